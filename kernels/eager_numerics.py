"""What ``numerics`` does in kernels, for tensors: torch operators on any device, equal to the bit.

    numerics.split(x, 16)        split(x, high, low)
    numerics.join(high, low)     join(high, low, x)

Functions write into the tensors that they are given, since an optimizer step calls them over and
over on chunks that stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NAN = 0x7FC0  # of bfloat16
_WORD, _HALF = 0xFFFFFFFF, 0xFFFF
_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7


def split(x: Tensor, high: Tensor, low: Tensor) -> None:
    """Writes a float32 ``x`` into a bfloat16 and what that has lost, an int16 or an int8."""
    bits = x.view(torch.int32)
    if low.dtype == torch.int8:
        bits = (bits + 0x80).bitwise_and_(-0x100)
        low.copy_(bits.to(torch.int16) >> 8)
    else:
        low.copy_(bits)
    high.view(torch.int16).copy_((bits + 0x8000).bitwise_right_shift_(16))
    _keep_nan(x, high)


def join(high: Tensor, low: Tensor, x: Tensor) -> None:
    """Writes into ``x`` the float32 that ``split`` had, or its first 16 bits of mantissa."""
    bits = x.view(torch.int32)
    bits.copy_(high.view(torch.int16)).bitwise_left_shift_(16)
    bits.add_(low, alpha=1 if low.dtype == torch.int16 else 0x100)


def stochastic_bfloat16(x: Tensor, random: Tensor, high: Tensor) -> None:
    """Writes ``x`` rounded up or down by 16 random bits for each element, an int32."""
    high.view(torch.int16).copy_((x.view(torch.int32) + random).bitwise_right_shift_(16))
    _keep_nan(x, high)


def _keep_nan(x: Tensor, high: Tensor) -> None:
    """A carry may have made a NaN a number."""
    if bool(x.sum().isnan()):  # one pass, where a mask would take several
        high.view(torch.int16).masked_fill_(x.isnan(), _NAN)


def random_bits(seed: int, step: int, first: int, count: int, device: torch.device) -> Tensor:
    """16 random bits for each of ``count`` elements as int32.

    Args:
        first: index of the first element in the whole model, not a multiple of anything.
    """
    start, end = first // 8, -(-(first + count) // 8)
    counter = torch.arange(start, end, device=device)
    words = _philox(seed, step, counter)
    halves = [half for word in words for half in (word & _HALF, word >> 16)]
    offset = first - 8 * start
    return torch.stack(halves, 1).flatten()[offset : offset + count].to(torch.int32)


def _philox(seed: int, step: int, counter: Tensor) -> list[Tensor]:
    """Four words of 32 random bits for each counter, as int64."""
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    words = [counter & _WORD, (counter >> 32) & _WORD]
    words += [torch.full_like(counter, step), torch.zeros_like(counter)]
    for _ in range(_ROUNDS):
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            ((second >> 32) & _WORD) ^ words[1] ^ keys[0],
            second & _WORD,
            ((first >> 32) & _WORD) ^ words[3] ^ keys[1],
            first & _WORD,
        ]
        keys = [(key + weyl) & _WORD for key, weyl in zip(keys, _WEYL, strict=True)]
    return words
