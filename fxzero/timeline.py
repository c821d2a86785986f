"""How many bytes are alive at every instant of a training step.

Walks the two graphs that really run, forward then backward, and keeps the books of their
storages: a storage is born when a node makes it, and dies after the last node that reads any
view of it, unless it is a result.  Knows nothing of solvers: it is the judge of their plans.

What the books hold besides activations:
    parameters, buffers, optimizer state, inputs    always
    model outputs                                   to the end, if the caller holds them
    tangents                                        from the loss to the end of the backward
    offloaded values                                in books of their own, for host memory
    gradients                                       from the node that makes them to the end, to
                                                    their update in the backward, or always, where
                                                    a step adds to those that exist
    what collectives read, and their workspace      until they are waited for
    the workspace of other operators                while they run, where it was measured
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fxzero.collectives import (
    collective_of,
    is_collective,
    is_gather,
    is_wait,
    workspace_of,
)
from fxzero.cost import workspace_of_operator
from fxzero.execution import last_uses
from fxzero.passes.bucket import GATHERED
from fxzero.passes.partition import Split
from fxzero.storages import Storages, analyse, is_scalar, storage_identity
from fxzero.transfers import TO_DEVICE, TO_HOST
from fxzero.updating import UPDATE

CUDA_GRANULARITY = 512
# A loss outside the model and its gradient: scalars that the caller holds.
LOSS_SCALARS = 32
_OUTSIDE = "what a loss outside the model needs"
_UPDATE = "what an update in the backward needs"
_WORKSPACE = "what an operator needs while it runs"


@dataclass(frozen=True)
class Alive:
    """A storage that lives at the peak.

    Attributes:
        node: the graph node that made it (in the forward if it was saved), None for fixed memory.
        role: as in ``plans.Value.role``.
        name: name of a parameter or buffer, else the node's.
        first, last: the points of the timeline at which it is there; ``last`` is None for what
            the step leaves behind.
        fixed: whether it is there before the step, and after it.
    """

    bytes: int
    role: str
    name: str
    node: fx.Node | None
    first: int = 0
    last: int | None = None
    fixed: bool = False


@dataclass(frozen=True)
class Timeline:
    """The life of one training step in bytes.

    Attributes:
        points: bytes alive while each node runs: forward, a loss outside the model, backward.
        forward_nodes: how many of the points belong to the forward.
        peak_bytes: the largest point.
        peak_node: the node that runs then; None for a loss outside the model.
        alive: what lives at the peak; sums to ``peak_bytes``.
        fixed: bytes that live throughout, by role.
        gradient_bytes: gradients left when the step ends.
        saved: the storages carried from forward to backward, with their roles.
        offloaded: the storages carried in host memory.
        host_bytes: most bytes in host memory at once.
        nodes: what runs at each of the points.
        roles: the points' bytes by role.
        lives: for each node the first and last point of the largest storage that it makes.
        allocations: all that was on the device at any point, in the order in which it was made.
    """

    points: tuple[int, ...]
    forward_nodes: int
    peak_bytes: int
    peak_node: fx.Node | None
    alive: tuple[Alive, ...]
    fixed: dict[str, int]
    gradient_bytes: int
    saved: tuple[Alive, ...]
    offloaded: tuple[Alive, ...]
    host_bytes: int
    nodes: tuple[fx.Node | None, ...] = ()
    roles: tuple[dict[str, int], ...] = ()
    lives: dict[fx.Node, tuple[int, int | None]] = field(default_factory=dict)
    allocations: tuple[Alive, ...] = ()

    def peak_of(self, phase: str) -> int:
        """Peak of "forward" or "backward" alone."""
        points = (
            self.points[: self.forward_nodes]
            if phase == "forward"
            else self.points[self.forward_nodes :]
        )
        return max(points, default=0)


@dataclass(frozen=True)
class Surroundings:
    """What the graphs do not show.

    Attributes:
        optimizer_bytes: optimizer state that lives throughout.
        outputs_held: whether the caller keeps the model's outputs during the backward; scalars, the
            loss among them, it always does.
        loss_bytes: what a loss outside the model needs between forward and backward, tangents
            included; 0 if the model returns the loss.
        granularity: the allocator rounds sizes up to a multiple of this.
        update_bytes: what the optimizer needs besides while it updates a weight in the backward.
        device: "cpu" or "cuda", which the step runs on.
        workspaces: bytes that operators need while they run, by ``cost.operator_key``.
    """

    optimizer_bytes: int = 0
    outputs_held: bool = True
    loss_bytes: int = 0
    granularity: int = 1
    update_bytes: int = 0
    device: str = "cpu"
    workspaces: Mapping[str, int] = field(default_factory=dict)


def simulate(split: Split, surroundings: Surroundings) -> Timeline:
    """The timeline of one training step that runs the two graphs of ``split``."""
    return _Books(split, surroundings).run()


class _Books:
    def __init__(self, split: Split, surroundings: Surroundings) -> None:
        self.split = split
        self.around = surroundings
        self.forward = analyse(split.forward.graph.nodes)
        self.backward = analyse(split.backward.graph.nodes)
        self.alias: dict[object, object] = {}
        self.alive: dict[object, Alive] = {}
        self.on_host: dict[object, Alive] = {}
        self.total = 0
        self.host_total = 0
        self.host_peak = 0
        self.points: list[int] = []
        self.peak = -1
        self.peak_node: fx.Node | None = None
        self.peak_alive: dict[object, Alive] = {}
        self.nodes: list[fx.Node | None] = []
        self.by_role: dict[str, int] = {}
        self.roles: list[dict[str, int]] = []
        self.lasts: dict[object, int] = {}
        self.made: dict[fx.Node, tuple[object, int, int]] = {}
        self.fixed: dict[str, int] = {}
        self.opened: list[Alive] = []
        self.numbers: dict[object, int] = {}

    def run(self) -> Timeline:
        self._open_fixed()
        results = _results(self.split.forward)
        outputs = results[: self.split.output_count]
        saved = results[self.split.output_count :]
        saved_entries = self._run_forward(outputs, saved)
        forward_nodes = len(self.points)
        offloaded = dict(self.on_host)
        gradient_bytes = self._run_backward(outputs, saved)
        return Timeline(
            points=tuple(self.points),
            forward_nodes=forward_nodes,
            peak_bytes=self.peak,
            peak_node=self.peak_node,
            alive=tuple(sorted(self._dated(self.peak_alive), key=lambda a: -a.bytes)),
            fixed=self.fixed,
            gradient_bytes=gradient_bytes,
            saved=self._dated(saved_entries),
            offloaded=self._dated(offloaded),
            host_bytes=self.host_peak,
            nodes=tuple(self.nodes),
            roles=tuple(self.roles),
            lives={node: (born, self.lasts.get(key)) for node, (key, born, _) in self.made.items()},
            allocations=tuple(self.opened),
        )

    def _dated(self, entries: Mapping[object, Alive]) -> tuple[Alive, ...]:
        return tuple(replace(e, last=self.lasts.get(key)) for key, e in entries.items())

    def _open_fixed(self) -> None:
        for role, node in zip(
            self.split.inputs, self.split.forward.graph.find_nodes(op="placeholder"), strict=True
        ):
            for storage in self.forward.of[node]:
                key = ("f", storage)
                if key not in self.alive:
                    self._birth(key, self.forward, storage, role.kind, role.name or node.name)
                    self.fixed[role.kind] = self.fixed.get(role.kind, 0) + self.alive[key].bytes
        parameters = [self.split.inputs[position].name for position in self.split.accumulated]
        _, existing, _ = self.split.backward_inputs()
        for name, node in zip(parameters, existing, strict=True):
            (storage,) = self.backward.of[node]
            self._birth(("b", storage), self.backward, storage, "gradient", name)
            size = self.alive["b", storage].bytes
            self.fixed["gradient"] = self.fixed.get("gradient", 0) + size
        for phase, storages in (("f", self.forward), ("b", self.backward)):
            for node, numbers in storages.of.items():
                if node.op == "get_attr":
                    constant = ("constant", str(node.target))
                    self.alias[phase, numbers[0]] = constant
                    self._birth(constant, storages, numbers[0], "buffer", str(node.target))
        self._add_fixed(self.around.optimizer_bytes, "optimizer", "optimizer state")
        self._add_fixed(LOSS_SCALARS if self.around.loss_bytes else 0, "output", "loss")
        self.permanent = set(self.alive)
        self.opened = [replace(entry, fixed=True) for entry in self.opened]

    def _add_fixed(self, size: int, role: str, name: str) -> None:
        if size:
            self._open(name, Alive(size, role, name, None))
            self.fixed[role] = self.fixed.get(role, 0) + size

    def _run_forward(self, outputs: list[fx.Node], saved: list[fx.Node]) -> dict[object, Alive]:
        roles: dict[object, str] = {
            ("f", s): "rng state" if node.meta.get("rng_state") else "saved"
            for node in saved
            for s in self.forward.of[node]
        }
        roles |= {("f", s): "output" for node in outputs for s in self.forward.of[node]}
        self._walk(self.split.forward.graph, self.forward, "f", roles, set(roles))
        return {
            key: self.alive[key]
            for key in {("f", s): None for node in saved for s in self.forward.of[node]}
            if key not in self.permanent and key not in self.on_host
        }

    def _run_backward(self, outputs: list[fx.Node], saved: list[fx.Node]) -> int:
        held = {("f", s) for node in outputs for s in self.forward.of[node]}
        taken, _, tangents = self.split.backward_inputs()
        carried: set[object] = set()
        for node, placeholder in zip(saved, taken, strict=True):
            for mine, theirs in zip(
                self.forward.of[node], self.backward.of[placeholder], strict=True
            ):
                self.alias["b", theirs] = ("f", mine)
                carried.add(("f", mine))
        if not self.around.outputs_held:
            dropped = {("f", s) for n in outputs if not is_scalar(n) for s in self.forward.of[n]}
            for key in dropped - carried - self.permanent:
                self._death(key)
            held -= dropped
        self._record_loss()
        for node in tangents:
            for storage in self.backward.of[node]:
                self._birth(("b", storage), self.backward, storage, "tangent", node.name)
        keep = held | {("b", s) for node in tangents for s in self.backward.of[node]}
        gradients = {
            self._key("b", s)
            for node in _results(self.split.backward)
            for s in self.backward.of[node]
        }
        handed_over = [n.args[1] for n in self.split.backward.graph.nodes if n.target is UPDATE]
        named = {self._key("b", s) for node in handed_over for s in self.backward.of[node]}
        roles = dict.fromkeys(gradients | named, "gradient")
        self._walk(self.split.backward.graph, self.backward, "b", roles, keep | gradients)
        return sum(self.alive[key].bytes for key in gradients - self.permanent)

    def _walk(
        self,
        graph: fx.Graph,
        storages: Storages,
        phase: str,
        roles: dict[object, str],
        keep: set[object],
    ) -> None:
        references: dict[object, int] = {}
        for node in graph.nodes:
            for storage in storages.of.get(node, ()):
                key = self._key(phase, storage)
                references[key] = references.get(key, 0) + 1
        dying = last_uses(graph)
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            for storage in storages.of.get(node, ()):
                if storages.maker[storage] is node:
                    key = self._key(phase, storage)
                    self._birth(key, storages, storage, roles.get(key, _role(node)), node.name)
            if is_collective(node):
                self._open_workspace(node)
            elif size := workspace_of_operator(node, self.around.workspaces):
                name, now = f"{node.name} workspace", len(self.points)
                self._open(_WORKSPACE, Alive(size, "temporary", name, node, now))
            if node.target is UPDATE and (size := self.around.update_bytes):
                self._open(_UPDATE, Alive(size, "temporary", "update", node, len(self.points)))
            self._record(node)
            self._death(_UPDATE)
            self._death(_WORKSPACE)
            if is_wait(node):
                self._death(("workspace", collective_of(node)))
            for dead in dying.get(node, ()):
                for storage in storages.of.get(dead, ()):
                    key = self._key(phase, storage)
                    references[key] -= 1
                    if references[key] == 0 and key not in keep and key not in self.permanent:
                        self._death(key)

    def _key(self, phase: str, storage: int) -> object:
        """What the books know a storage of the forward ("f") or backward ("b") by."""
        return self.alias.get((phase, storage), (phase, storage))

    def _birth(self, key: object, storages: Storages, number: int, role: str, name: str) -> None:
        if key in self.alive or key in self.on_host:
            return
        size, maker = storages.bytes[number], storages.maker[number]
        if maker not in self.made or size > self.made[maker][2]:
            self.made[maker] = key, len(self.points), size
        if maker.target is TO_HOST:
            self.on_host[key] = Alive(size, "offloaded", name, maker, len(self.points))
            self.host_total += size
            self.host_peak = max(self.host_peak, self.host_total)
            return
        if role == "rng state" and self.around.device == "cuda":
            size = 0  # that of a CUDA generator lives on the host
        size = -(-size // self.around.granularity) * self.around.granularity
        self._open(key, Alive(size, role, name, maker, len(self.points)))

    def _open(self, key: object, entry: Alive) -> None:
        self.alive[key] = entry
        self.numbers[key] = len(self.opened)
        self.opened.append(entry)
        self.total += entry.bytes
        self.by_role[entry.role] = self.by_role.get(entry.role, 0) + entry.bytes

    def _open_workspace(self, collective: fx.Node) -> None:
        """What a collective needs besides its tensors, until it is waited for."""
        if size := workspace_of(collective, self.around.device):
            name = f"{collective.name} workspace"
            entry = Alive(size, "temporary", name, collective, len(self.points))
            self._open(("workspace", collective), entry)

    def _death(self, key: object) -> None:
        if key in self.alive or key in self.on_host:
            self.lasts[key] = len(self.points) - 1
        if (entry := self.alive.pop(key, None)) is not None:
            number = self.numbers[key]
            self.opened[number] = replace(entry, last=len(self.points) - 1)
            self.total -= entry.bytes
            self.by_role[entry.role] -= entry.bytes
        if (entry := self.on_host.pop(key, None)) is not None:
            self.host_total -= entry.bytes

    def _record_loss(self) -> None:
        if self.around.loss_bytes:
            size, now = self.around.loss_bytes, len(self.points)
            loss = Alive(size, "temporary", "loss outside the model", None, now)
            self._open(_OUTSIDE, loss)
            self._record(None)
            self._death(_OUTSIDE)

    def _record(self, node: fx.Node | None) -> None:
        self.points.append(self.total)
        self.nodes.append(node)
        self.roles.append({role: size for role, size in self.by_role.items() if size})
        if self.total > self.peak:
            self.peak, self.peak_node = self.total, node
            self.peak_alive = dict(self.alive)


def _role(node: fx.Node) -> str:
    if node.meta.get("rng_state"):
        return "rng state"
    if node.target is TO_DEVICE:
        return "fetched"
    if is_gather(node) or GATHERED in node.meta:
        return "gathered"
    return "recomputed" if "recomputed_from" in node.meta else "temporary"


def _results(module: fx.GraphModule) -> list[fx.Node]:
    (output,) = module.graph.find_nodes(op="output")
    return list(output.args[0])


def tensor_bytes(tensors: Iterable[torch.Tensor], granularity: int = 1) -> int:
    """Bytes of the distinct storages behind ``tensors``, each rounded up."""
    sizes = {storage_identity(t): t.untyped_storage().nbytes() for t in tensors}
    return sum(-(-size // granularity) * granularity for size in sizes.values())
