"""The solver against other ways of choosing what to recompute, on the same graphs.

    python benchmarks/bench_solver.py [--models gpt2,llama] [--objective flops] [--quick]

For each model: every peak that ``activation_memory_budget`` (with each of torch's solvers) or
``torch.utils.checkpoint`` around each block reaches is given to fxzero as its budget.  Both sides
are priced by the same times per operator, measured here, or by FLOPs.  Then: the smallest
peaks, twenty budgets in a row, and the time to solve at growing depth, Llama-3-70B's last.  Nothing
is trained here; ``bench_memory.py`` runs the plans.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import harness
import torch
from models import MODELS, Case, Loss, build
from rich.console import Console
from rich.table import Table
from rivals import TORCH_SOLVERS, Outcome, torch_budget
from torch import fx
from torch.utils.checkpoint import checkpoint

from fxzero.capture import capture
from fxzero.graph import TrainGraph
from fxzero.model_calibration import calibrate
from fxzero.options import check_options
from fxzero.planner import Planner
from fxzero.plans import Decisions
from fxzero.sources import load_model

_RESULTS = Path(__file__).resolve().parent / "results"
_BUDGETS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
_MODELS = "gpt2,llama,bert,vit,unet,resnet,t5"
_DEPTHS = (8, 16, 32, 64, 128)
_COLUMNS = ("model", "rival", "peak MiB", "theirs", "fxzero", "ratio", "at most", "solve s")
_MiB = 2**20


@dataclass(frozen=True)
class Cell:
    """A rival's plan, and fxzero's within the same peak; prices in seconds or FLOPs.

    Attributes:
        bound: what no schedule within the peak undercuts, as fxzero's solver proved.
        seconds: time to solve.
    """

    model: str
    rival: str
    peak: int
    theirs: float
    ours: float
    bound: float
    seconds: float

    @property
    def ratio(self) -> float:
        """How many times fxzero's price the rival's is."""
        return self.theirs / self.ours if self.ours else float("inf")

    @property
    def most(self) -> float:
        """What the ratio could be at most, for the best of all schedules."""
        return self.theirs / self.bound if self.bound > 0 else float("inf")

    @property
    def lost(self) -> bool:
        """Whether fxzero pays more; a thousandth is the tolerance of the integer program."""
        return self.ours > self.theirs * 1.001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=_MODELS)
    parser.add_argument("--objective", choices=("time", "flops"), default="time")
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer depths")
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FXZERO_CACHE"] = cache
        _run(options)


def _run(options: argparse.Namespace) -> None:
    console = Console()
    cells: list[Cell] = []
    summaries: list[dict[str, object]] = []
    for name in options.models.split(","):
        case = build(name, quick=options.quick, dropout=0.0, dtype=torch.float32, device="cpu")
        graph = capture(case.module, (), dict(case.inputs)).graph
        calibrate(graph, "cpu")
        planner = _planner(graph, options.objective)
        rivals = [*_torch_outcomes(graph, planner), _checkpointed(case, options.objective)]
        found = list(_cells(name, planner, rivals))
        cells += found
        summaries.append(_summary(name, planner, found, checkpointed=rivals[-1]))
        console.print(_table(found))
        console.print(summaries[-1])
    depths = []
    for name, graph in _deep(_DEPTHS[: 3 if options.quick else None], whole=not options.quick):
        depths.append(_depth(name, graph))
        console.print(depths[-1])
    lost = [cell for cell in cells if cell.lost]
    console.print(f"{len(cells)} cells, {len(lost)} lost: {lost}")
    _write(options, cells, summaries, depths)


def _planner(graph: TrainGraph, objective: str = "time") -> Planner:
    options = check_options(device="cpu", optimizer="none", inner="eager", objective=objective)
    return Planner(graph, options, "model")


def _objective(planner: Planner) -> str:
    return planner.variants[0].options.objective


def _cells(name: str, planner: Planner, rivals: Iterable[Outcome]) -> Iterator[Cell]:
    """The rivals that have a lower peak than a step without recompute, each outcome once."""
    most = min(v.solver.everything.peak for v in planner.variants)
    seen: set[tuple[int, float]] = set()
    for rival in rivals:
        if rival.peak >= most or (rival.peak, rival.price) in seen:
            continue
        seen.add((rival.peak, rival.price))
        start = time.perf_counter()
        ours, bound = _solve(planner, rival.peak)
        seconds = time.perf_counter() - start
        yield Cell(name, rival.name, rival.peak, rival.price, ours, bound, seconds)


def _solve(planner: Planner, budget: int) -> tuple[float, float]:
    """The price of the better of the planner's variants, over one forward and backward.

    And the price that no schedule of any of them undercuts.
    """
    flops, found = _objective(planner) == "flops", [(float("inf"), float("inf"))]
    once = planner.variants[0].solver.problem
    for variant in planner.variants:
        solution, problem = variant.solver.solve(budget), variant.solver.problem
        if solution is not None:
            schedule = solution.schedule
            price = schedule.flops if flops else schedule.seconds
            whole = problem.flops if flops else problem.seconds
            more = whole - (once.flops if flops else once.seconds)
            bound = price - (solution.gap or 0.0) * (whole + price)
            found.append((price + more, bound + more))
    prices, bounds = zip(*found, strict=True)
    return min(prices), min(bounds)


def _price(planner: Planner) -> Callable[[fx.Node], float]:
    costs = planner.variants[0].costs
    if _objective(planner) == "flops":
        return lambda node: float(costs.price(node).flops)
    return lambda node: costs.price(node).seconds


def _torch_outcomes(graph: TrainGraph, planner: Planner) -> Iterator[Outcome]:
    price = _price(planner)
    for solver in TORCH_SOLVERS:
        for budget in _BUDGETS:
            yield torch_budget(
                graph,
                planner.variants[0].surroundings(Decisions()),
                price,
                solver=solver,
                budget=budget,
            )


def _checkpointed(case: Case, objective: str) -> Outcome:
    """The plan that does what ``torch.utils.checkpoint`` around each block asks for, no more."""
    for block in case.blocks(case.module):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    graph = capture(case.module, (), dict(case.inputs)).graph
    schedule = _planner(graph, objective).variants[-1].solver.everything
    for block in case.blocks(case.module):
        del block.forward
    price = float(schedule.flops) if objective == "flops" else schedule.seconds
    return Outcome("checkpoint per block", schedule.peak, price)


def _summary(
    name: str, planner: Planner, cells: list[Cell], checkpointed: Outcome
) -> dict[str, object]:
    solvers = [variant.solver for variant in planner.variants]
    low = min(solver.smallest.peak for solver in solvers)
    high = min(solver.everything.peak for solver in solvers)
    budgets = [low + (high - low) * twentieth // 19 for twentieth in range(20)]
    prices = [_solve(planner, budget)[0] for budget in budgets]
    rises = [after / before for before, after in pairwise(prices) if after > before > 0]
    return {
        "model": name,
        "operators": len(solvers[0].problem.operators),
        "smallest_peak_mib": low / _MiB,
        "checkpoint_peak_mib": checkpointed.peak / _MiB,
        "no_recompute_mib": high / _MiB,
        "cells": len(cells),
        "lost": sum(cell.lost for cell in cells),
        "least_ratio": min((cell.ratio for cell in cells), default=None),
        "median_ratio": statistics.median(cell.ratio for cell in cells) if cells else None,
        "largest_rise_over_20_budgets": max(rises, default=1.0),
    }


def _deep(depths: Iterable[int], *, whole: bool) -> Iterator[tuple[str, TrainGraph]]:
    """GPT-2 of growing depth, and Llama-3-70B."""
    family, size, _ = MODELS["gpt2"]
    for layers in depths:
        with torch.device("meta"):
            model, inputs = family(replace(size, layers=layers), 0.0)
        yield f"gpt2, {layers} layers", capture(Loss(model), (), inputs).graph
    if whole:
        source = load_model("llama-3-70b", batch=1, seq=4096)
        yield "llama-3-70b", capture(source.model, source.args, source.kwargs).graph


def _depth(name: str, graph: TrainGraph) -> dict[str, object]:
    """Time to solve for half of the way down to the smallest peak."""
    start = time.perf_counter()
    solver = _planner(graph).variants[0].solver
    middle = (min(cut.peak for cut in solver.cuts) + solver.everything.peak) // 2
    solution = solver.solve(middle)
    seconds = time.perf_counter() - start
    assert solution is not None
    return {
        "model": name,
        "nodes": len(graph.graph.nodes),
        "operators": len(solver.problem.operators),
        "seconds": seconds,
        "gap": solution.gap or 0.0,
    }


def _table(cells: list[Cell]) -> Table:
    table = Table()
    for column in _COLUMNS:
        table.add_column(column)
    for cell in cells:
        table.add_row(*_row(cell))
    return table


def _row(cell: Cell) -> list[str]:
    return [
        cell.model,
        cell.rival,
        f"{cell.peak / _MiB:.1f}",
        f"{cell.theirs:.4g}",
        f"{cell.ours:.4g}",
        f"{cell.ratio:.2f}" + (" LOST" if cell.lost else ""),
        f"{cell.most:.2f}",
        f"{cell.seconds:.2f}",
    ]


def _write(
    options: argparse.Namespace,
    cells: list[Cell],
    summaries: list[dict[str, object]],
    depths: list[dict[str, object]],
) -> None:
    quick = "-quick" if options.quick else ""
    stem = f"{datetime.date.today().isoformat()}-solver-{options.objective}{quick}"
    report = {
        "schema": 1,
        "objective": options.objective,
        "versions": harness.versions(),
        "machine": harness.machine("cpu"),
        "cells": [asdict(cell) for cell in cells],
        "models": summaries,
        "depths": depths,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{stem}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    tables = [
        [tuple(rows[0]), *(tuple(_shown(value) for value in row.values()) for row in rows)]
        for rows in (summaries, depths)
    ]
    tables.append([_COLUMNS, *(tuple(_row(cell)) for cell in cells)])
    path.with_suffix(".md").write_text("\n".join(harness.markdown(table) for table in tables))
    print(path)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
