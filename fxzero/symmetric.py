"""Small buckets over memory that all ranks of a group see, where CUDA and torch have it.

    layout = [(elements, torch.bfloat16), (elements, torch.bfloat16)]
    peers = symmetric.connect(group, device, layout)
    if peers is not None:  # on CUDA, and the buffers are small
        gradients, weights = peers.buffers(layout)
        kernels.symmetric.reduce_scatter(peers, gradients, out)

A collective over NCCL takes several microseconds to begin, whatever its size; these kernels take
two barriers between devices.  For large buffers both are as fast as the links.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed import ProcessGroup

from fxzero import _torch

if TYPE_CHECKING:
    from fxzero.kernels.peers import Layout, Peers

# Of a buffer.  Others have measured 1.9 times NCCL's speed at 2 MiB, and the same at 128 MiB.
LARGEST_BYTES = 16 * 2**20


def pays(size: int, device: torch.device) -> bool:
    """Whether ranks on devices of this kind exchange so many bytes sooner than over NCCL."""
    return size <= LARGEST_BYTES and device.type == "cuda" and _torch.has_symmetric_memory()


def connect(group: ProcessGroup, device: torch.device, layout: Layout) -> Peers | None:
    """Memory of all ranks of a group for the buffers of ``layout``; None where it does not pay.

    All ranks must call it, with the same layout, on devices of one model.

    Raises:
        RuntimeError: from torch, if these devices cannot read each other's memory.
    """
    if not pays(max(elements * dtype.itemsize for elements, dtype in layout), device):
        return None
    from fxzero.kernels.peers import PROGRAMS, Peers, bytes_of

    size = bytes_of(layout, group.size())
    memories = _torch.symmetric_memory(size, device, group)
    # A program for each multiprocessor always fits, so all of them can wait at once.
    available = torch.cuda.get_device_properties(device).multi_processor_count
    return Peers.of(group.rank(), memories, min(PROGRAMS, available))
