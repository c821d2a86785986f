"""What generated code leaves of a budget is spent, and what it needs besides is planned for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import fxzero
from fxzero import _torch
from fxzero.capture import capture
from fxzero.headroom import fit_to_code
from fxzero.inner import Code
from fxzero.options import check_options
from fxzero.planner import Decided, Planner
from fxzero.rehearsal import UNKNOWN, Peaks


class Rehearsed:
    """A planner whose code needs what a function of the operators' peak says."""

    def __init__(self, planner: Planner, needs: Any) -> None:
        self.planner, self.needs = planner, needs

    def within(self, budget: int) -> Planner:
        return self.planner.within(budget)

    def restate(self, decided: Decided) -> Decided:
        return self.planner.restate(decided)

    def rehearse(self, decided: Decided, *code: Any) -> Peaks:
        needed = self.needs(decided.emitted.timeline.peak_bytes)
        return UNKNOWN if needed is None else Peaks(0, needed)


class Spent:
    """A tenth of the way from the smallest peak to no recompute, under code that needs so much.

    Args:
        needs: of (the operators' peak, the budget): bytes; None: nobody knows.
        other: what is generated where the best code exceeds the budget.
    """

    def __init__(self, needs: Any, other: Code | None = None) -> None:
        model, args, kwargs, _ = zoo.build("tied")
        graph = capture(model, args, kwargs, inner="eager").graph
        options = check_options(device="cpu", inner="eager", optimizer="none")
        free = Planner(graph, options, "model")
        low, self.high = free.smallest().plan.peak_bytes, free.decide().plan.peak_bytes
        self.budget = low + (self.high - low) // 10
        planner = free.within(self.budget)
        self.before = planner.decide().plan
        self.asked: list[int | None] = []

        def generate(decided: Decided, limit: int | None) -> Code:
            self.asked.append(limit)
            peak = decided.emitted.timeline.peak_bytes
            excess = (needs(peak, self.budget) or 0) - self.budget
            if limit is None or excess <= 0 or other is None:
                return Code(list, list)
            return replace(other, excess=excess)

        made = fit_to_code(
            Rehearsed(planner, lambda peak: needs(peak, self.budget)),  # type: ignore[arg-type]
            planner.decide(),
            self.budget,
            generate,
        )
        self.plan, self.code = made.decided.plan, made.code


def test_code_that_needs_less_gets_a_plan_with_less_recompute() -> None:
    spent = Spent(lambda peak, budget: int(0.8 * peak))
    assert spent.plan.recompute_seconds < 0.8 * spent.before.recompute_seconds
    assert 0.97 * spent.budget <= spent.plan.peak_bytes <= spent.budget
    assert spent.plan.request.memory_budget == spent.budget
    assert spent.plan.fits
    assert (spent.plan.status, spent.plan.gap) == ("feasible", None)
    assert fxzero.Plan.from_json(spent.plan.to_json()) == spent.plan
    assert spent.asked[0] == spent.budget
    assert set(spent.asked[1:]) == {None}


def test_code_that_needs_suddenly_more_is_not_taken() -> None:
    """As where another operator's working memory becomes the peak."""
    spent = Spent(lambda peak, b: int(0.8 * peak) if peak < 1.1 * b else 2 * peak)
    assert spent.plan.peak_bytes <= 0.8 * 1.1 * spent.budget
    assert spent.plan.recompute_seconds < spent.before.recompute_seconds
    assert spent.asked == [spent.budget, None, None]


@pytest.mark.parametrize(
    "needs", [lambda peak, _: peak, lambda peak, _: None], ids=["no room", "unknown"]
)
def test_otherwise_the_plan_stands_and_no_more_code_is_generated(needs: Any) -> None:
    spent = Spent(needs)
    assert spent.plan.decisions == spent.before.decisions
    assert spent.asked == [spent.budget]


def test_code_that_needs_more_gets_a_plan_for_less_and_is_generated() -> None:
    spent = Spent(lambda peak, _: int(1.05 * peak), Code(list, list, one_by_one=True))
    assert not spent.code.one_by_one
    assert spent.plan.recompute_seconds > spent.before.recompute_seconds
    assert 0.97 * spent.budget <= spent.plan.peak_bytes <= spent.budget
    assert spent.plan.request.memory_budget == spent.budget
    assert (spent.plan.status, spent.plan.gap) == ("feasible", None)
    assert len(spent.asked) <= 3


def test_code_that_no_plan_has_room_for_leaves_operators_one_by_one() -> None:
    spent = Spent(lambda peak, _: 2 * peak, Code(list, list, one_by_one=True))
    assert spent.code.one_by_one
    assert spent.plan.decisions == spent.before.decisions
    assert spent.asked == [spent.budget]


def test_code_in_another_order_is_not_given_up_for_more_recompute() -> None:
    spent = Spent(lambda peak, _: int(1.05 * peak), Code(list, list))
    assert spent.code.excess
    assert spent.plan.decisions == spent.before.decisions


class Classifier(nn.Module):
    """Operators need its scores three times at the loss, generated code less often."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(12))
        self.head = nn.Linear(32, 256)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return F.cross_entropy(self.head(x), target)


@pytest.mark.slow
@pytest.mark.skipif(not _torch.has_compiler("cpu"), reason="needs a C++ compiler")
def test_generated_code_recomputes_less_than_operators_must_within_the_same_budget() -> None:
    model, inputs = Classifier(), (torch.randn(512, 32), torch.randint(256, (512,)))
    given: dict[str, Any] = {"optimizer": "none", "inner": "inductor"}
    free = fxzero.plan(model, inputs, **given)
    budget = free.minimum_budget + (free.peak_bytes - free.minimum_budget) // 10
    by_operators = fxzero.plan(model, inputs, memory_budget=budget, **given)
    compiled = fxzero.compile(model, inputs, memory_budget=budget, **given)
    plan = compiled.plan
    assert plan.recompute_seconds < 0.7 * by_operators.recompute_seconds

    def step() -> None:
        compiled(*inputs).backward()

    step()
    compiled.zero_grad()
    assert fxzero.measure(step).tensor_bytes <= plan.peak_bytes + 16 <= budget + 16
