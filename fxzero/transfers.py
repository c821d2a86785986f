"""Copies between device and host memory, as operators that stand in graphs, and memory there.

A value that is offloaded is copied to the host in the forward and fetched again in the backward:

    forward:   h = to_host(x)                  backward:  x = to_device(h, "cuda:0")

On CUDA the host copy is pinned and both copies are ordered with the operators of the current
stream.  On the CPU the "host" is the same memory, and only the books tell the two apart.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("fxzero::to_host", mutates_args=())
def to_host(value: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, with the same strides."""
    copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return copy.copy_(value, non_blocking=True)


@to_host.register_fake
def _(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value, device="cpu")


@torch.library.custom_op("fxzero::to_device", mutates_args=())
def to_device(copy: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a copy in host memory on a device, with the same strides."""
    return torch.empty_like(copy, device=device).copy_(copy, non_blocking=True)


@to_device.register_fake
def _(copy: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(copy, device=device)


@torch.library.custom_op("fxzero::host_zeros", mutates_args=())
def host_zeros(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros in host memory, one-dimensional, that a device copies to and from."""
    return torch.zeros(elements, dtype=dtype, pin_memory=device.type == "cuda")


TO_HOST = torch.ops.fxzero.to_host.default
TO_DEVICE = torch.ops.fxzero.to_device.default
TRANSFERS = (TO_HOST, TO_DEVICE)
HOST_ZEROS = torch.ops.fxzero.host_zeros.default
