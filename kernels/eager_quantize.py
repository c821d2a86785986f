"""What ``quantize`` does in kernels, in torch operators on any device, equal to the bit.

    quantize.quantize(x, codes, scales, "int4")      quantize(x, codes, scales, "int4")

Only the squares that ``dequantize_reduce`` adds up may differ by their order.  What Triton and its
twin must agree on, and what does without Triton, stands here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxzero.kernels import eager_numerics

SQUARES_BLOCK = 4096
LARGEST_CODE = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
CODE_TYPE = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.uint8}
SMALLEST_SCALE = 2.0**-122

_ROUNDER = 12582912.0  # a float32 this large has no bits behind the point
_INFINITY = float("inf")


def codes_of(elements: int, kind: str) -> int:
    """How many bytes the codes of so many elements are."""
    return elements // 2 if kind == "int4" else elements


def pieces_of(codes: Tensor, out: Tensor, kind: str) -> int:
    """How many pieces, each as long as ``out``, lie in codes."""
    return codes.numel() // codes_of(out.numel(), kind)


def quantize(
    x: Tensor, codes: Tensor, scales: Tensor, kind: str, key: Tensor | None = None
) -> None:
    """Writes codes and scales of ``x``; arguments as in ``quantize.quantize``."""
    rows = x.view(scales.numel(), -1).float()
    largest = rows.abs().amax(1)
    scale = (largest * (1 / LARGEST_CODE[kind])).clamp_(min=SMALLEST_SCALE)
    scales.copy_(torch.where(largest < _INFINITY, scale, torch.nan))
    scaled = rows * scales.reciprocal()[:, None]
    random = None
    if key is not None:
        seed, step, first = key.tolist()
        random = eager_numerics.random_bits(seed, step, first, x.numel(), x.device).view_as(rows)
    if kind == "fp8":
        found = _float8(scaled, random)
    else:
        found = _integers(scaled, random, LARGEST_CODE[kind])
        if kind == "int4":
            low, high = found.chunk(2, 1)
            found = (low & 0xF) | (high << 4)
    codes.view(scales.numel(), -1).view(torch.int8).copy_(found)  # its lower bits


def _integers(x: Tensor, random: Tensor | None, largest: float) -> Tensor:
    """The nearest integers in the lower bits of int32, ties to even."""
    if random is not None:
        x = (x + (random * 2.0**-16 + (2.0**-17 - 0.5))).clamp_(-largest, largest)
    return (x + _ROUNDER).view(torch.int32)


def _float8(x: Tensor, random: Tensor | None) -> Tensor:
    """Bits of e4m3 in the lower 8 of int32: times 2**-120 float32 has the same exponents."""
    bits = (x * 2.0**-120).view(torch.int32)
    carried = bits + (0x7FFFF + ((bits >> 20) & 1) if random is None else random << 4)
    return (carried >> 20) & 0x7F | (carried >> 24) & 0x80


def dequantize(codes: Tensor, scales: Tensor, out: Tensor, kind: str) -> None:
    """Writes what ``quantize`` had, as far as it is known, into ``out``: float32 or bfloat16."""
    out.copy_(_floats(codes, scales, kind).flatten())


def dequantize_reduce(
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    kind: str,
    squares: Tensor | None = None,
) -> None:
    """Writes the mean of pieces; arguments as in ``quantize.dequantize_reduce``."""
    pieces = pieces_of(codes, out, kind)
    chunks = zip(codes.view(pieces, -1), scales.view(pieces, -1), strict=True)
    total = _floats(*next(chunks), kind)
    for piece in chunks:
        total += _floats(*piece, kind)
    total = total.mul_(1 / pieces).flatten()
    out.copy_(total)
    if squares is not None:
        whole = total.numel() // SQUARES_BLOCK * SQUARES_BLOCK
        blocks = total[:whole].view(-1, SQUARES_BLOCK)
        squares[: len(blocks)] = blocks.square().sum(1)
        squares[len(blocks) :] = total[whole:].square().sum()


def _floats(codes: Tensor, scales: Tensor, kind: str) -> Tensor:
    rows = codes.view(scales.numel(), -1)
    if kind == "int4":
        signed = rows.view(torch.int8)
        rows = torch.cat([(signed << 4) >> 4, signed >> 4], 1)
    elif kind == "fp8":
        rows = rows.view(torch.float8_e4m3fn)
    return rows.float().mul_(scales[:, None])
