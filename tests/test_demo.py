"""``fxzero demo`` at a tiny size, and the example script as a person would run it."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fxzero.demo import DemoConfig, DemoResult, run
from fxzero.errors import BudgetError, UsageError
from fxzero.plans import Plan

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "train_gpt.py"
TINY = DemoConfig(layers=2, width=32, heads=2, sequence=64, batch=4, text_bytes=2**16)
STEPS = 6


def _console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=100, markup=False, force_terminal=terminal)


def _shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, str]:
    console = _console()
    out = tmp_path_factory.mktemp("demo") / "report"
    return run(steps=STEPS, out=out, config=TINY, console=console), _shown(console)


def test_losses_and_weights_are_bitwise_those_of_eager(demo: tuple[DemoResult, str]) -> None:
    result, shown = demo
    assert len(result.eager.losses) == STEPS
    assert result.first_difference is None
    assert result.compiled.losses == result.eager.losses
    assert result.compiled.weights == result.eager.weights
    assert result.eager.losses[-1] < result.eager.losses[0]
    assert f"losses are bitwise equal over all {STEPS} steps" in shown


def test_peak_is_as_planned_and_half_of_eager(demo: tuple[DemoResult, str]) -> None:
    result, shown = demo
    assert result.budget_bytes == result.eager.peak_bytes // 2
    assert result.compiled.peak_bytes <= result.plan.peak_bytes <= result.budget_bytes
    assert result.plan.peak_bytes <= 1.05 * result.compiled.peak_bytes
    assert result.plan.decisions.recompute
    assert result.broken_promises == ()
    assert "NOT AS PLANNED" not in shown


def test_report_is_written(demo: tuple[DemoResult, str]) -> None:
    result, shown = demo
    assert Plan.load(result.report / "plan.json") == result.plan
    assert "<html" in (result.report / "plan.html").read_text()
    assert str(result.report.name) in shown.replace("\n", "")


def test_output_shows_both_rows_in_plain_ascii(demo: tuple[DemoResult, str]) -> None:
    _, shown = demo
    rows = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("|")]
    assert [row for row in rows if row.strip("-")] == ["eager", "fxzero"]
    assert shown.isascii()
    assert max(map(len, shown.splitlines())) <= 100


def test_what_did_not_come_out_as_planned_is_said(demo: tuple[DemoResult, str]) -> None:
    from fxzero.demo import _conclusions

    result, _ = demo
    first, *rest = result.compiled.losses
    changed = replace(result.compiled, losses=(first + 1.0, *rest), peak_bytes=2**40)
    lines = list(_conclusions(replace(result, compiled=changed)))
    assert any("losses DIFFER from step 1 on" in line for line in lines)
    assert sum("NOT AS PLANNED: measured peak exceeds" in line for line in lines) == 2


@pytest.mark.slow
def test_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    console = _console(terminal=True)
    result = run("1GiB", STEPS, tmp_path, config=TINY, console=console)
    assert result.budget_bytes == 2**30
    assert not result.plan.decisions.recompute
    assert f"{STEPS}/{STEPS}" in _shown(console)


@pytest.mark.slow
def test_impossible_budget_names_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="smallest reachable peak"):
        run("10KiB", STEPS, tmp_path / "none", config=TINY, console=_console())
    assert not (tmp_path / "none").exists()


def test_missing_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install fxzero\[examples\]"):
        run(console=_console())


def test_too_few_steps_and_malformed_budgets_fail_at_once() -> None:
    with pytest.raises(UsageError, match="steps=4"):
        run(steps=4)
    with pytest.raises(UsageError, match="malformed"):
        run("lots")


# The example


def _run_example(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    sizes = ["--layers", 2, "--width", 64, "--batch", 4, "--seq", 64, "--inner", "eager"]
    command = [sys.executable, str(EXAMPLE), *map(str, [*sizes, *args])]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_example_trains_under_a_budget(tmp_path: Path) -> None:
    args = ["--steps", 4, "--memory-budget", "12MiB", "--plan-out", "plan.json"]
    done = _run_example(tmp_path, *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  loss ") == 4
    assert "FITS" in done.stdout
    assert Plan.load(tmp_path / "plan.json").peak_bytes <= 12 * 2**20


@pytest.mark.slow
def test_example_refuses_an_impossible_budget(tmp_path: Path) -> None:
    done = _run_example(tmp_path, "--memory-budget", "1MiB")
    assert done.returncode == 1
    assert "no plan fits memory_budget=1.00 MiB" in done.stderr
    assert "any one of these fits" in done.stderr
    assert "Traceback" not in done.stderr
