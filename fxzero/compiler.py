"""``fxzero.compile``: the model stays the object it was and trains under a memory budget.

The model's class is replaced by a subclass whose ``forward`` runs planned graphs; parameters,
buffers, submodules and state-dict keys are untouched.  A graph is made for each combination of
input shapes, train or eval modes and frozen parameters, when it first occurs.  Without gradients
(``torch.no_grad``) the model's own forward runs.

On many ranks parameters become shards (``sharding.py``), and each graph gathers what it uses and
averages the gradients.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxzero import _torch
from fxzero.capture import capture, check_devices
from fxzero.errors import RecompileLimitError, UsageError, unknown_option
from fxzero.forecast import without_pipeline
from fxzero.graph import describe_all
from fxzero.mesh import Mesh, resolve_mesh
from fxzero.microbatches import Batch, Call, choose_count, loss_of
from fxzero.options import Options, call_arguments, check_options, model_device
from fxzero.pipelining.automatic import agree_on_pipeline
from fxzero.pipelining.forecast import Forecaster
from fxzero.pipelining.request import AUTO, Pipeline, check_pipeline, ranks_along
from fxzero.pipelining.training import PipelinedModel
from fxzero.planner import Planner
from fxzero.plans import Plan
from fxzero.ranks import Ranks, connect
from fxzero.receiving import Updates, check_updater
from fxzero.sharding import agree_on_values, ids_elsewhere, is_spread
from fxzero.signature import Signature
from fxzero.structure import Structure, flatten
from fxzero.ties import Ties, ties_of
from fxzero.training_step import TrainingStep

log = logging.getLogger(__name__)

_DEFAULT_RECOMPILE_LIMIT = 16
_OPTIONS = (
    "memory_budget", "optimizer", "recompute", "objective", "inner", "strict", "offload", "mesh",
    "zero", "pipeline", "precision", "example_inputs", "loss_fn", "plan", "microbatches",
    "update",
)  # fmt: skip


def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    memory_budget: object = None,
    optimizer: object = "adamw",
    mesh: Any = None,
    zero: Any = "auto",
    pipeline: Any = None,
    recompute: Any = "auto",
    objective: str = "time",
    offload: bool = False,
    precision: Any = None,
    loss_fn: Any = None,
    microbatches: int | str = 1,
    update: str = "step",
    inner: str | None = None,
    plan: Plan | str | Path | None = None,
    strict: bool = False,
    **unknown: Any,
) -> Any:
    """Compiles ``model`` in place for training under a memory budget, and returns it.

    Args:
        example_inputs: tuple of arguments (or a dict of keyword arguments) to plan for now; None:
            at the first call.
        memory_budget: "22GiB", a number of bytes, or "90%" of the device; None: no limit.  It
            covers parameters, buffers, gradients, optimizer state, inputs and activations.
        optimizer: what will hold states: a name, a class of ``torch.optim`` or ``fxzero.optim``
            (options by ``functools.partial``), or bytes per parameter.
        mesh: a DeviceMesh with a dimension "dp", or "dp_replicate" and "dp_shard"; None: all
            processes (those of torchrun are connected, if nobody has yet), or one device.
        pipeline: into how many stages to cut the model, or a ``fxzero.Pipeline``; then only
            ``model.step`` trains it, with the whole batch on every rank of a pipeline.  Or "auto":
            a pipeline where that is faster or alone fits; every rank then has data of its own, and
            ``model.step`` trains them together.
        zero: 0: parameters whole on every rank; 1: sharded, with whole gradients; 2: gradients
            sharded too; 3: parameters gathered again for the backward; "auto": 2 or 3 for each
            parameter, as the budget asks.
        precision: a ``fxzero.Precision``: dtypes to compute, reduce and keep parameters in.
        recompute: "auto", "none", "full", or a function from a graph node to "save",
            "recompute" or None.
        objective: what recompute costs: "time" or "flops".
        offload: whether saved values may wait for the backward in host memory, and states of
            ``fxzero.optim`` for the optimizer's step; ``model.update_with`` names the optimizer.
        microbatches: into how many parts ``model.step`` cuts a batch, or "auto": so many that the
            step fits the budget and takes the least time.
        update: where the optimizer updates weights: in its "step", or in the "backward", each as
            soon as its gradient is there, so that gradients never exist all at once; then the
            optimizer is of ``fxzero.optim``, and ``model.update_with`` names it.
        inner: "inductor" or "eager"; None: what a given plan was made for, else inductor where a
            compiler is present.  Where no code that Inductor generates fits the budget, operators
            run as eager's do, unless ``strict``.
        plan: a Plan or a path to one, replayed without a solver for the graph it was made for.
        strict: what cannot be applied (a pass that is switched off, a value that was to be
            recomputed but may not) is an error, not a note in the plan.

    Raises:
        UsageError: an option that cannot be right.
        BudgetError: nothing fits the budget; names the smallest budget that does.
        CaptureError, DeviceError: the model cannot be traced with these inputs.
    """
    if unknown:
        raise unknown_option(next(iter(unknown)), _OPTIONS, where="fxzero.compile")
    if not isinstance(model, nn.Module):
        raise UsageError(f"fxzero.compile needs an nn.Module, not {type(model).__name__}")
    if _torch.is_optimized_module(model):
        raise UsageError(
            "the model is what torch.compile returned, which would run in place of a plan\n"
            "  give fxzero.compile the model itself; submodules may be compiled"
        )
    asked = check_pipeline(pipeline)
    example = None if example_inputs is None else call_arguments(example_inputs)
    if asked == AUTO and example is None:
        raise UsageError('pipeline="auto" is chosen before the first step: give example_inputs')
    if isinstance(plan, (str, Path)):
        plan = Plan.load(plan)
    device = model_device(model)
    ranks = resolve_mesh(mesh, device, ranks_along(asked))
    options = check_options(
        device=device,
        memory_budget=memory_budget,
        optimizer=optimizer,
        recompute=recompute,
        objective=objective,
        inner=plan.request.inner if inner is None and plan is not None else inner,
        strict=strict,
        offload=offload,
        precision=precision,
        zero=zero,
        mesh=ranks,
        microbatches=microbatches,
        update=update,
        pipeline=asked,
    )
    if plan is not None and asked is not None:
        raise UsageError("a pipeline cannot follow a given plan: each of its stages has its own")
    options.precision.keep(model)
    agree_on_values(model, ranks)
    view, loss = eager_view(model), functools.partial(loss_of, loss_fn=loss_fn)
    joins = asked == AUTO and "pp" not in ranks.sizes
    if asked == AUTO and example is not None:
        asked, ranks = _choose_pipeline(view, example, loss, options, ranks)
        options = options.on(ranks)
    state = _State(options, plan, loss_fn)
    batch = None
    if isinstance(asked, Pipeline):
        state.pipeline = PipelinedModel(asked, options, ranks, loss, joins=joins)
        if example is not None:  # before what is left is sharded
            batch = Batch.of(*example).times(ranks.sizes["pp"] if joins else 1)
            state.pipeline.prepare(model, view, batch)
    state.ranks = connect(model, ranks.data, options.sharding)
    state.ties = ties_of(model)
    original = type(model)._fxzero_original if isinstance(model, CompiledModule) else type(model)
    vars(model)["_fxzero"] = state
    model.__class__ = _compiled_class(original)
    if state.pipeline is not None and batch is not None:
        state.pipeline.settle(model, eager_view(model), batch, state.ranks)
    elif example is not None:
        args, kwargs = example
        if options.microbatches != 1:
            batch = Batch.of(args, kwargs)
            args, kwargs = next(batch.cut(state.microbatches_for(model, batch)))
        state.step_for(model, args, kwargs)
    return model


def _choose_pipeline(
    model: nn.Module,
    example: Call,
    loss: Callable[[Any], torch.Tensor],
    options: Options,
    mesh: Mesh,
) -> tuple[Pipeline | None, Mesh]:
    """What ``pipeline="auto"`` comes to, and the mesh for it."""
    name = type(model).__name__
    forecaster = Forecaster(model, loss, options, name)
    plain = functools.partial(without_pipeline, model, *example, options, name)
    return agree_on_pipeline(forecaster, Batch.of(*example), mesh, plain)


class CompiledModule(nn.Module):
    """What a compiled model can do besides being itself.

    Attributes:
        recompile_limit: how many graphs (input shapes, modes) may be made.
    """

    _fxzero_original: type[nn.Module]
    _fxzero: _State

    @property
    def plan(self) -> Plan:
        """The Plan in force: that of the latest call, or of the example inputs."""
        return self._fxzero.latest_plan()

    @property
    def recompile_limit(self) -> int:
        return self._fxzero.recompile_limit

    @recompile_limit.setter
    def recompile_limit(self, limit: int) -> None:
        self._fxzero.recompile_limit = limit

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._fxzero.pipeline is not None and (torch.is_grad_enabled() or ids_elsewhere(self)):
            raise UsageError(
                "a pipeline runs forward and backward together\n  call model.step(*inputs)"
            )
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return self._fxzero.run_eagerly(self, args, kwargs)
        return _run_planned(self, args, kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of one batch, in micro-batches; returns the detached loss.

        The model must return a scalar loss, an output with a ``loss``, or ``loss_fn`` must have
        been given to ``compile``.  In stages 0 and 1 gradients are averaged over the ranks with the
        last micro-batch, in 2 and 3, which keep no whole gradients, with each.

        Raises:
            UsageError: no scalar loss, or a batch that has no such micro-batches.
        """
        state = self._fxzero
        if state.pipeline is not None:
            batch = Batch.of(args, kwargs)
            return state.pipeline.step(self, eager_view(self), batch, state.ranks)
        if state.options.microbatches == 1:
            return _train(self, args, kwargs, state.loss_fn, 1)
        batch = Batch.of(args, kwargs)
        count = state.microbatches_for(self, batch)
        late = state.ranks is not None and state.options.sharding.zero in (0, 1)
        if count > 1:  # a budget that the second micro-batch exceeds is refused before the first
            first, keywords = next(batch.cut(count))
            reduces = state.ranks is None or (state.ranks.syncing and not late)
            state.step_for(self, first, keywords, reduces=reduces, accumulates=True)
        losses = []
        for index, (part, keywords) in enumerate(batch.cut(count)):
            with self.no_sync() if late and index < count - 1 else contextlib.nullcontext():
                losses.append(_train(self, part, keywords, state.loss_fn, count))
        return torch.stack(losses).sum()

    def update_with(self, optimizer: torch.optim.Optimizer) -> None:
        """Names the optimizer, for what it does besides ``step``, which is called as always.

        Where ``update="backward"`` asks for that, backwards hand gradients to it, and ``step`` ends
        the step.  With ``offload=True`` it keeps states in host memory that the Plan has there.

        Raises:
            UsageError: it can do neither, or has not all of the model's trained parameters.
        """
        state = self._fxzero
        followed = state.plan is not None and bool(state.plan.decisions.host_states)
        if not (state.options.updates or state.options.offload_states or followed):
            raise UsageError(
                "the model was compiled to return gradients, and to keep states on the device\n"
                '  give fxzero.compile update="backward" or offload=True'
            )
        state.updates.name(check_updater(optimizer, self))

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients are added up without reduction; the next step outside reduces all.

        On one device there is nothing to reduce.
        """
        ranks = self._fxzero.ranks
        if self._fxzero.options.updates:
            raise UsageError(
                'no_sync adds gradients up, and update="backward" keeps none\n'
                '  compile with update="step" to accumulate'
            )
        if ranks is None:
            yield
            return
        before, ranks.syncing = ranks.syncing, False
        try:
            yield
        finally:
            ranks.syncing = before

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, parameters are whole on every rank, for evaluation; all ranks enter together.

        Without it, each call under ``torch.no_grad`` gathers them anew.
        """
        with self._fxzero.whole(self):
            yield

    def verify(self, *args: Any, **kwargs: Any) -> Any:
        """Compares the compiled step with eager on these inputs, see ``fxzero.verification``."""
        from fxzero.verification import verify

        return verify(self, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        clone = copy.deepcopy(eager_view(self), memo)
        vars(clone)["_fxzero"] = self._fxzero.fresh()
        clone.__class__ = type(self)
        memo[id(self)] = clone
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self._fxzero
        if state.ranks is not None or state.pipeline is not None:
            raise UsageError(
                "a model on many ranks, or in stages, cannot be pickled\n"
                "  save it with fxzero.checkpoint.save"
            )
        return _rebuild, (eager_view(self), state.options, state.plan, state.recompile_limit)


def _rebuild(model: nn.Module, options: Options, plan: Plan | None, limit: int) -> nn.Module:
    state = vars(model)["_fxzero"] = _State(options, plan, None)
    state.recompile_limit = limit
    state.ties = ties_of(model)
    model.__class__ = _compiled_class(type(model))
    return model


def eager_view(model: nn.Module) -> nn.Module:
    """The model as it was before ``compile``: another object over the same parameters."""
    if not isinstance(model, CompiledModule):
        return model
    view = object.__new__(model._fxzero_original)
    vars(view).update({k: v for k, v in vars(model).items() if k != "_fxzero"})
    return view


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="a model of fxzero.compile runs its own graphs: leave fullgraph=True out"
)
def _run_planned(model: CompiledModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the model returns, by planned graphs; a ``torch.compile`` around it breaks here."""
    state = model._fxzero
    leaves, structure = flatten((args, kwargs))
    signature = Signature.of(model)
    if not (signature.trained or any(t.requires_grad for t in leaves)):
        return state.run_eagerly(model, args, kwargs)
    return state.run(model, args, kwargs, leaves, structure, signature)


def _compiled_class(original: type[nn.Module]) -> type[CompiledModule]:
    @functools.wraps(original.forward)  # libraries read its signature
    def forward(self: CompiledModule, *args: Any, **kwargs: Any) -> Any:
        return CompiledModule.forward(self, *args, **kwargs)

    namespace = {
        "forward": forward,
        "_fxzero_original": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (CompiledModule, original), namespace)


def _train(
    model: CompiledModule, args: tuple[Any, ...], kwargs: dict[str, Any], loss_fn: Any, count: int
) -> torch.Tensor:
    """Adds one of ``count`` micro-batches' share to the gradients; returns that of the loss."""
    loss = loss_of(model(*args, **kwargs), loss_fn)
    if count > 1:
        loss = loss / count
    loss.backward()
    return loss.detach()


class _State:
    """A compiled model's graphs, by what they depend on."""

    def __init__(
        self, options: Options, plan: Plan | None, loss_fn: Any, ranks: Ranks | None = None
    ) -> None:
        self.options = options
        self.ranks = ranks
        self.plan = plan
        self.loss_fn = loss_fn
        self.ties: Ties = frozenset()
        self.recompile_limit = _DEFAULT_RECOMPILE_LIMIT
        # By what is traced and whether it reduces, and by whether gradients exist.
        self.steps: OrderedDict[tuple[tuple[Hashable, bool], bool], TrainingStep] = OrderedDict()
        self.latest: TrainingStep | None = None
        self.pipeline: PipelinedModel | None = None
        self.updates = Updates()
        self.counts: dict[Hashable, int] = {}  # of micro-batches, by what is cut

    def fresh(self) -> _State:
        """The same settings without any graph.

        Raises:
            UsageError: the model is a pipeline, of which this process has a part.
        """
        if self.pipeline is not None:
            raise UsageError("a model with pipeline stages cannot be copied: copy it, then compile")
        state = _State(self.options, self.plan, self.loss_fn, self.ranks)
        state.recompile_limit = self.recompile_limit
        state.ties = self.ties
        return state

    def latest_plan(self) -> Plan:
        if self.pipeline is not None and self.pipeline.plan is not None:
            return self.pipeline.plan
        if self.latest is not None:
            return self.latest.plan
        if self.plan is not None:
            return self.plan
        raise UsageError(
            "there is no plan yet: it is made at the first call\n"
            "  pass example_inputs to fxzero.compile to plan at once"
        )

    def run(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: Sequence[torch.Tensor],
        structure: Structure,
        signature: Signature,
    ) -> Any:
        """The model's return value from planned graphs, attached to autograd."""
        trained = signature.trained
        exist = any(p.grad is not None for p in trained)
        accumulates = exist and not self.options.updates
        reduces = True
        if self.ranks is not None:
            reduces = self.ranks.syncing and not self.ranks.any_pending(trained)
        step = self.step_for(
            model,
            args,
            kwargs,
            leaves,
            structure,
            signature,
            reduces=reduces,
            accumulates=accumulates,
        )
        if self.ranks is None:
            return step.run(leaves)
        return step.run(leaves, self.ranks.step(reduces=reduces))

    def microbatches_for(self, model: nn.Module, batch: Batch) -> int:
        """Into how many micro-batches a batch is cut."""
        if isinstance(self.options.microbatches, int):
            return self.options.microbatches
        key = Signature.of(model).key(batch.leaves, batch.structure)
        known = key in self.counts

        def choose() -> str:
            return str(choose_count(batch, functools.partial(self._plan_of, model)))

        if self.ranks is not None:
            described = f"a batch of {describe_all(batch.leaves)}"
            when = f"step {self.ranks.steps + 1}"
            (knows,) = self.ranks.agreement.on_step(described, [known], when)
            if not all(knows):
                self.counts[key] = int(self.ranks.agreement.of_first(choose))
        elif not known:
            self.counts[key] = int(choose())
        return self.counts[key]

    def _plan_of(self, model: nn.Module, call: Call, accumulates: bool) -> Plan:
        """The plan of a step that is not run."""
        args, kwargs = call
        if self.plan is not None:
            raise UsageError(
                'microbatches="auto" makes plans, but one was given\n'
                "  give the number of micro-batches that it was made for"
            )
        options, view = self.options, eager_view(model)
        captured = capture(view, args, kwargs, inner=options.inner, precision=options.precision)
        name = type(view).__name__
        return Planner(captured.graph, options, name, accumulates=accumulates).decide().plan

    def run_eagerly(
        self, model: CompiledModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the model's own forward returns."""
        with self.whole(model):
            if self.options.precision.param is None:
                return model._fxzero_original.forward(model, *args, **kwargs)
            return self.eager(model)(*args, **kwargs)

    def eager(self, model: CompiledModule) -> Callable[..., Any]:
        """What computes as the model did before it was compiled, in the dtypes asked for."""
        view, precision = eager_view(model), self.options.precision
        if precision.param is None:
            return view
        return lambda *args, **kwargs: precision.run(view, args, kwargs)

    def whole(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Inside, the model's parameters are whole."""
        if self.ranks is None or not any(map(is_spread, model.parameters())):
            return contextlib.nullcontext()
        return self.ranks.shards.gathered(model)

    def has_trained(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether there is a graph for such inputs."""
        key = Signature.of(model).key(*flatten((args, kwargs)))
        return any(traced[0] == key for traced, _ in self.steps)

    def step_for(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: Sequence[torch.Tensor] | None = None,
        structure: Structure | None = None,
        signature: Signature | None = None,
        *,
        reduces: bool = True,
        accumulates: bool = False,
    ) -> TrainingStep:
        if leaves is None or structure is None:
            leaves, structure = flatten((args, kwargs))
        signature = signature or Signature.of(model)
        traced = (signature.key(leaves, structure), reduces)
        known = [self.steps.get((traced, key)) for key in (False, True)]
        if self.ranks is not None:
            described = _describe_step(model, signature, leaves, reduces)
            facts = [accumulates, *(step is not None for step in known)]
            when = f"step {self.ranks.steps + 1}"
            wanted, *knows = self.ranks.agreement.on_step(described, facts, when)
            accumulates = any(wanted)
            known = [s if all(each) else None for s, each in zip(known, knows, strict=True)]
        step, sibling = known[accumulates], known[not accumulates]
        if step is None:
            if sibling is None:
                check_devices(model, leaves, structure)
                self._announce(leaves)
            step = self.steps[traced, accumulates] = TrainingStep(
                model,
                eager_view(model),
                args,
                kwargs,
                self.options,
                self.plan,
                self.ranks,
                reduces=reduces,
                accumulates=accumulates,
                sibling=sibling,
                updates=self.updates,
            )
        self.latest = step
        return step

    def _announce(self, leaves: Sequence[torch.Tensor]) -> None:
        shapes_of = {traced: step.shapes for (traced, _), step in self.steps.items()}
        if len(shapes_of) >= self.recompile_limit:
            shapes = "; ".join(shapes_of.values())
            raise RecompileLimitError(
                f"graph number {len(shapes_of) + 1} for inputs {describe_all(leaves)}, but "
                f"recompile_limit is {self.recompile_limit}\n  compiled so far for: {shapes}\n"
                "  pad inputs to a few fixed shapes, or raise model.recompile_limit"
            )
        if shapes_of:
            log.warning(
                "compiling graph %d of at most %d: new input shapes or modes %s",
                len(shapes_of) + 1,
                self.recompile_limit,
                describe_all(leaves),
            )


def _describe_step(
    model: nn.Module, signature: Signature, leaves: Sequence[torch.Tensor], reduces: bool
) -> str:
    """What all ranks have to have in common, in words."""
    mode = "training" if model.training else "evaluation"
    accumulating = "" if reduces else ", accumulating"
    frozen = f"{signature.frozen} frozen parameters"
    return f"inputs {describe_all(leaves)}, {mode}, {frozen}{accumulating}"
