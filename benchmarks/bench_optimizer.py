"""Time of optimizers' steps on a CPU against torch's fused AdamW, on the same parameters.

    python benchmarks/bench_optimizer.py [--rounds 15]

Two sets of parameters of about 40 million elements each: many small tensors, and few large ones.
Every optimizer has parameters and gradients of its own; all are timed in turn, round after round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import torch
from torch import nn

from fxzero import optim

_RESULTS = Path(__file__).resolve().parent / "results"
_SHAPES = {
    "many small": [(96, 96), (96,), (384, 96), (384,)] * 800,
    "few large": [(4096, 2048), (2048, 4096), (16384, 1024), (4096, 2048)],
}
_VARIANTS: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "torch AdamW, fused": (torch.optim.AdamW, torch.float32, {"fused": True}),
    "torch AdamW, foreach": (torch.optim.AdamW, torch.float32, {"foreach": True}),
    "fxzero AdamW": (optim.AdamW, torch.float32, {}),
    "fxzero AdamW, split master": (optim.AdamW, torch.bfloat16, {}),
    "fxzero AdamW, split master, float32 moments": (
        optim.AdamW,
        torch.bfloat16,
        {"moments": "float32"},
    ),
    "fxzero AdamW, 24 bits, int8 moments": (
        optim.AdamW,
        torch.bfloat16,
        {"master_bits": 24, "moments": "int8"},
    ),
    "fxzero AdamW, stochastic rounding": (
        optim.AdamW,
        torch.bfloat16,
        {"stochastic_rounding": True},
    ),
    "fxzero Lion": (optim.Lion, torch.float32, {}),
    "fxzero SGD": (optim.SGD, torch.float32, {}),
}
_BASE = "torch AdamW, fused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found: dict[str, dict[str, float]] = {}
    for name, shapes in _SHAPES.items():
        steps = {variant: _step(shapes, *recipe) for variant, recipe in _VARIANTS.items()}
        times = harness.seconds_in_turn(steps, options.rounds)
        found[name] = {variant: statistics.median(rounds) for variant, rounds in times.items()}
    heads = ("optimizer", *(f"{name}: ms, of fused" for name in _SHAPES))
    cells = [heads]
    for variant in _VARIANTS:
        times = [found[name][variant] for name in _SHAPES]
        bases = [found[name][_BASE] for name in _SHAPES]
        texts = (f"{1e3 * t:.1f}, {t / b:.2f}" for t, b in zip(times, bases, strict=True))
        cells.append((variant, *texts))
    harness.show(cells)
    path = options.output / f"{datetime.date.today()}-optimizer-cpu.json"
    facts = {"versions": harness.versions(), "machine": harness.machine("cpu")}
    threads = {"threads": torch.get_num_threads(), "rounds": options.rounds}
    path.write_text(json.dumps(facts | threads | {"seconds": found}, indent=1) + "\n")
    path.with_suffix(".md").write_text(harness.markdown(cells))


def _step(
    shapes: list[tuple[int, ...]], make: Any, dtype: torch.dtype, options: dict[str, Any]
) -> Callable[[], Any]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = make(parameters, lr=1e-4, **options)
    optimizer.step()
    return optimizer.step  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
