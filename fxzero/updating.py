"""The operator by which a backward hands a gradient to the optimizer.

    done = update(weight, gradient, "layers.0.weight")

Whoever runs a backward says who takes what is handed over (``receiving``); graphs do not know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

Take = Callable[[str, Tensor], None]

_TAKE: ContextVar[Take] = ContextVar("fxzero_update")


@torch.library.custom_op("fxzero::update", mutates_args=("weight",))
def update(weight: Tensor, gradient: Tensor, name: str) -> Tensor:
    """Hands a gradient to whoever updates the parameter; returns a tensor without elements.

    Args:
        weight: what the graph has for the parameter.
        gradient: of it, of the same shape and dtype.
        name: of the parameter.
    """
    _TAKE.get()(name, gradient)
    return weight.new_empty(0)


@update.register_fake
def _(weight: Tensor, gradient: Tensor, name: str) -> Tensor:
    return weight.new_empty(0)


UPDATE = torch.ops.fxzero.update.default


@contextlib.contextmanager
def taking(take: Take) -> Iterator[None]:
    """Inside, ``take(name, gradient)`` is called for each update of a graph that runs."""
    token = _TAKE.set(take)
    try:
        yield
    finally:
        _TAKE.reset(token)
