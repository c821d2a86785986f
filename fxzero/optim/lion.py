"""Lion (Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fxzero.optim.base import Optimizer
from fxzero.optim.checks import check_betas, check_not_negative
from fxzero.optim.forms import Numerics
from fxzero.optim.rule import Columns, Group, Rule


class _LionRule:
    name = "lion"
    moments = ("exp_avg",)
    fused = None

    def check(self, group: Group) -> None:
        check_not_negative(group, "lr", "weight_decay")
        check_betas(group["betas"])

    def scalars(self, group: Group, steps: Tensor) -> Columns:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        return 1 - lr * group["weight_decay"], beta1, 1 - beta1, beta2, 1 - beta2, lr


class Lion(Optimizer):
    """Lion: steps of one size in the direction of the sign of a moment.

    One moment, so half of AdamW's memory; a third to a tenth of its learning rate and as many
    times its weight decay are usual.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate: the size of every step.
        betas: of the direction, and of what is kept of the moment.
        weight_decay: share of the weight, times ``lr``, that it loses in a step.
        maximize, master_bits, stochastic_rounding, moments, backend, seed, offload: as in
            ``AdamW``.

    Raises:
        UsageError: an option outside of its range, or two that exclude each other.
    """

    rule: ClassVar[Rule] = _LionRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        master_bits: int | None = None,
        stochastic_rounding: bool = False,
        moments: str | torch.dtype | None = None,
        backend: str = "auto",
        seed: int = 0,
        offload: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        numerics = Numerics.of(master_bits, stochastic_rounding, moments)
        super().__init__(params, defaults, numerics, backend, seed, offload)
