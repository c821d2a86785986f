"""Comparing tensors: bitwise but for the sign of zero, with a NaN equal to a NaN."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from fxzero import _torch
from fxzero.storages import tensor_leaves


def same(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    """Whether two tensors have equal elements, or neither is there."""
    if found is None or expected is None:
        return found is expected
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    return torch.equal(found, expected) or not bool(_differences(found, expected).any())


def largest_difference(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """The largest absolute difference; infinite where only one is there, or is a number."""
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    if found.shape != expected.shape:
        return float("inf")
    differences = _differences(found, expected)
    return float(differences.max()) if differences.numel() else 0.0


def first_difference(found: torch.Tensor, expected: torch.Tensor) -> tuple[int, ...]:
    """The first index at which two tensors of one shape differ."""
    return first_index(_differences(found, expected) != 0)


def first_index(chosen: torch.Tensor) -> tuple[int, ...]:
    """Where the first True of a tensor is."""
    return tuple(int(i) for i in chosen.nonzero()[0])


def _differences(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Absolute differences as float64 (complex: their absolute values), infinite for one NaN."""
    wide = torch.complex128 if found.is_complex() or expected.is_complex() else torch.float64
    one, other = found.to(wide), expected.to(wide)
    alike = (found == expected) | (one.isnan() & other.isnan())
    distance = (one - other).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return distance.masked_fill(alike, 0.0)


def fingerprint(value: Any) -> bytes:
    """A hash of all tensors in a value: dtypes, shapes and every bit but the sign of zero."""
    text = hashlib.blake2b(digest_size=16)
    for tensor in tensor_leaves(value):
        local = _torch.local_tensor(tensor).detach()
        text.update(f"{local.dtype} {tuple(local.shape)}".encode())
        flat = (local + 0 if local.is_floating_point() else local).cpu().contiguous().flatten()
        text.update(flat.view(torch.uint8).numpy().tobytes())
    return text.digest()
