"""The recompute problem of a training graph in numbers: what the solver sees.

Values are storages (views are free), operators are the forward nodes that make storages, and the
backward is a list of steps that read storages and have a base memory no decision changes.  A value
may come back for the backward in two ways: its maker runs again, or it is fetched from host memory,
which is an operator that reads nothing.

    forward:  op 0 makes storage 3 (reads 0), op 1 makes 4 and 5 (reads 3), ...
    backward: step 0 reads {5, 3}, base 812 bytes; step 1 reads {4}, base 900 bytes; ...

Plain data without graph objects: it can be hashed, printed, and solved by anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import getitem

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from fxzero.collectives import arrives_as, is_collective, is_gather, workspace_of
from fxzero.cost import CostModel
from fxzero.graph import TrainGraph
from fxzero.passes.replay_randomness import is_random, rng_state_bytes
from fxzero.storages import Storages, analyse, fills_storage, is_scalar
from fxzero.updating import UPDATE


@dataclass(frozen=True)
class Operator:
    """A forward operator, or the fetching of a value that lies in host memory.

    Attributes:
        name: its graph node; for a fetch, the node whose value is fetched.
        position: its place among the forward's steps.
        reads: storages it needs.
        makes: storages it makes.
        seconds, flops: price of running it once more; of a fetch, with the copy to the host.
        state_bytes: saved besides if it is recomputed: the random generator's state, and the old
            values of buffers that it reads and the forward updates.
        recomputable: whether running it again gives the same values and no side effect.
        fetches: whether it is a fetch, which does not run in the forward.
    """

    name: str
    position: int
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    seconds: float
    flops: int
    state_bytes: int
    recomputable: bool
    fetches: bool = False


@dataclass(frozen=True)
class Problem:
    """Which forward values to keep for the backward, under a bound on bytes at every instant.

    Attributes:
        bytes: size of every forward storage.
        operators: fetches, which come first where several operators run before one step, then the
            forward's operators in order.
        maker: for each storage the operator that makes it, or -1 for what is always there.
        death: for each storage the last forward position that needs it.
        forward_steps: number of forward positions.
        steps: names of the backward nodes in order.
        reads: forward storages that each backward step reads.
        base: bytes at each backward step that no decision changes (fixed memory included).
        base_after: the same after each step, when what it used last is gone.
        base_before: the same before the first step.
        base_loss: the same while a loss outside the model is computed.
        fixed: bytes that live throughout.
        outputs: storages returned to the caller.
        held: those of them that the caller keeps during the backward.
        must_save, must_recompute: storages settled by tags.
        seconds, flops: price of one forward and backward without any recompute.
    """

    bytes: tuple[int, ...]
    operators: tuple[Operator, ...]
    maker: tuple[int, ...]
    death: tuple[int, ...]
    forward_steps: int
    steps: tuple[str, ...]
    reads: tuple[tuple[int, ...], ...]
    base: tuple[int, ...]
    base_after: tuple[int, ...]
    base_before: int
    base_loss: int
    fixed: int
    outputs: frozenset[int]
    held: frozenset[int]
    must_save: frozenset[int]
    must_recompute: frozenset[int]
    seconds: float
    flops: int

    @cached_property
    def unit(self) -> float:
        """Bytes that programs count as one, so that their coefficients are moderate numbers."""
        return max(self.bytes, default=1) / 1000 or 1.0

    @cached_property
    def forward_change(self) -> NDArray[np.int64]:
        """Bytes that come (and, negative, go) at each forward position when nothing is saved."""
        change = np.zeros(self.forward_steps + 1, dtype=np.int64)
        for operator in self.operators:
            for storage in operator.makes if not operator.fetches else ():
                change[operator.position] += self.bytes[storage]
                if storage not in self.outputs:
                    change[self.death[storage] + 1] -= self.bytes[storage]
        return change

    @property
    def forward_bytes(self) -> NDArray[np.int64]:
        """Bytes at each forward position when nothing is saved."""
        return self.fixed + np.cumsum(self.forward_change)[: self.forward_steps]

    @property
    def held_bytes(self) -> int:
        """Bytes of the outputs that the caller keeps."""
        return sum(self.bytes[storage] for storage in self.held)

    @cached_property
    def reading_steps(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The backward steps that read anything of the forward, and what."""
        return tuple((step, reads) for step, reads in enumerate(self.reads) if reads)

    @cached_property
    def first_read(self) -> dict[int, int]:
        """The first backward step that reads each storage."""
        first: dict[int, int] = {}
        for step, reads in enumerate(self.reads):
            for storage in reads:
                first.setdefault(storage, step)
        return first

    @cached_property
    def last_read(self) -> dict[int, int]:
        """The last backward step that reads each storage."""
        return {storage: step for step, reads in enumerate(self.reads) for storage in reads}

    @cached_property
    def fetch(self) -> dict[int, int]:
        """For each storage that may lie in host memory, the operator that fetches it."""
        return {op.makes[0]: index for index, op in enumerate(self.operators) if op.fetches}

    def ways(self, storage: int) -> tuple[int, ...]:
        """The operators that can make a storage in the backward."""
        fetch = self.fetch.get(storage)
        return (self.maker[storage],) if fetch is None else (self.maker[storage], fetch)

    @cached_property
    def makers(self) -> tuple[int, ...]:
        """Operators that make or fetch what is needed, in order."""
        return tuple(dict.fromkeys(way for storage in self.needed for way in self.ways(storage)))

    @cached_property
    def needed(self) -> tuple[int, ...]:
        """Storages that the backward reads, and all that they are made from, in order."""
        needed: set[int] = set()
        stack = [s for reads in self.reads for s in reads]
        while stack:
            storage = stack.pop()
            if storage not in needed:
                needed.add(storage)
                stack.extend(self.operators[self.maker[storage]].reads)
        return tuple(sorted(needed))


def build_problem(
    graph: TrainGraph,
    *,
    costs: CostModel,
    device: str,
    fixed_bytes: int,
    outputs_held: bool,
    loss_bytes: int = 0,
    granularity: int = 1,
    policy: Mapping[str, str] | None = None,
    recompute: bool = True,
    offload: bool = False,
    update_bytes: int = 0,
) -> Problem:
    """The problem of a captured joint graph.

    Args:
        fixed_bytes: parameters, buffers, inputs, optimizer state and gradients to add to.
        recompute: whether operators other than gathers may run again.
        offload: whether values may lie in host memory between forward and backward.
        policy: "save" or "recompute" by node name, for values that a user or a tag has settled.
        update_bytes: what the optimizer needs besides while it updates a weight in the backward.
    """
    nodes = [n for n in graph.graph.nodes if n.op in ("call_function", "get_attr")]
    forward = [n for n in nodes if not graph.is_backward(n)]
    backward = [n for n in nodes if graph.is_backward(n)]
    storages = analyse(graph.graph.nodes)
    sizes = tuple(-(-size // granularity) * granularity for size in storages.bytes)
    settled = {"save": set[int](), "recompute": set[int]()}
    for node in forward:
        if (choice := (policy or {}).get(node.name)) is not None:
            settled[choice].update(storages.of.get(node, ()))
    stay = settled["save"] | settled["recompute"] if offload else set(range(len(sizes)))
    stay.update(s for node in forward if is_gather(node) for s in storages.of[node])
    operators, maker = _operators(forward, storages, costs, device, _mutated(graph), granularity)
    death = _deaths(forward, storages, graph)
    workspaces = _workspaces(operators, forward, device, costs)
    for index, size in workspaces.items():
        operator = operators[index]
        operators[index] = replace(operator, makes=(*operator.makes, len(sizes)))
        stay.add(len(sizes))
        sizes, maker, death = (*sizes, size), (*maker, index), (*death, operator.position)
    if not recompute:
        again = {n.name for g in forward if is_gather(g) for n in (g, arrives_as(g))}
        operators = [replace(o, recomputable=o.name in again) for o in operators]
    fetches = _fetches(operators, storages, stay, costs)
    maker = tuple(index + len(fetches) if index >= 0 else index for index in maker)
    results = {"output": frozenset[int](), "gradient": frozenset[int]()}
    for role, value in graph.result_pairs():
        if role.kind in results and isinstance(value, fx.Node):
            results[role.kind] |= frozenset(storages.of[value])
    outputs = frozenset(s for s in results["output"] if maker[s] >= 0)
    scalars = {s for value in results_of(graph) if is_scalar(value) for s in storages.of[value]}
    tangents = {
        s for role, node in graph.pairs() if role.kind == "tangent" for s in storages.of[node]
    }
    tangent_bytes = sum(sizes[s] for s in tangents)
    besides = [_bytes_besides(node, update_bytes, device, costs) for node in backward]
    base, after = _backward_base(
        backward, storages, sizes, results["gradient"], tangent_bytes, besides
    )
    prices = [costs.price(node) for node in nodes]
    made = {s for s, index in enumerate(maker) if index >= 0}
    return Problem(
        bytes=sizes,
        operators=(*fetches, *operators),
        maker=maker,
        death=death,
        forward_steps=len(forward),
        steps=tuple(node.name for node in backward),
        reads=tuple(_forward_reads(node, storages, maker) for node in backward),
        base=tuple(fixed_bytes + b for b in base),
        base_after=tuple(fixed_bytes + b for b in after),
        base_before=fixed_bytes + tangent_bytes,
        base_loss=fixed_bytes + max(loss_bytes, tangent_bytes),
        fixed=fixed_bytes,
        outputs=outputs,
        held=outputs if outputs_held else outputs & scalars,
        must_save=frozenset(settled["save"] & made),
        must_recompute=frozenset((settled["recompute"] - settled["save"]) & made),
        seconds=sum(price.seconds for price in prices),
        flops=sum(price.flops for price in prices),
    )


def results_of(graph: TrainGraph) -> list[fx.Node]:
    """The nodes of the model's outputs."""
    return [
        value
        for role, value in graph.result_pairs()
        if role.kind == "output" and isinstance(value, fx.Node)
    ]


def _operators(
    forward: list[fx.Node],
    storages: Storages,
    costs: CostModel,
    device: str,
    mutated: frozenset[fx.Node],
    granularity: int,
) -> tuple[list[Operator], tuple[int, ...]]:
    maker = [-1] * len(storages.bytes)
    operators: list[Operator] = []
    for position, node in enumerate(forward):
        makes = tuple(dict.fromkeys(s for s in storages.of[node] if storages.maker[s] is node))
        if not makes or node.op == "get_attr":
            continue
        for storage in makes:
            maker[storage] = len(operators)
        price = costs.price_again(node)
        reads = {s for source in node.all_input_nodes for s in storages.of[source]}
        operators.append(
            Operator(
                name=node.name,
                position=position,
                reads=tuple(sorted(s for s in reads if maker[s] >= 0)),
                makes=makes,
                seconds=price.seconds,
                flops=price.flops,
                state_bytes=sum(
                    -(-size // granularity) * granularity
                    for size in _state_sizes(node, storages, device, mutated)
                ),
                recomputable=is_recomputable(node),
            )
        )
    return operators, tuple(maker)


def _state_sizes(
    node: fx.Node, storages: Storages, device: str, mutated: frozenset[fx.Node]
) -> list[int]:
    """Bytes that are saved besides if an operator is recomputed."""
    states = [rng_state_bytes(device)] if is_random(node) else []
    old = mutated & set(node.all_input_nodes)
    return [*states, *(storages.bytes[storages.of[buffer][0]] for buffer in old)]


def _workspaces(
    operators: list[Operator], forward: list[fx.Node], device: str, costs: CostModel
) -> dict[int, int]:
    """Bytes of values that nobody reads: what operators need while they run."""
    found = {}
    for index, operator in enumerate(operators):
        node = forward[operator.position]
        size = workspace_of(node, device) if is_gather(node) else costs.workspace(node)
        if size:
            found[index] = size
    return found


def _fetches(
    operators: list[Operator], storages: Storages, stay: Collection[int], costs: CostModel
) -> list[Operator]:
    return [
        _fetch(value, storage, operator.position, costs)
        for operator in operators
        for storage in operator.makes
        if storage not in stay and (value := _whole_value(storage, storages)) is not None
    ]


def _whole_value(storage: int, storages: Storages) -> fx.Node | None:
    """The node whose value is all there is in a storage: what a copy has to copy."""
    maker = storages.maker[storage]
    items = [user for user in maker.users if user.target is getitem]
    for node in (maker, *items):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and storages.of[node] == (storage,):
            return node if fills_storage(value) else None
    return None


def _fetch(value: fx.Node, storage: int, position: int, costs: CostModel) -> Operator:
    return Operator(
        name=value.name,
        position=position,
        reads=(),
        makes=(storage,),
        seconds=costs.round_trip(value.meta["val"]),
        flops=0,
        state_bytes=0,
        recomputable=True,
        fetches=True,
    )


def _mutated(graph: TrainGraph) -> frozenset[fx.Node]:
    """Placeholders of buffers that the forward updates."""
    placeholder = dict(graph.pairs())
    roles = (role.of for role in graph.outputs if role.kind == "mutation")
    return frozenset(placeholder[role] for role in roles if role is not None)


def is_recomputable(node: fx.Node) -> bool:
    """Whether an operator may run twice: no mutation, no reduction, no unseeded randomness."""
    target = node.target
    if is_gather(node):
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target._schema.is_mutable or target.namespace in ("_c10d_functional", "c10d"):
        return False
    return torch.Tag.nondeterministic_bitwise not in target.tags


def _deaths(forward: list[fx.Node], storages: Storages, graph: TrainGraph) -> tuple[int, ...]:
    death = [-1] * len(storages.bytes)
    for position, node in enumerate(forward):
        for source in (node, *node.all_input_nodes):
            for storage in storages.of[source]:
                death[storage] = position
    for role, value in graph.result_pairs():
        if role.kind in ("output", "mutation") and isinstance(value, fx.Node):
            for storage in storages.of[value]:
                death[storage] = len(forward) - 1
    return tuple(death)


def _forward_reads(node: fx.Node, storages: Storages, maker: tuple[int, ...]) -> tuple[int, ...]:
    reads = {s for source in node.all_input_nodes for s in storages.of[source] if maker[s] >= 0}
    return tuple(sorted(reads))


def _bytes_besides(node: fx.Node, update_bytes: int, device: str, costs: CostModel) -> int:
    """What a node of the backward needs besides its arguments and results."""
    if node.target is UPDATE:
        return update_bytes
    return workspace_of(node, device) if is_collective(node) else costs.workspace(node)


def _backward_base(
    backward: list[fx.Node],
    storages: Storages,
    sizes: tuple[int, ...],
    gradients: frozenset[int],
    tangent_bytes: int,
    besides: list[int],
) -> tuple[list[int], list[int]]:
    """Bytes of gradients, tangents and backward temporaries during and after each backward step."""
    last: dict[int, int] = {}
    made = {s for node in backward for s in storages.of[node] if storages.maker[s] is node}
    for step, node in enumerate(backward):
        for source in (node, *node.all_input_nodes):
            for storage in storages.of[source]:
                if storage in made:
                    last[storage] = step
    dying: dict[int, list[int]] = {}
    for storage, step in last.items():
        if storage not in gradients:
            dying.setdefault(step, []).append(storage)
    alive = tangent_bytes
    base, after = [], []
    for step, node in enumerate(backward):
        alive += sum(sizes[s] for s in set(storages.of[node]) if storages.maker[s] is node)
        base.append(alive + besides[step])
        alive -= sum(sizes[s] for s in dying.get(step, ()))
        after.append(alive)
    return base, after
