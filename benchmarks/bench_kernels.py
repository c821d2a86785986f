"""Bandwidth of each kernel against a copy on the same device, and steps against torch's optimizers.

    python benchmarks/bench_kernels.py [--rounds 9] [--seconds 240]

Kernels that do nothing but move memory are as good as the share of a copy's bandwidth that they
reach.  Bytes are those that a kernel must read and write, from a table; time is between two CUDA
events with as many calls between them as take 20 ms, so that launches hide behind kernels.  Each
kernel takes turns with the copy, round after round, and what counts are medians.

Optimizers take turns with each other on two sets of parameters: many small tensors, and few large
ones.  Here launches count.

``--device cpu --small --rounds 1`` runs what stands for kernels on a CPU, to try the script.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn

from fxzero import optim
from fxzero.kernels import eager_pack, eager_quantize
from fxzero.optim.forms import Form, Numerics

_RESULTS = Path(__file__).resolve().parent / "results"
_QUANTUM, _RANKS = 256, 8
_LONG_ENOUGH = 0.02  # seconds between two events
_ROW = 4096
Run = Callable[[], Any]
Shapes = list[tuple[int, ...]]
Recipe = tuple[Any, torch.dtype, dict[str, Any]]

_FLOAT, _SHORT = torch.float32, torch.bfloat16
_STEPS: dict[str, Recipe] = {
    "AdamW": (optim.AdamW, _FLOAT, {}),
    "AdamW, bfloat16 moments": (optim.AdamW, _FLOAT, {"moments": "bfloat16"}),
    "AdamW, split master": (optim.AdamW, _SHORT, {}),
    "AdamW, split master, float32 moments": (optim.AdamW, _SHORT, {"moments": "float32"}),
    "AdamW, 24 bits, int8 moments": (optim.AdamW, _SHORT, {"master_bits": 24, "moments": "int8"}),
    "AdamW, rounded to nearest": (optim.AdamW, _SHORT, {"master_bits": 16}),
    "AdamW, stochastic rounding": (optim.AdamW, _SHORT, {"stochastic_rounding": True}),
    "AdamW, stochastic rounding, int8 moments": (
        optim.AdamW,
        _SHORT,
        {"stochastic_rounding": True, "moments": "int8"},
    ),
    "Lion": (optim.Lion, _FLOAT, {}),
    "Lion, split master": (optim.Lion, _SHORT, {}),
    "SGD": (optim.SGD, _FLOAT, {}),
    "SGD, split master": (optim.SGD, _SHORT, {}),
}
_RIVALS: dict[str, Recipe] = {
    "torch AdamW, fused": (torch.optim.AdamW, _FLOAT, {"fused": True}),
    "torch AdamW, foreach": (torch.optim.AdamW, _FLOAT, {"foreach": True}),
    "torch AdamW, fused, bfloat16": (torch.optim.AdamW, _SHORT, {"fused": True}),
}
_BASE = "torch AdamW, fused"


@dataclass(frozen=True)
class Case:
    """A kernel.

    Attributes:
        goal: share of the copy's bandwidth that it should reach.
        build: from a device and a number of elements: bytes that one call moves, and the call.
    """

    name: str
    goal: float
    build: Callable[[str, int], tuple[float, Run]]


# Bytes that must be read and written for each element


def step_bytes(form: Form, moments: int, gradient: torch.dtype) -> float:
    """Of an optimizer's step: weight and states are read and written, the gradient is read."""
    many = 1 << 20  # of which scales are whole numbers
    state = form.state_bytes(many, moments) / many
    return 2 * (form.weight.itemsize + state) + gradient.itemsize


def code_bytes(kind: str, quantum: int) -> float:
    """Of a quantized number with its share of a scale."""
    return eager_quantize.codes_of(quantum, kind) / quantum + 4 / quantum


def reduce_bytes(kind: str, quantum: int, ranks: int, out: torch.dtype) -> float:
    """Of the mean of so many pieces, for each element of the mean."""
    return ranks * code_bytes(kind, quantum) + out.itemsize


# What is measured


def cases() -> list[Case]:
    found = [Case(name, 0.9, partial(_step_case, recipe)) for name, recipe in _STEPS.items()]
    for kind in eager_quantize.CODE_TYPE:
        for dtype in (_FLOAT, _SHORT):
            what = f"{kind}, {_name(dtype)}"
            found += [
                Case(f"quantize to {what}", 0.8, partial(_quantize_case, kind, dtype, False)),
                Case(f"dequantize {what}", 0.8, partial(_reduce_case, kind, dtype, 1)),
            ]
        found += [
            Case(
                f"quantize to {kind}, bfloat16, stochastically",
                0.8,
                partial(_quantize_case, kind, _SHORT, True),
            ),
            Case(
                f"mean of {_RANKS} pieces of {kind}, float32",
                0.8,
                partial(_reduce_case, kind, _FLOAT, _RANKS),
            ),
        ]
    for outside, inside in ((_FLOAT, _FLOAT), (_FLOAT, _SHORT), (_SHORT, _SHORT)):
        names = _name(outside), _name(inside)
        pair = outside, inside
        found += [
            Case("pack {} into {}".format(*names), 0.9, partial(_pack_case, *pair, False)),
            Case("unpack {1} into {0}".format(*names), 0.9, partial(_pack_case, *pair, True)),
        ]
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _step_case(recipe: Recipe, device: str, elements: int) -> tuple[float, Run]:
    make, dtype, options = recipe
    shapes: Shapes = [(max(elements // 4 // _ROW, 1), _ROW)] * 4
    numerics = Numerics.of(
        options.get("master_bits"),
        options.get("stochastic_rounding", False),
        options.get("moments"),
    )
    form = numerics.form(torch.empty(shapes[0], dtype=dtype, device="meta"))
    size = step_bytes(form, len(make.rule.moments), dtype)
    return size * _count(shapes), _step(recipe, shapes, device)


def _step(recipe: Recipe, shapes: Shapes, device: str) -> Run:
    make, dtype, options = recipe
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    parameters = [nn.Parameter(random(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = random(tuple(parameter.shape))
    return make(parameters, lr=1e-4, **options).step  # type: ignore[no-any-return]


def _quantize_case(
    kind: str, dtype: torch.dtype, stochastic: bool, device: str, elements: int
) -> tuple[float, Run]:
    x = torch.randn(elements, device=device, dtype=dtype)
    codes, scales = _empty_codes(kind, elements, device)
    key = torch.tensor([1, 2, 8], device=device) if stochastic else None
    size = dtype.itemsize + code_bytes(kind, _QUANTUM)
    return size * elements, partial(_quantizers(device).quantize, x, codes, scales, kind, key)


def _reduce_case(
    kind: str, dtype: torch.dtype, ranks: int, device: str, elements: int
) -> tuple[float, Run]:
    codes, scales = _empty_codes(kind, elements, device)
    kernels = _quantizers(device)
    kernels.quantize(torch.randn(elements, device=device), codes, scales, kind)
    out = torch.empty(elements // ranks, device=device, dtype=dtype)
    size = reduce_bytes(kind, _QUANTUM, ranks, dtype)
    return size * len(out), partial(kernels.dequantize_reduce, codes, scales, out, kind)


def _empty_codes(kind: str, elements: int, device: str) -> tuple[Tensor, Tensor]:
    count, dtype = eager_quantize.codes_of(elements, kind), eager_quantize.CODE_TYPE[kind]
    codes = torch.empty(count, dtype=dtype, device=device)
    return codes, torch.empty(elements // _QUANTUM, device=device)


def _quantizers(device: str) -> Any:
    if device == "cpu":
        return eager_quantize
    from fxzero.kernels import quantize

    return quantize


def _pack_case(
    outside: torch.dtype, inside: torch.dtype, unpacks: bool, device: str, elements: int
) -> tuple[float, Run]:
    # As in a model: matrices, each with two short vectors behind it.
    parts = max(elements // _ROW**2, 1)
    sizes = [elements // parts - 2 * _ROW, _ROW, _ROW] * parts
    tensors = [torch.ones(size, device=device, dtype=outside) for size in sizes]
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // 16) * 16)
    bucket = torch.ones(places.pop(), device=device, dtype=inside)
    factor = torch.ones(1, device=device)
    size = (outside.itemsize + inside.itemsize) * sum(sizes)
    if device == "cpu":
        move = eager_pack.unpack if unpacks else eager_pack.pack
        return size, partial(move, tensors, places, bucket, factor)
    from fxzero.kernels import pack

    blocks = pack.blocks_of(tensors, places)
    launch = pack.unpack if unpacks else pack.pack

    def run() -> None:
        assert tensors  # the table only points to them
        launch(blocks, bucket, factor)

    return size, run


def _copy(device: str, size: int) -> Run:
    """A copy that reads and writes so many bytes each."""
    source = torch.ones(size // 4, device=device)
    return partial(torch.empty_like(source).copy_, source)


# How long it takes


def _seconds(run: Run, repeats: int, device: str) -> float:
    """Time of one call."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / repeats


def in_turn(steps: Mapping[str, Run], rounds: int, device: str) -> dict[str, float]:
    """Medians over rounds in which each step runs for as long."""
    repeats = {}
    for name, step in steps.items():
        step()  # compiles
        repeats[name] = 1
        if device != "cpu":
            _seconds(step, 3, device)
            once = _seconds(step, 3, device)
            repeats[name] = max(1, math.ceil(_LONG_ENOUGH / once))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_seconds(step, repeats[name], device))
    return {name: statistics.median(each) for name, each in times.items()}


# How much of it there is


def elements_for(memory: int) -> int:
    """Elements of one kernel in so many bytes: 2**28 in 15 GB, of which a step takes 16 each."""
    return 1 << min(29, max(16, (memory // 48).bit_length() - 1))


def shapes_for(memory: int, optimizers: int) -> dict[str, Shapes]:
    """Sets of parameters of which each of so many optimizers can have its own."""
    each = memory // 2 // optimizers // 16  # weight, gradient and two moments in float32
    block: Shapes = [(96, 96), (96,), (384, 96), (384,)]
    many = min(800, max(1, each // _count(block)))
    few = min(32, max(1, each // _ROW**2))
    large = (_ROW, _ROW) if each >= _ROW**2 else (16, _ROW)
    return {"many small": block * many, "few large": [large] * few}


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _free_memory(device: str, small: bool) -> int:
    if small or device == "cpu":
        return 1 << 22
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


# All of it, as tables


def main() -> None:
    options = _arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_kernels needs a CUDA device, and torch finds none here")
    torch.manual_seed(0)
    end = time.perf_counter() + options.seconds
    steps = _measure_steps(options)
    kernels = _measure_kernels(options, end)
    tables = [_step_cells(steps), _kernel_cells(kernels)]
    for cells in tables:
        harness.show(cells)
    _save(options, {"steps": steps, "kernels": kernels}, tables)
    failed = [name for name, row in kernels.items() if "failed" in row]
    if failed:
        sys.exit(f"{len(failed)} of {len(kernels)} kernels were not measured")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--rounds", type=int, default=9, help="times each is measured")
    parser.add_argument("--seconds", type=float, default=240, help="begin no kernel later")
    parser.add_argument("--small", action="store_true", help="few elements, to try the script")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="directory for results")
    return parser.parse_args()


def _measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """By set of parameters: elements, and seconds of each optimizer's step."""
    recipes = _RIVALS | {f"fxzero {name}": recipe for name, recipe in _STEPS.items()}
    found = {}
    sets = shapes_for(_free_memory(options.device, options.small), len(recipes))
    for name, shapes in sets.items():
        _tell(f"steps, {name}")
        steps = {each: _step(recipe, shapes, options.device) for each, recipe in recipes.items()}
        seconds = in_turn(steps, options.rounds, options.device)
        found[name] = {"elements": _count(shapes), "tensors": len(shapes), "seconds": seconds}
        del steps
        gc.collect()
    return found


def _measure_kernels(options: argparse.Namespace, end: float) -> dict[str, Any]:
    """By kernel: bytes, seconds, and the copy's; or why it failed."""
    found: dict[str, Any] = {}
    for case in cases():
        _tell(case.name)
        if time.perf_counter() > end:
            found[case.name] = {"failed": f"{options.seconds:.0f} s were over"}
            continue
        try:
            found[case.name] = _measure_kernel(case, options)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            found[case.name] = {"failed": lines[0]}
        gc.collect()
    return found


def _measure_kernel(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    elements = elements_for(_free_memory(options.device, options.small))
    size, run = case.build(options.device, elements)
    copied = 4 * elements
    both = {"kernel": run, "copy": _copy(options.device, copied)}
    seconds = in_turn(both, options.rounds, options.device)
    reached = {"kernel": size / seconds["kernel"], "copy": 2 * copied / seconds["copy"]}
    return {
        "elements": elements,
        "bytes": size,
        "seconds": seconds,
        "bytes_per_second": reached,
        "share": reached["kernel"] / reached["copy"],
        "goal": case.goal,
    }


def _tell(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _step_cells(steps: Mapping[str, Any]) -> list[tuple[str, ...]]:
    heads = [f"{n}: ms, of {_BASE}" for n in steps]
    cells = [("optimizer", *heads)]
    for name in next(iter(steps.values()))["seconds"]:
        times = [(each["seconds"][name], each["seconds"][_BASE]) for each in steps.values()]
        cells.append((name, *(f"{1e3 * t:.3f}, {t / base:.2f}" for t, base in times)))
    return cells


def _kernel_cells(kernels: Mapping[str, Any]) -> list[tuple[str, ...]]:
    cells = [("kernel", "ms", "GB/s", "copy GB/s", "share", "goal", "")]
    for name, row in kernels.items():
        if "failed" in row:
            cells.append((name, "", "", "", "", "", f"failed: {row['failed']}"))
            continue
        speed, copy = (row["bytes_per_second"][each] / 1e9 for each in ("kernel", "copy"))
        milliseconds = f"{1e3 * row['seconds']['kernel']:.3f}"
        missed = "" if row["share"] >= row["goal"] else "below its goal"
        share, goal = f"{row['share']:.2f}", f"{row['goal']:.2f}"
        cells.append((name, milliseconds, f"{speed:.0f}", f"{copy:.0f}", share, goal, missed))
    return cells


def _save(
    options: argparse.Namespace, found: dict[str, Any], tables: list[list[tuple[str, ...]]]
) -> None:
    today = datetime.date.today().isoformat()
    report = {
        "schema": 1,
        "date": today,
        "rounds": options.rounds,
        "versions": harness.versions(),
        "machine": harness.machine(options.device),
        **found,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    small = "-small" if options.small else ""
    path = options.output / f"{today}-kernels{small}-{options.device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(map(harness.markdown, tables)))
    print(path)


if __name__ == "__main__":
    main()
