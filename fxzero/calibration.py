"""Measures the operators of a model on this device, once, and keeps the times for later plans.

    fxzero calibrate MODEL                                            one process
    torchrun --no-python --nproc-per-node 2 fxzero calibrate MODEL    two, and links between them

Each kind of operator (name, shapes, strides, dtypes, other arguments) has the time that it takes
where it stands in the model's graph (``timing.py``).  Processes under torchrun run it at the same
time, as they do when they train.  So is the memory that it takes and gives back while it runs,
which plans count then.  All this lies in one JSON file for each device, number of
threads, of processes, and version of torch, below ``FXZERO_CACHE`` (default: ~/.cache/fxzero); a
plan for so many ranks on that device finds it there and says so.  What was not measured is priced
by the roofline model, times what the others took of it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import fx

from fxzero.capture import capture
from fxzero.cost import CostModel, hardware_for, modelled_cost, operator_key
from fxzero.documents import naming, read_json
from fxzero.errors import PlanError
from fxzero.graph import TrainGraph
from fxzero.hardware import Hardware
from fxzero.links import Links, is_first, measure_links
from fxzero.options import INNERS, model_device
from fxzero.randomness import RandomState
from fxzero.sources import Source
from fxzero.timing import (
    device_description,
    times_alone,
    times_in_place,
    workspaces_alone,
)
from fxzero.typed_data import read_value

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 3
_MAX_FILE_BYTES = 2**24  # room for 50,000 kinds of operators; a model has some hundreds


@dataclass(frozen=True)
class Calibration:
    """Measured times and workspaces.

    Attributes:
        device: what was measured: name, threads, version of torch.
        processes: how many ran at the same time.
        operators: seconds by ``cost.operator_key``.
        workspaces: bytes by the same keys that an operator takes and gives back while it runs.
        scale: measured by modelled seconds, over all kinds of the last model.
        links: between the processes; None: there is one.
    """

    schema_version: int
    device: str
    processes: int
    operators: dict[str, float]
    workspaces: dict[str, int]
    scale: float
    links: Links | None


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
        found = self.calibration
        among = f", {found.processes} processes" if found.processes > 1 else ""
        lines = [
            f"measured {self.measured} kinds of operators in {self.seconds:.1f} s on "
            f"{found.device}{among}; {self.known} were known",
            f"measured times are {found.scale:.3g} times the modelled ones",
        ]
        if found.links is not None:
            lines.append(f"links between processes: {found.links}")
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
    ranks = math.prod((mesh or {}).values())
    costs = _calibrated(device, ranks) if hardware is None else CostModel(hardware)
    return replace(costs, fused=fused, mesh=dict(mesh or {}))


def _calibrated(device: str, ranks: int) -> CostModel:
    """By the calibration of as many processes, else that of one."""
    hardware = hardware_for(device)
    for processes in dict.fromkeys((ranks, 1)):
        path = calibration_path(device, processes)
        if not path.exists():
            continue
        try:
            calibration = _load(path)
        except PlanError as error:
            log.warning("a calibration is not used: %s", error)
            continue
        if calibration.links is not None:
            hardware = calibration.links.between(hardware)
        return CostModel(
            hardware,
            calibration.operators,
            calibration.scale,
            workspaces=calibration.workspaces,
        )
    return CostModel(hardware)


def calibrate(
    graph: TrainGraph, device: str, decomposed: TrainGraph | None = None
) -> CalibrationReport:
    """Measures every kind of operator of a captured graph that the cache does not have yet.

    Where several processes run, all of them measure, and the first one writes what it found.

    Args:
        device: "cpu" or "cuda".
        decomposed: the same model's graph for generated code, for workspaces alone.
    """
    start = time.perf_counter()
    links = measure_links(device)
    processes = 1 if links is None else links.processes
    path = calibration_path(device, processes)
    try:
        before = _load(path)
    except PlanError:
        named = device_description(device)
        before = Calibration(_SCHEMA_VERSION, named, processes, {}, {}, 1.0, None)
    hardware = hardware_for(device)
    kinds = _kinds(graph, hardware)
    besides = {} if decomposed is None else _kinds(decomposed, hardware)
    state = RandomState.now()
    with torch.no_grad():
        measured = times_in_place(graph, device) if kinds.keys() - before.operators.keys() else {}
        missing = kinds.keys() - before.operators.keys() - measured.keys()
        alone, failed = times_alone({key: kinds[key] for key in kinds if key in missing}, device)
        new = {key: n for key, n in {**besides, **kinds}.items() if key not in before.operators}
        workspaces = {**workspaces_alone(new, device), **before.workspaces}
    state.restore()
    operators = {**measured, **alone, **before.operators}
    timed = [key for key in kinds if key in operators]
    modelled = sum(modelled_cost(kinds[key], hardware).seconds for key in timed)
    scale = sum(operators[key] for key in timed) / modelled if modelled else before.scale
    calibration = replace(
        before, operators=operators, workspaces=workspaces, scale=scale, links=links
    )
    if is_first():
        _save(path, calibration)
    return CalibrationReport(
        calibration,
        path,
        len(kinds.keys() & operators.keys() - before.operators.keys()),
        len(kinds.keys() & before.operators.keys()),
        failed,
        time.perf_counter() - start,
    )


def _kinds(graph: TrainGraph, hardware: Hardware) -> dict[str, fx.Node]:
    """Operators that take time, one of each kind."""
    nodes = (node for node in graph.graph.nodes if modelled_cost(node, hardware).seconds)
    return {operator_key(node): node for node in nodes}


def _save(path: Path, calibration: Calibration) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(calibration), sort_keys=True, indent=1))
    partial.replace(path)


def calibrate_model(source: Source) -> CalibrationReport:
    """Measures the operators of a model's forward and backward on the device of its weights.

    Of those that plans for generated code have, workspaces only: hardly one runs by itself there.
    A model on the meta device is measured on the CPU.
    """
    graph, decomposed = (
        capture(source.model, source.args, source.kwargs, inner=inner).graph for inner in INNERS
    )
    return calibrate(graph, model_device(source.model), decomposed)


def calibration_path(device: str, processes: int = 1) -> Path:
    """The file with the times of this device, numbers of threads and processes, and torch."""
    root = Path(os.environ.get("FXZERO_CACHE") or Path.home() / ".cache" / "fxzero")
    name = device_description(device) + (f", {processes} processes" if processes > 1 else "")
    return root / (re.sub(r"[^a-zA-Z0-9.]+", "-", name).lower() + ".json")


def _load(path: Path) -> Calibration:
    data = read_json(path, _MAX_FILE_BYTES, PlanError)
    with naming(path, PlanError):
        return _checked(data)


def _checked(data: object) -> Calibration:
    calibration = read_value(Calibration, data, "calibration")
    assert isinstance(calibration, Calibration)
    if calibration.schema_version != _SCHEMA_VERSION:
        raise PlanError(f"schema_version {calibration.schema_version} is not {_SCHEMA_VERSION}")
    if not all(
        0 <= seconds < 1e6 for seconds in (calibration.scale, *calibration.operators.values())
    ):
        raise PlanError("times must be seconds")
    if not all(0 <= size < 2**50 for size in calibration.workspaces.values()):
        raise PlanError("workspaces must be bytes")
    links = calibration.links
    if links is not None and not (
        links.bandwidth > 0 and 0 <= links.startup < 1e6 and 0 <= links.overlap <= 1
    ):
        raise PlanError(f"{links} are no links")
    return calibration
