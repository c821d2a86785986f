"""One captured graph of a compiled model: its plan, what runs it, and what running it has shown.

Two facts cannot be known before the first backward: whether the caller keeps the model's outputs
meanwhile, and which outputs gradients come from.  The plan starts from the safe assumptions
(kept; scalars, or all outputs if there are none) and follows what is observed:

    outputs dropped                the plan's peak is lowered at once; the next call plans anew
    fewer gradients than planned   missing ones count as zero, parameters reached by none get None
    a gradient nobody planned for  this step runs once more, from its inputs and random numbers
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxzero.capture import Capture, capture
from fxzero.errors import BudgetError, RuntimeStateError
from fxzero.failures import named
from fxzero.fallback import Attempt, or_as_eager
from fxzero.graph import InputRole, TrainGraph, describe_all
from fxzero.graph_planner import Decided, Emitted
from fxzero.halves import run_in_halves
from fxzero.headroom import as_code_runs, use_headroom
from fxzero.inner import Code, executable, generate
from fxzero.microbatches import Call
from fxzero.options import Options
from fxzero.passes.partition import Split
from fxzero.passes.pipeline import Pass
from fxzero.planner import Planner
from fxzero.plans import Plan
from fxzero.randomness import RandomState
from fxzero.ranks import Ranks
from fxzero.receiving import Updates
from fxzero.runtime import IN_PLACE, Executable, Parameters
from fxzero.structure import flatten

log = logging.getLogger(__name__)

# Share of the budget that must be gained for a plan to be made anew.
_SLACK = 0.02

Source = Callable[[Sequence[torch.Tensor]], torch.Tensor]
Trace = Callable[[Sequence[int] | None], Capture]


@dataclass(frozen=True)
class _Way:
    """One way to run a step: how it was traced, what was decided, and code if there is any yet."""

    options: Options
    unapplied: tuple[str, ...]
    captured: Capture
    planner: Planner
    decided: Decided
    ready: tuple[Split, Code] | None


class TrainingStep:
    """A model's training step for one combination of input shapes and modes.

    Args:
        model: the compiled model.
        view: the same model as it was before it was compiled, which is traced.
        ranks: those that train together.
        reduces: whether the graphs average gradients over them.
        accumulates: whether they add gradients to those that exist.
        trace: makes what is trained, given the outputs that receive gradients (None: as ``capture``
            assumes); None: all of ``view`` is trained.
        in_halves: whether the backward may run in two parts, see ``run_in_halves``.
        is_stage: whether it is a stage of a pipeline, whose outputs are sent away.
        updates: who takes the gradients that backwards do not return.
        sibling: the step that differs in that alone, if there is one: it shares its trace, and its
            plan where that fits.

    Attributes:
        shapes: the input shapes, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        view: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
        given: Plan | None,
        ranks: Ranks | None = None,
        reduces: bool = True,
        accumulates: bool = False,
        sibling: TrainingStep | None = None,
        trace: Trace | None = None,
        in_halves: bool = False,
        is_stage: bool = False,
        updates: Updates | None = None,
    ) -> None:
        self.options = options
        self.updates = updates or Updates()
        self.given = given
        self.ranks = ranks
        self.reduces = reduces
        self.accumulates = accumulates
        self.shapes = describe_all(flatten((args, kwargs))[0])
        self._model = view
        self._trace = trace
        self._in_halves = in_halves
        self._origin = weakref.ref(model)
        self._is_stage = is_stage
        self._outputs_held = not is_stage
        self._outputs_seen = False
        self._gradients_settled = False
        self._stale = False
        self._observes = True
        self._wanted: tuple[int, ...] | None = None
        self._captured: Capture
        self._planner: Planner
        self._decided: Decided
        self._code: Code
        self._ready: tuple[Split, Code] | None = None  # code of a rehearsed plan to adopt
        self._unapplied: tuple[str, ...] = ()  # notes on options that are not followed
        if sibling is None:
            self._recapture((args, kwargs), None)
        else:
            self._outputs_held = sibling._outputs_held
            self._outputs_seen = sibling._outputs_seen
            self._gradients_settled = sibling._gradients_settled
            self._follow(sibling, (args, kwargs))

    @property
    def plan(self) -> Plan:
        self._follow_outputs()
        return self._decided.plan

    @property
    def graph(self) -> TrainGraph:
        """The joint graph as it was traced, before any pass."""
        return self._captured.graph

    @property
    def emitted(self) -> Emitted:
        """The graphs that run, and their timeline."""
        return self._decided.emitted

    @property
    def executable(self) -> Executable:
        """The functions that run them."""
        return self._executable

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the outputs that the next run's graphs expect gradients from."""
        return self._captured.differentiable if self._wanted is None else self._wanted

    @property
    def peak_with_outputs_held(self) -> int:
        """Planned peak of forward and backward for a caller who keeps the outputs, in bytes.

        The optimizer's state is not in it.
        """
        if self._planner.outputs_held:
            return self._decided.plan.peak_of_graphs
        planner = self._planner.observing(outputs_held=True)
        decided, run = self._decided, self._executable
        if self.options.inner == "eager" or self._in_halves:
            return planner.peak_of_graphs(decided)
        state = decided.plan.ranks[0].breakdown.get("optimizer", 0)
        return planner.rehearse(decided, run.forward, run.backward).largest - state

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Those that made the graphs, in their order."""
        return self._planner.passes(self._decided.plan)

    def partway(self, count: int) -> TrainGraph:
        """The joint graph as the first ``count`` of ``passes`` leave it."""
        return self._planner.partway(self._decided.plan, count)

    def tensor_for(self, role: InputRole, leaves: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parameter, buffer or input that stands behind a placeholder now."""
        return self._source(role)(leaves)

    @contextlib.contextmanager
    def unobserved(self) -> Iterator[None]:
        """Inside, backwards teach nothing about how the caller trains."""
        before, self._observes = self._observes, False
        try:
            yield
        finally:
            self._observes = before

    def run(self, leaves: Sequence[torch.Tensor], parameters: Parameters = IN_PLACE) -> Any:
        """The model's return value for flat inputs, attached to autograd."""
        self._follow_outputs()
        if self._stale:
            self._stale = False
            self._plan_again()
        if self._wanted is not None:
            self._recapture(self._captured.inputs.fill(leaves), self._wanted)
        self.updates.place(self._decided.plan, self._model)
        tensors = [source(leaves) for source in self._sources]
        return self._captured.outputs.fill(self._executable(tensors, parameters))

    def run_in_halves(
        self, leaves: Sequence[torch.Tensor], parameters: Parameters = IN_PLACE
    ) -> tuple[Any, torch.Tensor]:
        """``run`` with the gradients of parameters apart, and the token that asks for them."""
        tensors = [source(leaves) for source in self._sources]
        outputs, token = run_in_halves(self._executable, tensors, parameters)
        return self._captured.outputs.fill(outputs), token

    def _traced(self, call: Call, differentiable: Sequence[int] | None) -> Capture:
        if self._trace is not None:
            return self._trace(differentiable)
        args, kwargs = call
        return capture(
            self._model,
            args,
            kwargs,
            differentiable=differentiable,
            inner=self.options.inner,
            precision=self.options.precision,
        )

    def _recapture(self, call: Call, differentiable: Sequence[int] | None) -> None:
        self._prepare(lambda: self._traced(call, differentiable))
        if differentiable is not None:
            self.given = None  # it was made for another graph
        given = self.given
        self._adopt(self._decide_for(call) if given is None else self._planner.replay(given))

    def _follow(self, sibling: TrainingStep, call: Call) -> None:
        """Does what another step does, but for what becomes of gradients."""
        self.options = replace(self.options, inner=sibling.options.inner)
        self._unapplied = sibling._unapplied
        self._prepare(lambda: sibling._captured)
        self._wanted = sibling._wanted
        self.given = sibling.given
        # Of a stage's micro-batches the first is in flight beside others, and holds what they hold.
        follows = self.accumulates or self._is_stage
        plan = self.given or (sibling.plan if follows else None)

        def follow() -> Decided:
            decided = None if plan is None else self._planner.replay(plan)
            fits = decided is not None and (decided.plan.fits or plan is self.given)
            return decided if decided is not None and fits else self._within_budget()

        self._adopt(self._decide_for(call, follow))

    def _prepare(self, trace: Callable[[], Capture]) -> None:
        """Traces, and prepares to plan."""

        def prepare() -> tuple[Capture, Planner]:
            captured = trace()
            planner = Planner(
                captured.graph,
                self.options,
                type(self._model).__name__,
                outputs_held=self._outputs_held,
                reduces=self.reduces,
                accumulates=self.accumulates,
                is_stage=self._is_stage,
                unapplied=self._unapplied,
            )
            return captured, planner

        self._wanted = None
        if self.ranks is None:
            self._captured, self._planner = prepare()
        else:
            made = self.ranks.agreement.on_result(prepare, lambda made: made[1].digest)
            self._captured, self._planner = made

    def _decide_for(self, call: Call, make: Callable[[], Decided] | None = None) -> Decided:
        """``_decide``; where generated code does not do, for the call as it is traced for eager."""
        if self._is_stage:
            return self._decide(make)

        def decide(options: Options, unapplied: tuple[str, ...]) -> Attempt[_Way]:
            if options is self.options:
                decided = self._decide(make)
            else:
                self.options, self._unapplied, self._ready = options, unapplied, None
                wanted, differentiable = self._wanted, self._captured.differentiable
                self._prepare(lambda: self._traced(call, differentiable))
                self._wanted = wanted
                decided = self._decide()
            way = _Way(options, unapplied, self._captured, self._planner, decided, self._ready)
            # Only the first rank knows what its code needs.
            confined = bool(decided.apart) and self.ranks is None
            return Attempt(way, decided.plan.step_seconds, confined)

        way = or_as_eager(self.options, decide)
        self.options, self._unapplied = way.options, way.unapplied
        self._captured, self._planner, self._ready = way.captured, way.planner, way.ready
        return way.decided

    def _decide(self, make: Callable[[], Decided] | None = None) -> Decided:
        """What this process plans, or the first rank does."""
        make = make or self._within_budget
        if self.ranks is None:
            return make()
        decided: list[Decided] = []

        def plan() -> str:
            decided.append(make())
            return decided[0].plan.to_json()

        text = self.ranks.agreement.of_first(plan)
        return decided[0] if decided else self._planner.replay(Plan.from_json(text))

    def _within_budget(self) -> Decided:
        """The plan for the options' budget, which generated code may meet where operators do not.

        Raises:
            BudgetError: nothing found fits; it names what generated code needs if that is less.
        """
        try:
            decided = self._planner.decide()
        except BudgetError:
            if self.options.inner == "eager":
                raise
            smallest = self._planner.smallest()
            code = self._generate(smallest, smallest.plan.peak_bytes)
            peaks = self._planner.rehearse(smallest, code.forward, code.backward)
            if not peaks.known or peaks.largest >= smallest.plan.peak_bytes:
                raise
            smallest = as_code_runs(self._planner, smallest, code, peaks)
            plan = replace(smallest.plan, status="feasible")
            if plan.fits:
                self._ready = smallest.emitted.split, code
                return replace(smallest, plan=plan)
            raise self._planner.refusal(plan.peak_bytes) from None
        return self._with_headroom_used(decided)

    def _with_headroom_used(self, decided: Decided) -> Decided:
        """A plan with less recompute, if generated code leaves room for one."""
        budget = self.options.memory_budget
        # A stage's budget is shared by all micro-batches in flight.
        alone = not (self._is_stage or self._in_halves)
        if budget is None or self.options.inner == "eager" or not alone:
            return decided
        made = use_headroom(self._planner, decided, budget, self._generate)
        self._ready = made.decided.emitted.split, made.code
        return made.decided

    def _follow_outputs(self) -> None:
        """Counts the outputs as the last backward has shown them: held by the caller or not."""
        if self._planner.outputs_held == self._outputs_held:
            return
        self._planner = self._planner.observing(outputs_held=self._outputs_held)
        self._decided = self._as_it_runs(self._planner.restate(self._decided), self._code)
        self._stale = self.given is None and self._worth_planning_again()

    def _plan_again(self) -> None:
        """A cheaper plan for what is known now; a plan that fits is not given up for less."""
        fits = self._decided.plan.fits
        try:
            decided = self._decide()
        except BudgetError:
            if not fits:
                raise
            return
        if not fits or self._price(decided.plan) < self._price(self._decided.plan):
            self._adopt(decided)

    def _price(self, plan: Plan) -> float:
        flops = self.options.objective == "flops"
        return plan.recompute_flops if flops else plan.recompute_seconds

    def _adopt(self, decided: Decided) -> None:
        limit = self.options.memory_budget if decided.plan.fits else None
        split, inner = decided.emitted.split, self.options.inner
        ready, self._ready = self._ready, None
        attached = self._captured.attached
        if ready and ready[0] is split:
            self._decided, self._code = decided, ready[1]
        else:
            self._code = self._generate(decided, limit)
            self._decided = self._as_it_runs(decided, self._code)
        self._executable = executable(split, self._code, inner, attached=attached, owner=self)
        self._sources = [self._source(role) for role in decided.emitted.split.inputs]
        log.info("planned %s: peak %d bytes", self.shapes, self._decided.plan.peak_bytes)

    def _generate(self, decided: Decided, limit: int | None) -> Code:
        return generate(
            decided.emitted.split,
            self.options.inner,
            limit=limit,
            rehearse=functools.partial(self._planner.rehearse, decided),
            groups=self.ranks.mesh.groups if self.ranks else None,
            in_halves=self._in_halves,
        )

    def _as_it_runs(self, decided: Decided, code: Code) -> Decided:
        """The same with a plan that says what generated code needs."""
        if self.options.inner == "eager" or self._in_halves:
            return decided
        peaks = self._planner.rehearse(decided, code.forward, code.backward)
        return as_code_runs(self._planner, decided, code, peaks)

    def _source(self, role: InputRole) -> Source:
        """How the tensor behind a placeholder is found at each call; weights may be replaced."""
        if role.kind == "input":
            return lambda leaves: leaves[role.index]
        if role.name in self._captured.constants:
            constant = self._captured.constants[role.name]
            return lambda leaves: constant
        if role.kind == "gathered":
            return self._gathered_source(role)
        owner, _, attribute = role.name.rpartition(".")
        if not owner:
            return self._root_source(attribute)
        module = self._model.get_submodule(owner)
        table: dict[str, Any] = next(
            t for t in (module._parameters, module._buffers, vars(module)) if attribute in t
        )

        def read(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
            tensor: torch.Tensor = table[attribute]
            return tensor

        return read

    def _gathered_source(self, role: InputRole) -> Source:
        """A parameter that is gathered once for all micro-batches of a step."""
        ranks, split = self.ranks, self._decided.emitted.split
        assert ranks is not None
        part = self._source(InputRole("parameter", role.name))
        nodes = split.forward.graph.find_nodes(op="placeholder")
        dtype = list(nodes)[split.inputs.index(role)].meta["val"].dtype
        return lambda leaves: ranks.whole(part(leaves), dtype)

    def _root_source(self, attribute: str) -> Source:
        """The model itself is asked, weakly: a step must not keep it alive, and it may change."""
        origin = self._origin

        def read(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
            tensor: torch.Tensor = getattr(origin(), attribute)
            return tensor

        return read

    def observe(self, outputs_held: bool, received: tuple[int, ...]) -> None:
        """What a backward has shown: are outputs alive, and which got a gradient.

        Many ranks keep to the first assumptions: what one of them sees, the others may not.
        """
        if self.ranks is not None or not self._observes:
            return
        self._outputs_held = outputs_held or (self._outputs_seen and self._outputs_held)
        self._outputs_seen = True
        if not self._gradients_settled and received:
            self._gradients_settled = True
            if set(received) < set(self._captured.differentiable) and self.given is None:
                self._wanted = received

    def _worth_planning_again(self) -> bool:
        budget, plan = self.options.memory_budget, self._decided.plan
        if budget is None or not plan.fits:
            return budget is not None
        return bool(plan.decisions.recompute) and budget - plan.peak_bytes > _SLACK * budget

    def named(self, error: RuntimeError) -> RuntimeError:
        """An error in a graph, as that of the collective that it comes from, if it does."""
        return error if self.ranks is None else named(error, self.emitted.split, self.ranks.mesh)

    def rerun(
        self, inputs: Sequence[torch.Tensor], state: RandomState, gradients: dict[int, torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Gradients of the step's inputs when an output outside the plan received one.

        The step runs once more, eagerly, from the same inputs and random numbers.
        """
        roles = self._decided.emitted.split.inputs
        mutated = self._decided.emitted.split.mutated
        unplanned = [i for i in gradients if i not in self._captured.differentiable]
        paths = ", ".join(self._captured.outputs.paths[i] or str(i) for i in unplanned)
        if mutated or self.ranks is not None:
            why = f"it updates {mutated[0]}" if mutated else "its parameters are spread over ranks"
            raise RuntimeStateError(
                f"a gradient came through output {paths}, but only the model's scalars were "
                f"planned for, and the step cannot run again because {why}\n"
                "  compute the loss inside the model, or return no scalar beside that output"
            )
        log.warning(
            "a gradient came through output %s besides the model's scalars; this step runs again "
            "and exceeds its planned memory, later steps are planned for it",
            paths,
        )
        self._wanted = tuple(sorted({*self._captured.differentiable, *gradients}))
        by_index = {
            role.index: t for role, t in zip(roles, inputs, strict=True) if role.kind == "input"
        }
        leaves = {i: t.detach().requires_grad_(t.requires_grad) for i, t in by_index.items()}
        sources = [
            leaves[role.index] if role.kind == "input" else tensor
            for role, tensor in zip(roles, inputs, strict=True)
        ]
        args, kwargs = self._captured.inputs.fill([leaves[i] for i in sorted(leaves)])
        with torch.enable_grad(), state.replayed():
            outputs, _ = flatten(self._model(*args, **kwargs))
        wanted = [tensor for tensor in sources if tensor.requires_grad]
        found = torch.autograd.grad(
            [outputs[i] for i in gradients], wanted, list(gradients.values()), allow_unused=True
        )
        by_id = {id(tensor): gradient for tensor, gradient in zip(wanted, found, strict=True)}
        return [by_id.get(id(tensor)) for tensor in sources]
