"""Whether to pipeline at all: over how many ranks, by which schedule, in how many micro-batches.

Ways are compared at the same number of examples a step: a pipeline of p ranks gets the examples of
all of them.

    8 ranks, 4 examples each        dp 8            4 examples a rank
                                    pp 2, dp 4      8 examples a pipeline, in 2, 4 or 8 parts

Cuts, schedules and their simulated times are cheap, so all are tried; those that promise most are
planned in full, until no other promises to be faster than what was planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fxzero.agreement import Agreement
from fxzero.errors import UsageError
from fxzero.mesh import Mesh
from fxzero.microbatches import Batch
from fxzero.pipelining.forecast import Forecaster, Setting
from fxzero.pipelining.request import Pipeline
from fxzero.plans import Alternative, Plan
from fxzero.report.wording import share
from fxzero.units import format_bytes, format_seconds

# Those whose memory is that of 1F1B or close to it.
_SCHEDULES = ("1f1b", "zb1p", "interleaved1f1b", "zbv")
# Micro-batches for each rank.
_PARTS = (1, 2, 4)
# How many are planned in full at most.
_PLANNED = 3


@dataclass(frozen=True)
class _Promise:
    """A way to pipeline and the time that it is simulated to take."""

    seconds: float
    setting: Setting


def choose_pipeline(
    forecaster: Forecaster,
    batch: Batch,
    mesh: Mesh,
    plain: Callable[[], Plan],
) -> Plan:
    """The fastest plan that fits, with a pipeline or without; the smallest if nothing fits.

    Args:
        batch: what one rank gets; with "pp" in the mesh what one pipeline gets.
        mesh: of all ranks.  Pipelines take ranks of its "dp", if they have no dimension yet.
        plain: makes the plan without a pipeline.

    Raises:
        UsageError: the mesh has "pp", but the batch cannot be cut for it.
    """
    promises = sorted(_promises(forecaster, batch, mesh), key=lambda promise: promise.seconds)
    planned: list[Plan] = []
    for promise in promises:
        fitting = [plan.step_seconds for plan in planned if plan.fits]
        if len(planned) == _PLANNED or (fitting and min(fitting) <= promise.seconds):
            break
        planned.append(forecaster.plan(promise.setting))
    every = planned if "pp" in mesh.sizes else [plain(), *planned]
    if not every:
        raise UsageError(
            f'pipeline="auto": {mesh.sizes.get("pp", 1)} ranks have no pipeline of this batch\n'
            "  give a batch that can be cut into micro-batches"
        )
    return _explained(min(every, key=_rank), every)


def _rank(plan: Plan) -> tuple[bool, float]:
    return not plan.fits, plan.step_seconds if plan.fits else plan.minimum_budget


def _promises(forecaster: Forecaster, batch: Batch, mesh: Mesh) -> Iterator[_Promise]:
    for ranks, arranged in _meshes(mesh):
        options = forecaster.options.on(arranged)
        whole = batch if "pp" in mesh.sizes else batch.times(ranks)
        for name in _SCHEDULES:
            for parts in _PARTS:
                setting = Setting(Pipeline(schedule=name), whole, ranks * parts, arranged, options)
                if whole.size % setting.microbatches:
                    continue
                forecaster.chooser(setting)  # raises what is wrong with the model
                try:
                    yield _Promise(forecaster.promised(setting), setting)
                except UsageError:  # no such schedule of so few micro-batches, or no such cuts
                    continue


def _meshes(mesh: Mesh) -> Iterator[tuple[int, Mesh]]:
    """Ranks of a pipeline, and the mesh with so many along "pp"."""
    if "pp" in mesh.sizes:
        yield mesh.sizes["pp"], mesh
        return
    data = mesh.sizes.get("dp", 1)
    for ranks in range(2, data + 1):
        if data % ranks == 0:
            sizes = {"pp": ranks, "dp": data // ranks}
            yield ranks, Mesh({name: size for name, size in sizes.items() if size > 1})


def _explained(best: Plan, every: Sequence[Plan]) -> Plan:
    """The best plan with the others as alternatives, and why they were not taken."""
    others = [plan for plan in every if plan is not best]
    notes = [f'pipeline="auto": {_outcome(best, plan)}' for plan in others]
    alternatives = tuple(
        Alternative(_called(plan), plan.peak_bytes, plan.step_seconds, plan.fits) for plan in others
    )
    return replace(
        best, alternatives=(*best.alternatives, *alternatives), notes=(*best.notes, *notes)
    )


def _outcome(best: Plan, other: Plan) -> str:
    """Why another plan was not taken: 'no pipeline would take 21.0 ms, 1.31 times as long'."""
    name = _called(other)
    if not other.fits:
        return f"{name} does not fit: it needs {format_bytes(other.minimum_budget)}"
    ratio = other.step_seconds / best.step_seconds
    text = f"{name} would take {format_seconds(other.step_seconds)}, {ratio:.2f} times as long"
    if other.pipeline is not None:
        text += f"; its ranks wait {share(other.pipeline.bubble, 1)} of the step"
    return text


def _called(plan: Plan) -> str:
    if plan.pipeline is None:
        return "no pipeline"
    pipeline = plan.pipeline
    return (
        f"{pipeline.schedule} on {pipeline.ranks} ranks with {pipeline.microbatches} micro-batches"
    )


def agree_on_pipeline(
    forecaster: Forecaster, batch: Batch, mesh: Mesh, plain: Callable[[], Plan]
) -> tuple[Pipeline | None, Mesh]:
    """What the first of some ranks that run chooses, and all of them in its mesh.

    Args: those of ``choose_pipeline``.
    """
    if mesh.size == 1:
        return None, mesh

    def choose() -> tuple[str, int, int] | None:
        found = choose_pipeline(forecaster, batch, mesh, plain).pipeline
        return None if found is None else (found.schedule, found.microbatches, found.ranks)

    answer = Agreement(mesh).of_first(choose)
    if answer is None:
        return None, mesh
    schedule, microbatches, ranks = answer
    request = Pipeline(schedule=schedule, microbatches=microbatches)
    return request, mesh if "pp" in mesh.sizes else mesh.in_pipelines(ranks)
