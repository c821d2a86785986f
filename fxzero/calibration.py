"""What was measured on this device, and prices of operators by it.

A calibration (``model_calibration.py``) is one JSON file for each device, number of threads, of
processes, and version of torch, below ``FXZERO_CACHE`` (default: ~/.cache/fxzero):

    operators     seconds by name, shapes, strides, dtypes, other arguments
    workspaces    bytes that they take and give back while they run
    generated     by graph, what code generated for it takes of the times of its operators

A plan for so many ranks on that device finds it there and says so.  What was not measured is priced
by the roofline model, times what the others took of it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fxzero.cost import CostModel, Shares, hardware_for
from fxzero.documents import naming, read_json
from fxzero.errors import PlanError
from fxzero.graph import TrainGraph
from fxzero.hardware import Hardware
from fxzero.links import Links
from fxzero.timing import device_description
from fxzero.typed_data import read_value

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 5
_MAX_FILE_BYTES = 2**24  # room for 50,000 kinds of operators; a model has some hundreds


@dataclass(frozen=True)
class Calibration:
    """Measured times and workspaces.

    Attributes:
        device: what was measured: name, threads, version of torch.
        processes: how many ran at the same time.
        operators: seconds by ``cost.operator_key``.
        workspaces: bytes by the same keys that an operator takes and gives back while it runs.
        generated: what graphs for generated code take, by the digest of the captured graph.
        scale: measured by modelled seconds, over all kinds of the last model.
        links: between the processes; None: there is one.
    """

    schema_version: int
    device: str
    processes: int
    operators: dict[str, float]
    workspaces: dict[str, int]
    generated: dict[str, Shares]
    scale: float
    links: Links | None

    @classmethod
    def empty(cls, device: str, processes: int) -> Calibration:
        named = device_description(device)
        return cls(_SCHEMA_VERSION, named, processes, {}, {}, {}, 1.0, None)

    def costs(self, hardware: Hardware) -> CostModel:
        """Prices of operators one by one; those of ``hardware`` for what was not measured."""
        if self.links is not None:
            hardware = self.links.between(hardware)
        return CostModel(hardware, self.operators, self.scale, workspaces=self.workspaces)


def cost_model(
    device: str,
    *,
    fused: bool = False,
    graph: TrainGraph | None = None,
    hardware: Hardware | None = None,
    mesh: Mapping[str, int] | None = None,
) -> CostModel:
    """Prices for a device type ("cpu" or "cuda"): measured ones where there is a calibration.

    Args:
        graph: as captured; if it is ``fused``, its code may have been timed.
        hardware: what they are for instead, by its description alone.
        fused, mesh: as in ``CostModel``.
    """
    ranks = math.prod((mesh or {}).values())
    calibration = _found(device, ranks) if hardware is None else None
    if calibration is None:
        costs = CostModel(hardware or hardware_for(device))
    else:
        costs = calibration.costs(hardware_for(device))
        if fused and graph is not None and calibration.generated:
            costs = replace(costs, generated=calibration.generated.get(graph.digest()))
    return replace(costs, fused=fused, mesh=dict(mesh or {}))


def _found(device: str, ranks: int) -> Calibration | None:
    """The calibration of as many processes, else that of one."""
    for processes in dict.fromkeys((ranks, 1)):
        path = calibration_path(device, processes)
        if path.exists():
            try:
                return load(path)
            except PlanError as error:
                log.warning("a calibration is not used: %s", error)
    return None


def save(path: Path, calibration: Calibration) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(calibration), sort_keys=True, indent=1))
    partial.replace(path)


def calibration_path(device: str, processes: int = 1) -> Path:
    """The file with the times of this device, numbers of threads and processes, and torch."""
    root = Path(os.environ.get("FXZERO_CACHE") or Path.home() / ".cache" / "fxzero")
    name = device_description(device) + (f", {processes} processes" if processes > 1 else "")
    return root / (re.sub(r"[^a-zA-Z0-9.]+", "-", name).lower() + ".json")


def load(path: Path) -> Calibration:
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
    shares = [n for found in calibration.generated.values() for n in (found.code, found.apart)]
    if not all(0 < share < 1e6 for share in shares):
        raise PlanError("generated code must take a share of the times of operators")
    if not all(0 <= size < 2**50 for size in calibration.workspaces.values()):
        raise PlanError("workspaces must be bytes")
    links = calibration.links
    if links is not None and not (
        links.bandwidth > 0 and 0 <= links.startup < 1e6 and 0 <= links.overlap <= 1
    ):
        raise PlanError(f"{links} are no links")
    return calibration
