"""Repeated forward operations run once, except where two results are wanted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxzero
from fxzero.capture import capture
from fxzero.graph import TrainGraph
from fxzero.passes.context import PassContext
from fxzero.passes.pipeline import PREPARATION
from fxzero.passes.runner import run_passes


class Masked(nn.Module):
    """Two layers that each make the same bias of the same mask."""

    def __init__(self, wrap: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.wrap = wrap

    def layer(self, layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        bias = torch.where(mask, 0.0, -1.0)
        return torch.tanh(layer(x) * bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            if self.wrap:
                x = checkpoint(self.layer, layer, x, mask, use_reentrant=False)
            else:
                x = self.layer(layer, x, mask)
        return x.sum()


class Twice(nn.Module):
    """Random numbers, outputs and names that must stay two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.linear(x)
        bias = self.linear.bias
        first = fxzero.name(bias.exp(), "first") * torch.rand(8)
        second = fxzero.name(bias.exp(), "second") * torch.rand(8)
        return (hidden.square() * first + second).sum(), bias.sin(), bias.sin()


def deduplicated(model: nn.Module, *inputs: Tensor) -> TrainGraph:
    graph = capture(model, inputs).graph
    graph, _ = run_passes(graph, PassContext(), PREPARATION, check=True)
    return graph


def count(graph: TrainGraph, target: object) -> int:
    nodes = graph.graph.find_nodes(op="call_function", target=target)
    return sum(not graph.is_backward(node) for node in nodes)


INPUTS = torch.randn(512, 8), torch.rand(8) > 0.5


def test_a_bias_that_every_layer_makes_is_made_once() -> None:
    before = capture(Masked(), INPUTS).graph
    assert count(before, torch.ops.aten.where.self) == 2
    assert count(deduplicated(Masked(), *INPUTS), torch.ops.aten.where.self) == 1


def test_it_is_saved_once_too() -> None:
    plan = fxzero.plan(Masked(), INPUTS)
    assert len([value for value in plan.saved if "where" in value.name]) == 1


def test_checkpoint_regions_keep_their_own() -> None:
    graph = deduplicated(Masked(wrap=True), *INPUTS)
    assert count(graph, torch.ops.aten.where.self) == 2


def test_random_numbers_outputs_and_named_values_stay_two() -> None:
    graph = deduplicated(Twice(), INPUTS[0])
    assert count(graph, torch.ops.aten.rand.default) == 2
    assert count(graph, torch.ops.aten.sin.default) == 2
    assert count(graph, torch.ops.aten.alias.default) == 2
    assert count(graph, torch.ops.aten.exp.default) == 1


def test_results_are_those_of_eager() -> None:
    model = Masked()
    model(*INPUTS).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    fxzero.compile(model, inner="eager")(*INPUTS).backward()
    for found, wanted in zip(model.parameters(), expected, strict=True):
        assert found.grad is not None
        assert torch.equal(found.grad, wanted)
