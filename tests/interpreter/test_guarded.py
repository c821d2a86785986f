"""Memory between guard pages: a kernel that leaves it is seen, one that stays is not."""

from __future__ import annotations

import signal

import pytest
import torch
import triton
import triton.language as tl
from guarded import at_both_ends, exit_code, guarded


@triton.jit
def _copy(x, out, first, count, READS: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr):
    """Copies elements, with masks where it does not go out of bounds on purpose."""
    i = first + tl.arange(0, BLOCK)
    mask = (i >= 0) & (i < count)
    values = tl.load(x + i) if READS else tl.load(x + i, mask)
    if WRITES:
        tl.store(out + i, values)
    else:
        tl.store(out + i, values, mask)


def _run(first: int, reads: bool, writes: bool) -> None:
    """A block of 16 over 15 elements."""
    for x, out in at_both_ends(torch.arange(15.0), torch.zeros(15)):
        _copy[(1,)](x, out, first, 15, reads, writes, 16)
        assert torch.equal(x[max(first, 0) :], out[max(first, 0) :])


@pytest.mark.parametrize("first", [0, -1])
def test_a_kernel_that_leaves_its_memory_dies(first: int) -> None:
    assert exit_code(lambda: _run(first, False, False)) == 0
    assert exit_code(lambda: _run(first, True, False)) == -signal.SIGSEGV
    assert exit_code(lambda: _run(first, False, True)) == -signal.SIGSEGV


def test_guarded_memory_has_the_values_and_can_be_written() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.int64):
        values = torch.arange(999).to(dtype).view(3, 333)
        for at_start in (False, True):
            copy = guarded(values, at_start=at_start)
            assert torch.equal(copy, values)
            copy.zero_()
            assert not copy.any()
