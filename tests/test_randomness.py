"""Recomputed random operators draw what they drew, and the stream ends where eager leaves it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, run, tiers
from torch import Tensor, nn

import fxzero

pytestmark = pytest.mark.usefixtures("shared_solvers")


class Drops(nn.Module):
    """Every activation passes a dropout; the loss depends smoothly on all parameters."""

    def __init__(self, p: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.p = p
        self.layers = nn.ModuleList([nn.Linear(12, 12, dtype=dtype) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(torch.tanh(layer(x)), self.p, self.training) + 0.5 * x
        return x.float().square().mean() if x.dtype == torch.bfloat16 else x.square().mean()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2048, 12, dtype=dtype, generator=torch.Generator().manual_seed(3))


def plan_of(model: nn.Module, x: Tensor, **options: Any) -> fxzero.Plan:
    return fxzero.plan(model, x, optimizer="sgd", **options)


def compiled(model: nn.Module, budget: int) -> Any:
    return fxzero.compile(
        copy.deepcopy(model), memory_budget=budget, optimizer="sgd", inner="eager"
    )


def budgets(model: nn.Module, x: Tensor) -> list[int]:
    """Nothing recomputed, half way, and the smallest there is."""
    plan = plan_of(model, x)
    smallest, largest = plan.minimum_budget, plan.peak_bytes
    return [largest, (smallest + largest) // 2, smallest]


def random_recomputed(plan: fxzero.Plan) -> int:
    return sum("dropout" in item.node for item in plan.decisions.recompute)


def loss_at(model: Any, x: Tensor) -> float:
    torch.manual_seed(0)
    return float(model(x))


@pytest.mark.parametrize("p", tiers((0.1, 0.3, 0.9), quick=(), exhaustive=(0.1, 0.9)))
def test_gradients_are_the_finite_differences_under_one_seed_at_every_budget(p: float) -> None:
    torch.manual_seed(1)
    model = Drops(p, torch.float64)
    x = inputs(torch.float64)
    for budget in budgets(model, x):
        subject = compiled(model, budget)
        run(subject, (x,))
        for parameter in (subject.layers[0].weight, subject.layers[1].weight):
            direction = torch.randn_like(parameter)
            slope = float((parameter.grad * direction).sum())
            with torch.no_grad():
                parameter.add_(direction, alpha=1e-6)
                above = loss_at(subject, x)
                parameter.sub_(direction, alpha=2e-6)
                below = loss_at(subject, x)
                parameter.add_(direction, alpha=1e-6)
            assert slope == pytest.approx((above - below) / 2e-6, rel=1e-5)
    assert random_recomputed(subject.plan) > 0


@pytest.mark.parametrize(
    "dtype",
    tiers((torch.float32, torch.bfloat16), quick=()),
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("p", tiers((0.37, 0.1, 0.5, 0.0, 1.0), (0.1,), (0.37, 0.5, 0.0, 1.0)))
def test_dropout_is_eagers_bitwise_at_every_budget_and_so_is_the_stream_after_it(
    p: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    model, x = Drops(p, dtype), inputs(dtype)
    expected = [run(model, (x,), seed=seed) for seed in range(2)]
    for budget in budgets(model, x):
        subject = compiled(model, budget)
        for seed in range(2):
            assert_same(run(subject, (x,), seed=seed), expected[seed])
    if 0 < p < 1:
        assert random_recomputed(subject.plan) > 0


@pytest.mark.slow
def test_two_steps_in_a_row_draw_different_numbers() -> None:
    model, x = Drops(0.5), inputs()
    subject = compiled(model, budgets(model, x)[-1])
    torch.manual_seed(0)
    first, second = float(subject(x)), float(subject(x))
    assert first != second
    torch.manual_seed(0)
    assert (float(model(x)), float(model(x))) == (first, second)


@pytest.mark.slow
def test_a_backward_long_after_its_forward_draws_what_the_forward_drew() -> None:
    model, x = Drops(0.5), inputs()
    subject = compiled(model, budgets(model, x)[-1])
    expected = run(model, (x,))
    torch.manual_seed(0)
    loss = subject(x)
    torch.manual_seed(99)
    torch.rand(100)
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert random_recomputed(subject.plan) > 0
    for name, parameter in subject.named_parameters():
        gradient = expected.gradients[name]
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient), name
