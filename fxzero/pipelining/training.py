"""A model that trains as a pipeline: its stages on this rank, and one step of all.

The first batch decides where the model is cut.  From then on each rank keeps the weights that its
stages read; those of others become meta tensors, which optimizers pass over.  A weight that stages
of several ranks read has a copy on each, whose gradients are added up at the end of a step, so that
copies stay equal.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fxzero import _torch
from fxzero.agreement import Agreement
from fxzero.calibration import cost_model
from fxzero.capture import Capture
from fxzero.errors import UsageError
from fxzero.graph import describe_all
from fxzero.mesh import Mesh
from fxzero.microbatches import Batch
from fxzero.options import Options, model_device
from fxzero.pipelining.line import Line
from fxzero.pipelining.planning import Choice, choose_cuts
from fxzero.pipelining.rank_plan import plan_rank
from fxzero.pipelining.request import Pipeline
from fxzero.pipelining.runner import Runner
from fxzero.pipelining.schedules import Schedule, make_schedule
from fxzero.pipelining.stages import Exports, Loss, Routes, shared_weights
from fxzero.pipelining.transport import Transport
from fxzero.plans import Plan
from fxzero.ranks import Ranks
from fxzero.runtime import IN_PLACE, Parameters
from fxzero.sharding import replace_tensors
from fxzero.structure import flatten
from fxzero.timeline import tensor_bytes
from fxzero.training_step import TrainingStep
from fxzero.units import format_seconds

log = logging.getLogger(__name__)

# Micro-batches for each stage, where nobody gives their number.
_MICROBATCHES = 4


@dataclass(frozen=True)
class _Kind:
    """What becomes of a micro-batch's gradients.

    Attributes:
        reduces: whether the stage's graph averages them over ranks.
        accumulates: whether it adds them to those that exist.
        syncs: whether they are averaged when its backward has run, with all that came before.
    """

    reduces: bool
    accumulates: bool
    syncs: bool


@dataclass(frozen=True)
class _Prepared:
    """What trains batches of some shapes.

    Attributes:
        choice: where the model was cut, and what the first rank expects of it.
        captures: this rank's stages as they were traced.
        shared: for weights that stages of several ranks read, by name, these ranks.
        budgets: of one micro-batch of each stage, once these are planned.
        steps: each stage's graphs, by what becomes of gradients.
    """

    choice: Choice
    routes: Routes
    schedule: Schedule
    captures: dict[int, Capture]
    shared: dict[str, tuple[int, ...]]
    budgets: dict[int, int | None]
    steps: dict[tuple[int, bool, bool], TrainingStep]


class PipelinedModel:
    """What a model on a pipeline remembers between steps.

    Args:
        mesh: of all ranks; the pipeline's are along "pp".
        loss: from what the model returns to the scalar that is trained.

    Attributes:
        in_flight: the most micro-batches that each stage of this rank had between its forward and
            its backward in the last step.
    """

    def __init__(self, request: Pipeline, options: Options, mesh: Mesh, loss: Loss) -> None:
        self.request = request
        self.options = options
        self.ranks: Ranks | None = None
        self.loss = loss
        self.line = Line.of(mesh)
        self.lines = Line.all_of(mesh)
        self.agreement = Agreement(mesh) if mesh.size > 1 else None
        self.prepared: dict[Hashable, _Prepared] = {}
        self.plan: Plan | None = None
        self.steps = 0
        self.in_flight: dict[int, int] = {}

    def step(
        self, model: nn.Module, view: nn.Module, batch: Batch, ranks: Ranks | None
    ) -> torch.Tensor:
        """Forward and backward of one batch; returns the mean loss, the same on every rank.

        Args:
            view: the model as it was before it was compiled.
            ranks: those that have the same stages and other data, if there are any.
        """
        self.steps += 1
        self.ranks = ranks
        accumulates = any(p.grad is not None for p in model.parameters() if p.requires_grad)
        if self.agreement is not None:
            mode = "training" if model.training else "evaluation"
            described = f"a batch of {describe_all(batch.leaves)}, {mode}"
            (wanted,) = self.agreement.on_step(described, [accumulates], f"step {self.steps}")
            accumulates = any(wanted)
        prepared = self.prepare(model, view, batch)
        if not prepared.budgets:
            self._check_batch(batch)
            self._together(lambda: self._plan(prepared, model, view, batch))
        try:
            return self._run(prepared, model, view, batch, accumulates)
        except RuntimeError as error:
            if self.agreement is None:
                raise
            raise self.agreement.explained(error, f"step {self.steps}") from error

    def _check_batch(self, batch: Batch) -> None:
        """Raises DivergenceError if ranks of a pipeline have different data: each reads its own."""
        if self.agreement is not None and self.lines:
            digest = hashlib.sha256()
            for leaf in batch.leaves:
                digest.update(_bytes(leaf))
            self.agreement.on_equal(
                f"a batch with the hash {digest.hexdigest()[:12]}",
                self.lines,
                "ranks of one pipeline were given different batches",
                "give all ranks of a pipeline the same batch; other data lies along dp",
            )

    def _together(self, plan: Callable[[], None]) -> None:
        """Plans on every rank; an error of one is one of all."""
        if self.agreement is None:
            plan()
        else:
            self.agreement.on_result(
                plan,
                lambda _: "its stages are planned",
                "a rank of the pipeline could not plan its stages",
                "see what that rank asks for",
            )

    def prepare(self, model: nn.Module, view: nn.Module, batch: Batch) -> _Prepared:
        """Cuts the model for such batches, unless that was done."""
        key = _key(model, batch)
        if key not in self.prepared:
            self.prepared[key] = self._prepare(model, view, batch)
        return self.prepared[key]

    def of_all_stages(self, model: nn.Module, mine: torch.Tensor) -> torch.Tensor:
        """What the ranks say of their gradients, in the order of the model's parameters.

        Args:
            mine: a number for each parameter that has a gradient here.
        """
        given = iter(mine)
        every = mine.new_zeros(2, sum(1 for _ in model.parameters()))
        (prepared, *_) = self.prepared.values()
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.grad is not None:
                value = next(given)
                if prepared.shared.get(name, (self.line.rank,))[0] == self.line.rank:
                    every[:, index] = torch.stack([value, torch.ones_like(value)])
        self.line.add_up(every)
        numbers, present = every
        found: torch.Tensor = numbers[present > 0]
        return found

    def _prepare(self, model: nn.Module, view: nn.Module, batch: Batch) -> _Prepared:
        count = self._microbatches(batch)
        args, kwargs = next(batch.cut(count))
        exports = Exports(view, args, kwargs, loss=self.loss, precision=self.options.precision)
        choice = self._choose(exports, count)
        schedule = make_schedule(
            self.request.schedule, self.line.size, count, len(choice.times), choice.times
        )
        stages = exports.cut(choice.cuts)
        routes = stages.routes
        self._check_weights(routes)
        mine = schedule.stages_of(self.line.rank)
        captures = {stage: stages.capture(stage, self.options.inner) for stage in mine}
        del stages, exports  # they hold the weights of all stages
        self._release(model, routes, mine)
        shared = shared_weights(routes, schedule)
        for owners in sorted({*shared.values()}):
            self.line.connect(owners)
        return _Prepared(choice, routes, schedule, captures, shared, {}, {})

    def _choose(self, exports: Exports, microbatches: int) -> Choice:
        """Where the first rank cuts the model."""
        request = self.request

        def choose() -> str:
            device = model_device(exports.exported.model)
            choice = choose_cuts(
                exports,
                name=request.schedule,
                ranks=self.line.size,
                stages=self._stages(),
                microbatches=microbatches,
                inner=self.options.inner,
                costs=cost_model(device, fused=self.options.inner == "inductor"),
                modules=request.cuts,
            )
            return choice.to_json()

        if self.prepared:
            return next(iter(self.prepared.values())).choice
        text = choose() if self.agreement is None else self.agreement.of_first(choose)
        return Choice.from_json(text)

    def _stages(self) -> int:
        known = self.request.known_stages
        return known or make_schedule(self.request.schedule, self.line.size, 1).stages

    def _microbatches(self, batch: Batch) -> int:
        """Into how many micro-batches the batch is cut."""
        if self.request.microbatches is not None:
            return self.request.microbatches
        if isinstance(self.options.microbatches, int) and self.options.microbatches > 1:
            return self.options.microbatches
        wanted = _MICROBATCHES * self._stages()
        return max(count for count in batch.counts() if count <= wanted)

    def _check_weights(self, routes: Routes) -> None:
        """Raises UsageError if other shapes ask for weights that this rank has given up."""
        for known in self.prepared.values():
            if known.routes.owners != routes.owners:
                raise UsageError(
                    "with these inputs the model's stages read other weights than with the first "
                    "ones\n  pad inputs to one shape"
                )

    def _release(self, model: nn.Module, routes: Routes, mine: Collection[int]) -> None:
        """Gives up the memory of weights that only other ranks' stages read."""
        owners = routes.owners.items()
        elsewhere = {name for name, stages in owners if not set(mine) & set(stages)}
        made: dict[torch.Tensor, torch.Tensor] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in elsewhere and not tensor.is_meta:
                nothing = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                made[tensor] = (
                    nn.Parameter(nothing, tensor.requires_grad) if is_parameter else nothing
                )
        held = [weakref.ref(tensor) for tensor in made]
        replace_tensors(model, made)
        made.clear()
        del tensor
        gc.collect()  # traces hold weights in cycles
        if count := sum(ref() is not None for ref in held):
            log.warning(
                "%d tensors that other ranks train are still held, by an optimizer that was made "
                "before the model was cut: give fxzero.compile example_inputs to cut it at once",
                count,
            )

    def _run(
        self,
        prepared: _Prepared,
        model: nn.Module,
        view: nn.Module,
        batch: Batch,
        accumulates: bool,
    ) -> torch.Tensor:
        routes, schedule, line = prepared.routes, prepared.schedule, self.line
        leaves = [flatten(call)[0] for call in batch.cut(schedule.microbatches)]
        device = next((leaf.device for leaf in batch.leaves), torch.device("cpu"))
        transport = Transport(schedule, routes, line.members, line.rank, line.group, device)
        kinds = self._kinds(schedule.microbatches, accumulates, model)

        def run(
            stage: int, microbatch: int, given: list[torch.Tensor]
        ) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
            return self._run_stage(prepared, model, view, stage, kinds[microbatch], given)

        runner = Runner(schedule, routes, transport, leaves, run)
        with self._shared_added_up(prepared, model):
            losses = runner.run()
        self.in_flight = runner.most_in_flight
        nothing = torch.zeros((), dtype=routes.loss, device=device)
        loss = torch.stack(losses).sum() if losses else nothing
        return line.tell(loss, schedule.placement[-1])

    def _kinds(self, count: int, accumulates: bool, model: nn.Module) -> list[_Kind]:
        """What becomes of each micro-batch's gradients, as in ``CompiledModule.step``."""
        if self.ranks is None:
            return [_Kind(True, accumulates or index > 0, True) for index in range(count)]
        late = self.options.sharding.zero in (0, 1)
        pending = self.ranks.any_pending(model.parameters())
        kinds = []
        for index in range(count):
            syncs = self.ranks.syncing and (not late or index == count - 1)
            kinds.append(_Kind(syncs and not pending, accumulates or index > 0, syncs))
            pending = not syncs
        return kinds

    def _run_stage(
        self,
        prepared: _Prepared,
        model: nn.Module,
        view: nn.Module,
        stage: int,
        kind: _Kind,
        given: list[torch.Tensor],
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
        key = stage, kind.reduces, kind.accumulates
        if key not in prepared.steps:
            sibling = prepared.steps.get((stage, kind.reduces, not kind.accumulates))
            budget = prepared.budgets.get(stage)
            prepared.steps[key] = self._make(prepared, model, view, stage, kind, budget, sibling)
        step = prepared.steps[key]
        parameters: Parameters = IN_PLACE
        if self.ranks is not None:
            parameters = self.ranks.step(reduces=kind.reduces, syncs=kind.syncs)
        if prepared.schedule.splits_backward:
            return step.run_in_halves(given, parameters)
        return step.run(given, parameters), None

    def _make(
        self,
        prepared: _Prepared,
        model: nn.Module,
        view: nn.Module,
        stage: int,
        kind: _Kind,
        budget: int | None,
        sibling: TrainingStep | None = None,
    ) -> TrainingStep:
        captured = prepared.captures[stage]
        leaves = [torch.empty(0, device="meta") for _ in captured.inputs.paths]
        return TrainingStep(
            model,
            view,
            tuple(leaves),
            {},
            replace(self.options, memory_budget=budget),
            None,
            self.ranks,
            reduces=kind.reduces,
            accumulates=kind.accumulates,
            sibling=sibling,
            trace=lambda _: captured,
            in_halves=prepared.schedule.splits_backward,
            outputs_held=False,
        )

    def _plan(self, prepared: _Prepared, model: nn.Module, view: nn.Module, batch: Batch) -> None:
        """Plans this rank's stages, for the micro-batches between the first and the last."""
        kind = self._kinds(max(prepared.schedule.microbatches, 3), True, model)[1]

        def make(stage: int, budget: int | None) -> TrainingStep:
            return self._make(prepared, model, view, stage, kind, budget)

        planned = plan_rank(
            make,
            prepared.schedule,
            self.line.rank,
            prepared.routes,
            tensor_bytes(batch.leaves),
            self.options.memory_budget,
        )
        choice = prepared.choice
        note = f"modelled step {format_seconds(choice.seconds)}, {choice.bubble:.1%} of it idle"
        plan = planned.plan
        self.plan = replace(plan, step_seconds=choice.seconds, notes=(*plan.notes, note))
        for stage, step in planned.steps.items():
            prepared.steps[stage, kind.reduces, kind.accumulates] = step
            prepared.budgets[stage] = step.options.memory_budget

    @contextlib.contextmanager
    def _shared_added_up(self, prepared: _Prepared, model: nn.Module) -> Iterator[None]:
        """Behind it, gradients of weights that several ranks have are those of all their stages."""
        shared = [
            (parameter, prepared.shared[name])
            for name, parameter in model.named_parameters()
            if name in prepared.shared and self.line.rank in prepared.shared[name]
            if parameter.requires_grad
        ]
        before = [parameter.grad for parameter, _ in shared]
        for parameter, _ in shared:
            parameter.grad = None
        try:
            yield
        except BaseException:
            for (parameter, _), earlier in zip(shared, before, strict=True):
                parameter.grad = earlier
            raise
        for (parameter, owners), earlier in zip(shared, before, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.line.add_up(_torch.local_tensor(parameter.grad), owners)
            if earlier is not None:
                parameter.grad = earlier.add_(parameter.grad)


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    found: bytes = flat.view(torch.uint8).numpy().tobytes()
    return found


def _key(model: nn.Module, batch: Batch) -> Hashable:
    """All that the stages' graphs depend on."""
    return (
        batch.structure.key,
        tuple((t.shape, t.stride(), t.dtype, t.device) for t in batch.leaves),
        tuple(module.training for module in model.modules()),
        tuple(p.requires_grad for p in model.parameters()),
        _torch.autocast_state(),
    )
