"""The books of the timeline are what really happens in memory, node by node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import step_of
from torch import Tensor, fx, nn

import fxzero
from fxzero.capture import Capture, capture
from fxzero.execution import compile_to_python
from fxzero.measurement import StorageCounter
from fxzero.options import Options
from fxzero.passes.context import PassContext
from fxzero.passes.partition import Split, partition
from fxzero.passes.runner import run_passes
from fxzero.planner import Planner
from fxzero.storages import analyse
from fxzero.timeline import CUDA_GRANULARITY, LOSS_SCALARS, Surroundings, Timeline, simulate


class Views(nn.Module):
    """Results of views, expands and chunks live as long as their bases do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(1, 0, 2, 3).unbind(0)
        mixed = (torch.softmax(q @ k.transpose(-2, -1), -1) @ v).flatten(1)
        return self.out(mixed + x.mean(0).expand(8, 16)).square().mean()


class Tuples(nn.Module):
    """Operators that return several tensors, some of which nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.lost = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        hidden = self.norm(F.dropout(self.up(x), 0.3, True))
        values, _ = hidden.max(-1)
        top = hidden.topk(3, dim=-1).values
        return (values.sum() + top.square().sum()) / hidden.var()


class SavedViews(nn.Module):
    """The backward needs transposed and sliced values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.first(x)).t()[:8].t()
        return (self.second(hidden) * hidden.repeat(1, 2)).exp().mean()


class Tied(nn.Module):
    """One weight, used twice, is one storage and has one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Any:
        ids = (x[:, :4].abs() * 5).long() % 20
        return self.head(torch.tanh(self.embed(ids))).square().mean()


class Constants(nn.Module):
    """Tensors that the model makes while it is traced stay with the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.table = torch.arange(16.0)

    def forward(self, x: Tensor) -> Any:
        return (torch.sigmoid(self.up(x)) * self.table * torch.tensor([2.0] * 16)).mean()


class Buffers(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.register_buffer("mean", torch.ones(16))

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.up(x)) * self.mean.clone()
        self.mean.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        return hidden.square().sum()


class Logits(Views):
    """The loss is outside."""

    def forward(self, x: Tensor) -> Any:
        return torch.tanh(self.out(torch.relu(self.qkv(x))[:, :16])), x.detach() * 2


X = torch.randn(8, 16)
KINDS = (Views, Tuples, SavedViews, Tied, Constants, Buffers)


class Watched(StorageCounter):
    """Notes after every operator of a graph how many bytes are alive."""

    def __init__(self, known: Any) -> None:
        super().__init__(known)
        self.points: list[int] = []

    def watch(self, function: Any) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.points.append(self.current)
            return result

        return watched


def watched(module: fx.GraphModule, counter: Watched) -> Any:
    """The graph as a function whose operators are watched."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = counter.watch(node.target)
    return compile_to_python(fx.GraphModule(module, graph))


@dataclass(frozen=True)
class Case:
    model: nn.Module
    captured: Capture
    split: Split

    def leaves(self) -> list[Tensor]:
        """The tensors behind the forward's placeholders."""
        found = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        found |= {n: t for n, t in vars(self.model).items() if isinstance(t, Tensor)}
        found |= self.captured.constants
        return [X if r.kind == "input" else found[r.name].detach() for r in self.split.inputs]

    def measure(self) -> list[int]:
        """Bytes alive after each operator of the two graphs; the caller holds the outputs."""
        arguments = self.leaves()
        constants = [
            getattr(graph, str(node.target))
            for graph in (self.split.forward, self.split.backward)
            for node in graph.graph.find_nodes(op="get_attr")
        ]
        counter = Watched([*arguments, *constants])
        forward = watched(self.split.forward, counter)
        backward = watched(self.split.backward, counter)
        with counter:
            results = forward(list(arguments))
            outputs = results[: self.split.output_count]
            saved = results[self.split.output_count :]
            del results
            tangents = [torch.ones_like(outputs[i]) for i in self.split.tangents]
            saved += tangents
            gradients = backward(saved)
        assert len(gradients) == len({g for g in self.split.gradients if g is not None})
        return counter.points

    def simulate(self, **surroundings: Any) -> Timeline:
        return simulate(self.split, Surroundings(**surroundings))


def case(kind: type[nn.Module], recompute: str = "none") -> Case:
    torch.manual_seed(0)
    model = kind()
    captured = capture(model, (X,))
    planner = Planner(captured.graph, Options(optimizer="sgd", recompute=recompute), "model")
    decisions = planner.decide().plan.decisions
    graph, _ = run_passes(captured.graph, PassContext(decisions))
    return Case(model, captured, partition(graph))


def expected_points(timeline: Timeline, split: Split) -> list[int]:
    """The timeline's points at operators; constants are no operators."""
    nodes = [
        node
        for graph in (split.forward.graph, split.backward.graph)
        for node in graph.nodes
        if node.op in ("call_function", "get_attr")
    ]
    assert len(nodes) == len(timeline.points)
    pairs = zip(timeline.points, nodes, strict=True)
    return [point for point, node in pairs if node.op == "call_function"]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_at_every_node_are_those_alive_when_it_runs(
    kind: type[nn.Module], recompute: str
) -> None:
    subject = case(kind, recompute)
    timeline = subject.simulate()
    assert subject.measure() == expected_points(timeline, subject.split)
    assert timeline.peak_bytes == max(timeline.points)
    assert [sum(roles.values()) for roles in timeline.roles] == list(timeline.points)


@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_is_what_a_step_of_the_compiled_model_takes(kind: type[nn.Module]) -> None:
    model = fxzero.compile(kind(), recompute="full", optimizer="sgd", inner="eager")
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        peak = fxzero.measure(step_of(model, (X,))).peak_bytes
        assert peak <= model.plan.peak_bytes <= 1.05 * peak


def test_what_lives_at_the_peak_adds_up_to_it() -> None:
    timeline = case(Tuples, "full").simulate()
    assert sum(entry.bytes for entry in timeline.alive) == timeline.peak_bytes
    at = timeline.points.index(timeline.peak_bytes)
    assert timeline.nodes[at] is timeline.peak_node
    end = len(timeline.points)
    assert all(
        entry.first <= at <= (end if entry.last is None else entry.last) for entry in timeline.alive
    )


def test_parameters_buffers_and_inputs_are_fixed_and_counted_once() -> None:
    timeline = case(Tied).simulate(optimizer_bytes=1000)
    assert timeline.fixed == {"parameter": 20 * 16 * 4, "input": 8 * 16 * 4, "optimizer": 1000}
    assert timeline.gradient_bytes == 20 * 16 * 4
    assert min(timeline.points) >= sum(timeline.fixed.values())


def test_optimizer_state_is_there_at_every_point() -> None:
    subject = case(Views)
    plain, more = subject.simulate(), subject.simulate(optimizer_bytes=12345)
    assert [b - a for a, b in zip(plain.points, more.points, strict=True)] == [12345] * len(
        plain.points
    )


def test_sizes_are_rounded_up_to_the_allocators_granularity() -> None:
    subject = case(Tied)
    fine, coarse = subject.simulate(), subject.simulate(granularity=CUDA_GRANULARITY)
    assert all(point % 512 == 0 for point in coarse.points)
    assert all(entry.bytes % 512 == 0 for entry in coarse.alive)
    assert all(a <= b for a, b in zip(fine.points, coarse.points, strict=True))
    assert coarse.fixed == {"parameter": 1536, "input": 512}


def test_outputs_that_the_caller_drops_are_gone_in_the_backward() -> None:
    subject = case(Logits)
    held, dropped = subject.simulate(outputs_held=True), subject.simulate(outputs_held=False)
    assert subject.measure() == expected_points(held, subject.split)
    forward = held.forward_nodes
    assert held.points[:forward] == dropped.points[:forward]
    spared = {a - b for a, b in zip(held.points[forward:], dropped.points[forward:], strict=True)}
    # The second output dies with the forward; the first is needed by tanh's backward.
    assert spared <= {X.untyped_storage().nbytes(), 2 * X.untyped_storage().nbytes()}
    assert held.points[forward] - dropped.points[forward] == X.untyped_storage().nbytes()


def test_a_loss_outside_the_model_is_one_more_point_between_forward_and_backward() -> None:
    subject = case(Logits)
    plain, loss = subject.simulate(), subject.simulate(loss_bytes=100_000)
    assert len(loss.points) == len(plain.points) + 1
    at = loss.forward_nodes
    assert loss.peak_bytes == loss.points[at]
    assert loss.peak_node is None
    assert loss.alive[0].name == "loss outside the model"
    saved = sum(entry.bytes for entry in loss.saved)
    outputs = 2 * X.untyped_storage().nbytes() - (saved and X.untyped_storage().nbytes())
    assert loss.points[at] == sum(loss.fixed.values()) + saved + outputs + 100_000
    assert loss.fixed["output"] == LOSS_SCALARS
    assert loss.points[0] == plain.points[0] + LOSS_SCALARS


def test_views_have_the_storage_of_their_base() -> None:
    storages = analyse(capture(Views(), (X,)).graph.graph.nodes)
    by_name = {node.name: node for node in storages.of}
    assert storages.is_view(by_name["permute"])
    assert not storages.is_view(by_name["addmm"])
    assert storages.of[by_name["permute"]] == storages.of[by_name["addmm"]]
    (base,) = storages.of[by_name["addmm"]]
    assert storages.bytes[base] == 8 * 48 * 4
    assert storages.maker[base] is by_name["addmm"]
