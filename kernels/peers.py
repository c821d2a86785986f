"""Memory that every rank of a group can read and write, and what a rank knows of it.

All ranks cut their memory alike, so a place in one is a place in all.  A rank has one table: where
it sees the memory of each, in the order of ranks.

    table   [address of rank 0's | address of rank 1's | ...]         in device memory, int64
    memory  [pads: PROGRAMS x ranks, int32 | buffer | buffer | ...]   the same on every rank

A kernel's program tells its twins on other ranks that it has come to a barrier by writing the
number of the barrier, its epoch, into their pads; none but that rank's program writes there.  How
many barriers a program has met lies in device memory, too: a kernel can run again, as in a CUDA
graph, without an argument that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of one kernel, at the most: fewer than there are multiprocessors on the devices of today.
PROGRAMS = 128
# Elements that a rank's part of a buffer is a multiple of, and bytes that a buffer begins at.
ALIGNMENT, _BYTES = 16, 128
Layout = Sequence[tuple[int, torch.dtype]]


@dataclass(frozen=True)
class Peers:
    """What a rank knows of the memory of all.

    All ranks run the same kernels over it in the same order, one after the other, on one stream.

    Attributes:
        rank: its own number.
        table: int64 [ranks], as above.
        memory: uint8, its own, which was zero before any rank ran a kernel.
        epochs: int32 [PROGRAMS], zeros at first: barriers that each program has met.
        programs: of a kernel at the most, the same on all ranks; all of them must run at once.
        mapped: the memory of all ranks, which stays mapped as long as this lives.
    """

    rank: int
    table: Tensor
    memory: Tensor
    epochs: Tensor
    programs: int
    mapped: Sequence[Tensor]

    @classmethod
    def of(cls, rank: int, mapped: Sequence[Tensor], programs: int) -> Peers:
        """Peers by the memory of each, uint8, as this rank has it mapped."""
        memory = mapped[rank]
        assert programs <= PROGRAMS
        assert memory.dtype == torch.uint8
        addresses = [other.data_ptr() for other in mapped]
        table = torch.tensor(addresses, dtype=torch.int64).to(memory.device)
        epochs = torch.zeros(PROGRAMS, dtype=torch.int32, device=memory.device)
        return cls(rank, table, memory, epochs, programs, mapped)

    @property
    def ranks(self) -> int:
        return len(self.table)

    def place(self, buffer: Tensor) -> int:
        """Where a buffer lies in the memory, in bytes."""
        start = buffer.data_ptr() - self.memory.data_ptr()
        inside = pads_bytes(self.ranks) <= start <= self.memory.nbytes - buffer.nbytes
        assert inside, "a buffer that other ranks cannot see"
        assert start % 16 == 0
        assert buffer.is_contiguous()
        return start

    def buffers(self, layout: Layout) -> list[Tensor]:
        """This rank's buffers, of so many elements each, one behind the other."""
        found, start = [], pads_bytes(self.ranks)
        for elements, dtype in layout:
            end = start + elements * dtype.itemsize
            found.append(self.memory[start:end].view(dtype))
            start = _rounded(end)
        return found


def pads_bytes(ranks: int) -> int:
    """Bytes at the beginning of the memory that barriers need."""
    return _rounded(PROGRAMS * ranks * 4)


def bytes_of(layout: Layout, ranks: int) -> int:
    """Bytes of a memory for buffers."""
    buffers = sum(_rounded(elements * dtype.itemsize) for elements, dtype in layout)
    return pads_bytes(ranks) + buffers


def _rounded(size: int) -> int:
    return -(-size // _BYTES) * _BYTES
