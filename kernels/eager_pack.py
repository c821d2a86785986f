"""What ``pack`` does in kernels, in torch operators on any device, equal to the bit.

    pack.pack(blocks, bucket, factor)      pack(tensors, places, bucket, factor)

An operator for each tensor takes the place of the table.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def pack(tensors: Sequence[Tensor], places: Sequence[int], bucket: Tensor, factor: Tensor) -> None:
    """Writes tensors times a factor, a float32 [1], into a flat bucket, from their places on."""
    for tensor, place in zip(tensors, places, strict=True):
        target = bucket[place : place + tensor.numel()]
        target.copy_(tensor.flatten().float() * factor)


def unpack(
    tensors: Sequence[Tensor], places: Sequence[int], bucket: Tensor, factor: Tensor
) -> None:
    """Writes what is in the bucket, times a factor, into tensors."""
    for tensor, place in zip(tensors, places, strict=True):
        source = bucket[place : place + tensor.numel()].float() * factor
        tensor.copy_(source.view(tensor.shape))
