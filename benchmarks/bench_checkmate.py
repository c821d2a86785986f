"""Checkmate's own problem on its own networks: fxzero's solver against the optimum.

    python benchmarks/bench_checkmate.py [--networks vgg16,mobilenet] [--budgets 4] [--nodes 3000]

Every layer is one node: its price is the FLOPs of its forward and its memory the bytes of its
output in float32, as in "Checkmate: Breaking the Memory Wall with Optimal Tensor Rematerialization"
(Jain et al., MLSys 2020).  The backward of a layer reads its input and its output and holds both
their gradients.  At each budget the optimum is looked for with the program over time (any value
recomputed any number of times, ``fxzero/solver/exact.py``, equal to brute force in the tests).
Where that does not end within ``--nodes``, the bound that no schedule undercuts stands alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import harness

from fxzero.solver.bound import price_bound
from fxzero.solver.exact import ExactProgram
from fxzero.solver.frames import fullest_steps
from fxzero.solver.problem import Operator, Problem
from fxzero.solver.schedule import Schedule
from fxzero.solver.search import Solver

_RESULTS = Path(__file__).resolve().parent / "results"
_VGG = {
    "vgg16": (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
    "vgg19": (64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4, 0),
}
_MOBILE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2))
_COLUMNS = ("network", "budget GiB", "fxzero %", "optimum %", "bound %", "solve s", "exact s")
_DECISIONS = 1500  # of the exact program; with more of them it does not end
_GiB = 2**30


@dataclass(frozen=True)
class Layer:
    """A node of a network: ``size`` values and ``flops`` for one sample, made from ``inputs``."""

    inputs: tuple[int, ...]
    size: int
    flops: int


@dataclass(frozen=True)
class Cell:
    """One budget of one network; overheads are relative to the FLOPs of one forward and backward.

    Attributes:
        optimum: of any schedule, None where it was not proven.
        bound: no schedule is below it.
    """

    network: str
    budget: int
    ours: float
    optimum: float | None
    bound: float
    seconds: float
    exact_seconds: float


class Network:
    """Layers one after the other; shapes are (channels, side)."""

    def __init__(self, side: int, channels: int = 3) -> None:
        self.layers: list[Layer] = []
        self.shapes: list[tuple[int, int]] = []
        self.image = (channels, side)

    def conv(
        self, channels: int, kernel: int, *, after: int = -1, stride: int = 1, deep: bool = False
    ) -> int:
        """A convolution, with its activation and its norm; ``deep`` means one filter a channel."""
        before, side = self._shape(after)
        side = -(-side // stride)
        macs = channels * side * side * kernel * kernel * (1 if deep else before)
        return self._add((after,), (channels, side), 2 * macs)

    def pool(self, factor: int, *, after: int = -1) -> int:
        channels, side = self._shape(after)
        size = channels * side * side
        return self._add((after,), (channels, side // factor), size)

    def dense(self, units: int) -> int:
        channels, side = self._shape(-1)
        return self._add((-1,), (units, 1), 2 * units * channels * side * side)

    def upscale(self) -> int:
        channels, side = self._shape(-1)
        return self._add((-1,), (channels, 2 * side), 4 * channels * side * side)

    def join(self, left: int, right: int, *, concatenate: bool) -> int:
        (one, side), (other, _) = self._shape(left), self._shape(right)
        channels = one + other if concatenate else one
        return self._add((left, right), (channels, side), channels * side * side)

    def _shape(self, layer: int) -> tuple[int, int]:
        return self.shapes[layer] if self.shapes else self.image

    def _add(self, inputs: tuple[int, ...], shape: tuple[int, int], flops: int) -> int:
        here = len(self.layers)
        resolved = tuple(i % here for i in inputs) if here else ()
        self.layers.append(Layer(resolved, shape[0] * shape[1] ** 2, flops))
        self.shapes.append(shape)
        return here


def vgg(name: str) -> Network:
    network = Network(224)
    for channels in _VGG[name]:
        if channels:
            network.conv(channels, 3)
        else:
            network.pool(2)
    for units in (4096, 4096, 1000):
        network.dense(units)
    return network


def mobilenet() -> Network:
    network = Network(224)
    network.conv(32, 3, stride=2)
    for channels, stride in (*_MOBILE, (1024, 1)):
        network.conv(network.shapes[-1][0], 3, stride=stride, deep=True)
        network.conv(channels, 1)
    network.pool(7)
    network.dense(1000)
    return network


def unet() -> Network:
    network = Network(416)
    skips = []
    for channels in (64, 128, 256, 512):
        network.conv(channels, 3)
        skips.append(network.conv(channels, 3))
        network.pool(2)
    for _ in range(2):
        network.conv(1024, 3)
    for channels, skip in zip((512, 256, 128, 64), reversed(skips), strict=True):
        network.upscale()
        up = network.conv(channels, 2)
        network.join(skip, up, concatenate=True)
        network.conv(channels, 3)
        network.conv(channels, 3)
    network.conv(2, 1)
    return network


def resnet50() -> Network:
    network = Network(224)
    network.conv(64, 7, stride=2)
    last = network.pool(2)
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            network.conv(width, 1, after=last)
            network.conv(width, 3, stride=stride)
            out = network.conv(4 * width, 1)
            short = last if block else network.conv(4 * width, 1, after=last, stride=stride)
            last = network.join(short, out, concatenate=False)
    network.pool(7)
    network.dense(1000)
    return network


# Network and the batch of its figure in the paper.
NETWORKS = {
    "vgg16": (lambda: vgg("vgg16"), 256),
    "vgg19": (lambda: vgg("vgg19"), 256),
    "mobilenet": (mobilenet, 512),
    "unet": (unet, 32),
    "resnet50": (resnet50, 256),
}


def problem_of(network: Network, batch: int) -> Problem:
    """Which layers' outputs to keep for the backward of a network."""
    layers = network.layers
    count = len(layers)
    sizes = tuple(4 * batch * layer.size for layer in layers)
    readers = {i: [j for j, layer in enumerate(layers) if i in layer.inputs] for i in range(count)}
    order = list(reversed(range(count)))
    left = [sizes[count - 1], *(_gradients(layers, sizes, step) for step in order)]
    forward = sum(batch * layer.flops for layer in layers)
    return Problem(
        bytes=sizes,
        operators=tuple(
            Operator(f"layer{i}", i, layer.inputs, (i,), 1e-12 * batch * layer.flops,
                     batch * layer.flops, 0, True)
            for i, layer in enumerate(layers)
        ),
        maker=tuple(range(count)),
        death=tuple(max([i, *readers[i]]) for i in range(count)),
        forward_steps=count,
        steps=tuple(f"gradient{i}" for i in order),
        reads=tuple(tuple(sorted({i, *layers[i].inputs})) for i in order),
        base=tuple(left[count - 1 - i] + sum(sizes[j] for j in layers[i].inputs) for i in order),
        base_after=tuple(left[1:]),
        base_before=left[0],
        base_loss=left[0],
        fixed=0,
        outputs=frozenset(),
        held=frozenset(),
        must_save=frozenset(),
        must_recompute=frozenset(),
        seconds=3e-12 * forward,
        flops=3 * forward,
    )  # fmt: skip


def _gradients(layers: list[Layer], sizes: tuple[int, ...], step: int) -> int:
    """Bytes of the gradients that wait after the backward of layer ``step``."""
    waiting = {j for layer in layers[step:] for j in layer.inputs if j < step}
    return sum(sizes[j] for j in waiting)


def cells(name: str, budgets: int, nodes: int) -> Iterator[Cell]:
    make, batch = NETWORKS[name]
    problem = problem_of(make(), batch)
    solver = Solver(problem, objective="flops")
    low, high = solver.smallest.peak, solver.everything.peak
    for part in range(budgets):
        budget = low + (high - low) * part // budgets
        start = time.perf_counter()
        solution = solver.solve(budget)
        seconds = time.perf_counter() - start
        assert solution is not None
        start = time.perf_counter()
        exact = _optimum(problem, solver, budget, nodes)
        exact_seconds = time.perf_counter() - start
        bound = price_bound(
            problem, solver.operator_price, budget, fullest_steps(solution.schedule, 4)
        )
        optimum = None
        if exact is not None:
            bound = max(bound, exact[1])
            best = solver.price(exact[0])
            optimum = best if best <= bound * 1.0001 else None
        whole = problem.flops
        yield Cell(
            name,
            budget,
            solver.price(solution.schedule) / whole,
            None if optimum is None else optimum / whole,
            bound / whole,
            seconds,
            exact_seconds,
        )


def _optimum(
    problem: Problem, solver: Solver, budget: int, nodes: int
) -> tuple[Schedule, float] | None:
    """The best schedule that the exact program finds, and its bound."""
    if not ExactProgram.serves(problem, _DECISIONS):
        return None
    return ExactProgram(problem, solver.operator_price).solve(budget, nodes=nodes)


def _row(cell: Cell) -> tuple[str, ...]:
    optimum = "not proven" if cell.optimum is None else f"{100 * cell.optimum:.2f}"
    return (
        cell.network,
        f"{cell.budget / _GiB:.2f}",
        f"{100 * cell.ours:.2f}",
        optimum,
        f"{100 * cell.bound:.2f}",
        f"{cell.seconds:.2f}",
        f"{cell.exact_seconds:.1f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--budgets", type=int, default=4, help="budgets a network")
    parser.add_argument("--nodes", type=int, default=3000, help="nodes of the exact program")
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args()
    rows: list[Cell] = []
    for name in options.networks.split(","):
        found = list(cells(name, options.budgets, options.nodes))
        harness.show([_COLUMNS, *map(_row, found)])
        rows += found
    above = [r for r in rows if r.optimum is not None and r.ours > r.optimum + 1e-4]
    proven = sum(row.optimum is not None for row in rows)
    print(f"{len(rows)} budgets, {proven} optima proven, above the optimum: {above}")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{datetime.date.today().isoformat()}-checkmate.json"
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    path.with_suffix(".md").write_text(harness.markdown([_COLUMNS, *map(_row, rows)]))
    print(path)


if __name__ == "__main__":
    main()
