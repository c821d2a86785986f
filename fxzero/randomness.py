"""Draws random numbers once and the same ones again.

The two functions stand in graphs as operators: the first runs a random operator and returns the
generator's state from before it, the second runs an operator from such a state and leaves the
generator where it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


def draw(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    """(state of the generator, result of the operator)."""
    device = _device(args)
    state = torch.get_rng_state() if device is None else torch.cuda.get_rng_state(device)
    return state, operator(*args, **kwargs)


def draw_again(state: torch.Tensor, operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The operator's result from a generator in ``state``; the stream does not move."""
    device = _device(args)
    if device is None:
        current = torch.get_rng_state()
        torch.set_rng_state(state)
        try:
            return operator(*args, **kwargs)
        finally:
            torch.set_rng_state(current)
    current = torch.cuda.get_rng_state(device)
    torch.cuda.set_rng_state(state, device)
    try:
        return operator(*args, **kwargs)
    finally:
        torch.cuda.set_rng_state(current, device)


def _device(args: tuple[Any, ...]) -> torch.device | None:
    """The CUDA device whose generator the operator uses; None for the CPU's."""
    for value in args:
        if isinstance(value, torch.Tensor):
            return value.device if value.is_cuda else None
    return None


@dataclass(frozen=True)
class RandomState:
    """The generators' states at one moment; CUDA's of the current device, if there is one."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        ready = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if ready else None)

    def equals(self, other: RandomState) -> bool:
        """Whether the same numbers follow."""
        if self.cuda is None or other.cuda is None:  # nothing has been drawn there yet
            return torch.equal(self.cpu, other.cpu)
        return torch.equal(self.cpu, other.cpu) and torch.equal(self.cuda, other.cuda)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, random numbers are those drawn after this moment; the stream does not move."""
        current = RandomState.now()
        self.restore()
        try:
            yield
        finally:
            current.restore()

    def restore(self) -> None:
        """Sets the generators back to this moment."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
