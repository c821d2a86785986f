"""``model.verify``: the compiled step against eager on the user's own batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxzero import _torch
from fxzero.measurement import Measurement, measure
from fxzero.plans import Plan
from fxzero.randomness import RandomState
from fxzero.structure import flatten
from fxzero.units import format_bytes


@dataclass(frozen=True)
class Verification:
    """What a compiled step and an eager one on the same batch and seed came to.

    Attributes:
        loss_difference: largest absolute difference over all scalar outputs.
        worst_gradient: name of the parameter whose gradient differs most, "" if all are equal.
        gradient_difference: that difference, relative to the gradient's largest entry.
        exact: outputs, gradients, buffers and random stream are bitwise equal.
        ok: exact, or within float tolerance where exactness is not promised.
        measured_bytes, planned_bytes: peak of forward and backward; both without the optimizer's
            state, which need not exist yet.
        eager_bytes: the peak of the eager step.
    """

    exact: bool
    ok: bool
    loss_difference: float
    gradient_difference: float
    worst_gradient: str
    random_stream_equal: bool
    buffers_equal: bool
    measured_bytes: int
    planned_bytes: int
    eager_bytes: int

    def __str__(self) -> str:
        verdict = "EXACT" if self.exact else "EQUAL WITHIN TOLERANCE" if self.ok else "DIFFERS"
        worst = f" at {self.worst_gradient}" if self.worst_gradient else ""
        return "\n".join(
            [
                f"{verdict}: compiled against eager, same batch and seed",
                f"  loss           differs by {self.loss_difference:.3g}",
                f"  gradients      differ by {self.gradient_difference:.3g} at most{worst}",
                f"  random stream  {'equal' if self.random_stream_equal else 'DIFFERS'}",
                f"  buffers        {'equal' if self.buffers_equal else 'DIFFER'}",
                f"  peak           measured {format_bytes(self.measured_bytes)}, planned "
                f"{format_bytes(self.planned_bytes)}, eager {format_bytes(self.eager_bytes)}",
            ]
        )


def verify(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Verification:
    """Runs one step compiled and one eager on copies of nothing but gradients and buffers.

    The model's parameters, buffers, gradients and the random stream are left as they were found.
    On many ranks all of them must call it, each with its batch: gradients are compared as they are
    after they were averaged, and each rank compares its own part.
    """
    compilation = vars(model)["_fxzero"]
    kept = _Kept(model)
    state = RandomState.now()
    parameters = dict(model.named_parameters())
    with compilation.updates.kept():
        compiled = _run(model, model, args, kwargs, state)
    kept.put_back(model)
    plan: Plan = model.plan
    kept_bytes = _gradient_bytes(compiled) if compilation.options.updates else 0
    with compilation.whole(model):
        eager = _run(compilation.eager(model), model, args, kwargs, state)
    kept.put_back(model)
    state.restore()
    if compilation.ranks is not None:
        compiled = _on_this_rank(compiled, lambda name, gradient: gradient)
        reduce = compilation.ranks.shards.reduce
        eager = _on_this_rank(eager, lambda name, gradient: reduce(gradient, parameters[name]))
    loss, (gradient, name) = _outputs_differ(compiled, eager), _gradients_differ(compiled, eager)
    buffers = all(torch.equal(a, b) for a, b in zip(compiled.buffers, eager.buffers, strict=True))
    stream = torch.equal(compiled.stream, eager.stream)
    exact = loss == 0 and gradient == 0 and buffers and stream
    tolerance = 2e-2 if any(p.element_size() < 4 for p in model.parameters()) else 1e-4
    return Verification(
        exact=exact,
        ok=exact or (loss <= tolerance and gradient <= tolerance and stream),
        loss_difference=loss,
        gradient_difference=gradient,
        worst_gradient=name,
        random_stream_equal=stream,
        buffers_equal=buffers,
        measured_bytes=compiled.measured.peak_bytes,
        planned_bytes=_step_peak(plan) + kept_bytes,
        eager_bytes=eager.measured.peak_bytes,
    )


def _gradient_bytes(run: _Run) -> int:
    """Of gradients that are kept for once; a plan with updates in the backward has no room."""
    found = (g for g in run.gradients.values() if g is not None)
    return sum(_torch.local_tensor(gradient).nbytes for gradient in found)


def _step_peak(plan: Plan) -> int:
    """Planned peak of forward and backward, less the optimizer's state."""
    state = plan.ranks[0].breakdown.get("optimizer", 0)
    return max(phase.peak_bytes for phase in plan.phases if phase.name != "optimizer step") - state


@dataclass(frozen=True)
class _Run:
    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    buffers: list[torch.Tensor]
    stream: torch.Tensor
    measured: Measurement


class _Kept:
    """A model's gradients and buffers, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        self.gradients = {name: p.grad for name, p in model.named_parameters()}
        self.buffers = copy.deepcopy(dict(model.named_buffers()))

    def put_back(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.grad = self.gradients[name]
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(self.buffers[name])


def _run(
    runner: Callable[..., Any],
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: RandomState,
) -> _Run:
    for parameter in model.parameters():
        parameter.grad = None
    state.restore()
    measured = measure(_step(runner, args, kwargs))
    return _Run(
        outputs=measured.output,
        gradients={name: p.grad for name, p in model.named_parameters()},
        buffers=[b.clone() for b in model.buffers()],
        stream=torch.rand(8),
        measured=measured,
    )


def _on_this_rank(run: _Run, change: Callable[[str, torch.Tensor], torch.Tensor]) -> _Run:
    """The run with changed gradients, of each this rank's part."""
    gradients = {
        name: None if g is None else _torch.local_tensor(change(name, g))
        for name, g in run.gradients.items()
    }
    return replace(run, gradients=gradients)


def _step(
    runner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], list[torch.Tensor]]:
    def step() -> list[torch.Tensor]:
        outputs, _ = flatten(runner(*args, **kwargs))
        wanted = [t for t in outputs if t.requires_grad and t.ndim == 0] or [
            t.sum() for t in outputs if t.requires_grad
        ]
        torch.autograd.backward(wanted)
        return [t.detach() for t in wanted]

    return step


def _outputs_differ(compiled: _Run, eager: _Run) -> float:
    pairs = zip(compiled.outputs, eager.outputs, strict=True)
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0)


def _gradients_differ(compiled: _Run, eager: _Run) -> tuple[float, str]:
    """Largest difference relative to its gradient, or to the rest where a gradient is noise."""
    worst, where = 0.0, ""
    largest = max(
        (float(g.abs().max()) for g in eager.gradients.values() if g is not None), default=0.0
    )
    for name, expected in eager.gradients.items():
        found = compiled.gradients[name]
        if (found is None) != (expected is None):
            return float("inf"), name
        if found is not None and expected is not None and not torch.equal(found, expected):
            scale = max(float(expected.abs().max()), 1e-3 * largest) or 1.0
            difference = float((found - expected).abs().max()) / scale
            if not difference <= worst:
                worst, where = difference, name
    return worst, where
