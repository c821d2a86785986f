"""What ``moments`` does in kernels, for tensors: 8-bit moments, equal to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

_MAGIC, _MAGIC_BITS = 12582912.0, 0x4B400000  # 1.5 * 2**23


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
    largest_code = 127.0
    if codes.dtype == torch.uint8:
        largest_code = 255.0
        x.copy_(x.double().sqrt_())  # torch's float32 root on a CPU is off by a bit in places
    rows = x.view(-1, quantum)
    largest = torch.linalg.vector_norm(rows, torch.inf, 1)
    divisor = torch.where(largest > 0, largest, 1.0)
    torch.div(largest, largest_code, out=scales)
    # Not a number divided by a tensor, which torch computes by way of the reciprocal.
    rows.mul_(torch.full_like(divisor, 256 * largest_code).div_(divisor)[:, None])
    bits = x.add_(_MAGIC).view(torch.int32).sub_(_MAGIC_BITS).add_(random).bitwise_right_shift_(8)
    codes.copy_(bits.clamp_(min=1) if codes.dtype == torch.uint8 else bits)
