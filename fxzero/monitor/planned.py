"""What a model's Plan says of the steps that are watched, and what the hardware could do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxzero.cost import count_flops
from fxzero.graph import TrainGraph
from fxzero.hardware import Hardware, describe
from fxzero.plans import Plan

# Descriptions of devices, by what torch.cuda.get_device_name says.
_DEVICES = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA B200": "b200-180gb",
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA H100 80GB HBM3": "h100-sxm-80gb",
    "NVIDIA H100 PCIe": "h100-pcie-80gb",
    "NVIDIA H200": "h200-141gb",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "Tesla T4": "t4",
    "Tesla V100-SXM2-32GB": "v100-32gb",
}


@dataclass(frozen=True)
class Planned:
    """Figures of the Plan in force; None where there is no plan."""

    peak_bytes: int | None = None
    step_seconds: float | None = None
    recompute_seconds: float | None = None
    communication_seconds: float | None = None
    exposed_seconds: float | None = None
    bubble: float | None = None

    @classmethod
    def of(cls, plan: Plan | None) -> Planned:
        if plan is None:
            return cls()
        return cls(
            plan.peak_bytes,
            plan.step_seconds,
            plan.recompute_seconds,
            plan.communication_seconds,
            plan.exposed_seconds,
            None if plan.pipeline is None else plan.pipeline.bubble,
        )


def plan_of(model: nn.Module) -> Plan | None:
    """The plan of the latest step; None before the first, and for a model that is not compiled."""
    state = vars(model).get("_fxzero")
    if state is None:
        return None
    if state.pipeline is not None:
        found: Plan | None = state.pipeline.plan
        return found
    return None if state.latest is None else state.latest.plan


def hardware_of(model: nn.Module, asked: object) -> Hardware | None:
    """The description of what a model runs on; None where its peak is not known.

    Args:
        asked: what the user says that it is, as ``fxzero.plan`` takes it.

    Raises:
        UsageError: nobody knows that hardware.
    """
    if asked is not None:
        return describe(asked)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return describe(_DEVICES[name]) if name in _DEVICES else None


def peak_of(model: nn.Module, hardware: Hardware) -> float:
    """The hardware's dense operations a second in the dtype that the model computes in."""
    state = vars(model).get("_fxzero")
    asked = None if state is None else state.options.precision.param
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    dtype = asked or (max(dtypes, key=dtypes.count) if dtypes else torch.float32)
    return hardware.peak_of(str(dtype).removeprefix("torch."))


class Operations:
    """Operations of forward and backward without recompute, counted once for each graph."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, float]] = {}

    def of_step(self, model: nn.Module, samples: int) -> float | None:
        """Of this rank in a step over so many samples; None if the model is not compiled.

        A compiled graph is for some samples, and a step may run it several times.
        """
        state = vars(model).get("_fxzero")
        if state is None or (state.pipeline is None and state.latest is None):
            return None
        if state.pipeline is not None:
            graphs, count = state.pipeline.graphs
            return math.fsum(count * self._of_graph(graph) for graph in graphs)
        graph: TrainGraph = state.latest.graph
        rows = [node.meta["val"].shape for role, node in graph.pairs() if role.kind == "input"]
        size = max((shape[0] for shape in rows if shape), default=0)
        return self._of_graph(graph) * samples / size if size and samples else None

    def _of_graph(self, graph: TrainGraph) -> float:
        key = id(graph)
        if key not in self.known:
            total = math.fsum(map(count_flops, graph.graph.nodes))
            self.known[key] = graph, total  # held, so that no other graph gets its id
        return self.known[key][1]
