"""Peak memory and step time of fxzero, torch.compile and checkpointing, side by side.

    python benchmarks/bench_memory.py --model gpt2 [--quick] [--device cuda]

Writes ``<date>-<model>-<device>.json`` with every number and ``.md`` with the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import harness
import torch
from models import MODELS, build
from variants import REFERENCES, VARIANTS

from fxzero.model_calibration import calibrate_model
from fxzero.sources import Source

_RESULTS = Path(__file__).resolve().parent / "results"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--rounds", type=int, default=7, help="times each variant is timed")
    parser.add_argument(
        "--rows", default="", help="regular expression: only these variants, besides eager ones"
    )
    parser.add_argument("--output", type=Path, default=_RESULTS, help="directory for results")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    # What an earlier run compiled must not shorten this one's first steps.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        os.environ["FXZERO_CACHE"] = cache
        _run(options)


def _run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 100  # one entry a row: the rows share their code
    wanted = [v for v in VARIANTS if v in REFERENCES or re.search(options.rows, v.name)]

    case = build(
        options.model,
        quick=options.quick,
        dropout=0.0,
        dtype=torch.float32,
        device=options.device,
    )
    inner = "inductor" if any(v.name.startswith("fxzero inductor") for v in wanted) else "eager"
    calibrate_model(Source(options.model, case.module, (), dict(case.inputs)), inner)
    rows = harness.run(case, wanted, options.rounds)
    torch.compiler.reset()
    # Whether gradients are right does not depend on size; finite differences need float64.
    case = build(options.model, quick=True, dropout=0.1, dtype=torch.float64, device=options.device)
    with_dropout = harness.run(case, wanted, rounds=0)

    cells = harness.columns(rows, with_dropout)
    today = datetime.date.today().isoformat()
    quick = "-quick" if options.quick else ""
    report = {
        "schema": 1,
        "date": today,
        "model": options.model,
        "quick": options.quick,
        "size": asdict(MODELS[options.model][2 if options.quick else 1]),
        "device": options.device,
        "versions": harness.versions(),
        "machine": harness.machine(options.device),
        "rows": harness.as_data(rows),
        "with_dropout": harness.as_data(with_dropout),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{today}-{options.model}{quick}-{options.device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(harness.markdown(cells))
    harness.show(cells)
    print(path)


if __name__ == "__main__":
    main()
