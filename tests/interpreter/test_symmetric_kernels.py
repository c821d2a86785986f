"""Kernels over memory that all ranks see, in Triton's interpreter, a process a rank.

What must come out is computed in numpy's float32, in the order of ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import optimizer_cases as cases
import pytest
import torch
from guarded import exit_code, guarded
from peer_processes import run
from torch import Tensor

from fxzero.kernels import eager_numerics, symmetric, symmetric_step, update
from fxzero.kernels.peers import Peers, bytes_of
from fxzero.kernels.symmetric import BLOCK
from fxzero.optim.adamw import AdamW

_FLOATS = (torch.float32, torch.bfloat16)
_RANKS = pytest.mark.parametrize("ranks", [2, 4])
# Of a part: fewer than a block, and more blocks than programs with a tail.
_SMALL, _LARGE = 16, 2 * BLOCK + 48
_STEPS = 3


def _values(rank: int, step: int, count: int, dtype: torch.dtype) -> Tensor:
    """What a rank has in a step: numbers of all sizes, and some that are none."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    values = torch.randn(count, generator=generator)
    values *= 2.0 ** torch.randint(-140, 100, (count,), generator=generator)
    values[:: 97 + rank] = torch.tensor([float("inf"), float("nan"), -0.0, 1e-45])[rank]
    return values.to(dtype)


def _mean(ranks: int, step: int, count: int, dtype: torch.dtype) -> Any:
    """The mean of what all ranks have, in the order of ranks, in numpy's float32."""
    total = _values(0, step, count, dtype).float().numpy().copy()
    with np.errstate(all="ignore"):
        for rank in range(1, ranks):
            total = total + _values(rank, step, count, dtype).float().numpy()
        return total * np.float32(1 / ranks)


def _rounded(values: Any, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        return torch.from_numpy(values)
    bits = values.view(np.uint32).astype(np.uint64)
    upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    upper = np.where(np.isnan(values), 0x7FC0, upper).astype(np.uint16).view(np.int16)
    return torch.from_numpy(upper).view(torch.bfloat16)


def _same(ours: Tensor, expected: Tensor) -> None:
    """Equal to the bit; which NaN it is does not matter."""
    assert ours.dtype == expected.dtype
    assert torch.equal(ours.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(cases.bits(ours[number]), cases.bits(expected[number]))


def _dawdle(rank: int, step: int) -> None:
    """Ranks come one after the other, another one last in each step."""
    time.sleep(0.05 * ((rank + step) % 2))


# Buffers of a rank by the length of its part.
_PARTS = [(_SMALL, torch.float32), (_LARGE, torch.float32), (_LARGE, torch.bfloat16)]


def _layout(ranks: int) -> list[tuple[int, torch.dtype]]:
    return [(ranks * part, dtype) for part, dtype in _PARTS]


@_RANKS
@pytest.mark.parametrize("out", _FLOATS)
def test_a_rank_pulls_the_mean_of_its_part(out: torch.dtype, ranks: int, tmp_path: Path) -> None:
    def case(peers: Peers, buffers: list[Tensor]) -> list[Tensor]:
        found = []
        for step in range(_STEPS):
            for buffer in buffers:
                result = torch.full((len(buffer) // ranks,), 85.0, dtype=out)
                _dawdle(peers.rank, step)
                buffer.copy_(_values(peers.rank, step, len(buffer), buffer.dtype))
                symmetric.reduce_scatter(peers, buffer, result)
                buffer.fill_(85.0)  # as soon as the kernel is done, others need it no more
                found.append(result)
        return found

    results = run(ranks, case, _layout(ranks), tmp_path)
    turns = [(step, *buffer) for step in range(_STEPS) for buffer in _layout(ranks)]
    for turn, (step, count, dtype) in enumerate(turns):
        expected = _rounded(_mean(ranks, step, count, dtype), out)
        for rank, part in enumerate(expected.chunk(ranks)):
            _same(results[rank][turn], part)


@_RANKS
def test_all_ranks_pull_the_mean_of_all(ranks: int, tmp_path: Path) -> None:
    layout = [(_LARGE, dtype) for dtype in _FLOATS]

    def case(peers: Peers, buffers: list[Tensor]) -> list[Tensor]:
        found = []
        for step in range(_STEPS):
            for buffer in buffers:
                _dawdle(peers.rank, step)
                buffer.copy_(_values(peers.rank, step, _LARGE, buffer.dtype))
                found.append(torch.full_like(buffer, 85.0))
                symmetric.all_reduce(peers, buffer, found[-1])
                buffer.fill_(85.0)
        return found

    results = run(ranks, case, layout, tmp_path)
    turns = [(step, dtype) for step in range(_STEPS) for dtype in _FLOATS]
    for turn, (step, dtype) in enumerate(turns):
        expected = _rounded(_mean(ranks, step, _LARGE, dtype), dtype)
        for found in results:
            _same(found[turn], expected)


@_RANKS
def test_a_rank_pushes_its_part_to_all(ranks: int, tmp_path: Path) -> None:
    def case(peers: Peers, buffers: list[Tensor]) -> list[Tensor]:
        found = []
        for step in range(_STEPS):
            for buffer in buffers:
                part = _values(peers.rank, step, len(buffer) // ranks, buffer.dtype)
                _dawdle(peers.rank, step)
                buffer.fill_(85.0)  # until this rank comes to the kernel, nobody writes
                symmetric.all_gather(peers, part, buffer)
                found.append(buffer.clone())
        return found

    results = run(ranks, case, _layout(ranks), tmp_path)
    turns = [(step, *part) for step in range(_STEPS) for part in _PARTS]
    for turn, (step, part, dtype) in enumerate(turns):
        whole = torch.cat([_values(rank, step, part, dtype) for rank in range(ranks)])
        for found in results:
            _same(found[turn], whole)


def _gradients(rank: int, step: int, count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return (torch.randn(count, generator=generator) * 0.1).to(dtype)


def _weights(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(7)).to(dtype)


def _scalars(step: int) -> Tensor:
    group = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    columns = AdamW.rule.scalars(group, torch.tensor([step]).double())
    row = torch.zeros(update.SCALARS)
    row[: len(columns)] = torch.tensor([float(column) for column in columns])
    row[-2:] = torch.tensor([1.0, step])
    return row


def _states(part: int, dtype: torch.dtype) -> symmetric_step.States:
    low = torch.zeros(part, dtype=torch.int16) if dtype == torch.bfloat16 else None
    moments = [torch.zeros(part, dtype=dtype) for _ in range(2)]
    return symmetric_step.States(low, *moments)


def _kept(states: symmetric_step.States) -> list[Tensor]:
    return [x for x in (states.low, states.first, states.second) if x is not None]


_CONTROL = torch.tensor([0.5, 0.0])


def _fused(peers: Peers, gradients: Tensor, weights: Tensor, states: Any, step: int) -> None:
    symmetric_step.step(peers, gradients, weights, states, _scalars(step), _CONTROL)


def _one_by_one(peers: Peers, gradients: Tensor, weights: Tensor, states: Any, step: int) -> None:
    part = len(weights) // peers.ranks
    mean = torch.empty(part)
    symmetric.reduce_scatter(peers, gradients, mean)
    own = weights[peers.rank * part :][:part].clone()
    kind = symmetric.TYPES[own.dtype]
    rows = [
        (own[start:].data_ptr(), mean[start:].data_ptr(), start, 0, min(BLOCK, part - start), 0)
        for start in range(0, part, BLOCK)
    ]
    table = torch.zeros(len(rows), update.COLUMNS, dtype=torch.int64)
    table[:, :6] = torch.tensor(rows)
    low, first, second = states.low, states.first, states.second
    update.update[(len(rows),)](
        table, _scalars(step), _CONTROL, torch.zeros(1, dtype=torch.int64),
        first if low is None else low, first, second, first, second,
        "adamw", kind, symmetric.TYPES[torch.float32], 0 if low is None else 16,
        False, 0, True, True, BLOCK,
    )  # fmt: skip
    symmetric.all_gather(peers, own, weights)


def _train(take: Any, ranks: int, part: int, dtype: torch.dtype, folder: Path) -> list[Any]:
    """Weights after each of three steps, and the states at the end, of each rank."""

    def case(peers: Peers, buffers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        gradients, weights = buffers
        weights.copy_(_weights(len(weights), dtype))
        states, seen = _states(part, dtype), []
        for step in range(1, _STEPS + 1):
            _dawdle(peers.rank, step)
            gradients.copy_(_gradients(peers.rank, step, len(gradients), dtype))
            take(peers, gradients, weights, states, step)
            gradients.fill_(85.0)
            seen.append(weights.clone())
        return seen, _kept(states)

    return run(ranks, case, [(ranks * part, dtype)] * 2, folder, programs=1)


def _unsharded(ranks: int, count: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The same in numpy's float32, of one process."""
    weights, states, seen = _weights(count, dtype), _states(count, dtype), []
    for step in range(1, _STEPS + 1):
        total = _gradients(0, step, count, dtype).float().numpy().copy()
        for rank in range(1, ranks):
            total = total + _gradients(rank, step, count, dtype).float().numpy()
        mean = total * np.float32(1 / ranks) * np.float32(0.5)
        master = weights.float()
        if states.low is not None:
            eager_numerics.join(weights, states.low, master)
        rule = cases.adamw(_scalars(step)[:7].tolist())
        moments = [x.float().numpy() for x in (states.first, states.second)]
        new, *moments = rule(master.numpy(), mean, *moments)
        for state, moment in zip((states.first, states.second), moments, strict=True):
            state.copy_(_rounded(moment, dtype))
        if states.low is not None:
            eager_numerics.split(torch.from_numpy(new), weights, states.low)
        else:
            weights = torch.from_numpy(new)
        seen.append(weights.clone())
    return seen, _kept(states)


@_RANKS
@pytest.mark.parametrize("dtype", _FLOATS)
def test_a_fused_step_is_that_of_three_kernels_and_of_one_process(
    dtype: torch.dtype, ranks: int, tmp_path: Path
) -> None:
    part = BLOCK + 48
    fused = _train(_fused, ranks, part, dtype, tmp_path)
    apart = _train(_one_by_one, ranks, part, dtype, tmp_path)
    seen, states = _unsharded(ranks, ranks * part, dtype)
    for results in (fused, apart):
        for rank, (weights, kept) in enumerate(results):
            assert all(map(torch.equal, weights, seen)), "weights of all ranks are the same"
            for state, whole in zip(kept, states, strict=True):
                _same(state, whole.chunk(ranks)[rank])


def test_a_step_that_is_skipped_changes_nothing_and_the_next_one_counts(tmp_path: Path) -> None:
    def case(peers: Peers, buffers: list[Tensor]) -> list[Tensor]:
        gradients, weights = buffers
        weights.copy_(_weights(len(weights), torch.bfloat16))
        states = _states(_LARGE, torch.bfloat16)
        gradients.fill_(float("inf"))
        skip = torch.tensor([1.0, 1.0])
        symmetric_step.step(peers, gradients, weights, states, _scalars(1), skip)
        found = [weights.clone(), *(state.clone() for state in _kept(states))]
        gradients.fill_(0.25)
        _fused(peers, gradients, weights, states, 1)
        return [*found, weights.clone()]

    layout = [(2 * _LARGE, torch.bfloat16)] * 2
    before = _weights(2 * _LARGE, torch.bfloat16)
    for weights, *states, after in run(2, case, layout, tmp_path):
        assert torch.equal(weights, before)
        assert not any(state.any() for state in states)
        assert (after <= before).all()
        assert (after < before).float().mean() > 0.5  # others are rounded to where they were


def test_epochs_may_wrap_and_kernels_may_have_other_numbers_of_programs(tmp_path: Path) -> None:
    def case(peers: Peers, buffers: list[Tensor]) -> list[Tensor]:
        found = []
        for step in range(4):
            for buffer in buffers:
                buffer.fill_(step + peers.rank)
                found.append(torch.empty(len(buffer) // 3))
                symmetric.reduce_scatter(peers, buffer, found[-1])
        return [torch.stack([x.min() for x in found]), torch.stack([x.max() for x in found])]

    layout = [(3 * part, torch.float32) for part in (_SMALL, _LARGE)]
    expected = torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 4])
    for smallest, largest in run(3, case, layout, tmp_path, epoch=2**31 - 4):
        torch.testing.assert_close(smallest, expected)
        assert torch.equal(smallest, largest)


def test_a_rank_that_dies_ends_all_and_leaves_nothing(tmp_path: Path) -> None:
    def case(peers: Peers, buffers: list[Tensor]) -> None:
        if peers.rank == 1:
            os._exit(3)
        symmetric.reduce_scatter(peers, buffers[0], torch.empty(_SMALL))

    files = os.listdir("/proc/self/fd")
    with pytest.raises(AssertionError, match=r"exit codes \[None, 3\]"):
        run(2, case, [(2 * _SMALL, torch.float32)], tmp_path)
    assert os.listdir("/proc/self/fd") == files
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("count", [16, BLOCK + 48])
def test_kernels_stay_in_their_memory(count: int, dtype: torch.dtype) -> None:
    def check() -> None:
        layout = [(count, dtype)] * 2
        size = bytes_of(layout, 1) - -count * dtype.itemsize % 128  # nothing behind the last one
        memory = guarded(torch.zeros(size, dtype=torch.uint8))
        peers = Peers.of(0, [memory], 2)
        first, second = peers.buffers(layout)
        out = guarded(torch.zeros(count, dtype=dtype))
        for buffer in (first, second):
            symmetric.reduce_scatter(peers, buffer, out)
            symmetric.all_reduce(peers, buffer, out)
            symmetric.all_gather(peers, out, buffer)
        states = _states(count, dtype)
        low = None if states.low is None else guarded(states.low)
        states = symmetric_step.States(low, guarded(states.first), guarded(states.second))
        for pair in ((first, second), (second, first)):
            _fused(peers, *pair, states, 1)

    assert exit_code(check) == 0
