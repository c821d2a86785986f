"""AdamW (Loshchilov and Hutter, ICLR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxzero import _torch
from fxzero.optim.base import Optimizer
from fxzero.optim.checks import check_betas, check_not_negative
from fxzero.optim.forms import Numerics
from fxzero.optim.rule import Columns, Group, Rule


class _AdamWRule:
    name = "adamw"
    moments = ("exp_avg", "exp_avg_sq")

    def check(self, group: Group) -> None:
        check_not_negative(group, "lr", "eps", "weight_decay")
        check_betas(group["betas"])

    def scalars(self, group: Group, steps: Tensor) -> Columns:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        first, second = 1 - beta1**steps, 1 - beta2**steps
        keep = 1 - lr * group["weight_decay"]
        size, root = lr / first, second.rsqrt()
        return keep, 1 - beta1, beta2, 1 - beta2, size, root, group["eps"]

    def fused(
        self,
        group: Group,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],
        step: Tensor,
    ) -> None:
        firsts, seconds = moments
        _torch.fused_adamw(
            weights,
            gradients,
            firsts,
            seconds,
            step,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )


class AdamW(Optimizer):
    """AdamW, equal to ``torch.optim.AdamW`` for parameters in float32.

    Weights in bfloat16 keep, in the optimizer's state, the bits that bfloat16 has lost, so that
    training is that of a float32 master at 2 bytes a parameter.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate; a tensor on the parameters' device may be changed while a CUDA graph of
            the step exists.
        betas: how much of the moments is kept in a step.
        eps: added to the root of the second moment.
        weight_decay: share of the weight, times ``lr``, that it loses in a step.
        maximize: go up instead of down.
        master_bits: of bfloat16 weights: 32 (default), 24 or 16.
        stochastic_rounding: round bfloat16 weights up or down at random, right on average, instead
            of keeping lost bits.
        moments: "float32", "bfloat16", "int8" (with a scale for up to 128 neighbours), or None: the
            parameter's dtype.
        backend: "triton", "torch", or "auto": Triton on CUDA, torch's operators elsewhere.
        seed: of stochastic rounding, of weights and of 8-bit moments.
        offload: whether states wait for each step in host memory; the model's device then has a
            stage that they pass through, a part at a time.

    Raises:
        UsageError: an option outside of its range, or two that exclude each other.
    """

    rule: ClassVar[Rule] = _AdamWRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        numerics = Numerics.of(master_bits, stochastic_rounding, moments)
        super().__init__(params, defaults, numerics, backend, seed, offload)
