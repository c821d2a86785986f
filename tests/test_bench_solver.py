"""The solver's benchmark: no rival on the same graph recomputes less within the same peak."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_COMMAND = Path(__file__).resolve().parent.parent / "benchmarks" / "bench_solver.py"
_MODELS = ("gpt2",)

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow, pytest.mark.timeout(330)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("results")
    command = [sys.executable, _COMMAND, "--quick", "--models", ",".join(_MODELS)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    subprocess.run(
        [*command, "--output", output],
        check=True,
        capture_output=True,
        timeout=300,
        env=environment,
    )
    (path,) = output.glob("*-solver-time-quick.json")
    return json.loads(path.read_text())


def test_no_cell_is_lost(report: dict[str, Any]) -> None:
    cells = report["cells"]
    assert {cell["model"] for cell in cells} == set(_MODELS)
    assert [c for c in cells if c["ours"] > 1.001 * c["theirs"]] == []
    assert any(cell["theirs"] > 1.8 * cell["ours"] for cell in cells)


def test_smaller_peaks_are_reached_than_by_checkpointing(report: dict[str, Any]) -> None:
    for model in report["models"]:
        assert model["smallest_peak_mib"] < model["checkpoint_peak_mib"]


def test_a_larger_budget_is_not_slower(report: dict[str, Any]) -> None:
    for model in report["models"]:
        assert model["largest_rise_over_20_budgets"] <= 1.001
