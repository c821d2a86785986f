"""Measured times replace modelled ones; a file that is none is not used."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import fxzero
from fxzero.calibration import calibrate, calibration_path, cost_model
from fxzero.capture import capture
from fxzero.cost import CPU, CostModel, operator_key
from fxzero.graph import TrainGraph


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
    report = calibrate(graph.graph.nodes, "cpu")
    assert torch.equal(state, torch.get_rng_state())
    assert report.failed == ()
    assert report.measured > 5
    costs = cost_model("cpu")
    for node in graph.graph.nodes:
        price = costs.price(node)
        if price.seconds:
            assert price.seconds == report.calibration.operators[operator_key(node)]
    again = calibrate(graph.graph.nodes, "cpu")
    assert (again.measured, again.known) == (0, report.measured)


def test_other_operators_are_modelled_on_the_scale_of_the_measured_ones() -> None:
    report = calibrate(traced().graph.nodes, "cpu")
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
    calibrate(capture(model, (x,)).graph.graph.nodes, "cpu")
    assert any("measured kinds of operators" in note for note in fxzero.plan(model, (x,)).notes)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        json.dumps({"schema_version": 1, "device": "", "operators": {"a": -1.0}, "scale": 1.0}),
        json.dumps({"schema_version": 1, "device": "", "operators": {"a": "b"}, "scale": 1.0}),
        json.dumps({"schema_version": 9, "device": "", "operators": {}, "scale": 1.0}),
        '{"schema_version": 1, "device": "", "operators": {"a": NaN}, "scale": 1.0}',
    ],
)
def test_a_file_that_is_no_calibration_is_not_used(
    content: str, caplog: pytest.LogCaptureFixture
) -> None:
    calibration_path("cpu").write_text(content)
    with caplog.at_level(logging.WARNING, logger="fxzero"):
        assert cost_model("cpu") == CostModel(CPU)
    assert "is not used" in caplog.text
