"""Many tensors into one flat bucket and back, cast and scaled on the way, in one launch.

A program moves a block of one tensor.  Tensors are where they are; what a program needs stands in a
row of a table in device memory, which is made once for tensors that stay where they are:

    block 17:  address of its first element | place in the bucket | elements | whole and aligned?

    tensors   [aaaaaaa]      [bbb]     [ccccccccccccc]        float32 or bfloat16, all the same
                  \\            |            /
    bucket    [aaaaaaa.|bbb.....|ccccccccccccc...]            float32 or bfloat16, times a factor

What lies between tensors in the bucket (``.``) is neither read nor written.  Blocks are read and
written at full width where a tensor and its place begin at a multiple of 16 bytes and of ALIGNMENT
elements.  ``eager_pack`` does the same in torch operators, equal to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxzero.kernels import numerics

BLOCK = 2048
WARPS = 4
ALIGNMENT = 16
COLUMNS = 4

_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)
_ALIGNMENT: tl.constexpr = tl.constexpr(ALIGNMENT)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Blocks:
    """Where tensors and their places are.

    Attributes:
        table: int64 [programs, 4] on the device, as above; it only points to the tensors.
        dtype: of the tensors.
        tails: whether any block is not whole and aligned.
    """

    table: Tensor
    dtype: torch.dtype
    tails: bool


def blocks_of(tensors: Sequence[Tensor], places: Sequence[int]) -> Blocks:
    """Blocks of contiguous tensors of one dtype on one device.

    Args:
        places: of the first elements in the bucket.
    """
    pairs = zip(tensors, places, strict=True)
    table = torch.cat([_rows(tensor, place) for tensor, place in pairs])
    tails = not bool(table[:, 3].all())
    return Blocks(table.to(tensors[0].device), tensors[0].dtype, tails)


def _rows(tensor: Tensor, place: int) -> Tensor:
    assert tensor.is_contiguous()
    first = torch.arange(0, tensor.numel(), BLOCK)
    rows = torch.empty(first.numel(), COLUMNS, dtype=torch.int64)
    rows[:, 0] = tensor.data_ptr() + first * tensor.element_size()
    rows[:, 1] = place + first
    rows[:, 2] = (tensor.numel() - first).clamp_(max=BLOCK)
    aligned = tensor.data_ptr() % 16 == 0 and place % ALIGNMENT == 0
    rows[:, 3] = (rows[:, 2] == BLOCK) & aligned
    return rows


def pack(blocks: Blocks, bucket: Tensor, factor: Tensor) -> None:
    """Writes tensors times a factor into the bucket, which begins at a multiple of 16 bytes.

    Args:
        factor: float32 [1], on their device.
    """
    _launch(blocks, bucket, factor, False)


def unpack(blocks: Blocks, bucket: Tensor, factor: Tensor) -> None:
    """Writes what is in the bucket, times a factor, into tensors; arguments as of ``pack``."""
    _launch(blocks, bucket, factor, True)


def _launch(blocks: Blocks, bucket: Tensor, factor: Tensor, unpacks: bool) -> None:
    assert bucket.data_ptr() % 16 == 0
    programs = len(blocks.table)
    if programs:
        with torch.cuda.device_of(bucket):
            pack_kernel[(programs,)](
                blocks.table, bucket, factor,
                _TYPES[blocks.dtype], unpacks, blocks.tails, BLOCK,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip


@triton.jit
def pack_kernel(
    blocks,
    bucket,
    factor,
    DTYPE: tl.constexpr,
    UNPACKS: tl.constexpr,
    TAILS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row of ``blocks``; TAILS: whether any block is not whole and aligned."""
    row = blocks + tl.program_id(0).to(tl.int64) * _COLUMNS
    tensor = tl.load(row).to(tl.pointer_type(DTYPE))
    place = tl.load(row + 1)
    whole = tl.load(row + 3) != 0
    times = tl.load(factor)
    i = tl.arange(0, BLOCK)
    if whole:
        tensor = tl.multiple_of(tensor, 16)
        there = bucket + tl.multiple_of(place, _ALIGNMENT)
        if UNPACKS:
            _move(there + i, tensor + i, times, None)
        else:
            _move(tensor + i, there + i, times, None)
    elif TAILS:
        mask = i < tl.load(row + 2)
        if UNPACKS:
            _move(bucket + place + i, tensor + i, times, mask)
        else:
            _move(tensor + i, bucket + place + i, times, mask)


@triton.jit
def _move(source, target, factor, mask):
    x = numerics.to_float32(tl.load(source, mask)) * factor
    numerics.store_nearest(target, x, mask)
