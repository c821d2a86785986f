"""Measured times replace modelled ones; a file that is none is not used."""

from __future__ import annotations

import json
import logging
import timeit
from pathlib import Path

import pytest
import torch
from torch import nn

import fxzero
from fxzero.calibration import calibration_path, cost_model
from fxzero.capture import capture
from fxzero.cost import CPU, CostModel, operator_key
from fxzero.generated_timing import time_generated
from fxzero.graph import TrainGraph
from fxzero.model_calibration import calibrate, calibrate_model
from fxzero.options import check_options
from fxzero.planner import Planner
from fxzero.sources import Source
from fxzero.timing import times_in_place

LINKS = {"processes": 2, "inside": 2, "bandwidth": 1e9, "startup": 1e-4, "overlap": 0.25}
EMPTY = {
    "schema_version": 5,
    "device": "",
    "processes": 1,
    "operators": {},
    "workspaces": {},
    "generated": {},
    "scale": 1.0,
    "links": None,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXZERO_CACHE", str(tmp_path))
    return tmp_path


def traced() -> TrainGraph:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8))
    return capture(model, (torch.zeros(4, 3, dtype=torch.long),)).graph


def test_every_kind_of_operator_is_measured_once() -> None:
    graph = traced()
    state = torch.get_rng_state()
    report = calibrate(graph, "cpu")
    assert torch.equal(state, torch.get_rng_state())
    assert report.failed == ()
    assert report.measured > 5
    costs = cost_model("cpu")
    for node in graph.graph.nodes:
        price = costs.price(node)
        if price.seconds:
            assert price.seconds == report.calibration.operators[operator_key(node)]
    again = calibrate(graph, "cpu")
    assert (again.measured, again.known) == (0, report.measured)


def test_other_operators_are_modelled_on_the_scale_of_the_measured_ones() -> None:
    report = calibrate(traced(), "cpu")
    scale = report.calibration.scale
    other = capture(nn.Linear(16, 16), (torch.randn(5, 16),)).graph
    for node in other.graph.nodes:
        modelled = CostModel(CPU).price(node)
        assert cost_model("cpu").price(node).seconds == pytest.approx(modelled.seconds * scale)


def test_views_cost_nothing() -> None:
    graph = capture(nn.Linear(8, 8), (torch.randn(4, 8),)).graph
    (view, *_) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.t.default)
    assert CostModel(CPU).price(view).seconds == 0


def test_a_plan_says_where_its_times_come_from() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    assert "step times come from a roofline model of cpu" in fxzero.plan(model, (x,)).notes
    calibrate(capture(model, (x,)).graph, "cpu")
    assert any("measured kinds of operators" in note for note in fxzero.plan(model, (x,)).notes)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        json.dumps({**EMPTY, "operators": {"a": -1.0}}),
        json.dumps({**EMPTY, "operators": {"a": "b"}}),
        json.dumps({**EMPTY, "schema_version": 9}),
        json.dumps({**EMPTY, "workspaces": {"a": -1}}),
        json.dumps({**EMPTY, "workspaces": {"a": 0.5}}),
        json.dumps({**EMPTY, "operators": {"a": float("nan")}}),
        json.dumps({**EMPTY, "generated": {"a": {"code": 0.9, "apart": 0.0}}}),
        json.dumps({**EMPTY, "links": {**LINKS, "overlap": 2.0}}),
        json.dumps({**EMPTY, "links": {**LINKS, "bandwidth": 0.0}}),
    ],
)
def test_a_file_that_is_no_calibration_is_not_used(
    content: str, caplog: pytest.LogCaptureFixture
) -> None:
    calibration_path("cpu").write_text(content)
    with caplog.at_level(logging.WARNING, logger="fxzero"):
        assert cost_model("cpu") == CostModel(CPU)
    assert "is not used" in caplog.text


def test_an_empty_calibration_is_one() -> None:
    calibration_path("cpu").write_text(json.dumps(EMPTY))
    assert cost_model("cpu") == CostModel(CPU)


def test_times_in_place_add_up_to_what_the_graph_takes() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    graph = capture(model, (torch.zeros(512, 256),)).graph
    times = times_in_place(graph, "cpu")
    priced = [node for node in graph.graph.nodes if CostModel(CPU).price(node).seconds]
    assert times.keys() == {operator_key(node) for node in priced}
    whole = sum(times[operator_key(node)] for node in priced)
    values = [torch.rand(node.meta["val"].shape) for node in graph.placeholders]
    interpreter = torch.fx.Interpreter(graph.module)

    def run() -> None:
        interpreter.run(*values)

    with torch.no_grad():
        alone = min(timeit.repeat(run, number=1, repeat=9))
    assert 0.2 * alone < whole < 5 * alone  # a machine that others use is as exact as this


def test_a_graph_that_the_device_cannot_hold_is_not_run() -> None:
    model = nn.Linear(2**20, 2**20, device="meta")
    graph = capture(model, (torch.zeros(2, 2**20, device="meta"),)).graph
    assert times_in_place(graph, "cpu") == {}


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32))


@pytest.mark.slow
def test_code_is_timed_once_and_counts_for_plans_of_the_same_graph_alone() -> None:
    model, x = small(), torch.randn(64, 32)
    report = calibrate_model(Source("small", model, (x,), {}), inner="eager")
    assert report.generated is None
    before = fxzero.plan(model, (x,), inner="inductor")
    one_by_one = fxzero.plan(model, (x,), inner="eager")
    report = calibrate_model(Source("small", model, (x,), {}))
    assert report.measured == 0
    assert report.generated is not None
    assert f"code generated for this model takes {report.generated.code:.3g} of" in str(report)
    plan = fxzero.plan(model, (x,), inner="inductor")
    assert plan.step_seconds == pytest.approx(report.generated.code * before.step_seconds)
    assert any("code generated for this model takes" in note for note in plan.notes)
    assert fxzero.plan(model, (x,), inner="eager").step_seconds == one_by_one.step_seconds
    other = fxzero.plan(small(), (x[:32],), inner="inductor")
    assert not any("code generated" in note for note in other.notes)
    assert calibrate_model(Source("small", model, (x,), {})).generated == report.generated


@pytest.mark.slow
def test_what_runs_one_by_one_for_a_budgets_sake_has_times_of_its_own() -> None:
    model, x = small(), torch.randn(64, 32)
    shares = calibrate_model(Source("small", model, (x,), {})).generated
    assert shares is not None
    graph = capture(model, (x,), inner="inductor").graph
    planner = Planner(graph, check_options(device="cpu", inner="inductor", optimizer="none"), "")
    decided = planner.decide()
    seconds = {}
    for phases in ((), ("backward",), ("forward", "backward")):
        plan = planner.restate(decided, frozenset(phases)).plan
        assert plan.decisions == decided.plan.decisions
        notes = [note for note in plan.notes if "run one by one: code" in note]
        assert [" and ".join(phases) in note for note in notes] == [True] * bool(phases)
        seconds[phases] = plan.step_seconds
    assert seconds[()] == decided.plan.step_seconds
    split, prices = decided.emitted.split, cost_model("cpu")
    apart = {
        phase: shares.apart * sum(prices.price(node).seconds for node in module.graph.nodes)
        for phase, module in (("forward", split.forward), ("backward", split.backward))
    }
    whole = seconds["forward", "backward"]
    assert whole == pytest.approx(apart["forward"] + apart["backward"])
    fused = planner.variants[0].costs
    forward = sum(fused.price(node).seconds for node in split.forward.graph.nodes)
    assert seconds["backward",] == pytest.approx(forward + apart["backward"])


@pytest.mark.slow
def test_the_share_of_generated_code_does_not_depend_on_the_speed_of_the_machine() -> None:
    model, x = small(), torch.randn(512, 32)
    graph, decomposed = (capture(model, (x,), inner=i).graph for i in ("eager", "inductor"))
    costs = calibrate(graph, "cpu").calibration.costs(CPU)
    slower = CostModel(
        CPU, {key: 20 * seconds for key, seconds in costs.measured.items()}, 20 * costs.scale
    )
    found, again = (time_generated(graph, decomposed, "cpu", c) for c in (costs, slower))
    assert found is not None
    assert again is not None
    assert 1 / 4 < found.shares.code / again.shares.code < 4
    assert 1 / 4 < found.shares.apart / again.shares.apart < 4


def test_plans_for_several_ranks_are_made_of_what_as_many_processes_measured() -> None:
    graph = traced()
    keys = {operator_key(n) for n in graph.graph.nodes if CostModel(CPU).price(n).seconds}
    for processes, seconds, links in ((1, 1.0, None), (2, 3.0, LINKS)):
        content = {
            **EMPTY,
            "processes": processes,
            "operators": dict.fromkeys(keys, seconds),
            "links": links,
        }
        calibration_path("cpu", processes).write_text(json.dumps(content))
    of_one, of_two, of_four = (cost_model("cpu", mesh=mesh) for mesh in ({}, {"dp": 2}, {"dp": 4}))
    assert set(of_one.measured.values()) == set(of_four.measured.values()) == {1.0}
    assert set(of_two.measured.values()) == {3.0}
    assert of_two.route("dp").gather(1e9) == pytest.approx(1e-4 + 0.5)
    assert (of_one.overlap, of_two.overlap) == (1.0, 0.25)
    assert cost_model("cpu", mesh={"pp": 2}).measured == of_two.measured
