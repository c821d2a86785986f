"""Gradients of pipelines against accumulation on one device: models, schedules, ranks, compilers.

    python benchmarks/bench_pipeline_matrix.py [--resume] [--by fxzero] [--ranks 4] [--inner eager]

Each cell trains a model for three steps of SGD in processes of its own and shows the largest
difference of any loss, gradient or weight from those of one process that goes through the same
micro-batches.  Beside it stands what ``torch.distributed.pipelining`` does for the same cell, cut
by its tracer between equal numbers of layers.  A cell that takes too long is killed: it hangs.
Cells are recorded as they finish; ``--resume`` leaves out those that have been.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import harness
import torch
import torch._inductor.compile_fx
import torch.distributed as dist
from pipeline_models import LIBRARY, MODELS, Output, build
from torch import Tensor, nn
from torch.distributed import pipelining

import fxzero
from fxzero.microbatches import Batch
from fxzero.pipelining.schedules import NAMES, TWO_STAGES_A_RANK

_RESULTS = Path(__file__).resolve().parent / "results"
_STEPS, _RATE, _MICROBATCHES, _TOLERANCE = 3, 0.05, 4, 1e-6
_LIMITS = {"eager": 120, "inductor": 600}
_GRACE = 5  # seconds that other ranks have to end after the first that failed
_BY = ("fxzero", "torch")
_INNER = ("eager", "inductor")
_UPSTREAM = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved1f1b": pipelining.ScheduleInterleaved1F1B,
    "interleavedzb": pipelining.ScheduleInterleavedZeroBubble,
    "zbv": pipelining.ScheduleZBVZeroBubble,
    "dualpipev": pipelining.ScheduleDualPipeV,
}
Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Cell:
    """What is trained, and by whom."""

    by: str
    ranks: int
    inner: str
    model: str
    schedule: str

    @property
    def stages(self) -> int:
        return self.ranks * (2 if self.schedule in TWO_STAGES_A_RANK else 1)

    @property
    def microbatches(self) -> int:
        """DualPipeV has at least as many as stages."""
        return max(_MICROBATCHES, self.stages)

    @property
    def placement(self) -> list[int]:
        """The rank of each stage."""
        once = list(range(self.ranks))
        back = once[::-1] if self.schedule in ("zbv", "dualpipev") else once
        return (once + back)[: self.stages]


@dataclass(frozen=True)
class Trained:
    """What training left behind: the losses, and gradients of each step and weights by name."""

    losses: list[float]
    tensors: Tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--by", nargs="+", choices=_BY, default=_BY)
    parser.add_argument("--ranks", nargs="+", type=int, choices=(2, 4), default=(2, 4))
    parser.add_argument("--inner", nargs="+", choices=_INNER, default=_INNER)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS))
    parser.add_argument("--schedules", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--record", type=Path, default=Path("runs/pipeline-matrix.jsonl"))
    parser.add_argument("--resume", action="store_true", help="keep what is in the record")
    parser.add_argument("--minutes", type=float, help="start no cell after as long")
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args()
    options.record.parent.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        options.record.unlink(missing_ok=True)
    chosen = options.by, options.ranks, options.inner, options.models, options.schedules
    _run([Cell(*fields) for fields in itertools.product(*chosen)], options.record, options.minutes)
    _write(_recorded(options.record), options.output)


def _recorded(record: Path) -> dict[Cell, dict[str, Any]]:
    lines = record.read_text().splitlines() if record.exists() else []
    found = [json.loads(line) for line in lines]
    return {Cell(**row["cell"]): row["found"] for row in found}


def _run(cells: list[Cell], record: Path, minutes: float | None) -> None:
    """Trains what is not recorded; the processes are forked from one that has all imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Path(__file__).stem, *LIBRARY])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # what it imports from
    done, expected, start = _recorded(record), {}, time.monotonic()
    for cell in cells:
        if cell in done or (cell.by == "torch" and cell.schedule not in _UPSTREAM):
            continue
        if minutes and time.monotonic() - start > 60 * minutes:
            return
        case = cell.model, cell.microbatches
        if case not in expected:
            expected[case] = _by_accumulation(*case)
        began = time.monotonic()
        found = _in_processes(cell, expected[case], context)
        found["seconds"] = round(time.monotonic() - began, 1)
        with record.open("a") as file:
            file.write(json.dumps({"cell": asdict(cell), "found": found}) + "\n")
        print(*asdict(cell).values(), _verdict(found), f"{found['seconds']} s", flush=True)


def _in_processes(cell: Cell, expected: Trained, context: Any) -> dict[str, Any]:
    """The largest difference, or the first error of any rank."""
    limit = _LIMITS[cell.inner]
    with tempfile.TemporaryDirectory() as directory:
        ranks = [
            context.Process(target=_rank, args=(rank, cell, directory), daemon=True)
            for rank in range(cell.ranks)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + limit
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
            if any(process.exitcode for process in ranks):
                deadline = min(deadline, time.monotonic() + _GRACE)
        codes = [process.exitcode for process in ranks]  # others fail when the first is killed
        failed = [json.loads(path.read_text()) for path in Path(directory).glob("*.json")]
        for process in ranks:
            process.kill()
            process.join()
        dead = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
        if dead:
            died = f"a rank dies of {signal.Signals(-codes[dead[0]]).name}"
            said = Path(directory, f"{dead[0]}.err").read_text()
            return {"error": f"{died}: {' '.join(re.findall('what.*', said))}", "stderr": said}
        if failed:
            first = min(failed, key=lambda failure: failure["time"])
            return {"error": first["error"], "traceback": first["traceback"]}
        if any(code is None for code in codes):
            return {"error": f"hangs (more than {limit} s)"}
        return _compare([torch.load(f"{directory}/{r}.pt") for r in range(cell.ranks)], expected)


def _rank(rank: int, cell: Cell, directory: str) -> None:
    """Trains, writes down what became of it, and ends without taking anything down in order."""
    torch.set_num_threads(1)
    os.dup2(os.open(f"{directory}/{rank}.err", os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    try:
        store = dist.FileStore(f"{directory}/store", cell.ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=cell.ranks)
        trained = (_by_fxzero if cell.by == "fxzero" else _by_torch)(cell)
        torch.save(asdict(trained), f"{directory}/{rank}.pt")
        dist.barrier()
    except BaseException as error:
        failure = {
            "time": time.time(),
            "error": _first_line(error),
            "traceback": traceback.format_exc(),
        }
        Path(directory, f"{rank}.json").write_text(json.dumps(failure))
        os._exit(1)
    os._exit(0)


def _first_line(error: BaseException) -> str:
    """Of what was raised, and of what that came from if it says no more than that it failed."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    return f"{text} {_first_line(error.__cause__)}" if error.__cause__ else text


def _train(modules: Iterable[nn.Module], step: Callable[[], float | None]) -> Trained:
    """Some steps of SGD for all that this process holds of the weights."""
    named = [pair for m in modules for pair in m.named_parameters(remove_duplicate=False)]
    optimizer = torch.optim.SGD({id(p): p for _, p in named}.values(), lr=_RATE)
    losses, tensors = [], {}
    for number in range(_STEPS):
        optimizer.zero_grad()
        losses.append(step())
        for name, parameter in named:
            if parameter.is_meta:
                continue
            gradient = parameter.grad
            tensors[f"{number} {name}"] = None if gradient is None else gradient.clone()
        optimizer.step()
    tensors |= {name: p.detach().clone() for name, p in named if not p.is_meta}
    return Trained([loss for loss in losses if loss is not None], tensors)


def _by_accumulation(name: str, microbatches: int) -> Trained:
    model, args, kwargs, loss = build(name, microbatches)

    def step() -> float:
        total = 0.0
        for part, keywords in Batch.of(args, kwargs).cut(microbatches):
            share = loss(model(*part, **keywords)) / microbatches
            share.backward()
            total += share.item()
        return total

    return _train([model], step)


def _by_fxzero(cell: Cell) -> Trained:
    model, args, kwargs, loss = build(cell.model, cell.microbatches)
    asked = fxzero.Pipeline(schedule=cell.schedule, microbatches=cell.microbatches)
    given: dict[str, Any] = {"loss_fn": loss, "inner": cell.inner, "recompute": "none"}
    example = args or kwargs
    model = fxzero.compile(model, example, pipeline=asked, **given)
    return _train([model], lambda: model.step(*args, **kwargs).item())


def _by_torch(cell: Cell) -> Trained:
    recipe = MODELS[cell.model]
    model, args, kwargs, _ = build(cell.model, cell.microbatches)
    inputs, target = recipe.inputs(model, kwargs or args)
    layers, count = recipe.layers, cell.stages
    cuts = [layers[len(layers) * stage // count] for stage in range(1, count)]
    parts = tuple(value.chunk(cell.microbatches)[0] for value in inputs)
    points = {f"model.{name}": pipelining.SplitPoint.BEGINNING for name in cuts}
    pipe = pipelining.pipeline(Output(model, recipe.predict), parts, split_spec=points)
    mine = [stage for stage, rank in enumerate(cell.placement) if rank == dist.get_rank()]
    stages = [pipe.build_stage(stage, torch.device("cpu")) for stage in mine]
    modules = [stage.submod for stage in stages]
    for stage in stages if cell.inner == "inductor" else ():
        stage.submod = torch.compile(stage.submod)
    whole = stages if cell.schedule in TWO_STAGES_A_RANK else stages[0]
    schedule = _UPSTREAM[cell.schedule](whole, cell.microbatches, loss_fn=recipe.loss)

    args, kwargs = _given(stages, inputs)

    def step() -> float | None:
        losses: list[Tensor] = []
        if count - 1 not in mine:
            schedule.step(*args, **kwargs)
            return None
        schedule.step(*args, target=target, losses=losses, **kwargs)
        return torch.stack(losses).mean().item()

    trained = _train(modules, step)
    tensors = {name.replace("model.", "", 1): value for name, value in trained.tensors.items()}
    return Trained(trained.losses, tensors)


def _given(
    stages: list[Any], inputs: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What torch wants from this rank: args for the first stage, keywords for others."""
    args: tuple[Tensor, ...] = ()
    kwargs = {}
    for stage in stages:
        whole = [node for node in stage.node.graph.nodes if node.op == "placeholder"]
        values = dict(zip(whole, inputs, strict=True))
        own = [node for node in stage.submod.graph.nodes if node.op == "placeholder"]
        if stage.is_first:
            args = tuple(values[node] for node in stage.node.args)
        else:
            pairs = zip(own, stage.node.args, strict=True)
            kwargs |= {inner.name: values[node] for inner, node in pairs if node in values}
    return args, kwargs


def _compare(answers: list[dict[str, Any]], expected: Trained) -> dict[str, Any]:
    """The largest difference, and where; a gradient that is missing counts as zero."""
    differences = {"loss": 0.0}
    for answer in answers:
        if answer["losses"]:  # torch has them on one rank only
            pairs = zip(answer["losses"], expected.losses, strict=True)
            found = [differences["loss"], *(abs(ours - theirs) for ours, theirs in pairs)]
            differences["loss"] = max(found)
        for name, ours in answer["tensors"].items():
            theirs, zero = expected.tensors[name], torch.zeros(())
            difference = (zero if ours is None else ours) - (zero if theirs is None else theirs)
            largest = difference.abs().nan_to_num(nan=math.inf).max().item()
            differences[name] = max(largest, differences.get(name, 0.0))
    where = max(differences, key=lambda name: differences[name])
    missing = sorted(expected.tensors.keys() - differences.keys())
    return {"difference": differences[where], "where": where, "missing": missing}


def _verdict(found: dict[str, Any]) -> str:
    if "error" in found:
        return str(found["error"])
    right = found["difference"] <= _TOLERANCE and not found["missing"]
    return f"{'OK' if right else 'WRONG'} {found['difference']:.0e}"


def _write(record: dict[Cell, dict[str, Any]], output: Path) -> None:
    """The table, with errors below it."""
    columns = list(itertools.product(_BY, (2, 4), _INNER))
    heads = (f"{by}: {ranks} ranks, {inner}" for by, ranks, inner in columns)
    cells: list[tuple[str, ...]] = [("model", "schedule", *heads)]
    errors: dict[str, int] = {}
    for model, schedule in itertools.product(MODELS, NAMES):
        line = [model, schedule]
        for column in columns:
            found = record.get(Cell(*column, model, schedule))
            if column[0] == "torch" and schedule not in _UPSTREAM:
                line.append("none")
            elif found is None:
                line.append("not run")
            elif "error" in found and not found["error"].startswith("hangs"):
                line.append(f"error {errors.setdefault(_alike(found['error']), len(errors) + 1)}")
            else:
                line.append(_verdict(found).partition(" (")[0])
        cells.append(tuple(line))
    cells.append(("right, of those run", "", *map(_right, list(zip(*cells[1:], strict=True))[2:])))
    harness.show(cells)
    notes = [f"{number}. `{text}`" for text, number in errors.items()]
    print(*notes, sep="\n")
    data = {
        "versions": harness.versions(),
        "machine": harness.machine("cpu"),
        "cells": [
            asdict(cell) | {key: found[key] for key in found if key not in ("traceback", "stderr")}
            for cell, found in record.items()
        ],
    }
    path = output / f"{datetime.date.today()}-pipeline-matrix.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    path.with_suffix(".md").write_text(
        harness.markdown(cells) + "\nErrors:\n\n" + "\n".join(notes) + "\n"
    )


def _right(texts: tuple[str, ...]) -> str:
    """How many cells of a column are."""
    run = [text for text in texts if text not in ("none", "not run")]
    return f"{sum(text.startswith('OK') for text in run)} of {len(run)}"


def _alike(error: str) -> str:
    """An error without what differs between ranks, shapes and stages."""
    short = re.split(r", but stage| \(\[|, but one was| \[\d+\.\d+|\. Found", error)[0]
    short = re.sub(r"Schedule\w+ schedule", "schedule", short.replace("`", ""))
    return re.sub(r"\d+", "N", re.sub(r"/\S*/", "", short))[:130]


if __name__ == "__main__":
    main()
