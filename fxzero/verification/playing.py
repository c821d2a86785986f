"""Runs a joint graph operator by operator, wherever in the list of passes it stands.

What goes in and what comes out has the same meaning after every pass, so that two points of the
list can be compared:

    parameters    whole before ``shard``, parts of this rank behind it
    gradients     reduced, as the parameter is spread, with what existed added to them
    buffers       as the step leaves them, whether the graph writes them or returns them
    random draws  a clone draws what its original drew, also before ``replay_randomness`` says how
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero import _torch
from fxzero.collectives import bind, starts_transfer
from fxzero.execution import last_uses
from fxzero.graph import InputRole, TrainGraph
from fxzero.passes.rematerialize import CLONE_OF
from fxzero.passes.replay_randomness import is_random
from fxzero.randomness import RandomState
from fxzero.ranks import Ranks
from fxzero.sharding import is_spread
from fxzero.training_step import TrainingStep
from fxzero.transfers import TO_HOST
from fxzero.updating import UPDATE, taking
from fxzero.verification.values import same

Observe = Callable[[fx.Node, Any], None]


@dataclass(frozen=True)
class Situation:
    """A step, and what it is run on again and again.

    Attributes:
        leaves: the call's tensors.
        state: of the random generators when it begins.
        existing: by name, gradients that it adds to, spread as the parameters are.
    """

    step: TrainingStep
    leaves: Sequence[torch.Tensor]
    state: RandomState
    existing: Mapping[str, torch.Tensor]

    @property
    def ranks(self) -> Ranks | None:
        return self.step.ranks


@dataclass(frozen=True)
class Outcome:
    """What a step left behind: on each rank its own part of gradients.

    Attributes:
        outputs: by position.
        gradients: by name of the parameter, "input 0" for that of an input.
        buffers: by name.
        stream: the random generators' state.
    """

    outputs: Mapping[int, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    stream: RandomState

    def differing(self, other: Outcome) -> Iterator[tuple[str, str]]:
        """Kind and name of all that is not the same, in the order in which a step makes it."""
        for index in sorted({*self.outputs, *other.outputs}):
            if not same(self.outputs.get(index), other.outputs.get(index)):
                yield "output", str(index)
        for name in dict.fromkeys((*self.buffers, *other.buffers)):
            if not same(self.buffers.get(name), other.buffers.get(name)):
                yield "buffer", name
        if not self.stream.equals(other.stream):
            yield "random stream", ""
        for name in dict.fromkeys((*self.gradients, *other.gradients)):
            if not same(self.gradients.get(name), other.gradients.get(name)):
                yield "gradient", name

    def value(self, kind: str, name: str) -> torch.Tensor | None:
        """What ``differing`` named."""
        if kind == "output":
            return self.outputs.get(int(name))
        return (self.buffers if kind == "buffer" else self.gradients).get(name)


def name_of(role: InputRole) -> str:
    """What gradients and buffers go by."""
    return role.name or f"input {role.index}"


def play(count: int, situation: Situation, observe: Observe | None = None) -> Outcome:
    """Runs the step's graph as its first ``count`` passes leave it.

    On many ranks all of them must call it with the same count.

    Args:
        observe: called with each operator's node and its value, unless that is still on its way.
    """
    names = [item.name for item in situation.step.passes[:count]]
    graph = situation.step.partway(count)
    given = {role: _given(role, node, situation, names) for role, node in graph.pairs()}
    replays = "replay_randomness" not in names
    return _run(graph, given, situation, "shard" in names, replays, observe or _ignore)


def _ignore(node: fx.Node, value: Any) -> None:
    pass


def _run(
    graph: TrainGraph,
    given: Mapping[InputRole, torch.Tensor],
    situation: Situation,
    reduced: bool,
    replays: bool,
    observe: Observe,
) -> Outcome:
    ranks, module = situation.ranks, graph.module
    if ranks is not None:
        bind(module, ranks.mesh.groups)
    handed: dict[str, torch.Tensor] = {}
    with situation.state.replayed(), torch.no_grad(), taking(_keeping(handed)):
        results = _Player(module, observe, replays).run(*given.values())
        stream = RandomState.now()
    outputs, gradients = {}, {}
    buffers = {name_of(role): tensor for role, tensor in given.items() if role.kind == "buffer"}
    accumulated = {role.name for role in given if role.kind == "gradient"}
    for (role, node), value in zip(graph.result_pairs(), results, strict=True):
        if value is None:
            continue
        if role.kind == "output":
            outputs[role.index] = value
        elif role.of is not None and role.kind == "mutation":
            buffers[name_of(role.of)] = value
        elif role.of is not None:
            value = handed[role.of.name] if node.target is UPDATE else value
            name = name_of(role.of)
            value = _as_left(role.of, value, situation, reduced)
            if name in situation.existing and name not in accumulated:
                value = _torch.local_tensor(situation.existing[name]) + value
            gradients[name] = value
    return Outcome(outputs, gradients, buffers, stream)


def _keeping(handed: dict[str, torch.Tensor]) -> Callable[[str, torch.Tensor], None]:
    def take(name: str, gradient: torch.Tensor) -> None:
        handed[name] = gradient

    return take


def _given(
    role: InputRole, node: fx.Node, situation: Situation, names: Sequence[str]
) -> torch.Tensor:
    """What a placeholder gets; nothing that a graph may write to is the model's own."""
    ranks = situation.ranks
    if role.kind == "tangent":
        value = node.meta["val"]
        return torch.ones((), dtype=value.dtype, device=value.device).expand(value.shape)
    if role.kind == "gradient":
        existing = situation.existing[role.name]
        local = _torch.local_tensor(existing).clone()
        return local if ranks is None else ranks.shards.part(_like(local, existing, situation))
    tensor = situation.step.tensor_for(role, situation.leaves).detach()
    if role.kind != "parameter":
        return tensor.clone()
    if ranks is None:
        return tensor
    return ranks.shards.part(tensor) if "shard" in names else ranks.shards.gather(tensor)


def _like(local: torch.Tensor, gradient: torch.Tensor, situation: Situation) -> torch.Tensor:
    """This rank's own copy of a gradient, spread as the gradient is."""
    assert situation.ranks is not None
    if not is_spread(gradient):
        return local
    return situation.ranks.shards.gradient(local, gradient)


def _as_left(
    role: InputRole, gradient: torch.Tensor, situation: Situation, reduced: bool
) -> torch.Tensor:
    """This rank's part of a gradient, as a backward leaves it in ``.grad``."""
    ranks = situation.ranks
    if ranks is None or role.kind != "parameter" or not situation.step.reduces:
        return gradient
    parameter = situation.step.tensor_for(role, situation.leaves)
    if reduced:
        return _torch.local_tensor(ranks.shards.gradient(gradient, parameter))
    return _torch.local_tensor(average(ranks, gradient, parameter))


def average(ranks: Ranks, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole gradient averaged over the ranks as graphs do it, spread as the parameter is."""
    dtype = ranks.shards.sharding.reduce_dtype
    value = gradient if dtype is None else gradient.to(getattr(torch, dtype))
    return ranks.shards.reduce(value, parameter).to(parameter.dtype)


def _is_on_its_way(node: fx.Node) -> bool:
    """Whether the node's value may not be there yet when the node has run."""
    source: Any = node.args[0] if node.target is operator.getitem else node
    return starts_transfer(source.target) or source.target is TO_HOST


class _Player(fx.Interpreter):
    """Runs node by node.

    Args:
        replays: whether clones of random operators draw what their originals drew.
    """

    def __init__(self, module: fx.GraphModule, observe: Observe, replays: bool) -> None:
        super().__init__(module)
        self.user_to_last_uses = last_uses(module.graph)  # a collective reads until its wait
        self.observe = observe
        self.replays = replays
        self.drawn: dict[str, RandomState] = {}

    def run_node(self, n: fx.Node) -> Any:
        with self._draws(n):
            value = super().run_node(n)
        if n.op == "call_function" and not _is_on_its_way(n):
            self.observe(n, value)
        return value

    @contextlib.contextmanager
    def _draws(self, node: fx.Node) -> Iterator[None]:
        if self.replays and is_random(node):
            if CLONE_OF in node.meta:
                with self.drawn[node.meta[CLONE_OF]].replayed():
                    yield
                return
            self.drawn[node.name] = RandomState.now()
        yield
