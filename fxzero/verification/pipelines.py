"""A step of a pipeline against eager accumulation over its micro-batches.

Every rank is given the weights of all stages for as long as the eager step runs, which therefore
needs the memory of the whole model.  Each rank compares the loss, and the gradients and buffers of
its own stages.  Where anything differs, the graphs of every stage are played by themselves, on
made-up inputs, before and behind their passes: that finds a guilty pass without the other stages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxzero import _torch
from fxzero.compiler import eager_view
from fxzero.errors import UsageError
from fxzero.measurement import measure
from fxzero.microbatches import Batch
from fxzero.pipelining.training import PipelinedModel
from fxzero.randomness import RandomState
from fxzero.sharding import is_spread, replace_tensors
from fxzero.ties import changed_ties, ties_of
from fxzero.training_step import TrainingStep
from fxzero.verification.bisection import Guilt, guilty_pass
from fxzero.verification.comparison import (
    Buffers,
    Run,
    comparison_of,
    tolerance_of,
)
from fxzero.verification.playing import Outcome, Situation, average
from fxzero.verification.ranks import failed_ranks, told
from fxzero.verification.replicas import stale_ranks
from fxzero.verification.report import Verification


def verify_pipeline(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Verification:
    """Runs one step of the pipeline and one eager, and compares them; all ranks must call it.

    If it is the first step, it is cut, and weights of other ranks' stages are given up, as ever.

    Raises:
        UsageError: the model draws random numbers, which stages draw from streams of their own.
    """
    compilation = vars(model)["_fxzero"]
    pipeline: PipelinedModel = compilation.pipeline
    pipeline.prepare(model, eager_view(model), _batch(pipeline, args, kwargs))
    with _left_alone(model, pipeline):
        compiled = _compiled(model, pipeline, args, kwargs)
        eager = _eager(model, pipeline, args, kwargs)
        planned = compiled.measured.peak_bytes
        if pipeline.plan is not None:
            planned = pipeline.plan.peak_of_graphs
        found = comparison_of(compiled, eager, tolerance_of(model), planned)
        ties = tuple(changed_ties(compilation.ties, ties_of(model)))
        stale = () if compilation.ranks is None else stale_ranks(model, compilation.ranks)
        every = told(pipeline.agreement, (found.ok, found.exact, stale))
        guilt = None
        if not all(exact for _, exact, _ in every):
            guilt = _guilt(pipeline, all(ok for ok, _, _ in every))
    failed = failed_ranks(pipeline.agreement, [ok for ok, _, _ in every])
    others = tuple(dict.fromkeys(item for _, _, items in every for item in items))
    innocent = guilt is None or guilt.expected
    return Verification(
        **{**vars(found), "ok": not failed and innocent and not ties and not others},
        guilt=guilt,
        ties=ties,
        stale=others,
        failed_ranks=failed,
    )


def _batch(pipeline: PipelinedModel, args: Any, kwargs: Any) -> Batch:
    """What the pipeline trains on: one rank's batch, or those of all of its ranks."""
    batch = Batch.of(args, kwargs)
    return batch.joined(pipeline.line.gather, pipeline.line.size) if pipeline.joins else batch


@contextlib.contextmanager
def _left_alone(model: nn.Module, pipeline: PipelinedModel) -> Iterator[None]:
    """Behind it gradients, buffers and random stream are what they were."""
    state, buffers = RandomState.now(), Buffers(model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        if pipeline.ranks is not None:
            pipeline.ranks.gathered.clear()
        buffers.put_back()
        state.restore()


def _compiled(model: Any, pipeline: PipelinedModel, args: Any, kwargs: Any) -> Run:
    """One step of all stages; what it came to on this rank."""
    state, before = RandomState.now(), Buffers(model)

    def step() -> torch.Tensor:
        loss: torch.Tensor = model.step(*args, **kwargs)
        return loss

    measured = measure(step)
    own = {name: p for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: _torch.local_tensor(p.grad) for name, p in own.items() if p.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers() if not b.is_meta}
    outcome = Outcome({0: measured.output}, gradients, buffers, RandomState.now())
    for parameter in own.values():
        parameter.grad = None
    before.put_back()
    state.restore()
    return Run(outcome, (0,), {}, measured)


def _eager(model: Any, pipeline: PipelinedModel, args: Any, kwargs: Any) -> Run:
    """Eager accumulation of the same batch; gradients of what this rank trains."""
    batch, precision = _batch(pipeline, args, kwargs), pipeline.options.precision
    prepared = pipeline.prepare(model, eager_view(model), batch)
    count, start = prepared.schedule.microbatches, RandomState.now()
    gradients: dict[str, torch.Tensor] = {}
    late = pipeline.options.sharding.zero in (0, 1)
    placement, owners = prepared.schedule.placement, prepared.routes.owners
    with _whole(model, pipeline, placement, owners) as originals:
        view = eager_view(model)

        def step() -> torch.Tensor:
            losses = []
            for index, (part, keywords) in enumerate(batch.cut(count)):
                output = precision.run(view, part, keywords)
                share = pipeline.loss(output) / count
                share.backward()
                losses.append(share.detach())
                if not late or index == count - 1:
                    _collect(gradients, view, originals, pipeline)
            return torch.stack(losses).sum()

        measured = measure(step)
        buffers = {
            name: b.clone() for name, b in view.named_buffers() if not originals[name].is_meta
        }
    stream = RandomState.now()
    if not stream.equals(start):
        raise UsageError(
            "the model draws random numbers, and the stages of a pipeline draw them from streams "
            "of their own: nothing to compare with\n  verify it after model.eval()"
        )
    return Run(Outcome({0: measured.output}, gradients, buffers, stream), (0,), {}, measured)


def _collect(
    gradients: dict[str, torch.Tensor],
    view: nn.Module,
    originals: Mapping[str, torch.Tensor],
    pipeline: PipelinedModel,
) -> None:
    """Adds what backwards have left, averaged over ranks with the same stages."""
    for name, parameter in view.named_parameters():
        gradient, original = parameter.grad, originals[name]
        parameter.grad = None
        if gradient is None or original.is_meta:
            continue
        if pipeline.ranks is not None:
            gradient = _torch.local_tensor(average(pipeline.ranks, gradient, original))
        gradients[name] = gradients[name] + gradient if name in gradients else gradient


@contextlib.contextmanager
def _whole(
    model: nn.Module,
    pipeline: PipelinedModel,
    placement: Sequence[int],
    owners: Mapping[str, tuple[int, ...]],
) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, the model has copies of all weights and buffers, of whatever rank has them.

    Given are the tensors that it has outside, by name.
    """
    originals = dict([*model.named_parameters(), *model.named_buffers()])
    made: dict[torch.Tensor, torch.Tensor] = {}
    for name, tensor in originals.items():
        value = _copy(tensor, pipeline)
        if name in owners:
            pipeline.line.tell(value, placement[owners[name][0]])
        is_parameter = isinstance(tensor, nn.Parameter)
        made[tensor] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    replace_tensors(model, made)
    try:
        yield originals
    finally:
        current = dict([*model.named_parameters(), *model.named_buffers()])
        replace_tensors(model, {current[name]: tensor for name, tensor in originals.items()})


def _copy(tensor: torch.Tensor, pipeline: PipelinedModel) -> torch.Tensor:
    """A whole, contiguous copy; of what other ranks have only its memory."""
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=pipeline.device)
    if is_spread(tensor):
        assert pipeline.ranks is not None
        tensor = pipeline.ranks.shards.gather(tensor)
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _guilt(pipeline: PipelinedModel, within_tolerance: bool) -> Guilt:
    """The first guilty pass of any stage, by stage; what holds the stages together, if none is."""
    said = told(pipeline.agreement, _guilty_here(pipeline))
    every = [item for items in said for item in items]
    every.sort(key=lambda guilt: (guilt.by_design, guilt.stage))
    return every[0] if every else Guilt("pipeline", allowed=within_tolerance)


def _guilty_here(pipeline: PipelinedModel) -> list[Guilt]:
    """Guilty passes of this rank's stages; ranks with the same stages find the same."""
    found = []
    for prepared in pipeline.prepared.values():
        for (stage, _, accumulates), step in sorted((prepared.steps or {}).items()):
            guilt = guilty_pass(_made_up(step))
            if guilt is not None:
                found.append(replace(guilt, stage=stage, accumulates=accumulates))
    return found


def _made_up(step: TrainingStep) -> Situation:
    """A situation for a stage: random values, zeros for indices, ones for gradients from before."""
    generator = torch.Generator().manual_seed(0)

    def like(value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        made = torch.randn(value.shape, generator=generator)
        return made.to(dtype=value.dtype, device=value.device)

    graph = step.partway(0)
    values = {role.index: node.meta["val"] for role, node in graph.pairs() if role.kind == "input"}
    count = max(values, default=-1) + 1
    leaves = [like(values[i]) if i in values else torch.empty(0) for i in range(count)]
    existing: dict[str, torch.Tensor] = {}
    if step.accumulates:
        spread = _spreads(step)
        for role, node in graph.pairs():
            if role in graph.trainable:
                parameter, value = step.tensor_for(role, leaves), node.meta["val"]
                ones = torch.ones(value.shape, dtype=value.dtype, device=parameter.device)
                existing[role.name] = spread(ones, parameter)
    return Situation(step, leaves, RandomState.now(), existing)


def _spreads(step: TrainingStep) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """From a whole gradient to how the step finds it."""
    ranks = step.ranks
    if ranks is None or not step.reduces:
        return lambda gradient, parameter: gradient
    return lambda gradient, parameter: average(ranks, gradient, parameter)
