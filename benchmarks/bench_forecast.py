"""Plans against what runs: peak and step time of random settings on one to four processes.

    python benchmarks/bench_forecast.py [--settings 20] [--seed 0]

A setting is a model, a number of ranks, a ZeRO stage, a pipeline or none, and a budget between the
smallest peak and that without recompute, all drawn with a seed.  Operators and links are calibrated
first, by as many processes at once as train later, at the shapes that a micro-batch has.  The peak
is what a rank's tensors and the allocator's record come to, over a whole step with AdamW; the
step's time is that of forward and backward.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from models import Case, Size, build

import fxzero
from fxzero.errors import FxzeroError
from fxzero.model_calibration import calibrate_model
from fxzero.sources import Source

_RESULTS = Path(__file__).resolve().parent / "results"
_WORLDS = (1, 1, 2, 2, 2, 4)
_PARTS = 4  # micro-batches of a pipeline
_ROUNDS = 7
# Large enough that operators take longer than calling them.
_SIZES = {
    "gpt2": Size(4, 256, 4, 256, 2048),
    "llama": Size(4, 256, 4, 256, 2048),
    "bert": Size(4, 256, 4, 256, 2048),
    "vit": Size(4, 256, 8, 64, 10),
}


@dataclass(frozen=True)
class Setting:
    """What is drawn: ``share`` is where the budget lies between the two peaks; None: no budget."""

    model: str
    ranks: int
    zero: int
    stages: int
    share: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args()
    settings = _drawn(random.Random(options.seed), options.settings)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        os.environ["FXZERO_CACHE"] = directory
        for world in sorted({setting.ranks for setting in settings}):
            mine = [setting for setting in settings if setting.ranks == world]
            processes.start_processes(
                _rank, args=(world, mine, directory), nprocs=world, start_method="spawn"
            )
            found = [
                json.loads((Path(directory) / f"{world}-{rank}.json").read_text())
                for rank in range(world)
            ]
            rows += [
                max(each, key=lambda row: row["measured"]) for each in zip(*found, strict=True)
            ]
    _write(options, rows)


def _drawn(source: random.Random, count: int) -> list[Setting]:
    found = []
    for _ in range(count):
        ranks = source.choice(_WORLDS)
        stages = source.choice((1, 1, 2)) if ranks > 1 else 1
        zero = source.choice((0, 1, 2, 3)) if ranks // stages > 1 else 0
        model = source.choice(list(_SIZES))
        found.append(Setting(model, ranks, zero, stages, source.choice((None, 0.3, 0.7))))
    return found


def _case(setting: Setting) -> Case:
    return build(
        setting.model,
        quick=True,
        dropout=0.0,
        dtype=torch.float32,
        device="cpu",
        size=_SIZES[setting.model],
    )


def _calibrate(settings: list[Setting], first: bool) -> None:
    for name, stages in sorted({(setting.model, setting.stages) for setting in settings}):
        case = _case(Setting(name, 1, 0, stages, None))
        parts = _PARTS if stages > 1 else 1
        inputs = {key: value[: len(value) // parts] for key, value in case.inputs.items()}
        report = calibrate_model(Source(name, case.module, (), inputs), inner="eager")
        if first:
            print(report, flush=True)


def _rank(rank: int, world: int, settings: list[Setting], directory: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(f"{directory}/store-{world}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    _calibrate(settings, rank == 0)
    if world > 1:
        dist.barrier()
    rows = []
    for setting in settings:
        if rank == 0:
            print(setting, flush=True)
        try:
            rows.append(_run(setting))
        except FxzeroError as error:
            rows.append({**asdict(setting), "measured": 0, "error": str(error).splitlines()[0]})
    (Path(directory) / f"{world}-{rank}.json").write_text(json.dumps(rows))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _run(setting: Setting) -> dict[str, Any]:
    case = _case(setting)
    given: dict[str, Any] = {"zero": setting.zero if setting.ranks > 1 else "auto"}
    if setting.stages > 1:
        given["pipeline"] = fxzero.Pipeline(setting.stages, "1f1b", _PARTS)
    budget, plan = _planned(setting, case, given)
    model: Any = fxzero.compile(
        case.module, case.inputs, inner="eager", memory_budget=budget, **given
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    only = functools.partial(_backward, model, case, setting)

    def step() -> None:
        only()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    peak = min(fxzero.measure(step).peak_bytes for _ in range(3))
    seconds = []
    for _ in range(_ROUNDS):
        if setting.ranks > 1:
            dist.barrier()
        start = time.perf_counter()
        only()
        seconds.append(time.perf_counter() - start)
        optimizer.zero_grad()
    rank = dist.get_rank() if setting.ranks > 1 else 0
    planned = plan.ranks[rank].peak_bytes
    return {
        **asdict(setting),
        "budget": budget,
        "planned": planned,
        "measured": peak,
        "planned_seconds": plan.step_seconds,
        "measured_seconds": statistics.median(seconds),
    }


def _planned(setting: Setting, case: Case, given: dict[str, Any]) -> tuple[int | None, fxzero.Plan]:
    """The budget, and the plan for it that anybody can make before anything runs."""
    data = setting.ranks // setting.stages
    mesh = {name: size for name, size in (("pp", setting.stages), ("dp", data)) if size > 1}
    plan = functools.partial(fxzero.plan, case.module, case.inputs, mesh=mesh or None, **given)
    free = plan()
    if setting.share is None:
        return None, free
    low, high = free.minimum_budget, free.unplanned_peak_bytes
    budget = int(low + setting.share * (high - low))
    return budget, plan(memory_budget=budget)


def _backward(model: Any, case: Case, setting: Setting) -> None:
    if setting.stages > 1:
        model.step(**case.inputs)
    else:
        loss: torch.Tensor = model(**case.inputs)
        loss.backward()


def _write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    heads = ("model", "ranks", "stages", "zero", "budget", "peak: measured / planned",
             "step: measured / planned")  # fmt: skip
    cells = [heads]
    for row in rows:
        share = "none" if row["share"] is None else f"{row['share']:.0%}"
        told = [row.get("error", ""), ""]
        if "planned" in row:
            told = [
                f"{row['measured'] / row['planned']:.3f}",
                f"{row['measured_seconds'] / row['planned_seconds']:.2f}",
            ]
        start = (row["model"], row["ranks"], row["stages"], row["zero"], share)
        cells.append((*map(str, start), *told))
    harness.show(cells)
    path = options.output / f"{datetime.date.today()}-forecast.json"
    facts = {"versions": harness.versions(), "machine": harness.machine("cpu")}
    path.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(harness.markdown(cells))


if __name__ == "__main__":
    main()
