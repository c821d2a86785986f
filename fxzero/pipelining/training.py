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
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxzero import _torch
from fxzero.agreement import Agreement
from fxzero.calibration import cost_model
from fxzero.capture import Capture
from fxzero.errors import PeerError, UsageError, first_line
from fxzero.graph import TrainGraph, describe_all
from fxzero.mesh import Mesh
from fxzero.microbatches import Batch
from fxzero.options import Options, model_device
from fxzero.pipelining.forecast import Setting, fitting_choice
from fxzero.pipelining.frozen import FrozenStage
from fxzero.pipelining.line import Line
from fxzero.pipelining.outline import outline
from fxzero.pipelining.planning import Choice, Chooser
from fxzero.pipelining.rank_plan import RankPlanner
from fxzero.pipelining.request import Pipeline
from fxzero.pipelining.runner import Runner
from fxzero.pipelining.schedules import Schedule
from fxzero.pipelining.stages import Exports, Loss, Routes, check_inputs, shared_weights
from fxzero.pipelining.transport import Transport
from fxzero.plans import Plan
from fxzero.precision import autocast_state
from fxzero.ranks import Ranks
from fxzero.runtime import IN_PLACE, Parameters
from fxzero.sharding import replace_tensors, stand_in
from fxzero.structure import flatten
from fxzero.timeline import tensor_bytes
from fxzero.training_step import TrainingStep

log = logging.getLogger(__name__)


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
        steps: each stage's graphs, by what becomes of gradients; of frozen stages there are none.
        frozen: what runs stages that no gradient comes to.
        finds_gradients: whether the plan is one of steps that add to gradients of earlier ones.
    """

    choice: Choice
    routes: Routes
    schedule: Schedule
    captures: Mapping[int, Capture]
    shared: Mapping[str, tuple[int, ...]]
    frozen: Mapping[int, FrozenStage]
    steps: Mapping[tuple[int, bool, bool], TrainingStep] | None = None
    finds_gradients: bool = False


class PipelinedModel:
    """What a model on a pipeline remembers between steps.

    Args:
        mesh: of all ranks; the pipeline's are along "pp".
        loss: from what the model returns to the scalar that is trained.
        joins: whether every rank has data of its own, which a pipeline trains together.

    Attributes:
        in_flight: the most micro-batches that each stage of this rank had between its forward and
            its backward in the last step.
    """

    def __init__(
        self, request: Pipeline, options: Options, mesh: Mesh, loss: Loss, joins: bool = False
    ) -> None:
        self.request = request
        self.mesh = mesh
        self.joins = joins
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
        self.device = torch.device("cpu")

    def step(
        self, model: nn.Module, view: nn.Module, batch: Batch, ranks: Ranks | None
    ) -> torch.Tensor:
        """Forward and backward of one batch; returns the mean loss, the same on every rank.

        Args:
            view: the model as it was before it was compiled.
            ranks: those that have the same stages and other data, if there are any.
        """
        self.steps += 1
        refusal = _refusal(batch)
        accumulates = any(p.grad is not None for p in model.parameters() if p.requires_grad)
        if self.agreement is not None:
            mode = "training" if model.training else "evaluation"
            frozen = sum(not p.requires_grad for p in model.parameters())
            described = (
                f"a batch of {describe_all(batch.leaves)}, {mode}, {frozen} frozen parameters"
            )
            described = described if refusal is None else first_line(refusal)
            (wanted,) = self.agreement.on_step(described, [accumulates], f"step {self.steps}")
            accumulates = any(wanted)
        if refusal is not None:
            raise refusal
        if self.joins:
            batch = batch.joined(self.line.gather, self.line.size)
        prepared = self.prepare(model, view, batch)
        finds = accumulates and self.options.memory_budget is not None
        if prepared.steps is None:
            self._check_batch(batch)
        if prepared.steps is None or (finds and not prepared.finds_gradients):
            prepared = self.settle(model, view, batch, ranks, finds_gradients=finds)
        return self._run(prepared, model, batch, accumulates)

    @contextlib.contextmanager
    def told(self, runner: Runner | None = None) -> Iterator[None]:
        """All ranks are told of an error inside, wherever they wait for this one.

        Process groups of the pipeline, and of the ranks with the same stages, are of no use then.

        Args:
            runner: what may be running.
        """
        try:
            yield
        except BaseException as error:
            if self.agreement is None:
                raise
            when = f"step {self.steps}"
            found: BaseException = error
            if isinstance(error, RuntimeError):
                found = self.agreement.explained(error, when)
            current = None if runner is None else runner.current
            where = when if current is None else f"{when}, in {current.in_words}"
            self.agreement.leave(found, where, self._groups)
            if found is not error:
                raise found from error
            if not isinstance(error, PeerError):
                error.add_note(f"rank {self.agreement.rank} failed in {where}; all ranks are told")
            raise

    @property
    def graphs(self) -> tuple[list[TrainGraph], int]:
        """This rank's stages as they were traced, and how many micro-batches a step has."""
        prepared = next(reversed(self.prepared.values()), None)
        if prepared is None:
            return [], 0
        captures = prepared.captures.values()
        return [captured.graph for captured in captures], prepared.schedule.microbatches

    @property
    def _groups(self) -> list[Any]:
        """Process groups in which others may wait for this rank in a step."""
        names = self.mesh.data.sizes
        return [*self.line.groups, *(self.mesh.devices.get_group(name) for name in names)]

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

    def settle(
        self,
        model: nn.Module,
        view: nn.Module,
        batch: Batch,
        ranks: Ranks | None,
        finds_gradients: bool = False,
    ) -> _Prepared:
        """Plans this rank's stages, within the budget; an error of one rank is one of all."""
        self.ranks = ranks
        found = self.prepare(model, view, batch)
        prepared = replace(found, finds_gradients=finds_gradients)
        plan, steps = self._alike(
            lambda: self._plan(prepared, model, view, batch),
            lambda _: "its stages are planned",
            "a rank of the pipeline could not plan its stages",
            "see what that rank asks for",
        )
        self.plan = plan
        settled = self.prepared[_key(model, batch)] = replace(prepared, steps=steps)
        return settled

    def _alike(self, make: Callable[[], Any], digest: Callable[[Any], str], *texts: str) -> Any:
        """What ``make`` returns here, if it returns on all ranks and digests are equal."""
        if self.agreement is None:
            return make()
        return self.agreement.on_result(make, digest, *texts)

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
        if not self.prepared:
            return mine
        given = iter(mine)
        # Ranks may have gradients of several dtypes, or none.
        count = sum(1 for _ in model.parameters())
        every = torch.zeros(2, count, dtype=torch.float64, device=self.device)
        prepared = next(iter(self.prepared.values()))
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.grad is not None:
                value = next(given)
                if prepared.shared.get(name, (self.line.rank,))[0] == self.line.rank:
                    every[:, index] = torch.stack([value, torch.ones_like(value)])
        self.line.add_up(every)
        numbers, present = every
        dtype = mine.dtype if len(mine) else torch.float32
        found: torch.Tensor = numbers[present > 0].to(dtype)
        return found

    def _prepare(self, model: nn.Module, view: nn.Module, batch: Batch) -> _Prepared:
        self.device = next((t.device for t in batch.leaves if t.ndim), torch.device("cpu"))
        count = self.request.microbatches_of(batch, self.line.size, self.options.microbatches)
        prepared = self._cut(view, batch, count)
        self._check_weights(prepared.routes)
        self._release(model, prepared.routes, prepared.schedule.stages_of(self.line.rank))
        for owners in sorted({*prepared.shared.values()}):
            self.line.connect(owners)
        return prepared

    def _cut(self, view: nn.Module, batch: Batch, count: int) -> _Prepared:
        """This rank's stages of a model, which alone hold their weights when this returns."""
        args, kwargs = next(batch.cut(count))
        exports = self._alike(
            lambda: Exports(view, args, kwargs, loss=self.loss, precision=self.options.precision),
            lambda exports: exports.digest,
        )
        choice = self._choose(exports, count, batch)
        stages = exports.cut(choice.cuts)
        schedule = choice.schedule(self.request.schedule, self.line.size, count)
        mine = schedule.stages_of(self.line.rank)
        trained = [stage for stage in mine if stages.trains(stage)]
        captures = self._alike(
            lambda: {stage: stages.capture(stage, self.options.inner) for stage in trained},
            lambda _: "its stages are traced",
            "a rank of the pipeline could not trace its stages",
            "see what that rank says",
        )
        frozen = {stage: FrozenStage(stages.parts[stage]) for stage in mine if stage not in trained}
        shared = shared_weights(stages.routes, schedule)
        return _Prepared(choice, stages.routes, schedule, captures, shared, frozen)

    def _choose(self, exports: Exports, microbatches: int, batch: Batch) -> Choice:
        """Where the first rank cuts the model."""

        def choose() -> str:
            device = model_device(exports.exported.model)
            costs = cost_model(
                device, fused=self.options.inner == "inductor", mesh=self.options.ranks
            )
            chooser = Chooser(exports, self.options, costs)
            setting = Setting(self.request, batch, microbatches, self.mesh, self.options)
            return fitting_choice(chooser, setting).to_json()

        if self.prepared:
            return next(iter(self.prepared.values())).choice
        text = choose() if self.agreement is None else self.agreement.of_first(choose)
        return Choice.from_json(text)

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
        tensors = [*model.named_parameters(), *model.named_buffers()]
        made = {t: stand_in(t) for name, t in tensors if name in elsewhere and not t.is_meta}
        tensors.clear()
        held = [weakref.ref(tensor) for tensor in made]
        replace_tensors(model, made)
        made.clear()
        gc.collect()  # traces hold weights in cycles
        if count := sum(ref() is not None for ref in held):
            log.warning(
                "%d tensors that other ranks train are still held, perhaps by an optimizer made "
                "before the model was cut: with example_inputs fxzero.compile cuts it at once",
                count,
            )

    def _run(
        self, prepared: _Prepared, model: nn.Module, batch: Batch, accumulates: bool
    ) -> torch.Tensor:
        routes, schedule, line = prepared.routes, prepared.schedule, self.line
        leaves = [flatten(call)[0] for call in batch.cut(schedule.microbatches)]
        transport = Transport(schedule, routes, line, self.device)
        kinds = self._kinds(schedule.microbatches, accumulates, model)

        def run(
            stage: int, microbatch: int, given: list[torch.Tensor]
        ) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
            return self._run_stage(prepared, model, stage, kinds[microbatch], given)

        runner = Runner(schedule, routes, transport, leaves, run)
        with self.told(runner):
            try:
                with self._shared_added_up(prepared, model):
                    losses = runner.run()
            finally:
                if self.ranks is not None:
                    self.ranks.gathered.clear()
            self.in_flight = runner.most_in_flight
            nothing = torch.zeros((), dtype=routes.loss, device=self.device)
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
        stage: int,
        kind: _Kind,
        given: list[torch.Tensor],
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
        if stage in prepared.frozen:
            shards = None if self.ranks is None else self.ranks.shards
            return prepared.frozen[stage].run(model, given, shards), None
        assert prepared.steps is not None
        step = prepared.steps[stage, kind.reduces, kind.accumulates]
        parameters: Parameters = IN_PLACE
        if self.ranks is not None:
            parameters = self.ranks.step(reduces=kind.reduces, syncs=kind.syncs, explains=False)
        if prepared.schedule.splits_backward:
            return step.run_in_halves(given, parameters)
        return step.run(given, parameters), None

    def _plan(
        self, prepared: _Prepared, model: nn.Module, view: nn.Module, batch: Batch
    ) -> tuple[Plan | None, dict[tuple[int, bool, bool], TrainingStep]]:
        """The plan of micro-batches between the first and the last, and steps for all of them."""
        schedule, count = prepared.schedule, prepared.schedule.microbatches

        def make(
            stage: int, kind: _Kind, budget: int | None, sibling: TrainingStep | None = None
        ) -> TrainingStep:
            return self._make(prepared, model, view, stage, kind, budget, sibling)

        usual = self._kinds(max(count, 3), True, model)[1]
        budget = self.options.memory_budget
        planner = RankPlanner(
            lambda stage, budget: make(stage, usual, budget),
            schedule,
            self.line.rank,
            prepared.routes,
            prepared.captures,
            tensor_bytes(batch.leaves) + sum(f.bytes for f in prepared.frozen.values()),
            prepared.finds_gradients,
        )
        planned = planner.within(budget)
        steps = {}
        for stage, step in planned.stages.items():
            steps[stage, usual.reduces, usual.accumulates] = step
            for accumulates in (False, True):
                for kind in self._kinds(count, accumulates, model):
                    if (stage, kind.reduces, kind.accumulates) not in steps:
                        alike = kind.reduces == usual.reduces
                        steps[stage, kind.reduces, kind.accumulates] = make(
                            stage, kind, step.options.memory_budget, step if alike else None
                        )
        if not planned.stages:
            return None, steps
        played = prepared.choice.simulated(schedule)
        plan = replace(
            planner.stated(planned, budget),
            step_seconds=played.step_seconds,
            pipeline=outline(prepared.choice, schedule, played, prepared.routes),
        )
        return plan, steps

    def _make(
        self,
        prepared: _Prepared,
        model: nn.Module,
        view: nn.Module,
        stage: int,
        kind: _Kind,
        budget: int | None,
        sibling: TrainingStep | None,
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
            is_stage=True,
        )

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


def _refusal(batch: Batch) -> UsageError | None:
    """What is wrong with a step, which all ranks must know before any of them raises it."""
    if not torch.is_grad_enabled():
        return UsageError("model.step computes gradients: call it outside of torch.no_grad")
    try:
        check_inputs(batch.leaves, batch.structure)
    except UsageError as error:
        return error
    return None


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
        autocast_state(),
    )
