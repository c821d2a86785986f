"""``fxzero.compile``: the model stays the object it was and trains under a memory budget.

The model's class is replaced by a subclass whose ``forward`` runs planned graphs; parameters,
buffers, submodules and state-dict keys are untouched.  A graph is made for each combination of
input shapes, train or eval modes and frozen parameters, when it first occurs.  Without gradients
(``torch.no_grad``) the model's own forward runs.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxzero import _torch
from fxzero.capture import check_devices
from fxzero.errors import RecompileLimitError, UsageError, unknown_option
from fxzero.graph import describe_all
from fxzero.options import Options, call_arguments, check_options, model_device
from fxzero.plans import Plan
from fxzero.structure import Structure, flatten
from fxzero.training_step import TrainingStep

log = logging.getLogger(__name__)

_DEFAULT_RECOMPILE_LIMIT = 16
_ONE_DEVICE_ONLY: dict[str, tuple[Any, ...]] = {
    "mesh": (None,),
    "zero": ("auto", 0),
    "pipeline": (None, 1),
    "precision": (None,),
}
_OPTIONS = ("memory_budget", "optimizer", "recompute", "objective", "inner", "strict", "offload")


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
        optimizer: what will hold states: a name, a ``torch.optim`` class, or bytes per parameter.
        recompute: "auto", "none", "full", or a function from a graph node to "save",
            "recompute" or None.
        objective: what recompute costs: "time" or "flops".
        offload: whether saved values may wait for the backward in host memory.
        inner: "inductor" or "eager"; None: inductor where a compiler is present.
        plan: a Plan or a path to one, replayed without a solver for the graph it was made for.
        strict: what cannot be applied (a pass that is switched off, a value that was to be
            recomputed but may not) is an error, not a note in the plan.

    Raises:
        UsageError: an option that cannot be right.
        BudgetError: nothing fits the budget; names the smallest budget that does.
        CaptureError, DeviceError: the model cannot be traced with these inputs.
    """
    given = {
        "mesh": mesh,
        "zero": zero,
        "pipeline": pipeline,
        "precision": precision,
    }
    if unknown:
        known = (*_OPTIONS, *given, "example_inputs", "loss_fn", "plan")
        raise unknown_option(next(iter(unknown)), known, where="fxzero.compile")
    if not isinstance(model, nn.Module):
        raise UsageError(f"fxzero.compile needs an nn.Module, not {type(model).__name__}")
    _refuse_distributed(given)
    options = check_options(
        device=model_device(model),
        memory_budget=memory_budget,
        optimizer=optimizer,
        recompute=recompute,
        objective=objective,
        inner=inner,
        strict=strict,
        offload=offload,
    )
    if isinstance(plan, (str, Path)):
        plan = Plan.load(plan)
    state = _State(options, plan, loss_fn)
    original = type(model)._fxzero_original if isinstance(model, CompiledModule) else type(model)
    vars(model)["_fxzero"] = state
    model.__class__ = _compiled_class(original)
    if example_inputs is not None:
        args, kwargs = call_arguments(example_inputs)
        state.step_for(model, args, kwargs)
    return model


def _refuse_distributed(given: dict[str, Any]) -> None:
    for name, value in given.items():
        allowed = _ONE_DEVICE_ONLY[name]
        if not any(value is item or value == item for item in allowed):
            raise UsageError(
                f"{name}={value!r} is not available: this version compiles for one device\n"
                f"  leave {name} out, or give {' or '.join(map(repr, allowed))}"
            )


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
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._fxzero_original.forward(self, *args, **kwargs)
        leaves, structure = flatten((args, kwargs))
        if not any(t.requires_grad for t in (*self.parameters(), *leaves)):
            return self._fxzero_original.forward(self, *args, **kwargs)
        step = self._fxzero.step_for(self, args, kwargs, leaves, structure)
        return step.run(leaves)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of one batch; returns the detached loss.

        The model must return a scalar loss, an output with a ``loss``, or ``loss_fn`` must have
        been given to ``compile``.
        """
        output = self(*args, **kwargs)
        loss = _loss_of(output, self._fxzero.loss_fn)
        loss.backward()
        return loss.detach()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradient accumulation without reduction; on one device there is nothing to reduce."""
        yield

    def verify(self, *args: Any, **kwargs: Any) -> Any:
        """Compares the compiled step with eager on these inputs; returns a ``Verification``."""
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
        return _rebuild, (eager_view(self), state.options, state.plan, state.recompile_limit)


def _rebuild(model: nn.Module, options: Options, plan: Plan | None, limit: int) -> nn.Module:
    state = vars(model)["_fxzero"] = _State(options, plan, None)
    state.recompile_limit = limit
    model.__class__ = _compiled_class(type(model))
    return model


def eager_view(model: nn.Module) -> nn.Module:
    """The model as it was before ``compile``: another object over the same parameters."""
    if not isinstance(model, CompiledModule):
        return model
    view = object.__new__(model._fxzero_original)
    vars(view).update({k: v for k, v in vars(model).items() if k != "_fxzero"})
    return view


def _compiled_class(original: type[nn.Module]) -> type[CompiledModule]:
    namespace = {
        "_fxzero_original": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (CompiledModule, original), namespace)


def _loss_of(output: Any, loss_fn: Any) -> torch.Tensor:
    loss = loss_fn(output) if loss_fn is not None else output
    if not isinstance(loss, torch.Tensor):
        loss = loss["loss"] if isinstance(loss, dict) else getattr(loss, "loss", loss)
    if isinstance(loss, (tuple, list)) and loss:
        loss = loss[0]
    if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
        raise UsageError(
            f"step() needs a scalar loss, but the model returned {type(output).__name__}\n"
            "  give fxzero.compile a loss_fn from the model's output to a scalar"
        )
    return loss


class _State:
    """A compiled model's graphs, by what they depend on."""

    def __init__(self, options: Options, plan: Plan | None, loss_fn: Any) -> None:
        self.options = options
        self.plan = plan
        self.loss_fn = loss_fn
        self.recompile_limit = _DEFAULT_RECOMPILE_LIMIT
        self.steps: OrderedDict[Hashable, TrainingStep] = OrderedDict()
        self.latest: TrainingStep | None = None

    def fresh(self) -> _State:
        """The same settings without any graph."""
        state = _State(self.options, self.plan, self.loss_fn)
        state.recompile_limit = self.recompile_limit
        return state

    def latest_plan(self) -> Plan:
        if self.latest is not None:
            return self.latest.plan
        if self.plan is not None:
            return self.plan
        raise UsageError(
            "there is no plan yet: it is made at the first call\n"
            "  pass example_inputs to fxzero.compile to plan at once"
        )

    def step_for(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: Sequence[torch.Tensor] | None = None,
        structure: Structure | None = None,
    ) -> TrainingStep:
        if leaves is None or structure is None:
            leaves, structure = flatten((args, kwargs))
        key = _key(model, leaves, structure)
        step = self.steps.get(key)
        if step is None:
            check_devices(model, leaves, structure)
            self._announce(leaves)
            step = self.steps[key] = TrainingStep(
                model, eager_view(model), args, kwargs, self.options, self.plan
            )
        self.latest = step
        return step

    def _announce(self, leaves: Sequence[torch.Tensor]) -> None:
        if len(self.steps) >= self.recompile_limit:
            shapes = "; ".join(step.shapes for step in self.steps.values())
            raise RecompileLimitError(
                f"graph number {len(self.steps) + 1} for inputs {describe_all(leaves)}, but "
                f"recompile_limit is {self.recompile_limit}\n  compiled so far for: {shapes}\n"
                "  pad inputs to a few fixed shapes, or raise model.recompile_limit"
            )
        if self.steps:
            log.warning(
                "compiling graph %d of at most %d: new input shapes or modes %s",
                len(self.steps) + 1,
                self.recompile_limit,
                describe_all(leaves),
            )


def _key(model: nn.Module, leaves: Sequence[torch.Tensor], structure: Structure) -> Hashable:
    """All that a captured graph depends on."""
    return (
        structure.key,
        tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in leaves),
        tuple(module.training for module in model.modules()),
        tuple((p.shape, p.dtype, p.device, p.requires_grad) for p in model.parameters()),
        _torch.autocast_state(),
    )
