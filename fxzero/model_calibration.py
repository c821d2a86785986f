"""Measures a model on this device, once, for the plans that come after (``calibration.py``).

    fxzero calibrate MODEL                                            one process
    torchrun --no-python --nproc-per-node 2 fxzero calibrate MODEL    two, and links between them

Each kind of operator has the time that it takes where it stands in the model's graph
(``timing.py``), and the memory that it takes and gives back while it runs.  Processes under
torchrun run it at the same time, as they do when they train.  Code that Inductor generates for the
whole step is timed against that (``generated_timing.py``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import fx

from fxzero.calibration import Calibration, calibration_path, load, save
from fxzero.capture import capture
from fxzero.cost import Shares, hardware_for, modelled_cost, operator_key
from fxzero.errors import PlanError
from fxzero.generated_timing import time_generated
from fxzero.graph import TrainGraph
from fxzero.hardware import Hardware
from fxzero.links import is_first, measure_links
from fxzero.options import INNERS, model_device
from fxzero.randomness import RandomState
from fxzero.sources import Source
from fxzero.timing import call_of, times_alone, times_in_place, workspaces_alone


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did: kinds measured now, known before, and not runnable by themselves.

    Attributes:
        generated: what the model's graph for generated code takes; None: not timed.
    """

    calibration: Calibration
    path: Path
    measured: int
    known: int
    failed: tuple[str, ...]
    generated: Shares | None
    seconds: float

    def __str__(self) -> str:
        found = self.calibration
        among = f", {found.processes} processes" if found.processes > 1 else ""
        lines = [
            f"measured {self.measured} kinds of operators in {self.seconds:.1f} s on "
            f"{found.device}{among}; {self.known} were known",
            f"measured times are {found.scale:.3g} times the modelled ones",
        ]
        if self.generated is not None:
            lines.append(
                f"code generated for this model takes {self.generated.code:.3g} of what its "
                "operators, fused where they can be, would"
            )
        if found.links is not None:
            lines.append(f"links between processes: {found.links}")
        if self.failed:
            lines.append(f"not measured, modelled instead: {', '.join(self.failed)}")
        return "\n".join([*lines, f"written to {self.path}; plans on this device use it"])


def calibrate_model(source: Source, inner: str = "inductor") -> CalibrationReport:
    """Measures the operators of a model's forward and backward on the device of its weights.

    A model on the meta device is measured on the CPU.

    Args:
        inner: "inductor" times the code generated for a step, too, where there is a compiler;
            "eager" does not.
    """
    graph, decomposed = (
        capture(source.model, source.args, source.kwargs, inner=inner).graph for inner in INNERS
    )
    device = model_device(source.model)
    return calibrate(graph, device, decomposed, generates=inner == "inductor")


def calibrate(
    graph: TrainGraph,
    device: str,
    decomposed: TrainGraph | None = None,
    *,
    generates: bool = False,
) -> CalibrationReport:
    """Measures every kind of operator of a captured graph that the cache does not have yet.

    Where several processes run, all of them measure, and the first one writes what it found.

    Args:
        device: "cpu" or "cuda".
        decomposed: the same model's graph for generated code. Of its operators workspaces alone
            are measured: hardly one runs by itself there.
        generates: whether to time its code, too, unless that is known.
    """
    start = time.perf_counter()
    links = measure_links(device)
    processes = 1 if links is None else links.processes
    path = calibration_path(device, processes)
    try:
        before = load(path)
    except PlanError:
        before = Calibration.empty(device, processes)
    state = RandomState.now()
    with torch.no_grad():
        found, failed = _with_operators(before, graph, decomposed, device)
        if decomposed is not None and generates:
            found = _with_code(found, graph, decomposed, device)
    state.restore()
    found = replace(found, links=links)
    if is_first():
        save(path, found)
    kinds = _kinds(graph, hardware_for(device)).keys()
    return CalibrationReport(
        found,
        path,
        len(kinds & found.operators.keys() - before.operators.keys()),
        len(kinds & before.operators.keys()),
        failed,
        None if decomposed is None else found.generated.get(decomposed.digest()),
        time.perf_counter() - start,
    )


def _with_operators(
    before: Calibration, graph: TrainGraph, decomposed: TrainGraph | None, device: str
) -> tuple[Calibration, tuple[str, ...]]:
    """With times and workspaces of the kinds of operators that were not known, and names of those
    that cannot be run."""
    hardware = hardware_for(device)
    kinds = _kinds(graph, hardware)
    besides = {} if decomposed is None else _kinds(decomposed, hardware)
    unknown = kinds.keys() - before.operators.keys()
    measured = times_in_place(graph, device) if unknown else {}
    missing = {k: call_of(n) for k, n in kinds.items() if k in unknown and k not in measured}
    alone, failed = times_alone(missing, device)
    new = {k: call_of(n) for k, n in {**besides, **kinds}.items() if k not in before.operators}
    workspaces = {**workspaces_alone(new, device), **before.workspaces}
    operators = {**measured, **alone, **before.operators}
    timed = [key for key in kinds if key in operators]
    modelled = sum(modelled_cost(kinds[key], hardware).seconds for key in timed)
    scale = sum(operators[key] for key in timed) / modelled if modelled else before.scale
    return replace(before, operators=operators, workspaces=workspaces, scale=scale), failed


def _with_code(
    before: Calibration, graph: TrainGraph, decomposed: TrainGraph, device: str
) -> Calibration:
    """With what was measured of generated code, unless that was known."""
    digest = decomposed.digest()
    if digest in before.generated:
        return before
    found = time_generated(graph, decomposed, device, before.costs(hardware_for(device)))
    if found is None:
        return before
    return replace(
        before,
        generated={**before.generated, digest: found.shares},
        workspaces={**found.workspaces, **before.workspaces},
    )


def _kinds(graph: TrainGraph, hardware: Hardware) -> dict[str, fx.Node]:
    """Operators that take time, one of each kind."""
    nodes = (node for node in graph.graph.nodes if modelled_cost(node, hardware).seconds)
    return {operator_key(node): node for node in nodes}
