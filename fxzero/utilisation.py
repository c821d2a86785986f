"""How much of a device's peak an operator reaches, by its dtype and shape.

Large products reach the share that the device's description says.  Smaller ones reach less: a
product is cut into tiles, and as many tiles as the device has processors run at once, so that
ragged edges and the last, incomplete wave are lost (NVIDIA, Matrix Multiplication Background User's
Guide).  A product of few tiles is cut along its sum, too.

    [4096, 1000] @ [1000, 3000], tiles of 128, 132 processors
    32 x 23.4 tiles: 24 columns of tiles, 2.3 % lost; 768 tiles in 6 waves of 132, 3.0 % lost
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxzero.hardware import Hardware

_TILE = 128
# The shortest part of a sum that is worth a tile of its own.
_SUM = 512
_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default,
}  # fmt: skip
_CONVOLUTIONS = {_ATEN.convolution.default, _ATEN.convolution_backward.default}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def speed(node: fx.Node, operator: Any, flops: int, hardware: Hardware) -> float:
    """Operations a second that a node runs at, if memory keeps up.

    Args:
        operator: what it runs.
        flops: how many operations it takes.
    """
    peak = hardware.peak_of(_dtype(node, operator))
    if is_attention(operator):
        return peak * hardware.achieved.attention
    peak *= hardware.achieved.matmul
    if operator not in _PRODUCTS or hardware.processors == 1:
        return peak
    result = node.meta["val"]
    *batch, rows, columns = result.shape
    count = math.prod(batch)
    terms = flops // max(2 * result.numel(), 1)
    return peak * utilisation(count, rows, columns, terms, hardware.processors)


def utilisation(count: int, rows: int, columns: int, terms: int, processors: int) -> float:
    """The share of all processors' time that ``count`` products of this size keep them busy."""
    down, across = -(-rows // _TILE), -(-columns // _TILE)
    tiles = count * down * across
    if not tiles:
        return 1.0
    filled = rows * columns / (down * across * _TILE**2)
    parts = min(max(processors // tiles, 1), max(terms // _SUM, 1))
    waves = -(-tiles * parts // processors)
    return filled * tiles * parts / (waves * processors)


def is_attention(operator: Any) -> bool:
    """Whether an operator is attention in one piece."""
    return "scaled_dot_product" in str(operator)


def _dtype(node: fx.Node, operator: Any) -> str:
    """The dtype that an operator computes in, by the description's names.

    Torch computes convolutions of float32 in TF32 unless told otherwise, and products not.
    """
    values = [source.meta.get("val") for source in node.all_input_nodes]
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    if not tensors:
        return "float32"
    dtype = tensors[0].dtype
    if dtype == torch.float32 and operator in _CONVOLUTIONS:
        return "tf32"
    return "fp8" if dtype.itemsize == 1 else _DTYPES.get(dtype, "float32")
