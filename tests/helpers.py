"""One training step of a model, and everything it leaves behind, to be compared bit for bit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import fxzero
from fxzero import capture
from fxzero.measurement import StorageCounter
from fxzero.structure import flatten

# When traced, the library makes a mask and repeats keys and values, which rounds differently.
NOT_TRACED_AS_RUN = ("llama_bf16",)


@dataclass(frozen=True)
class Outcome:
    """What one step came to.

    Attributes:
        gradients, buffers: by name; a gradient is None where autograd left none.
        stream: random numbers drawn after the step.
        peak: measured bytes of forward and backward.
        host_bytes: the most that was offloaded at once.
    """

    loss: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    stream: Tensor
    peak: int
    host_bytes: int


def itself(output: Any) -> Any:
    return output


def step_of(
    model: nn.Module, args: Any = (), kwargs: Any = None, loss: zoo.LossFn = itself
) -> Callable[[], Tensor]:
    """Forward and backward as a function; the model's outputs do not outlive the loss."""
    kwargs = kwargs or {}

    def step() -> Tensor:
        value = loss(model(*args, **kwargs))
        value.backward()
        return value.detach()

    return step


def run(
    model: nn.Module,
    args: Any = (),
    kwargs: Any = None,
    loss: zoo.LossFn = itself,
    *,
    seed: int = 0,
    call: Any = None,
) -> Outcome:
    """One measured step from a seed, without gradients from before.

    Args:
        call: what is called instead of the model itself.
    """
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    step = step_of(model if call is None else call, args, kwargs, loss)
    # Counts what ``fxzero.measure`` counts, also where it would ask the profiler.
    counter = StorageCounter(flatten([*model.parameters(), *model.buffers(), args, kwargs])[0])
    with counter:
        value = step()
    return Outcome(
        loss=value,
        gradients={name: p.grad for name, p in model.named_parameters()},
        buffers={name: b.clone() for name, b in model.named_buffers()},
        stream=torch.rand(8),
        peak=counter.peak,
        host_bytes=counter.host_peak,
    )


def assert_same(found: Outcome, expected: Outcome) -> None:
    """Bitwise equality of everything but the peaks."""
    assert torch.equal(found.stream, expected.stream), "random stream differs"
    assert torch.equal(found.loss, expected.loss), f"loss {found.loss} != {expected.loss}"
    assert_equal(found.gradients, expected.gradients)
    assert_equal(found.buffers, expected.buffers)


def assert_equal(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> None:
    """Bitwise equality of named tensors, None included."""
    assert list(found) == list(expected)
    different = [name for name, tensor in found.items() if not _equal(tensor, expected[name])]
    assert not different, f"not bitwise equal: {different}"


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


@functools.cache
def eager(name: str, steps: int = 2) -> tuple[Outcome, ...]:
    """The first steps of a zoo model in eager PyTorch, from seeds 0, 1, ..."""
    model, args, kwargs, loss = zoo.build(name)
    return tuple(run(model, args, kwargs, loss, seed=seed) for seed in range(steps))


class Subject:
    """A zoo model that is traced once and compiled for any number of budgets."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, self.args, self.kwargs, self.loss = zoo.build(name)
        self._state = copy.deepcopy(self.model.state_dict())
        self._traced: dict[Any, Any] = {}

    def compile(self, budget: object = None, **options: Any) -> Any:
        """The model as it was built, compiled."""
        self.model.load_state_dict(self._state)
        settings = {"memory_budget": budget, "inner": "eager", "optimizer": "sgd"} | options
        return fxzero.compile(self.model, **settings)

    def run(self, seed: int = 0) -> Outcome:
        return run(self.model, self.args, self.kwargs, self.loss, seed=seed)

    @functools.cached_property
    def required(self) -> int:
        """The smallest budget, as the error for an impossible one tells it."""
        self.compile(1)
        with pytest.raises(fxzero.BudgetError) as caught:
            self.run()
        return caught.value.required_bytes

    def capture(self, *arguments: Any, differentiable: Any = None, **options: Any) -> Any:
        """Stands for ``fxzero.capture.capture`` of this very model and these very inputs."""
        if differentiable not in self._traced:
            self._traced[differentiable] = capture.capture(
                *arguments, differentiable=differentiable, **options
            )
        return self._traced[differentiable]


def tiers(
    names: Iterable[Any], quick: Collection[Any], exhaustive: Collection[Any] = ()
) -> list[Any]:
    """Parameters of a test: those not in ``quick`` are marked slow, some of these exhaustive."""
    slow, more = pytest.mark.slow, pytest.mark.exhaustive
    return [
        pytest.param(n, marks=() if n in quick else (slow, more) if n in exhaustive else slow)
        for n in names
    ]
