"""What travels between ranks in 8 or 4 bits: operators for graphs that write and read messages.

A message is bytes: for each piece, its codes and behind them its scales, zeros up to a multiple of
16 bytes.  So one collective of bytes moves what two, of codes and of scales, would.

    x [pieces * elements]  --write_message-->  bytes [pieces * size]        sent
    bytes                  --read_message-->   x' [pieces * elements]       weights of all ranks
                           --average_message-> mean of the pieces           a gradient
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxzero.quantization import (
    QUANTUM,
    dequantize_blockwise,
    dequantize_reduce,
    quantize_blockwise,
    wire_bytes,
)

_ALIGNED = 16  # bytes
_SMALLEST_QUANTUM = 32
# Elements of a rank's part: fewer save no time, and norms and biases matter most for results.
_SMALLEST_PART = 2048
_FLOATS = (torch.float32, torch.bfloat16)


def is_worth_it(elements: int, dtype: torch.dtype) -> bool:
    """Whether parts of so many elements travel as codes, where that is asked for."""
    return dtype in _FLOATS and elements >= _SMALLEST_PART


def quantum_for(elements: int) -> int:
    """Neighbours that share a scale: as many as divide a piece, or 256 of one that is padded."""
    common = math.gcd(elements, QUANTUM)
    return common if common >= _SMALLEST_QUANTUM else QUANTUM


def message_bytes(elements: int, kind: str) -> int:
    """Bytes of one piece."""
    size = wire_bytes(_padded(elements), kind, quantum_for(elements))
    return -(-size // _ALIGNED) * _ALIGNED


def _padded(elements: int) -> int:
    quantum = quantum_for(elements)
    return -(-elements // quantum) * quantum


@torch.library.custom_op("fxzero::write_message", mutates_args=())
def write_message(x: Tensor, pieces: int, kind: str) -> Tensor:
    """The bytes of a tensor, uint8 [pieces * message_bytes].

    Args:
        x: float32 or bfloat16; ``pieces`` of as many elements each, one behind the other.
        kind: "int8", "int4" or "fp8".
    """
    elements = x.numel() // pieces
    rows = x.reshape(pieces, elements)
    padded = _padded(elements)
    if padded > elements:
        rows = torch.nn.functional.pad(rows, (0, padded - elements))
    codes, scales = quantize_blockwise(rows.reshape(-1), kind, quantum_for(elements))
    message = _empty(x, pieces, kind)
    rows, ends = message.view(pieces, -1), _ends(elements, kind)
    rows[:, : ends[0]] = codes.view(torch.uint8).view(pieces, -1)
    rows[:, ends[0] : ends[1]] = scales.view(torch.uint8).view(pieces, -1)
    rows[:, ends[1] :] = 0
    return message


@write_message.register_fake
def _(x: Tensor, pieces: int, kind: str) -> Tensor:
    return _empty(x, pieces, kind)


@torch.library.custom_op("fxzero::read_message", mutates_args=())
def read_message(
    message: Tensor, pieces: int, elements: int, kind: str, dtype: torch.dtype
) -> Tensor:
    """What all pieces were, [pieces * elements], within the bounds of ``quantization``."""
    codes, scales = _parts(message, pieces, elements, kind)
    whole = dequantize_blockwise(codes, scales, kind, quantum_for(elements), dtype)
    rows: Tensor = whole.view(pieces, -1)[:, :elements]
    return rows.contiguous().view(-1)


@read_message.register_fake
def _(message: Tensor, pieces: int, elements: int, kind: str, dtype: torch.dtype) -> Tensor:
    return message.new_empty(pieces * elements, dtype=dtype)


@torch.library.custom_op("fxzero::average_message", mutates_args=())
def average_message(
    message: Tensor, pieces: int, elements: int, kind: str, dtype: torch.dtype
) -> Tensor:
    """The mean of the pieces, [elements], added in order as float32."""
    codes, scales = _parts(message, pieces, elements, kind)
    mean: Tensor
    mean, _ = dequantize_reduce(codes, scales, kind, quantum_for(elements), pieces, dtype)
    return mean if mean.numel() == elements else mean[:elements].clone()


@average_message.register_fake
def _(message: Tensor, pieces: int, elements: int, kind: str, dtype: torch.dtype) -> Tensor:
    return message.new_empty(elements, dtype=dtype)


WRITE = torch.ops.fxzero.write_message.default
READ = torch.ops.fxzero.read_message.default
AVERAGE = torch.ops.fxzero.average_message.default


def _empty(x: Tensor, pieces: int, kind: str) -> Tensor:
    size = message_bytes(x.numel() // pieces, kind)
    return x.new_empty(pieces * size, dtype=torch.uint8)


def _ends(elements: int, kind: str) -> tuple[int, int]:
    """Where codes and where scales end in a piece, in bytes."""
    padded, quantum = _padded(elements), quantum_for(elements)
    scales = 4 * (padded // quantum)
    end = wire_bytes(padded, kind, quantum)
    return end - scales, end


def _parts(message: Tensor, pieces: int, elements: int, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of all pieces."""
    rows, ends = message.view(pieces, -1), _ends(elements, kind)
    codes = rows[:, : ends[0]].contiguous().view(-1)
    scales = rows[:, ends[0] : ends[1]].contiguous().view(-1).view(torch.float32)
    return codes.view(torch.int8) if kind == "int8" else codes, scales
