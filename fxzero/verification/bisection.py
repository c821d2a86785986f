"""Which step of a compilation makes the compiled step differ from eager.

    eager -> capture -> pass 1 -> ... -> pass n -> inner compiler and run time -> compiled

Passes promise bitwise equality, so the graphs that they leave are held against the captured one
bit for bit, whatever the tolerance between compiled and eager.  A pass that says that it changes
numbers begins a new stretch of passes, which are held against what it left.  In a stretch whose
end differs from its beginning the guilty pass is found by halving.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from fxzero.agreement import Agreement
from fxzero.verification.comparison import gradient_differences
from fxzero.verification.nodes import NodeDifference, first_difference_behind
from fxzero.verification.playing import Outcome, Situation, play
from fxzero.verification.ranks import on_any_rank, told
from fxzero.verification.values import largest_difference


@dataclass(frozen=True)
class Guilt:
    """What makes the compiled step differ from eager.

    Attributes:
        kind: "pass"; "capture": the traced graph computes something else than the model; "inner":
            the graphs are right, but what runs them is not; "pipeline": the passes of all stages
            are innocent, what cuts the model and runs its stages is not; or "unknown": the graph
            itself does not come to the same twice, so that nothing can be compared bit for bit.
        name: of the pass, or of the inner compiler; "" otherwise.
        number, count: of the pass among all passes, from 1; 0 if it is none.
        by_design: the pass says that it changes numbers.
        allowed: the difference is within tolerance, and whoever makes it promises no more.
        node: where it begins, if it is a pass.
        rank: on which rank that is; None on one device.
        accumulates: whether it is the step that adds to gradients that exist.
        stage: of a pipeline; None where there is none.
    """

    kind: str
    name: str = ""
    number: int = 0
    count: int = 0
    by_design: bool = False
    allowed: bool = False
    node: NodeDifference | None = None
    rank: int | None = None
    accumulates: bool = False
    stage: int | None = None

    @property
    def expected(self) -> bool:
        """Whether nobody promised that there would be no such difference."""
        return self.allowed or self.by_design or self.kind == "unknown"


def guilty_pass(situation: Situation) -> Guilt | None:
    """The pass that makes a step's graph compute something else than the captured one, if any.

    On many ranks all of them must call it; they come to the same answer.
    """
    return _Search(situation).guilty_pass()


def find_guilty(
    situation: Situation,
    compiled: Outcome,
    eager: Outcome,
    *,
    inner: str,
    tolerance: float,
    accumulates: bool = False,
) -> Guilt | None:
    """What makes the outcomes of a compiled and an eager step differ; None if they do not.

    On many ranks all of them must call it; they come to the same answer.
    """
    found = guilty_pass(situation)
    if found is None:
        found = _outside_of_passes(situation, compiled, eager, inner, tolerance)
    return None if found is None else replace(found, accumulates=accumulates)


class _Search:
    """Compares the step's graph at points of its list of passes."""

    def __init__(self, situation: Situation) -> None:
        self.situation = situation
        self.agreement = agreement_of(situation)
        self.passes = situation.step.passes
        self.outcome = lru_cache(maxsize=2)(lambda count: play(count, situation))

    def differs(self, first: int, second: int) -> bool:
        """Whether outcomes at two points differ, on any rank."""
        differing = any(True for _ in self.outcome(first).differing(self.outcome(second)))
        return on_any_rank(self.agreement, differing)

    def guilty_pass(self) -> Guilt | None:
        again = play(0, self.situation)
        repeats = not any(True for _ in again.differing(self.outcome(0)))
        if on_any_rank(self.agreement, not repeats):
            return Guilt("unknown")
        by_design: Guilt | None = None
        start = 0
        for end in (*self._changing(), len(self.passes)):
            if self.differs(start, end):
                return self._named(self._halve(start, end))
            if end < len(self.passes) and self.differs(end, end + 1):
                by_design = by_design or self._named(end)
            start = min(end + 1, len(self.passes))
        return by_design

    def _changing(self) -> list[int]:
        """Places of passes that say that they change numbers, and have done something."""
        return [
            place
            for place, item in enumerate(self.passes)
            if item.numerics == "changes"
            and self.situation.step.partway(place).digest()
            != self.situation.step.partway(place + 1).digest()
        ]

    def _halve(self, good: int, bad: int) -> int:
        """The place of a pass before which the outcome is that at ``good``, behind it another."""
        start = good
        while bad - good > 1:
            middle = (good + bad) // 2
            if self.differs(start, middle):
                bad = middle
            else:
                good = middle
        return good

    def _named(self, place: int) -> Guilt:
        item = self.passes[place]
        node = first_difference_behind(
            place, self.situation, self.outcome(place), self.outcome(place + 1)
        )
        rank = None
        if self.agreement is not None:
            nodes = told(self.agreement, node)
            at = next((i for i, each in enumerate(nodes) if each is not None), 0)
            node, rank = nodes[at], self.agreement.ranks[at]
        return Guilt(
            "pass",
            item.name,
            number=place + 1,
            count=len(self.passes),
            by_design=item.numerics == "changes",
            node=node,
            rank=rank,
        )


def agreement_of(situation: Situation) -> Agreement | None:
    """How the step's ranks talk to each other; None on one device."""
    return None if situation.ranks is None else situation.ranks.agreement


def _outside_of_passes(
    situation: Situation, compiled: Outcome, eager: Outcome, inner: str, tolerance: float
) -> Guilt | None:
    """Whether the capture or what runs the graphs differs; beyond what it promises, if either."""
    agreement = agreement_of(situation)
    captured = play(0, situation)
    planned = play(len(situation.step.passes), situation)
    candidates = (
        (Guilt("capture"), captured, _common(eager, captured), tolerance),
        (Guilt("inner", inner), compiled, _common(planned, compiled), _promised(inner, tolerance)),
    )
    differing = []
    for guilt, found, expected, allowed in candidates:
        if on_any_rank(agreement, not _within(_common(found, expected), expected, 0.0)):
            within = not on_any_rank(
                agreement, not _within(_common(found, expected), expected, allowed)
            )
            differing.append(replace(guilt, allowed=within))
    return min(differing, key=lambda guilt: guilt.allowed, default=None)


def _promised(inner: str, tolerance: float) -> float:
    return 0.0 if inner == "eager" else tolerance


def _common(outcome: Outcome, other: Outcome) -> Outcome:
    """The outcome without buffers that the other knows nothing of: a graph has constants, too."""
    buffers = {name: tensor for name, tensor in outcome.buffers.items() if name in other.buffers}
    return replace(outcome, buffers=buffers)


def _within(found: Outcome, expected: Outcome, tolerance: float) -> bool:
    differing = list(found.differing(expected))
    if not differing or tolerance == 0:
        return not differing
    if ("random stream", "") in differing:
        return False
    values = [item for item in differing if item[0] in ("output", "buffer")]
    largest = max(
        (largest_difference(found.value(*item), expected.value(*item)) for item in values),
        default=0.0,
    )
    gradients = gradient_differences(found.gradients, expected.gradients)
    return max(largest, gradients[0][1] if gradients else 0.0) <= tolerance
