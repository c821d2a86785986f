"""Operators that stand in graphs: numbers in 8 or 4 bits with a scale for each ``quantum`` of them.

    x [n]  --quantize_blockwise-->    codes, scales [n / quantum]    sent in place of x
           --dequantize_blockwise-->  x'                             what arrived
           --dequantize_reduce-->     the mean of all ranks' pieces, and its squares

On CUDA they are Triton kernels, elsewhere torch operators, equal to the bit.  What codes are is
said in ``kernels/quantize.py``.  A block that is not finite comes back as NaN.  Others differ from
what they were by no more than, where the largest of a block is 127, 7 or 448 times its scale,

    kind    bytes    to nearest                    stochastically
    int8    1        scale / 2                     scale
    int4    1/2      scale / 2                     scale
    fp8     1        max(|x| / 16, scale / 1024)   max(|x| / 8, scale / 512)

and 2**-15 of the scale, of fp8 2**-20 of |x|, for float32's own rounding; as bfloat16 by a 256th
more of what they came to.  Scales are 4 bytes more, 1/64 of a byte for one of 256 neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxzero.errors import UsageError
from fxzero.kernels import eager_quantize

QUANTUM = 256
KINDS = tuple(eager_quantize.CODE_TYPE)

_FLOATS = (torch.float32, torch.bfloat16)
_QUANTA = tuple(2**i for i in range(5, 12))


@torch.library.custom_op("fxzero::quantize_blockwise", mutates_args=())
def quantize_blockwise(
    x: Tensor, kind: str, quantum: int = QUANTUM, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a flat tensor.

    Args:
        x: float32 or bfloat16, its length a multiple of ``quantum``: pad it with zeros.
        kind: "int8", "int4" or "fp8" (e4m3).
        quantum: neighbours that share a scale, a power of two from 32 to 2048.
        key: int64 [3] to round stochastically: seed, step, and the index of the first element in
            the whole model, a multiple of 8, so that results do not depend on how it is cut.

    Returns:
        codes, int8 for "int8" and uint8 for others, two in a byte for "int4"; float32 scales.
    """
    codes, scales = _empty_codes(x, kind, quantum, key)
    if x.numel():
        _kernels(x).quantize(_aligned(x), codes, scales, kind, key)
    return codes, scales


@quantize_blockwise.register_fake
def _(
    x: Tensor, kind: str, quantum: int = QUANTUM, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _empty_codes(x, kind, quantum, key)


@torch.library.custom_op("fxzero::dequantize_blockwise", mutates_args=())
def dequantize_blockwise(
    codes: Tensor, scales: Tensor, kind: str, quantum: int, dtype: torch.dtype
) -> Tensor:
    """The floats that ``quantize_blockwise`` had, within the bounds above, as ``dtype``."""
    out = _empty_floats(codes, scales, kind, quantum, 1, dtype)
    if out.numel():
        _kernels(codes).dequantize(_aligned(codes), _aligned(scales), out, kind)
    return out


@dequantize_blockwise.register_fake
def _(codes: Tensor, scales: Tensor, kind: str, quantum: int, dtype: torch.dtype) -> Tensor:
    return _empty_floats(codes, scales, kind, quantum, 1, dtype)


@torch.library.custom_op("fxzero::dequantize_reduce", mutates_args=())
def dequantize_reduce(
    codes: Tensor,
    scales: Tensor,
    kind: str,
    quantum: int,
    ranks: int,
    dtype: torch.dtype,
    squares: bool = False,
) -> tuple[Tensor, Tensor]:
    """The mean of pieces of all ranks, which lie one behind the other, as ``dtype``.

    It differs from the mean of what was quantized by no more than the mean of the bounds above,
    and is the same in every run: pieces are added in the order of ranks, as float32.

    Args:
        squares: whether the second result is wanted.

    Returns:
        the mean; for each 4096 elements of it the sum of their squares in float32, for a norm.
    """
    out, sums = _empty_means(codes, scales, kind, quantum, ranks, dtype, squares)
    if out.numel():
        _kernels(codes).dequantize_reduce(
            _aligned(codes), _aligned(scales), out, kind, sums if squares else None
        )
    return out, sums


@dequantize_reduce.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    kind: str,
    quantum: int,
    ranks: int,
    dtype: torch.dtype,
    squares: bool = False,
) -> tuple[Tensor, Tensor]:
    return _empty_means(codes, scales, kind, quantum, ranks, dtype, squares)


QUANTIZE = torch.ops.fxzero.quantize_blockwise.default
DEQUANTIZE = torch.ops.fxzero.dequantize_blockwise.default
DEQUANTIZE_REDUCE = torch.ops.fxzero.dequantize_reduce.default


def wire_bytes(elements: int, kind: str, quantum: int = QUANTUM) -> int:
    """Bytes of the codes and scales of so many elements, a multiple of ``quantum``."""
    return eager_quantize.codes_of(elements, kind) + 4 * (elements // quantum)


def _kernels(x: Tensor) -> Any:
    """What computes where a tensor is; Triton is imported only where there is a device for it."""
    if x.is_cuda:
        from fxzero.kernels import quantize

        return quantize
    return eager_quantize


def _aligned(x: Tensor) -> Tensor:
    """The same numbers as kernels read them: one behind the other, from a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _empty_codes(x: Tensor, kind: str, quantum: int, key: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(kind, quantum)
    if x.dtype not in _FLOATS:
        raise UsageError(f"{x.dtype} cannot be quantized: float32 and bfloat16 can")
    if x.dim() != 1 or x.numel() % quantum:
        raise UsageError(
            f"a tensor of shape {list(x.shape)} cannot be quantized in blocks of {quantum}\n"
            f"  flatten it, and pad it with zeros to a multiple of {quantum}"
        )
    if key is not None and (key.dtype, key.shape, key.device) != (torch.int64, (3,), x.device):
        raise UsageError(
            f"key is {key.dtype} {list(key.shape)} on {key.device}, not torch.int64 [3] on"
            f" {x.device}: seed, step, index of the first element"
        )
    codes = x.new_empty(
        eager_quantize.codes_of(x.numel(), kind), dtype=eager_quantize.CODE_TYPE[kind]
    )
    return codes, x.new_empty(x.numel() // quantum, dtype=torch.float32)


def _empty_floats(
    codes: Tensor, scales: Tensor, kind: str, quantum: int, pieces: int, dtype: torch.dtype
) -> Tensor:
    _check(kind, quantum)
    if dtype not in _FLOATS:
        raise UsageError(f"{dtype} cannot be dequantized to: float32 and bfloat16 can")
    elements = scales.numel() * quantum
    if codes.numel() != eager_quantize.codes_of(elements, kind) or scales.numel() % pieces:
        raise UsageError(
            f"{codes.numel()} {kind} codes and {scales.numel()} scales are not those of {pieces}"
            f" pieces in blocks of {quantum}, which would have"
            f" {eager_quantize.codes_of(elements, kind)} codes for so many scales"
        )
    return codes.new_empty(elements // pieces, dtype=dtype)


def _empty_means(
    codes: Tensor,
    scales: Tensor,
    kind: str,
    quantum: int,
    ranks: int,
    dtype: torch.dtype,
    squares: bool,
) -> tuple[Tensor, Tensor]:
    out = _empty_floats(codes, scales, kind, quantum, ranks, dtype)
    blocks = -(-out.numel() // eager_quantize.SQUARES_BLOCK) if squares else 0
    return out, scales.new_empty(blocks)


def _check(kind: str, quantum: int) -> None:
    if kind not in KINDS:
        raise UsageError(f"numbers are quantized to {', '.join(KINDS)}, not to {kind!r}")
    if quantum not in _QUANTA:
        raise UsageError(f"quantum={quantum} is not a power of two from 32 to 2048")
