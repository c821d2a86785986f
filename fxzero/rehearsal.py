"""The peak of the code that runs, found by running it on fake tensors.

The timeline counts operators that run one by one.  Inductor's code differs: a fused kernel holds
all that its operators read and write at once, a value is computed where it is read, which keeps
what it is computed from, and convolutions get copies in another layout.  So its peak may be below
or above the timeline's.  A rehearsal runs the two functions of a step on tensors without memory,
with kernels that do nothing, and counts storages as they come and go.

    buf0 = empty_strided_cpu(...)    a fake tensor: counted
    cpp_fused_add_0(x, y, buf0)      nothing
    del x                            freed
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxzero import _torch
from fxzero.collectives import WAIT, starts_transfer, workspace_bytes
from fxzero.cost import call_key
from fxzero.execution import BoxedFunction
from fxzero.generated import without_kernels
from fxzero.passes.partition import Split
from fxzero.plans import Peak, Plan, Value
from fxzero.storages import is_scalar, storage_identity, tensor_leaves
from fxzero.timeline import Surroundings
from fxzero.transfers import TO_HOST
from fxzero.units import format_bytes
from fxzero.updating import UPDATE


@dataclass(frozen=True)
class Peaks:
    """Most bytes alive at once in each half of a step, everything that is fixed included.

    Attributes:
        known: whether the rehearsal went through; if not, the peaks are larger than any budget.
    """

    forward: int
    backward: int
    known: bool = True

    @property
    def largest(self) -> int:
        return max(self.forward, self.backward)


# Roles of what lives throughout a step.
_ALWAYS_THERE = ("parameter", "buffer", "optimizer", "input")

UNKNOWN = Peaks(1 << 62, 1 << 62, known=False)


def rehearse(
    split: Split,
    forward: BoxedFunction,
    backward: BoxedFunction,
    around: Surroundings,
    fixed_bytes: int,
) -> Peaks:
    """The peaks of a step that runs ``forward`` and ``backward``, the functions of ``split``.

    Raises whatever generated code does that cannot run on fake tensors.

    Args:
        fixed_bytes: what lives throughout, the step's inputs included.
    """
    forward, backward = without_kernels(forward), without_kernels(backward)
    counter = Counter(around.granularity, around.device, around.workspaces)
    with _torch.FakeTensorMode(allow_non_fake_inputs=True), counter:
        inputs = [example_of(node) for node in split.forward.graph.find_nodes(op="placeholder")]
        _, existing_nodes, tangent_nodes = split.backward_inputs()
        existing = [example_of(node) for node in existing_nodes]
        counter.restart(fixed_bytes)
        results = forward(list(inputs))
        outputs = results[: split.output_count]
        saved = results[split.output_count :]
        forward_peak = counter.peak
        tangents = [example_of(node) for node in tangent_nodes]
        if not around.outputs_held:
            (returned,) = split.forward.graph.find_nodes(op="output")
            nodes = returned.args[0][: split.output_count]
            outputs = [v for v, n in zip(outputs, nodes, strict=True) if is_scalar(n)]
        results.clear()
        arguments = [*saved, *existing, *tangents]
        saved.clear()
        counter.restart(counter.current)
        gradients = backward(arguments)
        updates = any(node.target is UPDATE for node in split.backward.graph.nodes)
        backward_peak = counter.peak + (around.update_bytes if updates else 0)
        # The caller holds these to the end.
        del inputs, outputs, existing, tangents, gradients
    return Peaks(forward_peak, backward_peak)


def as_it_runs(plan: Plan, peaks: Peaks) -> Plan:
    """The plan with the peaks of its generated code in the place of those of single operators."""
    if not peaks.known:
        return replace(plan, notes=(*plan.notes, "the generated code could not be rehearsed"))
    note = f"by rehearsal, the peak of the generated code is {format_bytes(peaks.largest)}"
    rehearsed = {"forward": peaks.forward, "backward": peaks.backward}
    phases = tuple(
        replace(item, peak_bytes=rehearsed.get(item.name, item.peak_bytes)) for item in plan.phases
    )
    largest = max(phases, key=lambda item: item.peak_bytes)
    peak = _alive_in_code(plan.peak, largest.peak_bytes, largest.name)
    return replace(
        plan,
        notes=tuple(dict.fromkeys((*plan.notes, note))),
        peak_bytes=peak.bytes,
        peak=peak,
        minimum_budget=min(plan.minimum_budget, peak.bytes),
        ranks=tuple(
            replace(rank, peak_bytes=peak.bytes, breakdown=peak.breakdown) for rank in plan.ranks
        ),
        phases=phases,
    )


def _alive_in_code(peak: Peak, size: int, phase: str) -> Peak:
    """What is alive at a peak of ``size`` bytes.

    More than was planned is what fused kernels hold.  Of less it is not known which values they do
    not write: all but what always lives is one entry.
    """
    alive = peak.alive
    if size < peak.bytes:
        alive = tuple(value for value in alive if value.role in _ALWAYS_THERE)
        peak = replace(peak, node="", source="")
    rest = size - sum(value.bytes for value in alive)
    if rest:
        value = Value("generated code", rest, "", "", "", "temporary", "held by fused operators")
        if phase == "optimizer step":
            value = Value("gradients and their update", rest, "", "", "", "gradient")
        alive = tuple(sorted((*alive, value), key=lambda item: -item.bytes))
    return replace(peak, bytes=size, phase=phase, alive=alive)


def example_of(node: fx.Node) -> torch.Tensor:
    """A tensor like the node's value; fake under a FakeTensorMode."""
    value = node.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


class Counter(_torch.TransparentDispatchMode):
    """Bytes of the fake storages that operators make inside the ``with`` block.

    Args:
        workspaces: bytes that operators need besides while they run, by ``cost.operator_key``.
    """

    def __init__(
        self, granularity: int, device: str = "cpu", workspaces: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.granularity = granularity
        self.device = device
        self.workspaces = workspaces or {}
        self.current = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._in_transfer: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def restart(self, current: int) -> None:
        """Goes on from ``current`` bytes, whatever was counted so far."""
        self.current = self.peak = current

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensor_leaves(result) if func is not TO_HOST else ():
            self._count(tensor)
        if self.workspaces:
            size = self.workspaces.get(call_key(func, args, kwargs or {}), 0)
            self.peak = max(self.peak, self.current + size)
        if func is WAIT:
            _, workspaces = self._in_transfer.pop(storage_identity(args[0]), ([], []))
            workspaces.clear()
        elif starts_transfer(func):
            self._follow_transfer(func, args, result)
        return result

    def _follow_transfer(self, func: Any, args: Any, result: Any) -> None:
        """Holds what a collective reads until its last wait, and its workspace until the first."""
        sent, made = tensor_leaves(args), tensor_leaves(result)
        size = workspace_bytes(func, sent, made) if self.device == "cpu" else 0
        workspace = torch.empty(size, dtype=torch.uint8)
        self._count(workspace)
        held = sent, [workspace]
        for tensor in made:
            self._in_transfer[storage_identity(tensor)] = held

    def _count(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_identity(tensor)
        if key not in self._sizes:
            size = -(-storage.nbytes() // self.granularity) * self.granularity
            self._sizes[key] = size
            self.current += size
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.current -= self._sizes.pop(key)
