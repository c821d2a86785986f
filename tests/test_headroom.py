"""What generated code leaves of a budget is spent, and never more than that."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import fxzero
from fxzero import _inductor
from fxzero.capture import capture
from fxzero.graph_planner import Decided
from fxzero.headroom import use_headroom
from fxzero.inner import Code
from fxzero.options import check_options
from fxzero.planner import Planner
from fxzero.rehearsal import UNKNOWN, Peaks


class Rehearsed(Planner):
    """The same planner, whose code needs what a function of the operators' peak says."""

    def __init__(self, planner: Planner, needs: Any) -> None:
        vars(self).update(vars(planner))
        self.needs = needs

    def rehearse(self, decided: Decided, *code: Any) -> Peaks:
        needed = self.needs(decided.emitted.timeline.peak_bytes)
        return UNKNOWN if needed is None else Peaks(0, needed)


@functools.cache
def a_tenth_of_the_way() -> tuple[Planner, int, Decided]:
    """From the smallest peak to no recompute: a planner under that budget, and what it decides."""
    model, args, kwargs, _ = zoo.build("tied")
    graph = capture(model, args, kwargs, inner="eager").graph
    options = check_options(device="cpu", inner="eager", optimizer="none")
    free = Planner(graph, options, "model")
    low, high = free.smallest().plan.peak_bytes, free.decide().plan.peak_bytes
    budget = low + (high - low) // 10
    planner = free.within(budget)
    return planner, budget, planner.decide()


class Spent:
    """What use_headroom makes of a budget, under code that needs so much.

    Args:
        needs: of (the operators' peak, the budget): bytes; None: nobody knows.
    """

    def __init__(self, needs: Any) -> None:
        planner, self.budget, decided = a_tenth_of_the_way()
        self.before = decided.plan
        self.asked: list[int | None] = []

        def generate(decided: Decided, limit: int | None) -> Code:
            self.asked.append(limit)
            return Code(list, list)

        made = use_headroom(
            Rehearsed(planner, lambda peak: needs(peak, self.budget)),
            decided,
            self.budget,
            generate,
        )
        self.plan = made.decided.plan


@pytest.mark.slow
def test_code_that_needs_less_gets_a_plan_with_less_recompute() -> None:
    spent = Spent(lambda peak, budget: int(0.8 * peak))
    assert spent.plan.recompute_seconds < 0.8 * spent.before.recompute_seconds
    assert 0.97 * spent.budget <= spent.plan.peak_bytes <= spent.budget
    assert spent.plan.request.memory_budget == spent.budget
    assert spent.plan.fits
    assert (spent.plan.status, spent.plan.gap) == ("feasible", None)
    assert fxzero.Plan.from_json(spent.plan.to_json()) == spent.plan
    assert set(spent.asked) == {None}


@pytest.mark.slow
def test_code_that_needs_suddenly_more_is_not_taken() -> None:
    """As where another operator's working memory becomes the peak."""
    spent = Spent(lambda peak, b: int(0.8 * peak) if peak < 1.1 * b else 2 * peak)
    assert spent.plan.peak_bytes <= 0.8 * 1.1 * spent.budget
    assert spent.plan.recompute_seconds < spent.before.recompute_seconds
    assert spent.asked == [None, None, None]


def test_without_room_the_plan_stands() -> None:
    spent = Spent(lambda peak, _: peak)
    assert spent.plan.decisions == spent.before.decisions
    assert spent.asked == [None]


@pytest.mark.parametrize("more", [2**10, 2**12])
def test_code_that_needs_a_little_more_gets_a_plan_for_a_little_less(more: int) -> None:
    spent = Spent(lambda peak, _: peak + more)
    assert spent.plan.peak_bytes <= spent.budget
    assert spent.plan.recompute_seconds >= spent.before.recompute_seconds
    assert spent.plan.step_seconds <= 1.1 * spent.before.step_seconds
    assert spent.plan.request.memory_budget == spent.budget
    assert (spent.plan.status, spent.plan.gap) == ("feasible", None)
    assert set(spent.asked) == {None}


@pytest.mark.parametrize(
    "needs", [lambda peak, _: 2 * peak, lambda peak, _: None], ids=["much more", "unknown"]
)
def test_code_that_needs_much_more_is_confined(needs: Any) -> None:
    spent = Spent(needs)
    assert spent.plan.decisions == spent.before.decisions
    assert spent.asked == [None, spent.budget]


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
@pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler")
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
