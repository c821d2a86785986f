"""How long a search takes, and how far its estimates lie from plans in full.

    python benchmarks/bench_search.py [--ways 8] [--model llama-3-70b]

Searches ways to train Llama-3-70B on 512 H100s and 4,096 examples a step; then GPT-2 in bfloat16 on
8 L4s and 32, of whose ways some, drawn with a seed, are planned in full.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import resource
import time
from pathlib import Path

import harness

import fxzero
from fxzero.sources import load_model

_RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", type=int, default=8)
    parser.add_argument("--model", default="llama-3-70b")
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args()
    speed, rows = _searched(options.model), _compared(options.ways)
    print(json.dumps(speed, indent=1))
    heads = ("way", "step: estimate, of plan", "peak: estimate, of plan", "fits")
    cells = [heads, *(tuple(map(str, row.values())) for row in rows)]
    harness.show(cells)
    path = options.output / f"{datetime.date.today()}-search.json"
    facts = {"versions": harness.versions(), "machine": harness.machine("cpu")}
    path.write_text(json.dumps(facts | {"search": speed, "ways": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(harness.markdown(cells))


def _searched(model: str) -> dict[str, object]:
    wall, cpu = time.perf_counter(), time.process_time()
    source = load_model(model, batch=1, seq=8192)
    found = fxzero.search(
        source.model,
        source.args,
        kwargs=source.kwargs,
        name=model,
        hardware="h100-sxm-80gb",
        devices=512,
        global_batch=4096,
    )
    print(found)
    return {
        "model": model,
        "ways": len(found.ranked),
        "fitting": sum(each.fits for each in found.ranked),
        "best": str(found.best.way),
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - cpu,
        "peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _compared(ways: int) -> list[dict[str, object]]:
    source = load_model("gpt2", batch=1, seq=1024, dtype="bfloat16")
    found = fxzero.search(
        source.model,
        source.args,
        kwargs=source.kwargs,
        name="gpt2",
        hardware="l4",
        devices=8,
        global_batch=32,
    )
    fitting = [
        each
        for each in found.ranked
        # A plan of one of several micro-batches reduces, which the step then does once.
        if each.fits and (each.way.schedule or each.way.microbatches == 1 or each.way.zero > 1)
    ]
    chosen = [fitting[0], *random.Random(0).sample(fitting[1:], ways - 1)]
    rows: list[dict[str, object]] = []
    for each in chosen:
        plan = found.plan(each)
        parts = 1 if each.way.schedule else each.way.microbatches
        rows.append(
            {
                "way": str(each.way),
                "seconds": round((each.seconds - each.update) / (plan.step_seconds * parts), 3),
                "peak": round(each.peak_bytes / plan.peak_bytes, 3),
                "fits": plan.fits,
            }
        )
    return rows


if __name__ == "__main__":
    main()
