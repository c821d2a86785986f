"""Plans against what was measured: peaks by the allocator, and times of steps, model by model.

    python benchmarks/bench_prediction.py [--inner inductor] [--models gpt2,unet] [--quick]

Operators are calibrated, each model's by themselves, with what they take and give back while they
run.  Then each model runs without a budget, at half of eager's peak where a plan fits that, and at
the smallest peak, in a process of its own: what else runs there changes its heap, and that the
time of a step.  The machine's speed changes, so all is done several times; the table has medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import harness
import torch
from models import MODELS, Case, build
from variants import EAGER, REFERENCES, VARIANTS

from fxzero import BudgetError
from fxzero.model_calibration import calibrate_model
from fxzero.sources import Source

_RESULTS = Path(__file__).resolve().parent / "results"
_BUDGETS = ("no budget", "half of eager's peak", "smallest")
_HEADS = (
    "model",
    "budget",
    "planned MiB",
    "measured MiB",
    "planned / peak",
    "planned / time",
    "least",
    "most",
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="gpt2,llama,bert,vit,unet,resnet,t5")
    parser.add_argument("--inner", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--quick", action="store_true", help="smaller models")
    parser.add_argument("--rounds", type=int, default=15, help="steps that are timed each time")
    parser.add_argument("--repeats", type=int, default=3, help="calibrations")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="directory for results")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    names = options.models.split(",")
    found: dict[tuple[str, str], list[harness.Row]] = {
        (name, budget): [] for name in names for budget in _BUDGETS
    }
    for _ in range(options.repeats):
        for name in names:
            with tempfile.TemporaryDirectory() as cache:
                os.environ["FXZERO_CACHE"] = cache
                _alone(_calibrate, name, options)
                for budget in _BUDGETS:
                    row = _alone(_measured, name, budget, options)
                    found[name, budget].append(row)
    cells = [_HEADS]
    cells += [_cells(*at, rows) for at, rows in found.items() if all(r.planned_bytes for r in rows)]
    text = harness.markdown(cells)
    quick = "-quick" if options.quick else ""
    today = datetime.date.today().isoformat()
    report = {
        "schema": 2,
        "date": today,
        "dropout": options.dropout,
        "sizes": {name: str(MODELS[name][2 if options.quick else 1]) for name in MODELS},
        "versions": harness.versions(),
        "machine": harness.machine("cpu"),
        "measured": [
            {"model": name, "budget": budget, "rows": harness.as_data(rows)}
            for (name, budget), rows in found.items()
        ],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{today}-prediction-{options.inner}{quick}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    harness.show(cells)
    print(path)


def _alone(run: Any, *args: Any) -> Any:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run, *args).result()


def _calibrate(name: str, options: argparse.Namespace) -> None:
    case = _case(name, options)
    calibrate_model(Source(name, case.module, (), dict(case.inputs)), options.inner)


def _measured(name: str, budget: str, options: argparse.Namespace) -> harness.Row:
    case = _case(name, options)
    eager = harness.prepare(case, REFERENCES[0], {}, None).row
    assert eager.peak is not None
    wanted = f"fxzero {options.inner}, {budget}"
    variant = next(each for each in VARIANTS if each.name == wanted)
    try:
        ready = harness.prepare(case, variant, {EAGER: eager.peak.bytes}, None)
    except BudgetError as error:
        return harness.Row(wanted, failed=str(error))
    return replace(ready.row, seconds=tuple(harness.seconds(ready, options.rounds)))


def _case(name: str, options: argparse.Namespace) -> Case:
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 100
    case = build(
        name, quick=options.quick, dropout=options.dropout, dtype=torch.float32, device="cpu"
    )
    # Without its dropout's rate the harness takes no finite differences, as bench_memory.py does.
    return replace(case, dropout=0.0)


def _cells(name: str, budget: str, rows: list[harness.Row]) -> tuple[str, ...]:
    planned, measured, times = [], [], []
    for row in rows:
        assert row.peak is not None
        assert row.planned_bytes
        assert row.planned_seconds
        assert row.median
        planned.append(row.planned_bytes)
        measured.append(row.peak.bytes)
        times.append(row.planned_seconds / row.median)
    # The plan that is furthest from what was measured: each calibration makes one of its own.
    worst = max(zip(planned, measured, strict=True), key=lambda pair: abs(pair[0] / pair[1] - 1))
    return (
        name,
        budget,
        f"{worst[0] / harness.MIB:.1f}",
        f"{worst[1] / harness.MIB:.1f}",
        f"{worst[0] / worst[1]:.3f}",
        f"{statistics.median(times):.2f}",
        f"{min(times):.2f}",
        f"{max(times):.2f}",
    )


if __name__ == "__main__":
    main()
