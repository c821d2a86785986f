"""The memory benchmark runs from the command line and records what it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_COMMAND = Path(__file__).resolve().parent.parent / "benchmarks" / "bench_memory.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(330)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("results")
    # The second row needs the peak of a row that is left out, so it fails.
    rows = "fxzero eager, (smallest|peak of torch's budget 0.5)"
    arguments = ["--quick", "--model", "vit", "--rounds", "2", "--rows", rows, "--output", output]
    command = [sys.executable, _COMMAND, *arguments]
    # A benchmark imports what lies beside it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
    (path,) = output.glob("*-vit-quick-cpu.json")
    table = path.with_suffix(".md").read_text().splitlines()
    assert table[0].startswith("| variant | budget MiB | peak MiB |")
    assert len(table) == 2 + 4
    return json.loads(path.read_text())


def _row(report: dict[str, Any], name: str, part: str = "rows") -> dict[str, Any]:
    (row,) = (row for row in report[part] if row["name"] == name)
    return row


def test_every_benchmark_can_be_imported() -> None:
    names = sorted(path.stem for path in _COMMAND.parent.glob("*.py"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(_COMMAND.parent)
    code = "import " + ", ".join(names)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.exhaustive
def test_says_where_it_was_measured(report: dict[str, Any]) -> None:
    assert report["model"] == "vit"
    assert report["device"] == "cpu"
    assert {"python", "torch", "fxzero", "transformers"} <= report["versions"].keys()
    assert {"cpu", "cores"} <= report["machine"].keys()


@pytest.mark.exhaustive
def test_keeps_every_repeat(report: dict[str, Any]) -> None:
    for name in ("eager", "eager, checkpoint per block", "fxzero eager, smallest"):
        assert len(_row(report, name)["seconds"]) == 2


@pytest.mark.exhaustive
def test_peaks_of_all_rows_are_measured_alike(report: dict[str, Any]) -> None:
    measured = [row for row in report["rows"] if row["peak"] is not None]
    assert {row["peak"]["method"] for row in measured} == {"allocator"}
    assert (
        _row(report, "eager, checkpoint per block")["peak"]["bytes"]
        < (_row(report, "eager")["peak"]["bytes"])
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", ["rows", "with_dropout"])
def test_fxzero_is_exact_and_within_its_budget(report: dict[str, Any], part: str) -> None:
    row = _row(report, "fxzero eager, smallest", part)
    assert row["check"]["exact"]
    assert row["peak"]["tensor_bytes"] <= row["planned_bytes"] <= row["budget_bytes"]


def test_a_variant_that_fails_is_a_row(report: dict[str, Any]) -> None:
    row = _row(report, "fxzero eager, peak of torch's budget 0.5")
    assert "torch.compile aot_eager, budget 0.5" in row["failed"]
    assert row["peak"] is None
