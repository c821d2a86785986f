"""Runs a compiled training step as one autograd node.

The forward graph runs inside ``torch.autograd.Function.forward`` and hands the saved values to
the node; the backward graph consumes them, each freed at its last use, and returns the gradients
to autograd, which accumulates them as it does for any model: optimizers, hooks and
``torch.autograd.grad`` work.  A graph that accumulates adds to what exists itself, where autograd
would do no more (``accumulation.py``).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fxzero import _torch
from fxzero.accumulation import Accumulated, sums_of
from fxzero.errors import RuntimeStateError
from fxzero.execution import BoxedFunction
from fxzero.randomness import RandomState
from fxzero.receiving import Updates
from fxzero.updating import taking


class Owner(Protocol):
    """Whose graphs these are: it learns from what a backward shows."""

    def observe(self, outputs_held: bool, received: tuple[int, ...]) -> None:
        """Called at the start of each backward: are outputs alive, which received a gradient."""

    def rerun(
        self, inputs: Sequence[torch.Tensor], state: RandomState, gradients: dict[int, torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Gradients of the inputs when an output without a planned tangent received one."""

    def named(self, error: RuntimeError) -> RuntimeError:
        """An error in a graph, as that of the collective that it comes from, if it does."""

    @property
    def updates(self) -> Updates:
        """Who takes the gradients that a backward does not return."""


class Parameters(Protocol):
    """The way, in one step, from what autograd knows as parameters to what graphs take."""

    def taken(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the forward takes for the step's inputs."""

    def existing(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """The gradient of a parameter as the backward would return it, in the same memory."""

    def returned(
        self,
        gradients: list[torch.Tensor | None],
        in_place: Collection[int],
        kept: Collection[int],
    ) -> list[torch.Tensor | None]:
        """What autograd gets for the backward's gradients of those inputs.

        Args:
            in_place: positions of those that were added to what ``existing`` gave.
            kept: positions of those that autograd adds to the ``.grad`` of their input.
        """

    def handed_over(self, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """A gradient that the backward does not return, spread as the parameter is."""

    def explained(self, error: RuntimeError) -> RuntimeError:
        """What is raised for an error in a graph."""


class _InPlace:
    """Graphs take parameters as they are."""

    def taken(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(tensors)

    def existing(self, parameter: torch.Tensor) -> torch.Tensor | None:
        return parameter.grad

    def returned(
        self,
        gradients: list[torch.Tensor | None],
        in_place: Collection[int],
        kept: Collection[int],
    ) -> list[torch.Tensor | None]:
        return [None if i in in_place else gradient for i, gradient in enumerate(gradients)]

    def handed_over(self, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        return gradient

    def explained(self, error: RuntimeError) -> RuntimeError:
        return error


IN_PLACE = _InPlace()


@dataclass(frozen=True)
class Halves:
    """A backward as two functions: gradients of inputs, then those of weights.

    Attributes:
        first: the backward's arguments at ``first_takes`` -> results at ``first_returns``, then
            what it hands over.
        second: what was handed over, then the backward's arguments at ``second_takes`` -> results
            at ``second_returns``.
        inputs: positions among the forward's arguments whose gradients the first returns.
    """

    first: BoxedFunction
    second: BoxedFunction
    first_takes: tuple[int, ...]
    second_takes: tuple[int, ...]
    first_returns: tuple[int, ...]
    second_returns: tuple[int, ...]
    inputs: tuple[int, ...]

    def begin(self, arguments: list[Any]) -> tuple[dict[int, Any], list[Any]]:
        """The first half: its results by position, and what waits for the second.

        Args:
            arguments: the backward's, which are taken out of the list.
        """
        taken = [arguments[i] for i in self.first_takes]
        kept = [arguments[i] for i in self.second_takes]
        arguments.clear()
        found = self.first(taken)
        count = len(self.first_returns)
        results = dict(zip(self.first_returns, found[:count], strict=True))
        return results, [*found[count:], *kept]

    def finish(self, waiting: list[Any], late: Mapping[int, Any] | None = None) -> dict[int, Any]:
        """The second half: the other results by position.

        Args:
            waiting: what ``begin`` left, which is taken out of the list.
            late: by position, arguments of the backward that ``begin`` was not given.
        """
        late = late or {}
        handed = len(waiting) - len(self.second_takes)
        for place, position in enumerate(self.second_takes, handed):
            waiting[place] = late.get(position, waiting[place])
        return dict(zip(self.second_returns, self.second(waiting), strict=True))

    def whole(self, arguments: list[Any]) -> list[Any]:
        """Both, one after the other: the backward."""
        results, waiting = self.begin(arguments)
        results |= self.finish(waiting)
        return [results[i] for i in range(len(results))]


@dataclass(frozen=True)
class Executable:
    """A forward and a backward that can run, and how their lists of tensors line up.

    Attributes:
        forward: takes parameters, buffers and inputs; returns outputs, then saved values.
        backward: takes saved values, gradients to add to, then tangents; returns gradients.
        output_count: how many of the forward's results are model outputs.
        differentiable: positions of outputs that have a tangent.
        attached: positions of outputs that autograd must know, ``differentiable`` among them.
        saved_inputs: for each saved value, its position among the inputs, or None if computed.
        accumulated: the gradients that the backward adds up itself.
        updated: by name, positions among the inputs of parameters whose gradients the backward
            hands over.
        gradients: for each input, its position among the gradients, or None.
        reached: for each output with a tangent, the positions of the gradients that depend on it.
        owner: told what each backward shows.
        strided: whether the backward needs tangents with the outputs' strides: generated code does,
            and autograd may hand over an expanded scalar.
        halves: the backward once more, in two parts that may run apart; None: it never does.
    """

    forward: BoxedFunction
    backward: BoxedFunction
    output_count: int
    differentiable: tuple[int, ...]
    attached: tuple[int, ...]
    saved_inputs: tuple[int | None, ...]
    accumulated: tuple[Accumulated, ...]
    updated: Mapping[str, int]
    gradients: tuple[int | None, ...]
    reached: dict[int, frozenset[int]]
    owner: Owner
    strided: bool
    halves: Halves | None = None

    def __call__(
        self, inputs: Sequence[torch.Tensor], parameters: Parameters = IN_PLACE
    ) -> list[torch.Tensor]:
        """Model outputs for ``inputs`` (parameters, buffers, inputs), attached to autograd.

        Args:
            parameters: what stands in the graphs for those that are spread over ranks.
        """
        outputs = _Step.apply(self, parameters, *inputs)  # type: ignore[no-untyped-call]
        return list(outputs)

    def reached_by(self, outputs: Collection[int]) -> Collection[int]:
        """Positions of the gradients that depend on those outputs."""
        return frozenset[int]().union(*(self.reached[i] for i in outputs))

    @property
    def may_rerun(self) -> bool:
        """Whether a gradient may come through an output that has no tangent."""
        return self.attached != self.differentiable


class Saved:
    """Values between a forward and its backward.

    Plain references instead of ``save_for_backward``: the backward gives each one up at its last
    use, while autograd would keep all of them until it returns.
    """

    def __init__(self, values: list[Any], inputs: list[torch.Tensor]) -> None:
        self.values: list[Any] | None = values
        self.count = len(values)
        self.inputs = inputs
        self.versions = [tensor._version for tensor in inputs]

    def take(self, keep: bool) -> list[Any]:
        if self.values is None:
            raise RuntimeStateError(
                "backward ran a second time, but its saved values are freed after the first\n"
                "  call the first one with retain_graph=True"
            )
        for tensor, version in zip(self.inputs, self.versions, strict=True):
            if tensor._version != version:
                raise RuntimeStateError(
                    f"a tensor of shape {list(tensor.shape)} that the backward needs was modified "
                    f"in place after the forward (version {tensor._version}, expected {version})\n"
                    "  call optimizer.step() and in-place updates after backward()"
                )
        values = list(self.values)
        if not keep:
            self.values = None
            self.inputs = []
            self.versions = []
        return values


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, executable: Executable, parameters: Parameters, *inputs: torch.Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.executable = executable
        ctx.parameters = parameters
        if executable.may_rerun:
            ctx.start = (inputs, RandomState.now())
        outputs, ctx.saved = run_forward(executable, parameters, inputs)
        ctx.shapes = [(t.shape, t.stride(), t.dtype, t.device) for t in outputs]
        ctx.outputs = [weakref.ref(t) for t in outputs if t.ndim > 0]
        attached = {*executable.attached}
        ctx.mark_non_differentiable(
            *(t for i, t in enumerate(outputs) if i not in attached and t.is_floating_point())
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeStateError(
                "create_graph=True asks for gradients of gradients, which a compiled step has not\n"
                "  compute them with the model before fxzero.compile"
            )
        executable: Executable = ctx.executable
        received = {i: g for i, g in enumerate(gradients) if g is not None}
        held = any(ref() is not None for ref in ctx.outputs)
        saved = ctx.saved.take(keep=_torch.backward_keeps_graph())
        if not received.keys() <= set(executable.differentiable):
            del saved
            inputs, state = ctx.start
            return None, None, *executable.owner.rerun(inputs, state, received)
        executable.owner.observe(held, tuple(received))
        parameters: Parameters = ctx.parameters
        takers = [node for node, _ in ctx.next_functions]
        reached = executable.reached_by(received)
        pairs = zip(takers, executable.gradients, strict=True)
        reached_takers = [node if at in reached else None for node, at in pairs]
        sums = sums_of(reached_takers, executable.accumulated, parameters.existing)
        saved += sums.tensors
        kept = [i for i, node in enumerate(takers) if _torch.adds_to_leaf(node)]
        with (
            explained_errors(executable, parameters),
            _updating(executable, reached_takers, parameters),
        ):
            found = _run_backward(executable, saved, received, ctx.shapes)
            return None, None, *parameters.returned(found, sums.in_place, kept)


@contextlib.contextmanager
def _updating(
    executable: Executable, takers: Sequence[Any], parameters: Parameters
) -> Iterator[None]:
    """Inside, gradients that the backward hands over go to the model's optimizer.

    Args:
        takers: for each of the step's inputs, the autograd node that would take its gradient; None
            where the backward does not reach it, and its parameter is not updated.

    Raises:
        RuntimeStateError: somebody else asks for a gradient, or nobody takes it.
    """
    if not executable.updated:
        yield
        return
    reached: dict[str, torch.Tensor] = {}
    for name, position in executable.updated.items():
        if takers[position] is not None:
            parameter = _torch.parameter_to_add_to(takers[position])
            if parameter is None:
                raise RuntimeStateError(
                    f'the gradient of {name} is asked for, but update="backward" gives it to the '
                    "optimizer alone\n  take hooks of the parameter away, call loss.backward(), or "
                    'compile with update="step"'
                )
            reached[name] = parameter
    receiver = executable.owner.updates.begin(reached)

    def take(name: str, gradient: torch.Tensor) -> None:
        if name in reached:
            parameter = reached[name]
            receiver.take(parameter, parameters.handed_over(gradient, parameter))

    with taking(take):
        yield


@contextlib.contextmanager
def explained_errors(executable: Executable, parameters: Parameters) -> Iterator[None]:
    """Errors in graphs that run inside are raised as the parameters explain them."""
    try:
        yield
    except RuntimeError as error:
        found = parameters.explained(executable.owner.named(error))
        if found is error:
            raise
        raise found from error


def run_forward(
    executable: Executable, parameters: Parameters, inputs: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], Saved]:
    """The forward, outside of autograd: model outputs, and what waits for the backward."""
    taken = parameters.taken(inputs)
    with explained_errors(executable, parameters):
        results = executable.forward(list(taken))
    outputs = results[: executable.output_count]
    saved = results[executable.output_count :]
    _detach_outputs(saved, outputs)
    positions = [i for i in executable.saved_inputs if i is not None]
    return outputs, Saved(saved, [taken[i] for i in positions])


def _run_backward(
    executable: Executable,
    saved: list[Any],
    received: dict[int, torch.Tensor],
    shapes: list[Any],
) -> list[torch.Tensor | None]:
    """Gradients of all inputs; those that no received gradient reaches are None, as in eager.

    Args:
        saved: all that the backward takes but the tangents.
    """
    missing = [i for i in executable.differentiable if i not in received]
    saved += tangents_of(executable, received, shapes)
    results = executable.backward(saved)
    if missing:
        reached = executable.reached_by(received)
        results = [r if i in reached else None for i, r in enumerate(results)]
    handed_over = set(executable.updated.values())
    return [
        None if at is None or i in handed_over else results[at]
        for i, at in enumerate(executable.gradients)
    ]


def tangents_of(
    executable: Executable, received: dict[int, torch.Tensor], shapes: list[Any]
) -> list[torch.Tensor]:
    """What the backward takes for the gradients of outputs; zeros for those that have none.

    Args:
        shapes: of each output the shape, strides, dtype and device.
    """
    tangents = []
    for index in executable.differentiable:
        shape, stride, dtype, device = shapes[index]
        tangent = received.get(index)
        if tangent is None:
            tangent = torch.zeros(shape, dtype=dtype, device=device)
        if executable.strided and tangent.stride() != stride:
            tangent = _with_stride(tangent, stride)
        tangents.append(tangent)
    return tangents


def _with_stride(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """A copy with other strides; the tensor itself if they make elements overlap."""
    if any(step == 0 and size > 1 for step, size in zip(stride, tensor.shape, strict=True)):
        return tensor
    copy = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _detach_outputs(saved: list[Any], outputs: list[torch.Tensor]) -> None:
    """A saved value that is also an output must not keep its own autograd node alive."""
    identities = {id(output) for output in outputs}
    for index, value in enumerate(saved):
        if id(value) in identities:
            saved[index] = value.detach()
