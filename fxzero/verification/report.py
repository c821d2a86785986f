"""What a verification found, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from fxzero.documents import format_json
from fxzero.errors import listed
from fxzero.ties import TieChange
from fxzero.units import format_bytes
from fxzero.verification.bisection import Guilt
from fxzero.verification.comparison import Comparison
from fxzero.verification.nodes import NodeDifference, NonFinite
from fxzero.verification.replicas import StaleRank

_ROWS = 5
_INDENT = "  "


@dataclass(frozen=True)
class Verification(Comparison):
    """A comparison of a compiled step with an eager one, and the reasons for its differences.

    ``ok`` is that of all ranks.  Beyond ``Comparison.ok`` it asks that every pass that promises so
    left a bitwise equal graph, and that there are no changed ties and no stale ranks.

    Attributes:
        accumulated: the same for the step that adds to gradients that exist, if there is one.
        guilt: what makes compiled and eager differ; None if they are bitwise equal.
        non_finite_origins: where what is not finite comes from.
        ties: names that were one parameter when the model was compiled and are two, or the reverse.
        stale: ranks whose parameters are not those of the others.
        failed_ranks: those on which ``Comparison.ok`` does not hold.
    """

    accumulated: Comparison | None = None
    guilt: Guilt | None = None
    non_finite_origins: tuple[NonFinite, ...] = ()
    ties: tuple[TieChange, ...] = ()
    stale: tuple[StaleRank, ...] = ()
    failed_ranks: tuple[int, ...] = ()

    @property
    def within_plan(self) -> bool:
        """Whether the measured peak is at most the planned one."""
        return self.measured_bytes <= self.planned_bytes

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def to_json(self) -> str:
        """The same as data; numbers that JSON has not are "nan", "inf" and "-inf"."""
        data = {**asdict(self), "within_plan": self.within_plan}
        return format_json(data, indent=1)


def _lines(found: Verification) -> Iterator[str]:
    yield f"{_verdict(found)}: compiled against eager, same batch and seed"
    yield _row("loss", _difference(found.loss_difference))
    if found.output_difference != found.loss_difference:
        yield _row("outputs", _difference(found.output_difference))
    yield from _gradients("gradients", found)
    yield _row("random stream", "equal" if found.random_stream_equal else "DIFFERS")
    yield _row(
        "buffers", "equal" if found.buffers_equal else f"DIFFER: {listed(found.buffers, _ROWS)}"
    )
    if found.accumulated is not None:
        yield from _gradients("accumulated", found.accumulated)
    yield _row("peak", _peak(found))
    if found.failed_ranks:
        yield _row("ranks", f"wrong on rank {', '.join(map(str, found.failed_ranks))}")
    for tie in found.ties:
        yield _row("tied weights", str(tie))
    for stale in found.stale:
        yield _row("stale rank", str(stale))
    if found.non_finite:
        yield _row("not finite", listed(found.non_finite, _ROWS))
    for origin in found.non_finite_origins:
        yield from _origin(origin)
    if found.guilt is not None:
        yield from _guilt(found.guilt)


def _verdict(found: Verification) -> str:
    if found.non_finite:
        return "NOT FINITE"
    if found.ties or found.stale:
        return "WRONG WEIGHTS"
    if not found.ok:
        return "DIFFERS"
    return "EXACT" if found.exact else "EQUAL WITHIN TOLERANCE"


def _row(name: str, text: str) -> str:
    return f"{_INDENT}{name:<15}{text}"


def _difference(value: float) -> str:
    return "equal" if value == 0 else f"differs by {value:.3g}"


def _gradients(title: str, found: Comparison) -> Iterator[str]:
    if not found.gradients:
        yield _row(title, f"all {found.gradient_count} equal")
        return
    yield _row(
        title,
        f"{len(found.gradients)} of {found.gradient_count} differ, the worst by "
        f"{found.gradient_difference:.3g} of its largest entry",
    )
    for name, difference in found.gradients[:_ROWS]:
        yield _row("", f"{difference:<9.3g} {name}")
    if len(found.gradients) > _ROWS:
        yield _row("", f"and {len(found.gradients) - _ROWS} more")


def _peak(found: Verification) -> str:
    text = (
        f"measured {format_bytes(found.measured_bytes)}, planned "
        f"{format_bytes(found.planned_bytes)}, eager {format_bytes(found.eager_bytes)}"
    )
    if found.within_plan:
        return text
    share = found.measured_bytes / max(found.planned_bytes, 1) - 1
    return f"{text}: {share:.1%} MORE THAN PLANNED"


def _origin(found: NonFinite) -> Iterator[str]:
    if not found.made_by:
        yield _row("first " + found.kind, f"the step is given it: {found.given} {_at(found.index)}")
        return
    yield _row("first " + found.kind, f"{found.node} = {found.made_by}  {found.value}")
    yield from _place(found.module, found.source)
    yield _row("", f"{_at(found.index)}, from {found.given}")


def _at(index: tuple[int, ...]) -> str:
    return f"at {list(index)}" if index else "as its only element"


def _place(module: str, source: str) -> Iterator[str]:
    if module:
        yield _row("", f"in module {module}")
    yield _row("", source or "from a line that is not known")


def _guilt(guilt: Guilt) -> Iterator[str]:
    text = _accused(guilt)
    if guilt.accumulates:
        text += ", where gradients exist that it adds to"
    if guilt.stage is not None:
        text += f", in stage {guilt.stage}"
    if guilt.rank is not None:
        text += f", on rank {guilt.rank}"
    yield _row("comes from", text)
    if guilt.node is not None:
        yield from _node(guilt.node)


def _accused(guilt: Guilt) -> str:
    if guilt.kind == "pass":
        design = ", which changes numbers by design" if guilt.by_design else ""
        return f"pass {guilt.name}, number {guilt.number} of {guilt.count}{design}"
    if guilt.kind == "capture":
        how = "rounds otherwise" if guilt.allowed else "computes something else"
        return f"the capture: traced, the model {how}; no pass changes anything"
    if guilt.kind == "inner" and guilt.name == "eager":
        return "what runs the graphs, or a hook of the model: no pass changes anything"
    if guilt.kind == "inner":
        how = "rounds otherwise" if guilt.allowed else "computes something else"
        return f"the inner compiler: code of {guilt.name} {how}; no pass changes anything"
    if guilt.kind == "pipeline":
        how = "adds up otherwise" if guilt.allowed else "computes something else"
        return f"the pipeline: cut in stages, the model {how}; no pass changes anything"
    return "an unknown step: the same graph does not come to the same twice on this device"


def _node(node: NodeDifference) -> Iterator[str]:
    what = f", the {node.result}" if node.result else ""
    yield _row("first node", f"{node.node}  {node.value}{what}")
    yield from _place(node.module, node.source)
    if node.before:
        yield _row("", f"before: {node.before}")
    if node.after:
        yield _row("", f"behind: {node.after}")
    if math.isinf(node.largest) and not node.index:
        yield _row("", "one of the two does not make it")
        return
    yield _row(
        "",
        f"differs by {node.largest:.3g} at most; {_at(node.index)} {node.expected:.6g} became "
        f"{node.found:.6g}",
    )
