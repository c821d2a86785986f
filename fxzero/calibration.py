"""Measures the operators of a model on this device, once, and keeps the times for later plans.

Each kind of operator (name, shapes, strides, dtypes, other arguments) is run by itself on random
numbers.  The times lie in one JSON file for each device, thread count and torch version, below
``FXZERO_CACHE`` (default: ~/.cache/fxzero); a plan made on that device finds them there and says
so. What was not measured is priced by the roofline model, times what the others took of it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxzero.capture import capture
from fxzero.cost import CostModel, drawn_operator, hardware_for, modelled_cost, operator_key
from fxzero.errors import PlanError
from fxzero.hardware import Hardware
from fxzero.options import model_device
from fxzero.plans import read_value
from fxzero.randomness import RandomState
from fxzero.sources import Source
from fxzero.storages import tensor_leaves

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 1
_MAX_FILE_BYTES = 64 * 2**20
_RUNS = 5
_SECONDS = 0.02  # an operator is run more often until it took this long
_LARGEST = 2 * 2**30  # bytes of arguments and results beyond which an operator is not run


@dataclass(frozen=True)
class Calibration:
    """Measured times.

    Attributes:
        device: what was measured: name, threads, version of torch.
        operators: seconds by ``cost.operator_key``.
        scale: measured by modelled seconds, over all kinds of the last model.
    """

    schema_version: int
    device: str
    operators: dict[str, float]
    scale: float


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did: kinds measured now, known before, and not runnable by themselves."""

    calibration: Calibration
    path: Path
    measured: int
    known: int
    failed: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"measured {self.measured} kinds of operators in {self.seconds:.1f} s on "
            f"{self.calibration.device}; {self.known} were known",
            f"measured times are {self.calibration.scale:.3g} times the modelled ones",
        ]
        if self.failed:
            lines.append(f"not measured, modelled instead: {', '.join(self.failed)}")
        return "\n".join([*lines, f"written to {self.path}; plans on this device use it"])


def cost_model(
    device: str,
    *,
    fused: bool = False,
    hardware: Hardware | None = None,
    mesh: Mapping[str, int] | None = None,
) -> CostModel:
    """Prices for a device type ("cpu" or "cuda"): measured ones where there is a calibration.

    Args:
        hardware: what they are for instead, by its description alone.
        fused, mesh: as in ``CostModel``.
    """
    costs = _calibrated(device) if hardware is None else CostModel(hardware)
    return replace(costs, fused=fused, mesh=dict(mesh or {}))


def _calibrated(device: str) -> CostModel:
    hardware = hardware_for(device)
    path = calibration_path(device)
    try:
        calibration = _load(path)
    except FileNotFoundError:
        return CostModel(hardware)
    except (OSError, ValueError) as error:
        log.warning("calibration %s is not used: %s", path, error)
        return CostModel(hardware)
    return CostModel(hardware, calibration.operators, calibration.scale)


def calibrate(nodes: Iterable[fx.Node], device: str) -> CalibrationReport:
    """Measures every kind of operator among ``nodes`` that the cache does not have yet.

    Args:
        nodes: of a captured joint graph.
        device: "cpu" or "cuda".
    """
    path = calibration_path(device)
    try:
        before = _load(path)
    except (OSError, ValueError):
        before = Calibration(_SCHEMA_VERSION, device_description(device), {}, 1.0)
    hardware = hardware_for(device)
    kinds = {operator_key(n): n for n in nodes if modelled_cost(n, hardware).seconds}
    new = {key: node for key, node in kinds.items() if key not in before.operators}
    start = time.perf_counter()
    measured, failed = _measure(new, device)
    operators = {**before.operators, **measured}
    timed = [key for key in kinds if key in operators]
    modelled = sum(modelled_cost(kinds[key], hardware).seconds for key in timed)
    scale = sum(operators[key] for key in timed) / modelled if modelled else before.scale
    calibration = replace(before, operators=operators, scale=scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(calibration), sort_keys=True, indent=1))
    partial.replace(path)
    return CalibrationReport(
        calibration,
        path,
        len(measured),
        len(kinds) - len(new),
        failed,
        time.perf_counter() - start,
    )


def calibrate_model(source: Source) -> CalibrationReport:
    """Measures the operators of a model's forward and backward on the device of its weights.

    A model on the meta device is measured on the CPU.
    """
    graph = capture(source.model, source.args, source.kwargs).graph
    return calibrate(graph.graph.nodes, model_device(source.model))


def calibration_path(device: str) -> Path:
    """The file with the times of this device, thread count and torch version."""
    root = Path(os.environ.get("FXZERO_CACHE") or Path.home() / ".cache" / "fxzero")
    return root / (re.sub(r"[^a-zA-Z0-9.]+", "-", device_description(device)).lower() + ".json")


def device_description(device: str) -> str:
    """'Xeon 8259CL, 2 threads, torch 2.13.0' for the CPU; the device's name for CUDA."""
    version = torch.__version__.partition("+")[0]
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {version}"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads, torch {version}"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "CPU"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else "CPU"


def _load(path: Path) -> Calibration:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise PlanError(f"{path} is larger than a calibration can be")
    data = json.loads(path.read_text())
    calibration = read_value(Calibration, data, "calibration")
    assert isinstance(calibration, Calibration)
    if calibration.schema_version != _SCHEMA_VERSION:
        raise PlanError(f"schema_version {calibration.schema_version} is not {_SCHEMA_VERSION}")
    if not all(
        0 <= seconds < 1e6 for seconds in (calibration.scale, *calibration.operators.values())
    ):
        raise PlanError("times must be seconds")
    return calibration


def _measure(kinds: dict[str, fx.Node], device: str) -> tuple[dict[str, float], tuple[str, ...]]:
    """Seconds by key, and the names of operators that cannot be run by themselves."""
    state = RandomState.now()
    measured: dict[str, float] = {}
    failed: dict[str, None] = {}
    with torch.no_grad():
        for key, node in kinds.items():
            operator = drawn_operator(node)
            assert operator is not None
            try:
                measured[key] = seconds_of(_runner(operator, node, device), device)
            except (RuntimeError, IndexError, ValueError, TypeError, MemoryError):
                failed[str(operator)] = None
    state.restore()
    return measured, tuple(failed)


def _runner(operator: Any, node: fx.Node, device: str) -> Callable[[], Any]:
    leaves = [
        leaf for n in (node, *node.all_input_nodes) for leaf in tensor_leaves(n.meta.get("val"))
    ]
    if sum(leaf.numel() * leaf.element_size() for leaf in leaves) > _LARGEST:
        raise MemoryError
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda n: _example(n.meta.get("val"), device)
    )
    return lambda: operator(*args, **kwargs)


def _example(value: Any, device: str) -> Any:
    """A tensor of the same shape, strides and dtype: random numbers, zeros for indices."""
    if not isinstance(value, torch.Tensor):
        return value
    span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    size = max(span, 0) if value.numel() else 0
    if value.is_floating_point():
        base = torch.rand(size, device=device).to(value.dtype)
    else:
        base = torch.zeros(size, dtype=value.dtype, device=device)
    return base.as_strided(value.shape, value.stride())


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """What a function takes: the median of several runs, the first one apart."""
    run()
    times: list[float] = []
    while len(times) < _RUNS or sum(times) < _SECONDS:
        times.append(_one_run(run, device))
    return statistics.median(times)


def _one_run(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result
    return seconds
