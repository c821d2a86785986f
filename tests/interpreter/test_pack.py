"""Buckets in Triton's interpreter: as in numpy, as their twins in torch, in their memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from guarded import at_both_ends, exit_code, guarded
from torch import Tensor

from fxzero.kernels import eager_pack, pack

_FLOATS = (torch.float32, torch.bfloat16)
_SIZES = (1, 7, 1023, 1024, 2048, 65537)
_POISON = 85.0


def _values(count: int, dtype: torch.dtype) -> Tensor:
    """Bits at random: all exponents, ties, subnormal numbers, and some that are none."""
    generator = torch.Generator().manual_seed(count)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    bits[::3] = bits[::3] & -0x10000 | 0x8000
    values = bits.view(torch.float32).clone()
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45, -0.0, 3.4e38])
    values[-6:] = special[: values.numel()]
    return values.to(dtype)


def _bits(x: Tensor) -> Tensor:
    """To be compared: one for all that are not a number."""
    kind = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return torch.where(x.isnan(), 0x7FC0, x.contiguous().view(kind).to(torch.int64))


def _reference(x: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """x * factor in numpy's float32, rounded to nearest as bfloat16 in integers."""
    with np.errstate(all="ignore"):
        product = x.float().numpy() * np.float32(factor)
    if dtype == torch.float32:
        return torch.from_numpy(product)
    bits = product.view(np.uint32).astype(np.uint64)
    upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    upper = np.where(np.isnan(product), 0x7FC0, upper).astype(np.uint16).view(np.int16)
    return torch.from_numpy(upper).view(torch.bfloat16)


def _places(sizes: list[int], alignment: int) -> tuple[list[int], int]:
    """Places of tensors with room between them, and how long the bucket is."""
    places, end = [], alignment
    for size in sizes:
        places.append(end)
        end += -(-(size + 1) // alignment) * alignment
    return places, end


@pytest.mark.parametrize("factor", [1.0, 1 / 3])
@pytest.mark.parametrize("alignment", [1, 16, 256])
@pytest.mark.parametrize("inside", _FLOATS)
@pytest.mark.parametrize("outside", _FLOATS)
def test_tensors_are_packed_and_unpacked_as_in_numpy(
    outside: torch.dtype, inside: torch.dtype, alignment: int, factor: float
) -> None:
    tensors = [_values(size, outside) for size in _SIZES]
    places, length = _places(list(_SIZES), alignment)
    times = torch.tensor([factor])
    blocks = pack.blocks_of(tensors, places)
    bucket, ours = (torch.full((length,), _POISON, dtype=inside) for _ in range(2))
    pack.pack(blocks, bucket, times)
    expected = torch.full((length,), _POISON, dtype=inside)
    for tensor, place in zip(tensors, places, strict=True):
        expected[place : place + tensor.numel()] = _reference(tensor, times.item(), inside)
    assert torch.equal(_bits(bucket), _bits(expected)), "what is between tensors stays"
    eager_pack.pack(tensors, places, ours, times)
    assert torch.equal(_bits(ours), _bits(expected))

    memory = torch.full((sum(_SIZES) + 64 * (len(_SIZES) + 1),), _POISON, dtype=outside)
    starts, end = _places(list(_SIZES), 16)
    targets = [memory[start : start + n] for start, n in zip(starts, _SIZES, strict=True)]
    pack.unpack(pack.blocks_of(targets, places), bucket, times)
    gaps = [
        0,
        *(edge for start, n in zip(starts, _SIZES, strict=True) for edge in (start, start + n)),
    ]
    assert all((memory[a:b] == _POISON).all() for a, b in list(pairwise([*gaps, end]))[::2]), (
        "what is between tensors stays"
    )
    for target, tensor, place in zip(targets, tensors, places, strict=True):
        source = bucket[place : place + tensor.numel()]
        assert torch.equal(_bits(target), _bits(_reference(source, times.item(), outside)))
    again = [torch.empty_like(tensor) for tensor in tensors]
    eager_pack.unpack(again, places, bucket, times)
    for target, twin in zip(targets, again, strict=True):
        assert torch.equal(_bits(target), _bits(twin))


def test_tensors_of_many_shapes_come_back() -> None:
    tensors = [torch.randn(shape) for shape in ((3, 5), (64, 64), (), (0,), (2, 2048))]
    places, length = _places([tensor.numel() for tensor in tensors], 16)
    bucket = torch.empty(length)
    pack.pack(pack.blocks_of(tensors, places), bucket, torch.ones(1))
    copies = [torch.empty_like(tensor) for tensor in tensors]
    pack.unpack(pack.blocks_of(copies, places), bucket, torch.ones(1))
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))


def test_a_table_knows_which_blocks_are_whole_and_aligned() -> None:
    memory = torch.zeros(3 * pack.BLOCK)
    whole, moved = memory[: pack.BLOCK], memory[1 : pack.BLOCK + 1]
    assert not pack.blocks_of([whole, memory], [0, 2 * pack.BLOCK]).tails
    for tensors, places in [([whole], [8]), ([moved], [0]), ([memory[:100]], [0])]:
        assert pack.blocks_of(tensors, places).tails
    table = pack.blocks_of([memory[: pack.BLOCK + 5]], [64]).table
    address = memory.data_ptr()
    assert table.tolist() == [
        [address, 64, pack.BLOCK, 1],
        [address + 4 * pack.BLOCK, 64 + pack.BLOCK, 5, 0],
    ]


@pytest.mark.parametrize("inside", _FLOATS)
@pytest.mark.parametrize("outside", _FLOATS)
def test_kernels_stay_in_their_memory(outside: torch.dtype, inside: torch.dtype) -> None:
    def run() -> None:
        for size in (1, 7, 2047, 2048, 4097):
            for at_start in (False, True):
                tensors = [guarded(torch.ones(size, dtype=outside), at_start=at_start)]
                length = -(-size // 8) * 8  # the bucket's beginning is aligned at both ends
                for bucket, factor in at_both_ends(
                    torch.zeros(length, dtype=inside), torch.ones(1)
                ):
                    for place in {0, length - size}:
                        blocks = pack.blocks_of(tensors, [place])
                        table = guarded(blocks.table, at_start=at_start)
                        blocks = pack.Blocks(table, outside, blocks.tails)
                        pack.pack(blocks, bucket, factor)
                        assert bucket[place : place + size].eq(1).all()
                        pack.unpack(blocks, bucket, factor)
                        assert tensors[0].eq(1).all()

    assert exit_code(run) == 0
