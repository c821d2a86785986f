"""What an optimizer's rule is to those that run it, and what a step is told besides.

Rule: AdamW's, SGD's, Lion's       Update: one launch (CUDA) or chunks (CPU) for an arena
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fxzero.optim.arenas import Arena, Member

# Columns of a row of scalars; the last two are the sign of gradients and the step's number.
SCALARS = 16
Group = dict[str, Any]
Columns = tuple[float | Tensor, ...]


class Rule(Protocol):
    """How an optimizer makes new weights and moments from old ones.

    Attributes:
        name: as ``kernels.update`` knows it.
        moments: names of the moments.
    """

    @property
    def name(self) -> str: ...

    @property
    def moments(self) -> tuple[str, ...]: ...

    def check(self, group: Group) -> None:
        """Raises a UsageError for the first hyperparameter that cannot be right."""
        ...

    def scalars(self, group: Group, steps: Tensor) -> Columns:
        """What ``kernels.update`` reads: numbers, or float64 [n] where steps [n] matter."""
        ...

    @property
    def fused(self) -> Fused | None:
        """Torch's kernel for tensors of one dtype, if it has one."""
        ...


class Fused(Protocol):
    """Updates weights and moments in place by a kernel of torch's."""

    def __call__(
        self,
        group: Group,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],
        step: Tensor,
    ) -> None:
        """One step.

        Args:
            moments: for each name, those of all weights.
            step: the number of this step, a float32 scalar.
        """
        ...


@dataclass(frozen=True)
class Control:
    """What multiplies gradients, and whether there is a step at all; tensors of one element.

    Attributes:
        clipped: what clipping asks for.
        loss_scale: what the loss was multiplied by.
        found_inf: 1 if a gradient is not finite, and nothing may change.
    """

    clipped: Tensor | None
    loss_scale: Tensor | None
    found_inf: Tensor | None

    def factor(self, device: torch.device) -> Tensor | None:
        """What gradients are multiplied by, or None."""
        factor = None if self.clipped is None else self.clipped.to(device, torch.float32)
        if self.loss_scale is not None:
            inverse = self.loss_scale.to(device).double().reciprocal().float()
            factor = inverse if factor is None else factor * inverse
        return factor


class Update(Protocol):
    """What updates all parameters of an arena."""

    @property
    def arena(self) -> Arena: ...

    def __call__(
        self,
        ready: Sequence[Member],
        gradients: Sequence[Tensor],
        control: Control,
        groups: Sequence[Group],
    ) -> None:
        """One step for the members that have gradients, which lie in memory as weights do."""
        ...
