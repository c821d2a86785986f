"""What ``moments`` does in kernels, for tensors: 8-bit moments, equal to the bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MAGIC, _MAGIC_BITS = 12582912.0, 0x4B400000  # 1.5 * 2**23


def decoded(codes: Tensor, scales: Tensor, quantum: int) -> Tensor:
    """The moments of int8 codes, or the second moments of uint8 codes, float32."""
    values = (codes.view(-1, quantum).float() * scales[:, None]).view(-1)
    return values * values if codes.dtype == torch.uint8 else values


def encoded(
    x: Tensor, random: Tensor, quantum: int, root: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Codes, as int32, and scales of moments.

    Args:
        random: 8 bits for each element, as int32.
        root: the square root, which is kept of second moments.
    """
    largest_code = 255.0 if root else 127.0
    rows = (root(x) if root else x).view(-1, quantum)
    largest = rows.abs().amax(1)
    divisor = torch.where(largest > 0, largest, 1.0)
    # Not a number divided by a tensor, which torch computes by way of the reciprocal.
    inverse = torch.full_like(divisor, 256 * largest_code) / divisor
    bits = (rows * inverse[:, None] + _MAGIC).view(torch.int32).view(-1) - _MAGIC_BITS
    codes = (bits + random) >> 8
    return codes.clamp(min=1) if root else codes, largest / largest_code
