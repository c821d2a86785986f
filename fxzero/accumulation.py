"""What a backward adds its gradients to: those that exist, where autograd would do just that.

A graph that accumulates takes a tensor for each parameter and adds the gradient to it in place
(``passes/accumulate.py``).  That tensor is

    ``p.grad``         if it is of the planned layout and autograd would only add to it; autograd
                       then gets None for the parameter
    negative zeros     otherwise: without a gradient, with hooks that want to see the new one, under
                       ``torch.autograd.grad``; autograd gets the result

Negative zeros, because x + -0.0 is x to the bit, and 0.0 + -0.0 is not -0.0.  A parameter that the
backward does not reach is never added to: its new gradient may be nan, and is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxzero import _torch


@dataclass(frozen=True)
class Layout:
    """What a graph was made for; where a dimension has one element, its stride is 0."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        stride = tuple(step if size > 1 else 0 for size, step in pairs)
        return cls(tuple(tensor.shape), stride, tensor.dtype, tensor.device)

    def identity(self) -> torch.Tensor:
        """A tensor to which a gradient is added without a change."""
        zero = complex(-0.0, -0.0) if self.dtype.is_complex else -0.0
        given = (self.shape, self.stride)
        return torch.empty_strided(*given, dtype=self.dtype, device=self.device).fill_(zero)


@dataclass(frozen=True)
class Accumulated:
    """A gradient that the backward adds up itself.

    Attributes:
        position: its parameter's place among the step's inputs.
        layout: of the tensor that the graph adds to.
    """

    position: int
    layout: Layout


@dataclass(frozen=True)
class Sums:
    """What one backward adds to.

    Attributes:
        tensors: for each accumulated gradient, in order.
        in_place: positions of the inputs whose ``.grad`` is among them.
    """

    tensors: list[torch.Tensor]
    in_place: frozenset[int]


def sums_of(
    takers: Sequence[Any],
    accumulated: Sequence[Accumulated],
    existing: Callable[[torch.Tensor], torch.Tensor | None],
) -> Sums:
    """What the backward that is running adds to.

    Args:
        takers: for each of the step's inputs, the autograd node that takes its gradient; None
            where there is none to take.
        existing: a parameter's gradient in the form in which the graph returns it, if it has one.
    """
    tensors, in_place = [], []
    for item in accumulated:
        parameter = _torch.parameter_to_add_to(takers[item.position])
        gradient = None if parameter is None else existing(parameter)
        if gradient is None or gradient.requires_grad or Layout.of(gradient) != item.layout:
            tensors.append(item.layout.identity())
        else:
            tensors.append(gradient)
            in_place.append(item.position)
    return Sums(tensors, frozenset(in_place))
