"""What operators take and give back while they run is in plans once it was measured."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import tiers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fxzero
from fxzero import _inductor, _torch
from fxzero.allocations import peak_of_allocations
from fxzero.calibration import cost_model
from fxzero.capture import capture
from fxzero.cost import call_key, operator_key
from fxzero.execution import compile_to_python
from fxzero.graph_planner import GraphPlanner
from fxzero.model_calibration import calibrate, calibrate_model
from fxzero.options import check_options
from fxzero.rehearsal import Counter
from fxzero.sources import Source
from fxzero.timing import Calls, workspaces_alone

ROWS, WIDTH, SCRATCH = 256, 64, 3 * 2**17


@torch.library.custom_op("fxzero_test::negated", mutates_args=())
def negated(x: Tensor) -> Tensor:
    """Takes SCRATCH bytes besides its result."""
    scratch = torch.empty(SCRATCH, dtype=torch.uint8)
    result = torch.neg(x)
    del scratch
    return result


@negated.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


negated.register_autograd(lambda context, gradient: negated(gradient))
NEGATED = torch.ops.fxzero_test.negated.default


class Negated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.ops.fxzero_test.negated(F.gelu(layer(x))).sin()
        return x.square().sum()


class Pooled(nn.Module):
    """Convolutions, which oneDNN runs in a layout of its own, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(3 if i == 0 else 24, 24, 3, padding=1) for i in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(F.relu(layer(x)), 0.1)
        return x.square().sum()


CASES: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "negated": (Negated, (ROWS, WIDTH)),
    "convolutions": (Pooled, (4, 3, 32, 32)),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_CACHE", str(tmp_path))
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


def allocated(step: Callable[[], Any]) -> int:
    """Most bytes that the allocator had given out at once since the step began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    return peak_of_allocations(record)


def peak_by_the_allocator(model: Any, x: Tensor) -> int:
    def step() -> None:
        model(x).backward()

    for _ in range(2):
        step()
        model.zero_grad()
    gc.collect()
    return allocated(step) + sum(t.nbytes for t in (*model.parameters(), x))


@pytest.mark.parametrize("name", tiers(CASES, quick=("negated",)))
def test_plans_and_budgets_are_of_what_the_allocator_gives_out(name: str) -> None:
    kind, shape = CASES[name]
    original, x = kind(), torch.randn(shape)
    given: dict[str, Any] = {"optimizer": "none"}
    calibrate(capture(original, (x,)).graph, "cpu")
    free = fxzero.plan(original, (x,), **given)
    assert any(note.endswith("is counted as measured") for note in free.notes)
    room = free.peak_bytes - free.minimum_budget
    for budget in (None, free.minimum_budget + room // 3, free.minimum_budget):
        model = fxzero.compile(
            copy.deepcopy(original), (x,), memory_budget=budget, inner="eager", **given
        )
        measured = peak_by_the_allocator(model, x)
        assert measured == pytest.approx(model.plan.peak_bytes, rel=0.02)
        assert budget is None or model.plan.peak_bytes <= budget


@pytest.mark.slow
@pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler")
def test_so_are_those_of_generated_code_which_calls_convolutions_in_other_layouts() -> None:
    original, x = Pooled(), torch.randn(4, 3, 32, 32)
    report = calibrate_model(Source("pooled", original, (x,), {}))
    channels_last = [key for key in report.calibration.workspaces if ":1:768:24" in key]
    assert any("convolution_backward" in key for key in channels_last)
    free = fxzero.plan(original, (x,), optimizer="none", inner="inductor")
    middle = (free.peak_bytes + free.minimum_budget) // 2
    for budget in (None, middle):
        model = fxzero.compile(
            copy.deepcopy(original), (x,), memory_budget=budget, inner="inductor", optimizer="none"
        )
        measured = peak_by_the_allocator(model, x)
        assert measured == pytest.approx(model.plan.peak_bytes, rel=0.02)
        assert budget is None or model.plan.peak_bytes <= budget


def test_a_workspace_is_measured_to_the_byte_and_planned_where_its_operator_runs_again() -> None:
    graph = capture(Negated(), (torch.randn(ROWS, WIDTH),)).graph
    report = calibrate(graph, "cpu")
    (node, *_) = graph.graph.find_nodes(op="call_function", target=NEGATED)
    assert report.calibration.workspaces[operator_key(node)] == SCRATCH
    costs = cost_model("cpu")
    options = check_options(device="cpu", inner="eager", optimizer="none", recompute="full")
    passes = options.passes.preparation
    (full, without) = (
        GraphPlanner(graph, options, "", passes, prices)
        for prices in (costs, replace(costs, workspaces={}))
    )
    decided = full.smallest()
    again = [n for n in decided.emitted.split.backward.graph.nodes if "recomputed_from" in n.meta]
    assert any(n.target is NEGATED for n in again)
    assert full.solver.smallest.peak == decided.emitted.timeline.peak_bytes
    points = decided.emitted.timeline.points
    nodes = decided.emitted.timeline.nodes
    more = [
        here - there
        for here, there, at in zip(
            points, without.replay(decided.plan).emitted.timeline.points, nodes, strict=True
        )
        if at is not None and at.target is NEGATED
    ]
    assert len(more) >= 12
    assert set(more) == {SCRATCH}


def test_rehearsals_count_what_the_timeline_counts() -> None:
    """Pipelines take their peaks from them."""
    graph = capture(Negated(), (torch.randn(ROWS, WIDTH),)).graph
    calibrate(graph, "cpu")
    options = check_options(device="cpu", inner="eager", optimizer="none")
    planner = GraphPlanner(graph, options, "", options.passes.preparation, cost_model("cpu"))
    decided = planner.smallest()
    split = decided.emitted.split
    peaks = planner.rehearse(
        decided, compile_to_python(split.forward), compile_to_python(split.backward)
    )
    timeline = decided.emitted.timeline
    assert (peaks.forward, peaks.backward) == tuple(map(timeline.peak_of, ("forward", "backward")))


def test_a_random_operator_that_generated_code_wraps_has_its_own_workspace() -> None:
    """Plans choose which draws are kept and replayed, after calibration has measured them."""
    x = torch.rand(ROWS, WIDTH)
    dropout = torch.ops.aten.native_dropout.default
    state, _ = _torch.run_and_save_rng_state(dropout, x, 0.5, True)
    with Calls() as calls:
        _torch.run_and_save_rng_state(dropout, x, 0.5, True)
        _torch.run_with_rng_state(state, dropout, x, 0.5, True)
        dropout(x, 0.5, True)
    (key,) = calls.made
    assert key == call_key(dropout, (x, 0.5, True), {})
    found = workspaces_alone(calls.made, "cpu")
    counter = Counter(1, workspaces=found)
    with counter:
        result, mask = _torch.run_with_rng_state(state, dropout, x, 0.5, True)
    assert found[key] == x.nbytes
    assert counter.peak == result.nbytes + mask.nbytes + found[key]
