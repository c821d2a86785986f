"""Operators whose traced form computes something else than eager on the CPU.

Tracing turns every dropout into ``native_dropout``, which the CPU does not use: it multiplies by
noise that was rounded to the tensor's dtype first.  The two agree bitwise for most probabilities
in float32, and never in the half precisions.  Where they do not, the graph gets the CPU's own
formula; the bool mask, not the noise, stays the value that the backward needs.

For generated code a classification loss gets a gradient that can be fused: the one that tracing
gives scatters into zeros of the logits' size, which a kernel must write out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from fxzero import _inductor, _torch

aten = torch.ops.aten


def eager_exact() -> dict[Any, Callable[..., Any]]:
    """Decompositions under which a captured graph equals eager bit for bit."""
    return {
        aten.native_dropout.default: _native_dropout,
        aten.native_dropout_backward.default: _native_dropout_backward,
    }


def decompositions_for(inner: str) -> dict[Any, Callable[..., Any]]:
    """The decompositions to trace with for an inner compiler, "eager" or "inductor"."""
    if inner == "eager":
        return eager_exact()
    return {
        **_inductor.inductor_decompositions(),
        aten.bernoulli.default: _bernoulli,
        aten.nll_loss_backward.default: _nll_loss_backward,
        aten.nll_loss2d_backward.default: _nll_loss_backward,
    }


def restore_eager_operators(forward: fx.GraphModule) -> None:
    """Lets resampling in a forward graph be traced as what eager runs.

    Tracing would replace it by formulas of its own, with other rounding.
    """
    for node in forward.graph.nodes:
        if getattr(node.target, "_overloadpacket", None) in _RESAMPLING:
            node.target = _torch.as_eager(node.target)
    forward.recompile()


_RESAMPLING = {
    aten.upsample_nearest1d,
    aten.upsample_nearest2d,
    aten.upsample_nearest3d,
    aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d,
    aten.upsample_linear1d,
    aten.upsample_bilinear2d,
    aten.upsample_trilinear3d,
    aten.upsample_bicubic2d,
    aten._upsample_bilinear2d_aa,
    aten._upsample_bicubic2d_aa,
}


def _native_dropout(tensor: torch.Tensor, p: float, train: bool | None) -> Any:
    if not train or tensor.device.type != "cpu" or _forward_agrees(tensor.dtype, p):
        return NotImplemented
    if p >= 1:
        return tensor * 0, torch.zeros_like(tensor, dtype=torch.bool)
    mask = aten.bernoulli.p(torch.empty_like(tensor, dtype=torch.bool), 1 - p)
    return tensor * _noise(mask, tensor.dtype, 1 / (1 - p)), mask


def _native_dropout_backward(gradient: torch.Tensor, mask: torch.Tensor, scale: float) -> Any:
    if gradient.device.type != "cpu" or _backward_agrees(gradient.dtype, scale):
        return NotImplemented
    return gradient * _noise(mask, gradient.dtype, scale)


def _bernoulli(probabilities: torch.Tensor, *, generator: Any = None) -> Any:
    """The same draw by an operator that Inductor can call; it refuses to call the default one."""
    if generator is not None:
        return NotImplemented
    return aten.bernoulli.Tensor(probabilities, probabilities)


def _nll_loss_backward(
    gradient: torch.Tensor,
    scores: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: torch.Tensor,
) -> torch.Tensor:
    """The gradient of ``scores``, by comparing each class with the target.

    Args:
        scores: log-probabilities, (classes,), (batch, classes) or (batch, classes, height, width).
        reduction: as in ATen: 0 none, 1 mean, 2 sum.
    """
    dim = min(scores.ndim - 1, 1)
    along = [-1 if i == dim else 1 for i in range(scores.ndim)]
    classes = torch.arange(scores.shape[dim], device=scores.device).view(along)
    if reduction == 1:
        gradient = gradient / total_weight
    if 0 < gradient.ndim < scores.ndim:
        gradient = gradient.unsqueeze(dim)
    if weight is not None:
        gradient = gradient * weight.view(along)
    target = target.unsqueeze(dim)
    counted = torch.where(target == ignore_index, 0.0, -gradient)
    return torch.where(classes == target, counted, 0.0)


def _noise(mask: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    return mask.to(dtype) if scale == 0 else mask.to(dtype).div(1 / scale)


def _forward_agrees(dtype: torch.dtype, p: float) -> bool:
    return p < 1 and (dtype.itemsize < 4 or _backward_agrees(dtype, 1 / (1 - p)))


def _backward_agrees(dtype: torch.dtype, scale: float) -> bool:
    """Whether scaling by ``scale`` and dividing one by its inverse round to the same number."""
    if scale == 0:
        return True
    if dtype.itemsize < 4:
        return False
    if dtype == torch.float64:
        return True
    return bool(np.float32(1) / np.float32(1 / scale) == np.float32(scale))
