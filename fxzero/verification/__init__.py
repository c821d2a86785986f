"""``model.verify``: the compiled step against eager on the user's own batch.

    compare(model, args, kwargs)    one compiled and one eager step: what differs (comparison.py)
    verify(model, args, kwargs)     and why: the pass and the node (bisection.py, nodes.py), values
                                    that are not finite, changed ties, stale ranks (replicas.py)

Both leave the model, its gradients and buffers, the optimizer's states and the random stream as
they found them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fxzero.ties import changed_ties, ties_of
from fxzero.verification.bisection import Guilt, agreement_of, find_guilty
from fxzero.verification.comparison import Comparison, Pair, Steps, compare, compared, steps
from fxzero.verification.nodes import NodeDifference, NonFinite, first_non_finite
from fxzero.verification.pipelines import verify_pipeline
from fxzero.verification.playing import Situation
from fxzero.verification.ranks import failed_ranks, on_any_rank, told
from fxzero.verification.replicas import StaleRank, stale_ranks
from fxzero.verification.report import Verification

__all__ = [
    "Comparison",
    "Guilt",
    "NodeDifference",
    "NonFinite",
    "StaleRank",
    "Verification",
    "compare",
    "verify",
]


def verify(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Verification:
    """Runs one step compiled and one eager, compares them, and finds out why they differ.

    The step that adds to gradients that exist is verified, too, where such a one is in use: where
    gradients exist now, one was run before, or ``compile`` was asked for micro-batches; of a batch
    that is cut into these the first is taken.  Steps inside ``no_sync`` are not.

    On many ranks all of them must call it, each with its batch; ``ok`` is the same on all of them.

    A pipeline is compared with eager accumulation, see ``pipelines.py``.

    Raises:
        UsageError: the model trains as a pipeline and draws random numbers.
    """
    compilation = vars(model)["_fxzero"]
    if compilation.pipeline is not None:
        return verify_pipeline(model, args, kwargs)
    with steps(model, args, kwargs) as runner:
        pair = runner.pair()
        situation = Situation(pair.step, pair.leaves, pair.start, {})
        agreement = agreement_of(situation)
        ties = tuple(changed_ties(compilation.ties, ties_of(model)))
        stale = () if compilation.ranks is None else stale_ranks(model, compilation.ranks)
        first = compared(model, pair)
        guilt = _guilt(situation, pair, first)
        second = None
        if on_any_rank(agreement, runner.accumulation_in_use):
            added = _added(runner, pair)
            second = compared(model, added)
            if guilt is None or guilt.allowed:
                adding = replace(situation, step=added.step, existing=pair.eager.spread)
                guilt = _guilt(adding, added, second, accumulates=True) or guilt
        origins: tuple[NonFinite, ...] = ()
        if on_any_rank(agreement, bool(first.non_finite)):
            origins = first_non_finite(situation)
    sides = (first, *([] if second is None else [second]))
    every = told(agreement, all(side.ok for side in sides))
    innocent = guilt is None or guilt.expected
    return Verification(
        **{**vars(first), "ok": all(every) and innocent and not ties and not stale},
        accumulated=second,
        guilt=guilt,
        non_finite_origins=origins,
        ties=ties,
        stale=stale,
        failed_ranks=() if agreement is None else failed_ranks(agreement, every),
    )


def _guilt(
    situation: Situation, pair: Pair, found: Comparison, accumulates: bool = False
) -> Guilt | None:
    """What makes a pair of steps differ, if they do on any rank."""
    if not on_any_rank(agreement_of(situation), not found.exact):
        return None
    return find_guilty(
        situation,
        pair.compiled.outcome,
        pair.eager.outcome,
        inner=pair.step.options.inner,
        tolerance=found.tolerance,
        accumulates=accumulates,
    )


def _added(runner: Steps, pair: Pair) -> Pair:
    """The compiled step that adds to the gradients of the eager one, beside twice these."""
    step = runner.accumulating()
    compiled = runner.compiled(step, pair.eager.spread)
    old = pair.eager.outcome
    inputs = {name: g for name, g in old.gradients.items() if name not in pair.eager.spread}
    twice = {name: 2 * g for name, g in old.gradients.items() if name in pair.eager.spread}
    eager = replace(pair.eager, outcome=replace(old, gradients={**twice, **inputs}))
    return replace(pair, step=step, compiled=compiled, eager=eager)
