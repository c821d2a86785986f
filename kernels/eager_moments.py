"""What ``moments`` does in kernels, for tensors: 8-bit moments, equal to the bit."""

from __future__ import annotations

import torch
from torch import Tensor


def decode(codes: Tensor, scales: Tensor, quantum: int, out: Tensor) -> None:
    """Writes the moments of int8 codes, or the second moments of uint8 codes, into ``out``."""
    rows = out.view(-1, quantum)
    torch.mul(codes.view(-1, quantum), scales[:, None], out=rows)
    if codes.dtype == torch.uint8:
        rows.mul_(rows)


def encode(x: Tensor, random: Tensor, quantum: int, codes: Tensor, scales: Tensor) -> None:
    """Writes codes and scales of moments; changes ``x``.

    Args:
        random: 8 bits for each element, as int32.
        codes: int8 for first moments, uint8 for second ones.
    """
    fraction = random * 0.00390625 + 0.001953125
    if codes.dtype == torch.uint8:
        smallest = x > 0
        x.copy_(x.double().sqrt_())  # torch's float32 root on a CPU is off by a bit in places
        largest_code = 255.0
    else:
        smallest = torch.tensor(-127.0)
        largest_code = 127.0
    rows = x.view(-1, quantum)
    largest = rows.abs().amax(1) if codes.dtype == torch.int8 else rows.amax(1)
    inverse = torch.where(largest > 0, largest_code / largest, 0.0)
    torch.div(largest, largest_code, out=scales)
    rows.mul_(inverse[:, None])
    x.add_(fraction).floor_()
    torch.maximum(x, smallest.to(x.dtype), out=x)
    codes.copy_(x.clamp_(max=largest_code))
