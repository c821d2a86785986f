"""One compiled step and one eager step on the same batch and random state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxzero import _torch
from fxzero.errors import UsageError
from fxzero.measurement import Measurement, measure
from fxzero.microbatches import Batch, Call
from fxzero.randomness import RandomState
from fxzero.structure import flatten
from fxzero.training_step import TrainingStep
from fxzero.verification.playing import Outcome, average
from fxzero.verification.values import largest_difference, same

if TYPE_CHECKING:
    from fxzero.compiler import CompiledModule, _State

# Relative to a gradient's largest entry; where numbers have 16 bits, and where they have more.
_TOLERANCES = (2e-2, 1e-4)
# A gradient smaller than this share of the largest one is noise, and measured against that share.
_NOISE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """What a compiled step and an eager one on the same batch and seed came to, on this rank.

    Attributes:
        exact: outputs, gradients, buffers and random stream are bitwise equal.
        ok: exact, or within ``tolerance`` with an equal random stream; and everything is finite.
        tolerance: what differences are allowed: of outputs absolute, of gradients relative.
        loss_difference: largest absolute difference over the outputs that gradients come from.
        output_difference: the same over all outputs.
        gradient_difference: the largest of ``gradients``.
        worst_gradient: the name behind it, "" if all are equal.
        gradients: by name, differences of all gradients that differ, relative to the gradient's
            largest entry; the worst first.  Infinite where only one of the two is there.
        gradient_count: how many gradients were compared.
        buffers: names of those that differ.
        random_stream_equal: both steps leave the random generators in one state.
        non_finite: names of outputs and gradients of the compiled step that are not finite.
        measured_bytes, planned_bytes: peak of forward and backward; both without the optimizer's
            state, which need not exist yet.
        eager_bytes: the peak of the eager step.
    """

    exact: bool
    ok: bool
    tolerance: float
    loss_difference: float
    output_difference: float
    gradient_difference: float
    worst_gradient: str
    gradients: tuple[tuple[str, float], ...]
    gradient_count: int
    buffers: tuple[str, ...]
    random_stream_equal: bool
    non_finite: tuple[str, ...]
    measured_bytes: int
    planned_bytes: int
    eager_bytes: int

    @property
    def buffers_equal(self) -> bool:
        """Whether both steps leave the same buffers."""
        return not self.buffers


@dataclass(frozen=True)
class Run:
    """What one step came to.

    Attributes:
        wanted: positions of the outputs that gradients came from.
        spread: gradients as they lay in ``.grad``, by name.
    """

    outcome: Outcome
    wanted: tuple[int, ...]
    spread: Mapping[str, torch.Tensor]
    measured: Measurement


@dataclass(frozen=True)
class Pair:
    """A compiled step and the eager one beside it.

    Attributes:
        step: the graphs that ran.
        start: the random state from which both began.
        leaves: the call's tensors.
    """

    step: TrainingStep
    compiled: Run
    eager: Run
    start: RandomState
    leaves: Sequence[torch.Tensor]


def compare(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Comparison:
    """Runs one step compiled and one eager, and compares them.

    The model's parameters, buffers, gradients, the optimizer's states and the random stream are
    left as they were found.  If ``compile`` was asked for micro-batches, the first one is taken.
    On many ranks all of them must call it, each with its batch: gradients are compared as they are
    after they were averaged, and each rank compares its own part.

    Raises:
        UsageError: the model trains as a pipeline.
    """
    with steps(model, args, kwargs) as runner:
        pair = runner.pair()
    return compared(model, pair)


def compared(model: Any, pair: Pair) -> Comparison:
    """How the two steps of a pair differ."""
    return comparison_of(pair.compiled, pair.eager, tolerance_of(model), _planned(model, pair))


def comparison_of(found: Run, expected: Run, tolerance: float, planned: int) -> Comparison:
    """How a compiled run differs from an eager one, for which so many bytes were planned."""
    outputs = {
        index: largest_difference(tensor, expected.outcome.outputs.get(index))
        for index, tensor in found.outcome.outputs.items()
    }
    loss = max((outputs[index] for index in found.wanted), default=0.0)
    gradients = gradient_differences(found.outcome.gradients, expected.outcome.gradients)
    differing = list(found.outcome.differing(expected.outcome))
    stream = ("random stream", "") not in differing
    broken = _non_finite(found.outcome)
    worst, difference = gradients[0] if gradients else ("", 0.0)
    largest = max(outputs.values(), default=0.0)
    exact = not differing
    return Comparison(
        exact=exact,
        ok=not broken and (exact or (max(largest, difference) <= tolerance and stream)),
        tolerance=tolerance,
        loss_difference=loss,
        output_difference=largest,
        gradient_difference=difference,
        worst_gradient=worst,
        gradients=gradients,
        gradient_count=len(found.outcome.gradients),
        buffers=tuple(name for kind, name in differing if kind == "buffer"),
        random_stream_equal=stream,
        non_finite=broken,
        measured_bytes=found.measured.peak_bytes,
        planned_bytes=planned,
        eager_bytes=expected.measured.peak_bytes,
    )


def tolerance_of(model: Any) -> float:
    """What differences are allowed where steps are not bitwise equal."""
    param = vars(model)["_fxzero"].options.precision.param
    dtypes = [p.dtype for p in model.parameters()] + [param] * (param is not None)
    return _TOLERANCES[all(dtype.itemsize >= 4 for dtype in dtypes)]


def gradient_differences(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> tuple[tuple[str, float], ...]:
    """By name, gradients that differ, the worst first.

    Differences are relative to the gradient's largest entry, or to the rest where it is noise.
    """
    largest = max((_largest(g) for g in expected.values()), default=0.0)
    differences = {}
    for name in dict.fromkeys((*expected, *found)):
        one, other = found.get(name), expected.get(name)
        if not same(one, other):
            scale = 0.0 if other is None else _largest(other)
            scale = max(scale, _NOISE * largest) or 1.0
            differences[name] = largest_difference(one, other) / scale
    return tuple(sorted(differences.items(), key=lambda item: -item[1]))


def _largest(tensor: torch.Tensor) -> float:
    """Of the finite entries."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _non_finite(outcome: Outcome) -> tuple[str, ...]:
    named = {f"output {index}": tensor for index, tensor in outcome.outputs.items()}
    named |= {f"gradient of {name}": tensor for name, tensor in outcome.gradients.items()}
    return tuple(name for name, tensor in named.items() if not bool(tensor.isfinite().all()))


def _planned(model: Any, pair: Pair) -> int:
    """Planned peak of forward and backward with outputs held, less the optimizer's state.

    With it come gradients that an optimizer would have taken, and that a comparison keeps.
    """
    peak = pair.step.peak_with_outputs_held
    if vars(model)["_fxzero"].options.updates:
        peak += sum(gradient.nbytes for gradient in pair.compiled.outcome.gradients.values())
    return peak


class Steps:
    """Runs a model's steps, compiled and eager, from one state."""

    def __init__(self, model: CompiledModule, call: Call) -> None:
        self.model = model
        self.compilation: _State = vars(model)["_fxzero"]
        self.start = RandomState.now()
        self.found_gradients = any(p.grad is not None for p in model.parameters())
        self.leaves, self.structure = flatten(call)
        self.step = self.compilation.step_for(model, *call)

    def pair(self) -> Pair:
        """One step of each kind, without gradients from before."""
        compiled = self.compiled(self.step)
        with self.compilation.whole(self.model):
            eager = self._run(self.compilation.eager(self.model), self.step)
        return Pair(self.step, compiled, self._reduced(eager), self.start, self.leaves)

    def compiled(
        self, step: TrainingStep, existing: Mapping[str, torch.Tensor] | None = None
    ) -> Run:
        """A compiled step; to gradients that exist it adds."""
        with self.compilation.updates.kept(), step.unobserved():
            return self._run(self.model, step, existing)

    @property
    def accumulation_in_use(self) -> bool:
        """Whether the model is trained with gradients that are added up."""
        if self.compilation.options.updates:
            return False
        known = any(accumulates for _, accumulates in self.compilation.steps)
        return self.found_gradients or known or self.compilation.options.microbatches != 1

    def accumulating(self) -> TrainingStep:
        """The step that adds to gradients that exist."""
        call = self.structure.fill(self.leaves)
        return self.compilation.step_for(self.model, *call, accumulates=True)

    def _run(
        self,
        runner: Callable[..., Any],
        step: TrainingStep,
        existing: Mapping[str, torch.Tensor] | None = None,
    ) -> Run:
        for name, parameter in self.model.named_parameters():
            gradient = (existing or {}).get(name)
            parameter.grad = None if gradient is None else gradient.clone()
        before = Buffers(self.model)
        leaves = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in self.leaves]
        self.start.restore()
        try:
            args, kwargs = self.structure.fill(leaves)
            measured = measure(_step(runner, step.differentiable, args, kwargs))
            stream = RandomState.now()
            buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        finally:
            before.put_back()
        spread = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        gradients = {name: _torch.local_tensor(g) for name, g in spread.items()}
        gradients |= {
            f"input {index}": leaf.grad
            for index, leaf in enumerate(leaves)
            if leaf.grad is not None
        }
        outcome = Outcome(dict(enumerate(measured.output)), gradients, buffers, stream)
        return Run(outcome, step.differentiable, spread, measured)

    def _reduced(self, run: Run) -> Run:
        """A run of the eager model with gradients averaged over the ranks."""
        ranks = self.compilation.ranks
        if ranks is None:
            return run
        parameters = dict(self.model.named_parameters())
        spread = {
            name: average(ranks, gradient, parameters[name])
            for name, gradient in run.spread.items()
        }
        local = {name: _torch.local_tensor(gradient) for name, gradient in spread.items()}
        old = run.outcome
        outcome = Outcome(old.outputs, {**old.gradients, **local}, old.buffers, old.stream)
        return Run(outcome, run.wanted, spread, run.measured)


@contextlib.contextmanager
def steps(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Steps]:
    """Steps of a model, which is behind it as it was: gradients, buffers and random stream.

    Raises:
        UsageError: the model trains as a pipeline.
    """
    compilation = vars(model)["_fxzero"]
    if compilation.pipeline is not None:
        raise UsageError(
            "compare() runs one step of a whole model, and this one is a pipeline\n"
            "  call model.verify(*inputs), on all ranks"
        )
    state, latest, ranks = RandomState.now(), compilation.latest, compilation.ranks
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    if ranks is not None:
        syncing, local = ranks.syncing, {*ranks.local}
        ranks.syncing = True
    try:
        with torch.enable_grad():
            yield Steps(model, first_microbatch(model, args, kwargs))
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        if ranks is not None:
            ranks.syncing, ranks.local = syncing, local
        compilation.latest = compilation.latest if latest is None else latest
        state.restore()


def first_microbatch(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call itself, or its first micro-batch."""
    compilation = vars(model)["_fxzero"]
    if compilation.options.microbatches == 1:
        return args, kwargs
    batch = Batch.of(args, kwargs)
    return next(batch.cut(compilation.microbatches_for(model, batch)))


class Buffers:
    """A model's buffers, to be put back in their places with what they held."""

    def __init__(self, model: nn.Module) -> None:
        self.kept = [
            (module._buffers, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def put_back(self) -> None:
        with torch.no_grad():
            for table, name, buffer, value in self.kept:
                buffer.copy_(value)
                table[name] = buffer


def _step(
    runner: Callable[..., Any], wanted: tuple[int, ...], args: Any, kwargs: Any
) -> Callable[[], list[torch.Tensor]]:
    def step() -> list[torch.Tensor]:
        outputs, _ = flatten(runner(*args, **kwargs))
        sources = [outputs[index] for index in wanted]
        torch.autograd.backward([t if t.ndim == 0 else t.sum() for t in sources])
        return [tensor.detach() for tensor in outputs]

    return step
