"""A step of Adafactor on a whole weight.

The last two dimensions of a weight are matrices; of the squares of a matrix's gradient the means of
its rows and of its columns are kept, and their product, divided by the mean of all, stands for the
second moment.  Scalars and vectors keep their squares.  A step is relative to the weight's root
mean square, and the update's is limited:

    alpha   = max(eps2, rms(weight)) * min(lr, step^-0.5)
    update  = gradient / sqrt(row_var col_var / mean(row_var))
    weight -= alpha * update / max(1, rms(update) / d)

In float32 these are the operators of ``torch.optim.Adafactor``, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fxzero.kernels.eager_numerics import random_bits, stochastic_bfloat16

SQUARES, ROWS, COLUMNS = "variance", "row_var", "col_var"
# Elements that are rounded at random at once: random bits have temporaries.
PIECE = 2**14


def moment_shapes(shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """By name: what is kept of a parameter of this shape."""
    if len(shape) < 2:
        return {SQUARES: tuple(shape)}
    return {ROWS: (*shape[:-1], 1), COLUMNS: (*shape[:-2], 1, shape[-1])}


@dataclass(frozen=True)
class RandomRounding:
    """Rounds float32 numbers to bfloat16 ones up or down at random, right on average.

    Attributes:
        seed: of the random bits.
        index: of the first number, among all elements of the optimizer.
    """

    seed: int
    index: int

    def round(self, x: Tensor, step: int) -> None:
        """In place, by bits that depend on the step and on the elements' numbers."""
        for number, piece in enumerate(x.view(-1).split(PIECE)):
            self._round_piece(piece, step, self.index + number * PIECE)

    def _round_piece(self, piece: Tensor, step: int, index: int) -> None:
        rounded = torch.empty_like(piece, dtype=torch.bfloat16)
        bits = random_bits(self.seed, step, index, len(piece), piece.device)
        stochastic_bfloat16(piece, bits, rounded)
        piece.copy_(rounded)


def take_step(
    weight: Tensor,
    moments: list[Tensor],
    gradient: Tensor,
    step: float,
    group: Mapping[str, Any],
    rounding: RandomRounding | None = None,
) -> None:
    """Updates a weight and its moments; bit for bit ``torch.optim.Adafactor`` in their one dtype.

    Args:
        moments: means of rows and of columns, or squares; what is narrower is widened to them.
        step: number of this one.
        rounding: what rounds a bfloat16 weight, or None: to nearest.
    """
    if not weight.numel():
        return
    lr, (eps1, eps2) = group["lr"], group["eps"]
    if isinstance(lr, Tensor):
        lr = lr.squeeze()
    wide = moments[0].dtype
    if eps1 is None:
        eps1 = torch.finfo(wide).eps
    root = weight.numel() ** 0.5
    share, pace = step ** group["beta2_decay"], min(lr, 1 / step**0.5)
    alpha = max(eps2, vector_norm(weight, dtype=wide).item() / root) * pace
    gradient = gradient.to(wide)
    update = _estimate(moments, gradient, share, eps1).clamp_(min=eps1 * eps1).rsqrt_()
    update.mul_(gradient)
    del gradient
    excess = max(1.0, vector_norm(update).item() / (root * group["d"]))
    changed = weight.to(wide)
    if group["weight_decay"]:
        changed.mul_(1 - lr * group["weight_decay"])
    size = alpha / excess
    changed.add_(update, alpha=size if group["maximize"] else -size)
    del update
    if rounding is not None:
        changed = changed.contiguous()
        rounding.round(changed, int(step))
    weight.copy_(changed)


def _estimate(moments: list[Tensor], gradient: Tensor, share: float, eps: float) -> Tensor:
    """The second moment, after the moments have taken in a share of the gradient's squares."""
    if len(moments) == 1:
        return moments[0].lerp_(gradient.square(), share).clone()
    rows, columns = moments
    rows.lerp_(_mean_of_squares(gradient, -1), share)
    columns.lerp_(_mean_of_squares(gradient, -2), share)
    return (rows @ columns).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=eps))


def _mean_of_squares(gradient: Tensor, dim: int) -> Tensor:
    norm: Tensor = vector_norm(gradient, dim=dim, keepdim=True)
    return norm.square_().div_(gradient.shape[dim])
