"""Measures variants of one training step side by side, and shows what was measured.

A step is forward and backward from gradients that are None; no optimizer runs.  Every variant has
its own copy of the model.  All are prepared and checked against eager first; then time is taken in
rounds that run each variant once, so that a change of the machine's speed meets all of them.
"""

from __future__ import annotations

import copy
import gc
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import Case
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from variants import EAGER, Setting, Variant

import fxzero
from fxzero.allocations import peak_of_allocations

MIB = 2**20
_SEED = 1234
_WARM_UP = 3  # fxzero may plan again after the first step, and for other gradients after the second
# How far the loss goes to each side. Models of transformers round it to float32, so short steps see
# noise, long ones curvature.
_DERIVATIVE_STEP, _DERIVATIVE_TOLERANCE = 5e-4, 3e-3

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Peak:
    """Most bytes alive at once in a step: parameters, buffers and inputs plus all that it makes.

    Attributes:
        bytes: by ``method``, the same for all rows: "allocator" (profiler record) or "cuda".
        tensor_bytes: storages alone as ``fxzero.measure`` counts them, scratch memory of operators
            left out, which plans count as far as it was measured.
    """

    bytes: int
    method: str
    tensor_bytes: int


@dataclass(frozen=True)
class Check:
    """A step against eager's under the same seed.

    Attributes:
        exact: loss and all gradients are equal bit for bit.
        loss: relative difference of the loss.
        gradients: length of the difference of all gradients relative to that of the gradients.  Not
            by parameter: some gradients are zero but for rounding, as those of key biases.
        buffers: whether all buffers are equal after the same number of steps.
        derivative: relative error of the gradient against finite differences; None: not taken.
    """

    exact: bool
    loss: float
    gradients: float
    buffers: bool
    derivative: float | None


@dataclass(frozen=True)
class Row:
    """What was measured of one variant; ``failed`` is the first line of what it raised.

    ``planned_seconds`` comes from operators timed one by one; what fusion saves is modelled.
    """

    name: str
    failed: str | None = None
    budget_bytes: int | None = None
    planned_bytes: int | None = None
    planned_seconds: float | None = None
    peak: Peak | None = None
    check: Check | None = None
    first_step_seconds: float | None = None
    seconds: tuple[float, ...] = ()

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Result:
    """What a step left behind: the loss and, by name, gradients and buffers."""

    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A variant that is compiled, warm and checked."""

    row: Row
    module: nn.Module
    step: Step
    result: Result


def run(case: Case, variants: Sequence[Variant], rounds: int) -> list[Row]:
    """All that is known about every variant, in their order; eager must be the first."""
    peaks: dict[str, int] = {}
    prepared: dict[str, Prepared] = {}
    failed: dict[str, Row] = {}
    for variant in variants:
        _progress(variant.name)
        reference = prepared[EAGER].result if prepared else None
        try:
            ready = prepare(case, variant, peaks, reference)
        except Exception as error:
            if variant.name == EAGER:
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            _progress(f"  failed: {lines[0]}")
            failed[variant.name] = Row(variant.name, failed=lines[0])
            continue
        prepared[variant.name] = ready
        assert ready.row.peak is not None
        peaks[variant.name] = ready.row.peak.bytes
    times: dict[str, list[float]] = {name: [] for name in prepared}
    for number in range(rounds):
        _progress(f"round {number + 1} of {rounds}")
        for name in _shuffled(prepared, number):
            times[name] += seconds(prepared[name], 1)
    rows = failed | {n: replace(p.row, seconds=tuple(times[n])) for n, p in prepared.items()}
    return [rows[variant.name] for variant in variants]


def _shuffled(names: Iterable[str], number: int) -> list[str]:
    """The names in the order of a round: what ran before leaves caches and heap as they are."""
    order = list(names)
    random.Random(number).shuffle(order)
    return order


def seconds_in_turn(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Wall-clock times of each step, on all ranks of the process group if any, one a round."""
    together = dist.barrier if dist.is_initialized() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        if not dist.is_initialized() or dist.get_rank() == 0:
            _progress(f"round {number + 1} of {rounds}")
        for name, step in steps.items():
            together()
            start = time.perf_counter()
            step()
            together()
            times[name].append(time.perf_counter() - start)
    return times


def prepare(
    case: Case, variant: Variant, peaks: dict[str, int], reference: Result | None
) -> Prepared:
    """Compiles, warms up and measures a variant, and compares its step with a result, if any.

    Args:
        peaks: measured bytes of the variants that its budget is made of.
    """
    module = copy.deepcopy(case.module)
    start = time.perf_counter()
    model = variant.build(Setting(module, case.inputs, case.blocks, peaks))
    step = _step(model, case)
    step()
    first = time.perf_counter() - start
    for _ in range(_WARM_UP - 1):
        result = _seeded(step, module)
    check = _compare(result, reference or result)
    if case.dropout:
        check = replace(check, derivative=_derivative_error(model, module, case, result))
    peak = _peak(step, module, case)
    _forget(module)
    plan = getattr(model, "plan", None)
    row = Row(
        variant.name,
        budget_bytes=plan and plan.request.memory_budget,
        planned_bytes=plan and plan.peak_bytes,
        planned_seconds=plan and plan.step_seconds,
        peak=peak,
        check=check,
        first_step_seconds=first,
    )
    return Prepared(row, module, step, result)


def _step(model: nn.Module, case: Case) -> Step:
    inputs = case.inputs

    def step() -> Tensor:
        loss = model(**inputs)
        loss.backward()
        return loss.detach()

    return step


def seconds(ready: Prepared, steps: int) -> list[float]:
    """What steps take, one after the other."""
    device, times = next(ready.module.parameters()).device.type, []
    for _ in range(steps):
        ready.module.zero_grad(set_to_none=True)
        times.append(_seconds(ready.step, device))
    ready.module.zero_grad(set_to_none=True)
    return times


def _seconds(step: Step, device: str) -> float:
    """Processor time on CPU, where other programs disturb wall-clock time; that on CUDA."""
    if device != "cuda":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(step: Step, module: nn.Module, case: Case) -> Peak:
    own = _storage_bytes([*module.parameters(), *module.buffers(), *case.inputs.values()])
    _forget(module)
    measured = fxzero.measure(step)
    total = measured.peak_bytes - measured.baseline_bytes + own
    tensors = measured.tensor_bytes - measured.baseline_bytes + own
    if measured.method != "tensors":
        return Peak(total, measured.method, tensors)
    _forget(module)
    return Peak(own + _most_allocated(step), "allocator", tensors)


def _most_allocated(step: Step) -> int:
    """Most bytes of CPU memory allocated at once since the step began, by the profiler's record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    return peak_of_allocations(record)


def _forget(module: nn.Module) -> None:
    module.zero_grad(set_to_none=True)
    gc.collect()


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _seeded(step: Step, module: nn.Module) -> Result:
    module.zero_grad(set_to_none=True)
    torch.manual_seed(_SEED)
    loss = step()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return Result(loss, gradients, {n: b.clone() for n, b in module.named_buffers()})


def _compare(result: Result, reference: Result) -> Check:
    names = sorted(result.gradients.keys() | reference.gradients.keys())
    zero = torch.zeros((), device=reference.loss.device)  # for a parameter without a gradient
    pairs = [(result.gradients.get(n, zero), reference.gradients.get(n, zero)) for n in names]
    size = math.hypot(*(_norm(wanted) for _, wanted in pairs))
    return Check(
        exact=all(torch.equal(*pair) for pair in [(result.loss, reference.loss), *pairs]),
        loss=abs((result.loss - reference.loss) / reference.loss).item(),
        gradients=math.hypot(*(_norm(found - wanted) for found, wanted in pairs)) / size,
        buffers=all(torch.equal(b, reference.buffers[n]) for n, b in result.buffers.items()),
        derivative=None,
    )


def _norm(tensor: Tensor) -> float:
    return tensor.norm().item()


def _derivative_error(model: nn.Module, module: nn.Module, case: Case, result: Result) -> float:
    """The gradient's length against the slope of the loss along it, under one seed.

    Right for any stream of random numbers, as long as forward and backward see the same one.
    """
    length = math.hypot(*(_norm(gradient) for gradient in result.gradients.values()))
    reach = _DERIVATIVE_STEP / length

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            for name, gradient in result.gradients.items():
                module.get_parameter(name).add_(gradient, alpha=distance / length)
        torch.manual_seed(_SEED)
        return float(model(**case.inputs).detach())

    below = loss_at(-reach)
    above = loss_at(2 * reach)
    loss_at(-reach)
    return abs((above - below) / (2 * reach) - length) / length


def _progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


# What was measured, as text


def columns(rows: Sequence[Row], with_dropout: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's cells, the first line being the heads."""
    heads = (
        "variant",
        "budget MiB",
        "peak MiB",
        "peak / eager",
        "by",
        "tensors MiB",
        "planned / peak",
        "time / eager",
        "planned / time",
        "first step s",
        "loss and gradients",
        "with dropout",
    )
    checks = {row.name: row for row in with_dropout}
    return [heads, *(_cells(row, rows[0], checks[row.name]) for row in rows)]


def _cells(row: Row, eager: Row, dropout: Row) -> tuple[str, ...]:
    if row.peak is None or row.check is None:
        return (row.name, *[""] * 9, f"failed: {row.failed}", "")
    assert eager.peak is not None
    return (
        row.name,
        _mib(row.budget_bytes),
        _mib(row.peak.bytes),
        f"{row.peak.bytes / eager.peak.bytes:.2f}",
        row.peak.method,
        _mib(row.peak.tensor_bytes),
        f"{row.planned_bytes / row.peak.bytes:.3f}" if row.planned_bytes else "",
        f"{row.median / eager.median:.2f}" if row.median and eager.median else "",
        f"{row.planned_seconds / row.median:.2f}" if row.planned_seconds and row.median else "",
        f"{row.first_step_seconds:.1f}",
        _verdict(row.check),
        f"failed: {dropout.failed}" if dropout.check is None else _dropout_verdict(dropout.check),
    )


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:.1f}"


def _verdict(check: Check) -> str:
    text = "exact" if check.exact else f"{max(check.loss, check.gradients):.0e}"
    return text if check.buffers else f"{text}, buffers differ"


def _dropout_verdict(check: Check) -> str:
    if check.exact:
        return "exact"
    if check.derivative is not None and check.derivative > _DERIVATIVE_TOLERANCE:
        return f"WRONG by {check.derivative:.1%}"
    if check.gradients > _DERIVATIVE_TOLERANCE:
        return "right, other masks"
    return f"{max(check.loss, check.gradients):.0e}"


def show(cells: Sequence[tuple[str, ...]]) -> None:
    """Prints the table, however narrow the terminal."""
    table = Table()
    for head, sample in zip(cells[0], cells[1], strict=True):
        table.add_column(head, justify="right" if sample[:1].isdigit() else "left")
    for line in cells[1:]:
        table.add_row(*line)
    Console(markup=False, highlight=False, width=200).print(table)


def markdown(cells: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]) + "\n"


def as_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) | {"median_seconds": row.median} for row in rows]


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "triton")
    found = {each.name: each.version for each in metadata.distributions() if each.name in names}
    return {"python": platform.python_version(), "fxzero": fxzero.__version__, **found}


def machine(device: str) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(models),
        "threads_used": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.platform(),
    }
