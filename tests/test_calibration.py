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
from fxzero.calibration import calibrate, calibration_path, cost_model
from fxzero.capture import capture
from fxzero.cost import CPU, CostModel, operator_key
from fxzero.graph import TrainGraph
from fxzero.timing import times_in_place

LINKS = {"processes": 2, "inside": 2, "bandwidth": 1e9, "startup": 1e-4, "overlap": 0.25}
EMPTY = {
    "schema_version": 3,
    "device": "",
    "processes": 1,
    "operators": {},
    "workspaces": {},
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
