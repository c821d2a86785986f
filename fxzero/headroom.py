"""Fits plans to what their generated code needs: spends what it leaves, saves what it lacks.

A plan is made for operators that run one by one.  Code that Inductor generates often needs less: a
value inside a fused kernel is never written.  So plans for larger budgets are made, and their code
rehearsed, as long as it fits:

    budget 500 MiB    planned for    generated code    recompute
                      500 MiB        430 MiB           8 %
                      570 MiB        480 MiB           3 %
                      590 MiB        510 MiB                         too large: not taken

Code that needs a little more than operators do, as a fused kernel holds all that it reads, gets a
plan for a little less.  Only where that recomputes much more is the code confined, operator by
operator in the worst case (``inner.generate_within``).

Invariant: the code of what is returned stays within the budget.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from fxzero.errors import BudgetError
from fxzero.graph_planner import Decided
from fxzero.inner import Code
from fxzero.planner import Planner
from fxzero.rehearsal import Peaks, as_it_runs

log = logging.getLogger(__name__)

# The code of a decision, within so many bytes or as it comes.
Generate = Callable[[Decided, int | None], Code]

# Shares of the budget, and of a step, that are worth generating code once more.
_ROOM = 0.01
_RECOMPUTE = 0.005
# How often code is generated at most besides the first time: it takes most of a compilation.
_TRIES = 3
# Beyond a budget by more than this share of it, or for a plan that takes so much longer, code is
# confined.
_NEAR = 0.2
_DEARER = 1.1


@dataclass(frozen=True)
class Generated:
    """A plan, as its code runs, and that code."""

    decided: Decided
    code: Code


def use_headroom(planner: Planner, decided: Decided, budget: int, generate: Generate) -> Generated:
    """The plan with the least recompute found whose best code stays within ``budget`` bytes.

    Args:
        decided: what ``planner`` decided for that budget.
    """
    code = generate(decided, None)
    peaks = planner.rehearse(decided, code.forward, code.backward)
    if peaks.largest <= budget:
        fitting = Generated(as_code_runs(planner, decided, code, peaks), code)
        return _spend(planner, fitting, peaks, budget, generate)
    if peaks.known and (saved := _save(planner, decided, peaks, budget, generate)) is not None:
        return saved
    code = generate(decided, budget)
    peaks = planner.rehearse(decided, code.forward, code.backward)
    return Generated(as_code_runs(planner, decided, code, peaks), code)


def as_code_runs(planner: Planner, decided: Decided, code: Code, peaks: Peaks) -> Decided:
    """The same with what its code, once rehearsed, is known to need, and where it takes longer."""
    if code.apart:
        decided = planner.restate(decided, code.apart)
    return replace(decided, plan=as_it_runs(decided.plan, peaks))


def _spend(
    planner: Planner, best: Generated, peaks: Peaks, budget: int, generate: Generate
) -> Generated:
    """A plan for more than the budget, whose code needs no more than that, or ``best``."""
    # Budgets of operators: the largest whose code is known to fit, and the next one to try.
    fits, target, room = budget, 2 * budget - peaks.largest, budget - peaks.largest
    exceeded = False
    for _ in range(_TRIES):
        recompute = best.decided.plan.recompute_seconds
        if room < _ROOM * budget or recompute < _RECOMPUTE * best.decided.plan.step_seconds:
            break
        try:
            larger = planner.within(target).decide()
        except BudgetError:  # the smallest that is known to fit need not be a solver's answer
            break
        if larger.plan.recompute_seconds >= recompute:
            break
        code, peaks = _rehearsed(planner, larger, target, budget, generate)
        if peaks.largest > budget:
            less = larger.emitted.timeline.peak_bytes - (peaks.largest - budget)
            target = less if less > fits else (fits + target) // 2
            exceeded = True
            continue
        best = Generated(_restated(planner, larger, peaks), code)
        if exceeded:
            break
        fits, room = target, budget - peaks.largest
        target += room
    return best


def _save(
    planner: Planner, decided: Decided, peaks: Peaks, budget: int, generate: Generate
) -> Generated | None:
    """A plan for somewhat less than the budget, whose code needs no more than that."""
    most = _DEARER * decided.plan.step_seconds
    for _ in range(_TRIES):
        target = decided.emitted.timeline.peak_bytes - (peaks.largest - budget)
        if target < (1 - _NEAR) * budget:
            break
        try:
            decided = planner.within(target).decide()
        except BudgetError:
            break
        if decided.plan.step_seconds > most:
            break
        code, peaks = _rehearsed(planner, decided, target, budget, generate)
        if peaks.largest <= budget:
            return Generated(_restated(planner, decided, peaks), code)
    return None


def _rehearsed(
    planner: Planner, decided: Decided, target: int, budget: int, generate: Generate
) -> tuple[Code, Peaks]:
    code = generate(decided, None)
    peaks = planner.rehearse(decided, code.forward, code.backward)
    log.info("planned for %d bytes, generated code needs %s of %d", target, peaks, budget)
    return code, peaks


def _restated(planner: Planner, decided: Decided, peaks: Peaks) -> Decided:
    """A decision for another budget of operators as one for the planner's, and as its code runs."""
    restated = planner.restate(decided)
    # What was proven was so of operators that run one by one.
    plan = replace(restated.plan, status="feasible", gap=None)
    return replace(restated, plan=as_it_runs(plan, peaks))
