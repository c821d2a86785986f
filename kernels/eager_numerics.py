"""What ``numerics`` does in kernels, for tensors: torch operators on any device, equal to the bit.

    numerics.split(x, 16)        split(x, high, low)
    numerics.join(high, low)     join(high, low, x)

Functions write into the tensors that they are given.
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
    rounded = (bits + 0x80) & -0x100 if low.dtype == torch.int8 else bits
    high.view(torch.int16).copy_(((rounded + 0x8000) >> 16).masked_fill(x.isnan(), _NAN))
    low.copy_((rounded << 16) >> 24 if low.dtype == torch.int8 else bits)


def join(high: Tensor, low: Tensor, x: Tensor) -> None:
    """Writes into ``x`` the float32 that ``split`` had, or its first 16 bits of mantissa."""
    shifted = low.to(torch.int32) << (8 if low.dtype == torch.int8 else 0)
    x.view(torch.int32).copy_((high.view(torch.int16).to(torch.int32) << 16) + shifted)


def stochastic_bfloat16(x: Tensor, random: Tensor, high: Tensor) -> None:
    """Writes ``x`` rounded up or down by 16 random bits for each element, an int32."""
    bits = (x.view(torch.int32) + random) >> 16
    high.view(torch.int16).copy_(bits.masked_fill(x.isnan(), _NAN))


def random_bits(seed: int, step: int, first: int, count: int, device: torch.device) -> Tensor:
    """16 random bits for each of ``count`` elements as int32.

    Args:
        first: index of the first element in the whole model.
    """
    counter = torch.arange(first // 8, -(-(first + count) // 8), device=device)
    words = _philox(counter.new_tensor(seed), counter.new_tensor(step), counter)
    halves = [half for word in words for half in (word & _HALF, word >> 16)]
    return torch.stack(halves, 1).flatten()[first % 8 :][:count].to(torch.int32)


def random_bits_of(seed: Tensor, step: Tensor, index: Tensor) -> Tensor:
    """The same for elements by index, each by itself, as suits generated code; all are int64."""
    place = index & 7
    a, b, c, d = _philox(seed, step, index >> 3)
    word = torch.where(place < 4, torch.where(place < 2, a, b), torch.where(place < 6, c, d))
    return torch.where(place & 1 == 0, word & _HALF, word >> 16).to(torch.int32)


def _philox(seed: Tensor, step: Tensor, counter: Tensor) -> list[Tensor]:
    """Four words of 32 random bits for each counter, as int64."""
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    words = [counter & _WORD, (counter >> 32) & _WORD]
    words += [(step & _WORD).expand_as(counter), torch.zeros_like(counter)]
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
