"""Reduce-scatter, AdamW and all-gather of a bucket in one launch, over memory all ranks see.

    all ranks' gradients --mean of this rank's part--> AdamW --new weights--> all ranks' weights
                                                        | ^
                                       this rank's moments and low bits

For small buckets, where the time is that of launches and not of bytes.  The mean goes into AdamW
as float32, in registers; weights and states are, to the bit, those of ``symmetric.reduce_scatter``
into float32, ``update.update`` and ``symmetric.all_gather`` one after the other.  Two barriers are
enough (``symmetric``): gradients are read and weights are written between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxzero.kernels import numerics, symmetric, update
from fxzero.kernels.peers import Peers


@dataclass(frozen=True)
class States:
    """What a rank keeps for its part of a bucket; all as long as the part.

    Attributes:
        low: int16, of weights in bfloat16; None of those in float32.
        first, second: moments in float32 or bfloat16.
    """

    low: Tensor | None
    first: Tensor
    second: Tensor


def step(
    peers: Peers,
    gradients: Tensor,
    weights: Tensor,
    states: States,
    scalars: Tensor,
    control: Tensor,
) -> None:
    """One step of AdamW for a bucket of which each rank has a part; all ranks get all weights.

    Args:
        gradients, weights: in the peers' memory, each at the same place on all ranks.
        scalars: float32 [16], a row of those of ``update.update``.
        control: float32 [2]: what to multiply gradients by, and whether to leave all as it is;
            the same on all ranks.
    """
    assert weights.numel() == gradients.numel() == peers.ranks * states.first.numel()
    low, dtype = states.low, weights.dtype
    assert (low is None) == (dtype == torch.float32)
    with torch.cuda.device_of(weights):
        step_kernel[symmetric.grid(peers, states.first)](
            peers.table, peers.epochs, peers.rank, peers.place(gradients), peers.place(weights),
            states.first if low is None else low, states.first, states.second,
            scalars, control, states.first.numel(),
            peers.ranks, symmetric.TYPES[dtype], symmetric.TYPES[gradients.dtype],
            0 if low is None else 16, symmetric.BLOCK,
            num_warps=symmetric.WARPS, enable_fp_fusion=False, launch_cooperative_grid=True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rank"])
def step_kernel(
    table,
    epochs,
    rank,
    gradients,
    weights,
    lows,
    firsts,
    seconds,
    scalars,
    control,
    elements,
    RANKS: tl.constexpr,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    LOW_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``elements`` of this rank's part; ``gradients`` and ``weights`` are places in bytes."""
    symmetric.arrive(table, epochs, rank, RANKS)
    i = tl.arange(0, BLOCK)
    part = tl.multiple_of(rank * elements.to(tl.int64), 16)
    block = tl.program_id(0)
    if tl.load(control + 1) != 0.0:
        block = tl.cdiv(elements, BLOCK)  # no block of this program; others still wait for it
    while block < tl.cdiv(elements, BLOCK):
        start = block.to(tl.int64) * BLOCK
        mask = i < elements - start
        here = part + start
        gradient = symmetric.mean(table, gradients, here, i, mask, RANKS, GRADIENT)
        gradient = gradient * (tl.load(control) * tl.load(scalars + update.SCALARS - 2))
        own = symmetric.buffer_of(table, rank, weights, PARAMETER) + here + i
        new = _updated(own, lows, firsts, seconds, start + i, gradient, scalars, mask, LOW_BITS)
        symmetric.push(table, rank, weights, here, i, new, mask, RANKS, PARAMETER)
        block += tl.num_programs(0)
    symmetric.leave(table, epochs, rank, RANKS)


@triton.jit
def _updated(own, lows, firsts, seconds, at, gradient, scalars, mask, LOW_BITS: tl.constexpr):
    """New weights of a block, as the model sees them; states are updated in place."""
    weight = tl.load(own, mask)
    if LOW_BITS:
        weight = numerics.join(weight, tl.load(lows + at, mask), LOW_BITS)
    first = numerics.to_float32(tl.load(firsts + at, mask))
    second = numerics.to_float32(tl.load(seconds + at, mask))
    weight, first, second = update.adamw(weight, gradient, first, second, scalars, True)
    numerics.store_nearest(firsts + at, first, mask)
    numerics.store_nearest(seconds + at, second, mask)
    if LOW_BITS:
        weight, low = numerics.split(weight, LOW_BITS)
        tl.store(lows + at, low, mask)
    return weight
