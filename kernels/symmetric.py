"""Collectives over memory that all ranks see (``peers``): one launch, no copies, no other library.

    reduce_scatter   pulls   rank 1 reads part 1 of every rank's buffer, keeps their mean
    all_gather       pushes  rank 1 writes part 1 into every rank's buffer
    all_reduce       pulls   every rank reads every rank's buffer, keeps the mean of all

    rank 0's buffer  [ part 0 | part 1 ]            [ part 0 | part 1 ]
                                   |  \\                          ^  ^
    rank 1's buffer  [ part 0 | part 1 ] \\          [ part 0 | part 1 ] \\
                                   v      v                        |     |
    rank 1's part    mean in float32, in the order of ranks   ->   a part of a new buffer

Each kernel begins with a barrier, before which no rank may be read or written, and ends with one,
behind which a rank may do with its buffers what it likes.  A barrier joins the programs of one
number on all ranks.  That is enough: a kernel begins when what its rank did before is done, and is
done when its last program is.  A program waits for its twins, so all programs of a kernel must run
at once: there are no more than multiprocessors, and the launch is cooperative, which fails where
they do not fit.  All ranks run the same machine code: kernels are not specialized for rank 1, which
would be compiled while others wait for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxzero.kernels import numerics
from fxzero.kernels.peers import ALIGNMENT, Peers

BLOCK = 1024
WARPS = 4
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

_UNROLLED: tl.constexpr = tl.constexpr(8)  # ranks that are read at a time


def reduce_scatter(peers: Peers, buffer: Tensor, out: Tensor) -> None:
    """Writes the mean of all ranks' ``buffer``, of this rank's part of it, into ``out``.

    They are added in the order of ranks, as float32, and the sum is multiplied by 1 / ranks.

    Args:
        buffer: float32 or bfloat16 in the peers' memory, at the same place on all ranks.
        out: float32 or bfloat16, as long as a part.
    """
    assert out.numel() * peers.ranks == buffer.numel()
    _reduce(peers, buffer, out, peers.rank * out.numel())


def all_reduce(peers: Peers, buffer: Tensor, out: Tensor) -> None:
    """Writes the mean of all ranks' whole ``buffer`` into ``out``, which no other rank may read."""
    assert out.numel() == buffer.numel()
    assert out.data_ptr() != buffer.data_ptr(), "others still read the buffer"
    _reduce(peers, buffer, out, 0)


def _reduce(peers: Peers, buffer: Tensor, out: Tensor, first: int) -> None:
    with torch.cuda.device_of(out):
        reduce_kernel[grid(peers, out)](
            peers.table, peers.epochs, peers.rank, peers.place(buffer), out, first, out.numel(),
            peers.ranks, TYPES[buffer.dtype], BLOCK,
            num_warps=WARPS, enable_fp_fusion=False, launch_cooperative_grid=True,
        )  # fmt: skip


def all_gather(peers: Peers, part: Tensor, buffer: Tensor) -> None:
    """Writes this rank's ``part`` into its place in every rank's ``buffer``.

    Args:
        part: of the buffer's dtype; it may be this rank's part of its buffer itself.
        buffer: float32 or bfloat16 in the peers' memory, at the same place on all ranks.
    """
    assert part.dtype == buffer.dtype
    assert part.numel() * peers.ranks == buffer.numel()
    with torch.cuda.device_of(part):
        gather_kernel[grid(peers, part)](
            peers.table, peers.epochs, peers.rank, peers.place(buffer), part, part.numel(),
            peers.ranks, TYPES[buffer.dtype], BLOCK,
            num_warps=WARPS, launch_cooperative_grid=True,
        )  # fmt: skip


def grid(peers: Peers, part: Tensor) -> tuple[int]:
    """How many programs share the blocks of a part: as many on every rank, all running at once."""
    assert part.numel() % ALIGNMENT == 0, "pad it: blocks are read at full width"
    assert part.data_ptr() % 16 == 0
    return (max(1, min(triton.cdiv(part.numel(), BLOCK), peers.programs)),)


@triton.jit(do_not_specialize=["rank"])
def reduce_kernel(
    table,
    epochs,
    rank,
    place,
    out,
    first,
    elements,
    RANKS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean of ``elements`` from the ``first`` on, of the buffers at ``place``."""
    arrive(table, epochs, rank, RANKS)
    first = tl.multiple_of(first, 16)
    i = tl.arange(0, BLOCK)
    block = tl.program_id(0)
    while block < tl.cdiv(elements, BLOCK):
        start = block.to(tl.int64) * BLOCK
        mask = i < elements - start
        total = mean(table, place, first + start, i, mask, RANKS, DTYPE)
        numerics.store_nearest(out + start + i, total, mask)
        block += tl.num_programs(0)
    leave(table, epochs, rank, RANKS)


@triton.jit
def mean(table, place, start, i, mask, RANKS: tl.constexpr, DTYPE: tl.constexpr):
    """The mean of a block of all ranks' buffers, added in the order of ranks, as float32."""
    total = _floats(table, 0, place, start, i, mask, DTYPE)
    if RANKS <= _UNROLLED:
        for peer in tl.static_range(1, RANKS):
            total += _floats(table, peer, place, start, i, mask, DTYPE)
    else:
        for peer in range(1, RANKS):
            total += _floats(table, peer, place, start, i, mask, DTYPE)
    return total * (1.0 / RANKS)


@triton.jit
def _floats(table, peer, place, start, i, mask, DTYPE: tl.constexpr):
    buffer = buffer_of(table, peer, place, DTYPE)
    return numerics.to_float32(tl.load(buffer + start + i, mask))


@triton.jit(do_not_specialize=["rank"])
def gather_kernel(
    table,
    epochs,
    rank,
    place,
    part,
    elements,
    RANKS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``elements`` of a part into all ranks' buffers at ``place``."""
    arrive(table, epochs, rank, RANKS)
    i = tl.arange(0, BLOCK)
    block = tl.program_id(0)
    while block < tl.cdiv(elements, BLOCK):
        start = block.to(tl.int64) * BLOCK
        mask = i < elements - start
        x = tl.load(part + start + i, mask)
        push(table, rank, place, rank * elements.to(tl.int64) + start, i, x, mask, RANKS, DTYPE)
        block += tl.num_programs(0)
    leave(table, epochs, rank, RANKS)


@triton.jit
def push(table, rank, place, start, i, x, mask, RANKS: tl.constexpr, DTYPE: tl.constexpr):
    """Writes a block into all ranks' buffers; ranks begin with another each, as links are many."""
    start = tl.multiple_of(start, 16)
    for turn in tl.static_range(RANKS):
        buffer = buffer_of(table, (rank + turn + 1) % RANKS, place, DTYPE)
        tl.store(buffer + start + i, x, mask)


@triton.jit
def buffer_of(table, peer, place, DTYPE: tl.constexpr):
    """The buffer at ``place`` in a rank's memory."""
    address = tl.load(table + peer) + place
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def arrive(table, epochs, rank, RANKS: tl.constexpr):
    """The first barrier of a kernel: all ranks have done what they did before it."""
    _meet(table, rank, tl.load(epochs + tl.program_id(0)) + 1, RANKS)


@triton.jit
def leave(table, epochs, rank, RANKS: tl.constexpr):
    """The second and last: no rank reads or writes another's memory any more."""
    epoch = tl.load(epochs + tl.program_id(0)) + 2
    _meet(table, rank, epoch, RANKS)
    tl.store(epochs + tl.program_id(0), epoch)


@triton.jit
def _meet(table, rank, epoch, RANKS: tl.constexpr):
    """Returns when this program of every rank has come to the barrier ``epoch``.

    A twin may be one barrier ahead.  Epochs are compared by their difference: they may wrap.
    """
    places: tl.constexpr = triton.next_power_of_2(RANKS)
    peer = tl.arange(0, places)
    some = peer < RANKS
    row = tl.program_id(0) * RANKS
    theirs = tl.load(table + peer, some).to(tl.pointer_type(tl.int32)) + row + rank
    mine = tl.load(table + rank).to(tl.pointer_type(tl.int32)) + row + peer
    told = tl.zeros([places], tl.int32) + epoch
    tl.debug_barrier()  # what other threads have read and written comes before the release
    tl.atomic_xchg(theirs, told, some, sem="release", scope="sys")
    while _late(mine, epoch, some):
        pass
    tl.debug_barrier()  # and what they will, behind the acquire


@triton.jit
def _late(pads, epoch, some):
    """Whether any rank is not there.  An addition of nothing is a read that acquires."""
    seen = tl.atomic_add(pads, 0, some, sem="acquire", scope="sys")
    return tl.min(tl.where(some, seen - epoch, 0)) < 0
