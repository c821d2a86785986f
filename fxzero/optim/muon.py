"""Muon: momentum made orthogonal (Jordan et al., Muon: An optimizer for hidden layers, 2024).

A step has two parts that work element by element, on the rows that a rank keeps, and between them
one that needs the whole matrix, at its home (``homes``); what travels there and back is bfloat16,
in which the iteration computes anyway:

    rows         momentum and gradient -> direction, bfloat16
    at home      whole direction -> Newton-Schulz iteration -> whole update, bfloat16
    rows         weight and update -> weight

Matrices that are whole on every rank are updated by each for itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxzero.errors import UsageError, unknown_option
from fxzero.optim.arenas import local
from fxzero.optim.checks import check_not_negative
from fxzero.optim.homes import Share
from fxzero.optim.whole import WholeOptimizer, spread

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_BUFFER = "momentum_buffer"
_ADJUSTMENTS = ("original", "match_rms_adamw")


@dataclass(frozen=True)
class _Matrix:
    """A parameter with what its update needs."""

    parameter: Tensor
    momentum: Tensor
    group: dict[str, Any]

    @property
    def cost(self) -> int:
        """Multiplications of the iteration: three products of a matrix that lies on its side."""
        short, long = sorted(self.parameter.shape)
        return int(max(self.group["ns_steps"], 1) * short * short * (2 * long + short))

    @property
    def shares(self) -> list[Share]:
        """The direction, which becomes the update."""
        return [Share(tuple(self.parameter.shape), torch.bfloat16)]

    def send(self) -> list[Tensor]:
        """Of this rank's rows, where to step, in bfloat16; the momentum takes the gradient in."""
        assert self.parameter.grad is not None
        gradient, momentum = local(self.parameter.grad), local(self.momentum)
        share = self.group["momentum"]
        momentum.lerp_(gradient, 1 - share)
        if self.group["nesterov"]:
            return [gradient.lerp(momentum, share).bfloat16()]
        # Of a bfloat16 momentum, too, a copy: the iteration scales what it is given.
        return [momentum.to(torch.bfloat16, copy=True)]

    def work(self, wholes: list[Tensor]) -> list[Tensor]:
        """The update of the whole matrix from its direction, which is overwritten."""
        group, direction = self.group, wholes.pop()
        coefficients, steps = group["ns_coefficients"], group["ns_steps"]
        return [orthogonalize(direction, coefficients, steps, group["eps"])]

    def receive(self, rows: Sequence[Tensor]) -> None:
        """Steps by this rank's rows of the update."""
        (update,) = rows
        lr, weight = self.group["lr"], local(self.parameter)
        if isinstance(lr, Tensor):
            lr = lr.squeeze()
        weight.mul_(1 - lr * self.group["weight_decay"])
        size = float(-lr * _stretch(self.parameter, self.group["adjust_lr_fn"]))
        if weight.dtype.itemsize > 2 or weight.device.type != "cpu":
            weight.add_(update, alpha=size)
            return
        # On a CPU torch rounds a product before it adds it at the end of a narrow tensor, and in a
        # transposed one, and nowhere else; rows end elsewhere: here only the sum is rounded.
        narrow = float(torch.tensor(size, dtype=weight.dtype))
        weight.copy_(weight.float().add_(update, alpha=narrow))


def orthogonalize(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Singular values of a bfloat16 matrix, which is overwritten, brought near to 1.

    Bit for bit what ``torch.optim.Muon`` computes: the same operators on the same layouts.

    Args:
        coefficients: of x, x^3 and x^5 in the iteration's polynomial.
        steps: of the iteration.
        eps: the least that the matrix's norm is taken for.
    """
    assert matrix.dtype == torch.bfloat16
    is_tall = matrix.shape[0] > matrix.shape[1]
    a, b, c = coefficients
    x = matrix.T if is_tall else matrix
    x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, factor, x, beta=a)
    return x.T if is_tall else x


def _stretch(parameter: Tensor, adjustment: str | None) -> float:
    """What the learning rate of a matrix is multiplied by."""
    rows, columns = parameter.shape
    if adjustment == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns)) if columns else 1.0


class Muon(WholeOptimizer):
    """Muon for the matrices of hidden layers, equal to ``torch.optim.Muon``.

    To the bit in float32 and float64.  In 16 bits on a CPU torch rounds some elements twice, and
    without ``nesterov`` its iteration overwrites a bfloat16 momentum; this one does neither.

    Parameters may be cut into rows over ranks; results do not depend on how many there are, and a
    rank keeps the momentum of its own rows.  In a step all ranks exchange 4 bytes a parameter, so
    all must step.  Embeddings, biases and the weights of norms belong to an ``AdamW`` of their own.

    Args:
        params: matrices, or groups of them with options of their own.
        lr: learning rate; a tensor may be changed between steps.
        weight_decay: share of the weight, times ``lr``, that it loses in a step.
        momentum: how much of the momentum is kept in a step.
        nesterov: step by where the momentum will be.
        ns_coefficients: of x, x^3 and x^5 in the polynomial of the Newton-Schulz iteration.
        eps: the least that the norm of a direction is taken for.
        ns_steps: steps of the iteration, at most 99.
        adjust_lr_fn: "original" or None: ``lr`` times the root of rows by columns, at least 1;
            "match_rms_adamw": times 0.2 and the root of the larger of both, so that AdamW's ``lr``
            and ``weight_decay`` fit (Liu et al., Muon is Scalable for LLM Training, 2025).

    Raises:
        UsageError: a parameter that is no matrix, or an option outside of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, defaults)

    def _homed(self, parameter: Tensor, group: dict[str, Any]) -> _Matrix:
        state = self.state[parameter]
        momentum = state.get(_BUFFER)
        if momentum is None:
            momentum = torch.zeros_like(parameter, requires_grad=False)
        state[_BUFFER] = momentum = spread(momentum, parameter, parameter.dtype)
        return _Matrix(parameter, momentum, group)

    def _check_options(self, group: Mapping[str, Any]) -> None:
        check_not_negative(group, "lr", "weight_decay", "momentum", "eps")
        steps, coefficients = group["ns_steps"], group["ns_coefficients"]
        if not 0 <= steps < 100:
            raise UsageError(f"ns_steps={steps} must be at least 0 and below 100")
        if len(coefficients) != 3:
            raise UsageError(f"ns_coefficients={coefficients} must be three numbers")
        adjustment = group["adjust_lr_fn"]
        if adjustment is not None and adjustment not in _ADJUSTMENTS:
            raise unknown_option(adjustment, _ADJUSTMENTS, where="adjust_lr_fn")

    def _check_parameter(self, parameter: Tensor) -> None:
        if parameter.ndim != 2:
            raise UsageError(
                f"Muon updates matrices, not a parameter of shape {list(parameter.shape)}\n"
                "  give it to fxzero.optim.AdamW, in an optimizer of its own"
            )
        if not parameter.is_floating_point():
            raise UsageError(f"Muon updates matrices of real numbers, not of {parameter.dtype}")
