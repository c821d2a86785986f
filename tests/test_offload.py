"""offload=True: values wait for the backward in host memory, bit for bit, within the plan."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
import zoo
from brute_force import cheapest
from helpers import Subject, assert_same, eager, run, tiers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_solver import budget_at, peak_by_hand, problems
from torch import nn
from torch.testing import FileCheck

import fxzero
from fxzero import BudgetError, Plan, UsageError, _inductor
from fxzero.capture import capture
from fxzero.explanation import explain_plan
from fxzero.graph_planner import GraphPlanner
from fxzero.options import Options
from fxzero.passes.context import PassContext
from fxzero.passes.listing import format_graph
from fxzero.passes.offload import offload_pass
from fxzero.passes.rematerialize import rematerialize_pass
from fxzero.planner import Planner
from fxzero.plans import Decisions, Fetch
from fxzero.solver.bound import price_bound
from fxzero.solver.problem import Operator, Problem
from fxzero.solver.search import Solver

pytestmark = pytest.mark.usefixtures("shared_solvers")

_CALM = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


# The pass.


def offload(*pairs: tuple[str, str]) -> PassContext:
    return PassContext(Decisions(offload=tuple(Fetch(*pair) for pair in pairs)))


def test_a_value_is_copied_once_made_and_fetched_before_the_node_that_the_plan_names() -> None:
    context = offload(("addmm", "gelu_backward"))
    graph = offload_pass(graphs.tiny(), context)
    FileCheck().check("addmm  ").check_next(
        "addmm_on_host  fxzero.to_host.default(addmm)  float32[2, 8]  F"
    ).check("addmm_fetched  fxzero.to_device.default(addmm_on_host, cpu)").check(
        "aten.gelu_backward.default(mul_4, addmm)"
    ).run(format_graph(graph))
    graph = rematerialize_pass(graph, context)
    FileCheck().check("addmm_fetched  ").check("aten.gelu_backward.default(mul_4, addmm_fet").run(
        format_graph(graph)
    )


# The solver.


def with_fetches(problem: Problem, seconds: dict[int, float]) -> Problem:
    """The problem in which these storages may be fetched for this price."""
    fetches = [
        Operator(
            name=f"value{storage}",
            position=problem.operators[problem.maker[storage]].position,
            reads=(),
            makes=(storage,),
            seconds=price,
            flops=0,
            state_bytes=0,
            recomputable=True,
            fetches=True,
        )
        for storage, price in sorted(seconds.items())
    ]
    return dataclasses.replace(
        problem,
        operators=(*fetches, *problem.operators),
        maker=tuple(index + len(fetches) for index in problem.maker),
    )


@st.composite
def offloadable(draw: Any, operators: int, steps: int) -> Problem:
    """A problem with some fetches."""
    plain = draw(problems(operators, steps))
    plain = dataclasses.replace(plain, must_save=frozenset(), must_recompute=frozenset())
    free = [s for s in range(len(plain.bytes)) if s not in plain.held]
    fetched = draw(st.sets(st.sampled_from(free), min_size=1)) if free else set()
    price = st.floats(0.01, 10.0)
    return with_fetches(plain, {storage: draw(price) for storage in sorted(fetched)})


def seconds(operator: Operator) -> float:
    return operator.seconds


@pytest.mark.slow
@given(offloadable(8, 6), st.floats(0, 1))
@settings(max_examples=150, **_CALM)
def test_a_schedule_with_fetches_fits_by_books_kept_here(problem: Problem, share: float) -> None:
    solver = Solver(problem)
    budget = budget_at(solver, share)
    solution = solver.solve(budget)
    assert solution is not None
    assert peak_by_hand(problem, solution.schedule) <= solution.schedule.peak <= budget
    assert solution.schedule.seconds >= price_bound(problem, seconds, budget) - 1e-6


@pytest.mark.slow
@given(offloadable(4, 3), st.floats(0, 1))
@settings(max_examples=60, **_CALM)
def test_no_schedule_with_fetches_undercuts_the_bound_or_brute_force(
    problem: Problem, share: float
) -> None:
    assume(len(problem.bytes) <= 5)
    solver = Solver(problem)
    budget = budget_at(solver, share)
    best = cheapest(problem, budget)
    assert best is not None
    assert price_bound(problem, seconds, budget) <= best + 1e-6
    solution = solver.solve(budget)
    assert solution is not None
    assert solution.schedule.seconds >= best - 1e-6
    if solution.status == "optimal":
        assert solution.schedule.seconds == pytest.approx(best, abs=1e-6)


def planner(name: str, **options: Any) -> GraphPlanner:
    model, args, kwargs, _ = zoo.build(name)
    graph = capture(model, args, kwargs).graph
    return Planner(graph, Options(optimizer="sgd", **options), name, outputs_held=False).variants[0]


@pytest.mark.parametrize("name", tiers(("gpt2", "unet"), quick=(), exhaustive=("gpt2",)))
def test_with_offload_a_peak_is_smaller_and_a_budget_no_dearer(name: str) -> None:
    plain, offloading = planner(name).solver, planner(name, offload=True).solver
    low, high = plain.smallest.peak, plain.everything.peak
    assert offloading.smallest.peak <= low
    prices = []
    for budget in (low, low + (high - low) // 4, low + (high - low) // 2):
        without, with_it = plain.solve(budget), offloading.solve(budget)
        assert without is not None
        assert with_it is not None
        prices.append((with_it.schedule.seconds, without.schedule.seconds))
    assert all(mine <= 1.01 * theirs for mine, theirs in prices)
    assert prices[0][0] < prices[0][1]


# Models.


@pytest.fixture(scope="module")
def traced(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


@pytest.fixture
def subject(traced: Subject, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setattr("fxzero.training_step.capture", traced.capture)
    return traced


every_model = pytest.mark.parametrize(
    "traced",
    tiers(
        ("rand_ops", "gpt2", "unet", "mixed_dtype"),
        quick=("rand_ops",),
        exhaustive=("gpt2",),
    ),
    indirect=True,
)


def smallest(subject: Subject, **options: Any) -> int:
    subject.compile(1, offload=True, **options)
    with pytest.raises(BudgetError) as caught:
        subject.run()
    return caught.value.required_bytes


def check(subject: Subject, budget: int, **options: Any) -> Plan:
    """Two steps are eager's, each measured as planned; the second one's plan."""
    model = subject.compile(budget, offload=True, **options)
    for seed in range(2):
        found = subject.run(seed)
        plan: Plan = model.plan
        assert_same(found, eager(subject.name)[seed])
        assert found.peak <= plan.peak_bytes <= budget
        assert plan.peak_bytes <= 1.05 * found.peak
        assert found.host_bytes == plan.host_bytes
    return plan


@pytest.mark.slow
@every_model
def test_a_step_is_exact_and_its_peaks_on_device_and_host_are_planned(subject: Subject) -> None:
    required = smallest(subject)
    check(subject, max(eager(subject.name)[0].peak // 2, required))
    plan = check(subject, required)
    assert plan.offloaded
    assert plan.host_bytes == sum(value.bytes for value in plan.offloaded)


@every_model
def test_without_recompute_values_are_offloaded_alone(subject: Subject) -> None:
    plan = check(subject, smallest(subject, recompute="none"), recompute="none")
    assert not plan.decisions.recompute
    assert plan.decisions.offload
    assert plan.recompute_seconds == 0
    assert plan.transfer_seconds > 0


def plan_of(name: str, **options: Any) -> Plan:
    model, args, kwargs, _ = zoo.build(name)
    return fxzero.plan(model, args, kwargs=kwargs, optimizer="sgd", offload=True, **options)


@pytest.mark.slow
def test_a_budget_that_needs_nothing_offloads_nothing() -> None:
    plan = plan_of("rand_ops")
    assert not plan.offloaded
    assert (plan.host_bytes, plan.transfer_seconds) == (0, 0.0)


@pytest.mark.slow
def test_a_plan_says_what_lies_where_and_replays() -> None:
    plan = plan_of("rand_ops")
    plan = plan_of("rand_ops", memory_budget=plan.minimum_budget)
    assert Plan.from_json(plan.to_json()) == plan
    assert f"\noffload {len(plan.offloaded)} values: " in str(plan)
    assert "of host memory, +" in str(plan)
    explanation = explain_plan(plan)
    assert "\noffloaded: " in explanation
    assert "there and back" in explanation
    assert "not kept on the device: " in explanation
    model, args, kwargs, loss = zoo.build("rand_ops")
    compiled = fxzero.compile(model, plan=plan, optimizer="sgd", inner="eager", offload=True)
    for seed in range(2):
        outcome = run(compiled, args, kwargs, loss, seed=seed)
        assert_same(outcome, eager("rand_ops")[seed])
        assert outcome.host_bytes == plan.host_bytes


@pytest.mark.slow
def test_a_pass_that_is_switched_off_offloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_SKIP", "offload")
    plan = plan_of("rand_ops", memory_budget="7MiB")
    assert not plan.offloaded
    assert "pass offload is switched off by FXZERO_SKIP" in plan.notes


def test_offload_is_true_or_false() -> None:
    with pytest.raises(UsageError, match=r"\[FXZ101\] offload='yes' must be True or False"):
        fxzero.compile(torch.nn.Linear(1, 1), offload="yes")


@pytest.mark.parametrize("name", tiers(("rand_ops", "unet"), quick=()))
def test_the_backend_offloads_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXZERO_SPEC", "0")  # the law speaks of graphs that fxzero captured
    torch._dynamo.reset()
    model, args, kwargs, loss = zoo.build(name)
    options = {"inner": "eager", "optimizer": "sgd", "offload": True, "recompute": "none"}
    options |= {"memory_budget": eager(name)[0].peak * 6 // 10, "plan_dir": tmp_path}
    call = torch.compile(model, backend="fxzero", dynamic=False, options=options)
    for seed in range(2):
        outcome = run(model, args, kwargs, loss, seed=seed, call=call)
        assert_same(outcome, eager(name)[seed])
        assert outcome.host_bytes > 0
    assert any(Plan.load(path).offloaded for path in tmp_path.glob("*.json"))


@pytest.mark.slow
@pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler")
def test_generated_code_offloads_too() -> None:
    x = torch.randn(256, 32)
    original = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4)))
    plan = fxzero.plan(original, x, optimizer="none", recompute="none")
    model = fxzero.compile(
        copy.deepcopy(original),
        memory_budget=plan.peak_bytes - 40 * 2**10,
        optimizer="none",
        recompute="none",
        inner="inductor",
        offload=True,
    )
    outcome = run(model, (x,), loss=torch.sum)
    torch.testing.assert_close(outcome.loss, run(original, (x,), loss=torch.sum).loss)
    assert outcome.host_bytes == model.plan.host_bytes > 0
