"""The sentences that all views of a Plan share, so that they never tell it differently."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from fxzero.plans import ModelStates, PipelinePlan, PipelineStage, Plan, Rank
from fxzero.units import format_bytes, format_count, format_seconds

ROLES = (
    "parameter",
    "buffer",
    "gradient",
    "optimizer",
    "input",
    "saved",
    "recomputed",
    "gathered",
    "fetched",
    "temporary",
    "output",
    "rng state",
    "tangent",
)
_FUNCTION = re.compile(r" in [^:]*:")


def verdict(plan: Plan) -> str:
    """'FITS, 7.30 GiB headroom', 'DOES NOT FIT, 1.20 GiB short' or 'no budget'."""
    budget = plan.request.memory_budget
    if budget is None:
        return f"no budget, peak {format_bytes(plan.peak_bytes)}"
    if plan.fits:
        return f"FITS, {format_bytes(budget - plan.peak_bytes)} headroom"
    needed = plan.minimum_budget if plan.status == "infeasible" else plan.peak_bytes
    return f"DOES NOT FIT, {format_bytes(needed - budget)} short"


def advice(plan: Plan) -> list[str]:
    """What to change, or what a change would bring; each a sentence of computed facts."""
    budget, said = plan.request.memory_budget, []
    smallest = f'memory_budget="{rounded_up(plan.minimum_budget)}"'
    fitting = [other for other in plan.alternatives if other.fits]
    if budget is None:
        said.append(f"Any budget from {smallest} on has a plan.")
    elif not plan.fits:
        said.append(f"The smallest budget with a plan is {smallest}.")
        for other in fitting:
            peak, step = format_bytes(other.peak_bytes), format_seconds(other.step_seconds)
            said.append(f"This fits: {other.change}, peak {peak}, step {step}.")
        if not fitting:
            said.append("None of the alternatives that were tried fits.")
    elif plan.recompute_seconds and plan.unplanned_peak_bytes > budget:
        said.append(
            f"Recompute costs {share(plan.recompute_seconds, plan.step_seconds)} of the step; "
            f"{format_bytes(plan.unplanned_peak_bytes - budget)} more would need none."
        )
    if plan.fits and budget is not None:
        said.append(f"The budget could be as small as {smallest}.")
    return said


def rounded_up(size: int) -> str:
    """A budget one can write that is no smaller."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= 10 * scale:
            return f"{-(-size * 10 // scale) / 10:.1f}{unit}"
    return f"{-(-size // 2**10)}KiB"


def budget_text(plan: Plan) -> str:
    """'budget 64.0 GiB', or '' without one."""
    budget = plan.request.memory_budget
    return "" if budget is None else f"budget {format_bytes(budget)}"


def device_text(plan: Plan) -> str:
    """'h100-sxm-80gb', or 'cpu' where no hardware was named."""
    return plan.request.hardware or plan.request.device


def states_text(states: ModelStates) -> str:
    """'30.0 GiB at most: parameters 10.0 GiB, gradients 10.0 GiB, optimizer 10.0 GiB'."""
    return (
        f"{format_bytes(states.bytes)} of a rank at most: parameters "
        f"{format_bytes(states.parameters)}, gradients {format_bytes(states.gradients)}, "
        f"optimizer {format_bytes(states.optimizer)}"
    )


def mesh_text(plan: Plan) -> str:
    """'dp 8, zero 3', or '' on one device."""
    sizes = [f"{name} {size}" for name, size in plan.request.mesh.items()]
    return ", ".join([*sizes, f"zero {plan.request.zero}"]) if sizes else ""


def pipeline_text(pipeline: PipelinePlan) -> str:
    """'pipeline 1f1b: 4 stages on 4 ranks, 8 micro-batches; ranks wait 27.3 % of the step'."""
    return (
        f"pipeline {pipeline.schedule}: {count(len(pipeline.stages), 'stage')} on "
        f"{count(pipeline.ranks, 'rank')}, {count(pipeline.microbatches, 'micro-batch', 'es')}; "
        f"ranks wait {share(pipeline.bubble, 1)} of the step"
    )


def begins(stage: PipelineStage) -> str:
    """Where a stage begins: 'model.layers.8.mlp', or 'the model'."""
    return printable(stage.begins) or "the model"


def time_lines(pipeline: PipelinePlan, width: int) -> Iterator[str]:
    """A character for each moment of each rank: 'FFFF..FFBBBBBB'; lower case: a further stage."""
    end = pipeline.end
    lines = [["."] * width for _ in range(pipeline.ranks)]
    for turn in pipeline.turns if end else ():
        letter = turn.kind.lower() if pipeline.is_further(turn) else turn.kind
        start, stop = (round(width * at / end) for at in (turn.start, turn.end))
        lines[turn.rank][start:stop] = letter * (stop - start)
    for line in lines:
        yield "".join(line)


_TURNS = {"F": "forward", "B": "backward", "I": "gradients of inputs", "W": "gradients of weights"}


def turn_kinds(pipeline: PipelinePlan) -> dict[str, str]:
    """What the letters mean that a pipeline's turns have."""
    found = {turn.kind for turn in pipeline.turns}
    return {letter: text for letter, text in _TURNS.items() if letter in found}


def time_legend(pipeline: PipelinePlan) -> str:
    """'F forward  B backward  . waiting; small letters: the rank's second stage'."""
    kinds = "  ".join(f"{letter} {text}" for letter, text in turn_kinds(pipeline).items())
    several = len(pipeline.stages) > pipeline.ranks
    return f"{kinds}  . waiting" + ("; small letters: next stage" if several else "")


def solved(plan: Plan) -> str:
    """The solver's status and what it proved: 'optimal', 'feasible, within 1.2 % of optimal'."""
    if plan.status == "optimal" or plan.status == "infeasible":
        return plan.status
    if plan.gap is None:
        return f"{plan.status}, no bound proved"
    return f"{plan.status}, within {share(plan.gap, 1)} of optimal"


def recompute_price(plan: Plan) -> str:
    """'recompute 60 values: peak -2.10 GiB, +41.0 ms (4.1 % of the step), +1.20 TFLOP'."""
    gathered = sum(value.role == "gathered" for value in plan.recomputed)
    recomputed = len(plan.decisions.recompute) - gathered
    if not recomputed:
        return "recompute nothing"
    freed = plan.unplanned_peak_bytes - plan.peak_bytes
    together = " with offload" if plan.offloaded else ""
    return (
        f"recompute {count(recomputed, 'value')}: "
        f"peak {signed_bytes(-freed)}{together}, +{format_seconds(plan.recompute_seconds)} "
        f"({share(plan.recompute_seconds, plan.step_seconds)} of the step), "
        f"+{format_flops(plan.recompute_flops)}"
    )


def gather_price(plan: Plan) -> str:
    """'gather 12 parameters again: 48.0 MiB, +8.0 ms (3.1 % of the step)', or ''."""
    again = [value for value in plan.recomputed if value.role == "gathered"]
    if not again:
        return ""
    seconds = sum(value.seconds for value in again)
    return (
        f"gather {count(len(again), 'parameter')} again: "
        f"{format_bytes(sum(value.bytes for value in again))}, +{format_seconds(seconds)} "
        f"({share(seconds, plan.step_seconds)} of the step)"
    )


def offload_price(plan: Plan) -> str:
    """'offload 12 values: 48.0 MiB of host memory, +8.0 ms (3.1 % of the step)'."""
    return (
        f"offload {count(len(plan.offloaded), 'value')}: "
        f"{format_bytes(plan.host_bytes)} of host memory, +{format_seconds(plan.transfer_seconds)} "
        f"({share(plan.transfer_seconds, plan.step_seconds)} of the step)"
    )


def count(number: int, noun: str, plural: str = "s") -> str:
    """'1 value', '12 values'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{plural}"


def signed_bytes(size: int) -> str:
    return f"{'+' if size > 0 else ''}{format_bytes(size)}"


def format_flops(count: float) -> str:
    """'1.20 TFLOP', '512 FLOP'."""
    number, _, prefix = format_count(count).partition(" ")
    return f"{number} {prefix.replace('B', 'G')}FLOP"


def share(part: float, whole: float) -> str:
    """'8.1 %' of the whole; '-' where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def percent_more(before: float, after: float) -> str:
    """'+12.0 %', or '' where both are the same."""
    return f"{100 * (after - before) / before:+.1f} %" if before and after != before else ""


def roles_of(plan: Plan) -> list[str]:
    """The roles that hold any bytes on any rank, in reading order."""
    return in_reading_order(r for rank in plan.ranks for r, size in rank.breakdown.items() if size)


def in_reading_order(roles: Iterable[str]) -> list[str]:
    """Each role once."""
    found = set(roles)
    return [role for role in ROLES if role in found] + sorted(found - set(ROLES))


def equal_ranks(ranks: Sequence[Rank]) -> Iterator[tuple[str, Rank]]:
    """Neighbours that hold the same bytes are one row: '0-7'."""
    start = 0
    for end in range(1, len(ranks) + 1):
        first = ranks[start]
        if end < len(ranks) and ranks[end].breakdown == first.breakdown:
            continue
        last = ranks[end - 1]
        yield f"{first.index}-{last.index}" if end - start > 1 else f"{first.index}", first
        start = end


def printable(text: str) -> str:
    """One line of ASCII: a plan file may hold anything, terminal escapes included."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def short_source(source: str) -> str:
    """'model.py:41 x = self.w1(x)' from 'model.py:41 in forward: x = self.w1(x)'."""
    return _FUNCTION.sub("", source, count=1)
