"""Plans against what was measured: peaks by the allocator, and times of steps, model by model.

    python benchmarks/bench_prediction.py [--inner inductor] [--models gpt2,unet] [--quick]

Operators are calibrated once, each model's by itself, with what they take and give back while they
run.  Then each model runs without a budget, at half of eager's peak where a plan fits that, and at
the smallest peak.

Plans know the machine as it was while it was calibrated.  Its speed may have changed since: eager's
step is timed around the calibration and in turn with the plans, and the last column has its change
taken out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import harness
import torch
from models import MODELS, build
from variants import REFERENCES, VARIANTS

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
    "at eager's speed",
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="gpt2,llama,bert,vit,unet,resnet,t5")
    parser.add_argument("--inner", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--quick", action="store_true", help="smaller models")
    parser.add_argument("--rounds", type=int, default=5, help="times each is timed")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="directory for results")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 100
    cells, rows = [_HEADS], []
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["FXZERO_CACHE"] = cache
            calibrated, measured = _measured(name, options)
        rows.append(
            {
                "model": name,
                "eager_seconds_at_calibration": calibrated,
                "rows": harness.as_data(measured),
            }
        )
        assert measured[0].median
        slower = measured[0].median / calibrated
        cells += [_cells(name, row, slower) for row in measured if row.planned_bytes]
    text = harness.markdown(cells)
    quick = "-quick" if options.quick else ""
    today = datetime.date.today().isoformat()
    report = {
        "schema": 1,
        "date": today,
        "dropout": options.dropout,
        "sizes": {name: str(MODELS[name][2 if options.quick else 1]) for name in MODELS},
        "versions": harness.versions(),
        "machine": harness.machine("cpu"),
        "models": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{today}-prediction-{options.inner}{quick}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    harness.show(cells)
    print(path)


def _measured(name: str, options: argparse.Namespace) -> tuple[float, list[harness.Row]]:
    """Seconds of eager's step around the calibration, and eager's row and those of the plans."""
    case = build(
        name, quick=options.quick, dropout=options.dropout, dtype=torch.float32, device="cpu"
    )
    wanted = [v for v in VARIANTS if v.name in _names(options.inner)]
    # Without its dropout's rate the harness takes no finite differences, as bench_memory.py does.
    timed = replace(case, dropout=0.0)
    eager = harness.run(timed, REFERENCES[:1], options.rounds)
    calibrate_model(Source(name, case.module, (), dict(case.inputs)), options.inner)
    eager += harness.run(timed, REFERENCES[:1], options.rounds)
    calibrated = statistics.median(seconds for row in eager for seconds in row.seconds)
    return calibrated, harness.run(timed, [REFERENCES[0], *wanted], options.rounds)


def _names(inner: str) -> list[str]:
    return [f"fxzero {inner}, {budget}" for budget in _BUDGETS]


def _cells(name: str, row: harness.Row, slower: float) -> tuple[str, ...]:
    """``slower``: eager's step by what it was while operators were calibrated."""
    assert row.peak is not None
    assert row.planned_bytes
    assert row.planned_seconds
    assert row.median
    return (
        name,
        row.name.partition(", ")[2],
        f"{row.planned_bytes / harness.MIB:.1f}",
        f"{row.peak.bytes / harness.MIB:.1f}",
        f"{row.planned_bytes / row.peak.bytes:.3f}",
        f"{row.planned_seconds / row.median:.2f}",
        f"{slower * row.planned_seconds / row.median:.2f}",
    )


if __name__ == "__main__":
    main()
