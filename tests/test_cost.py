"""What an operator costs alone, and inside a kernel that Inductor fuses it into."""

from __future__ import annotations

import functools

import pytest
import torch
import zoo
from torch import Tensor, fx, nn

import fxzero
from fxzero.capture import capture
from fxzero.cost import CPU, CostModel, is_elementwise, operator_key

ALONE, FUSED = CostModel(CPU), CostModel(CPU, fused=True)


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        larger = x + x.flip(0)
        return (larger * self.scale).cos().square().sum()


@functools.cache
def nodes_of(kind: type[nn.Module]) -> tuple[fx.Node, ...]:
    graph = capture(kind(), (torch.randn(64, 64, requires_grad=True),), inner="inductor").graph
    return tuple(graph.graph.nodes)


def first(target: object) -> fx.Node:
    return next(node for node in nodes_of(Sums) if node.target == target)


def test_reading_two_values_instead_of_one_costs_the_second() -> None:
    size = 64 * 64 * 4
    assert FUSED.price(first(torch.ops.aten.add.Tensor)).seconds == size / CPU.bandwidth


def test_reading_as_much_as_is_made_costs_almost_nothing() -> None:
    cos = first(torch.ops.aten.cos.default)
    assert FUSED.price(cos).seconds == pytest.approx(0.02 * ALONE.price(cos).seconds)


def test_a_broadcast_value_is_read_once() -> None:
    scaled = first(torch.ops.aten.mul.Tensor)
    assert (
        FUSED.price(scaled).seconds <= 64 * 4 / CPU.bandwidth + 0.02 * ALONE.price(scaled).seconds
    )


def test_what_computes_longer_than_it_reads_and_writes_keeps_the_rest() -> None:
    cos = first(torch.ops.aten.cos.default)
    alone = 10 * ALONE.price(cos).seconds
    slow = CostModel(CPU, {operator_key(cos): alone}, fused=True)
    assert slow.price(cos).seconds == pytest.approx(0.9 * alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "unet"])
def test_inside_a_kernel_elementwise_operators_are_cheaper_and_others_as_before(name: str) -> None:
    model, args, kwargs, _ = zoo.build(name)
    nodes = capture(model, args, kwargs, inner="inductor").graph.graph.nodes
    for node in nodes:
        alone, fused = ALONE.price(node), FUSED.price(node)
        assert fused.flops == alone.flops
        if is_elementwise(node) and alone.seconds:
            leaves = any(_must_be_written_for(user) for user in node.users)
            assert 0 < fused.seconds < alone.seconds or leaves
        else:
            assert fused.seconds == alone.seconds


def _must_be_written_for(user: fx.Node) -> bool:
    if isinstance(user.target, torch._ops.OpOverload) and user.target.is_view:
        return any(map(_must_be_written_for, user.users))
    products = ("mm", "convolution", "scaled_dot_product")
    return user.op == "output" or any(name in str(user.target) for name in products)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.cos().neg().t() @ self.weight).sum()


def test_what_a_product_reads_is_written_and_what_it_is_made_from_is_not() -> None:
    nodes = {node.target: node for node in reversed(nodes_of(Product))}
    cos, neg = nodes[torch.ops.aten.cos.default], nodes[torch.ops.aten.neg.default]
    assert FUSED.price(neg) == ALONE.price(neg)
    assert FUSED.price(cos).seconds < 0.1 * ALONE.price(cos).seconds


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["time", pytest.param("flops", marks=pytest.mark.exhaustive)])
def test_without_a_budget_generated_code_recomputes_what_costs_next_to_nothing(
    objective: str,
) -> None:
    model, args, kwargs, _ = zoo.build("buffers")
    plan = functools.partial(
        fxzero.plan, model, args, kwargs=kwargs, optimizer="sgd", objective=objective
    )
    found = plan(inner="inductor")
    assert found.peak_bytes < 0.95 * found.unplanned_peak_bytes
    assert found.recompute_seconds > 0
    if objective == "time":
        assert found.recompute_seconds <= 0.01 * found.step_seconds
    for other in (plan(inner="inductor", recompute="none"), plan(inner="eager")):
        assert other.peak_bytes == other.unplanned_peak_bytes
        assert not other.decisions.recompute
