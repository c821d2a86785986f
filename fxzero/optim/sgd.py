"""Stochastic gradient descent with momentum, as torch has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxzero import _torch
from fxzero.errors import UsageError
from fxzero.optim.base import Optimizer
from fxzero.optim.checks import check_not_negative
from fxzero.optim.forms import Numerics
from fxzero.optim.rule import Columns, Group, Rule


class _SGDRule:
    name = "sgd"
    moments = ("momentum_buffer",)

    def check(self, group: Group) -> None:
        check_not_negative(group, "lr", "momentum", "weight_decay")
        momentum, dampening = group["momentum"], group["dampening"]
        if group["nesterov"] and (momentum == 0 or dampening != 0):
            raise UsageError(
                f"nesterov=True needs momentum above 0 and dampening=0, not momentum={momentum} "
                f"and dampening={dampening}"
            )

    def scalars(self, group: Group, steps: Tensor) -> Columns:
        # Without momentum a moment is the gradient, which is not dampened.
        dampening = group["dampening"] if group["momentum"] else 0.0
        taken = torch.where(steps == 1, 1.0, 1.0 - dampening)
        nesterov = float(group["nesterov"])
        return group["weight_decay"], group["momentum"], taken, group["lr"], nesterov

    def fused(
        self,
        group: Group,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],
        step: Tensor,
    ) -> None:
        (buffers,) = moments
        _torch.fused_sgd(
            weights,
            gradients,
            buffers if group["momentum"] else [],
            first_step=bool(group["momentum"]) and step.item() == 1,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )


class SGD(Optimizer):
    """SGD with momentum, equal to ``torch.optim.SGD`` for parameters in float32.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate.
        momentum: how much of the moment is kept in a step; with 0 one is allocated all the same.
        dampening: share of the gradient that does not get into the moment.
        weight_decay: share of the weight that is added to its gradient.
        nesterov: step by where the moment will be.
        maximize, master_bits, stochastic_rounding, moments, backend, seed, offload: as in
            ``AdamW``.

    Raises:
        UsageError: an option outside of its range, or two that exclude each other.
    """

    rule: ClassVar[Rule] = _SGDRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        master_bits: int | None = None,
        stochastic_rounding: bool = False,
        moments: str | torch.dtype | None = None,
        backend: str = "auto",
        seed: int = 0,
        offload: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        numerics = Numerics.of(master_bits, stochastic_rounding, moments)
        super().__init__(params, defaults, numerics, backend, seed, offload)
