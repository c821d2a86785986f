"""What the graphs of a model depend on, read off in one walk over it at the start of every step.

A step asks which graph is its own before it runs anything, and a walk by ``named_modules`` takes as
long as many a small step.  So one walk finds all that is asked about modules and parameters.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fxzero.precision import autocast_state
from fxzero.structure import Structure


@dataclass(frozen=True)
class Signature:
    """A model as it is now.

    Attributes:
        traits: the modes of all modules; shapes, dtypes and devices of all parameters, which of
            them are trained, and which stand in several places.
        trained: the distinct parameters that require gradients.
        frozen: how many of the distinct parameters do not.
    """

    traits: Hashable
    trained: tuple[nn.Parameter, ...]
    frozen: int

    @staticmethod
    def of(model: nn.Module) -> Signature:
        modes, places = [], []
        distinct: dict[int, nn.Parameter] = {}  # by identity: a tensor's own hash is slow
        numbers: dict[int, int] = {}
        for module in _modules(model):
            modes.append(module.training)
            for parameter in module._parameters.values():
                if parameter is not None:
                    distinct[id(parameter)] = parameter
                    places.append(numbers.setdefault(id(parameter), len(numbers)))
        kinds = tuple((p.shape, p.dtype, p.device, p.requires_grad) for p in distinct.values())
        trained = tuple(p for p in distinct.values() if p.requires_grad)
        return Signature((tuple(modes), tuple(places), kinds), trained, len(kinds) - len(trained))

    def key(self, leaves: Sequence[torch.Tensor], structure: Structure) -> Hashable:
        """All that the graph of a call with these inputs depends on."""
        inputs = tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in leaves)
        return structure.key, inputs, self.traits, autocast_state()


def _modules(model: nn.Module) -> list[nn.Module]:
    """Each module once, in an order that depends on the model's structure alone."""
    found = {model: None}
    waiting = [model]
    for module in waiting:  # it grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return waiting
