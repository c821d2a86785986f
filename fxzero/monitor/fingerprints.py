"""Whether ranks that should have equal weights do: 64 bits for each parameter, compared by all.

A fingerprint is a weighted sum of a tensor's bits modulo 2**64.  Weights are odd, so that a change
of one element always shows; other changes are missed once in about 2**64.

    parameter of every rank        equal on all ranks of the mesh
    shard of a parameter           equal on ranks with the same shard ("dp_replicate")
    weight of several stages       equal on all ranks of a pipeline that have it (tied weights)

Whoever has a piece gives its fingerprint and the fingerprint's complement to one all-reduce by
maximum: the largest and the smallest come out of it, and are equal if all are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from fxzero import _torch
from fxzero.agreement import Agreement

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PRIME = 0x100000001B3
# Elements that are looked at together: they become 64-bit integers.
_CHUNK = {"cpu": 2**16, "cuda": 2**20}
_NOBODY = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class Disagreement:
    """Ranks that differ in a parameter that should be equal on them.

    Attributes:
        name: the first such parameter, in the model's order.
        count: how many there are.
        ranks: the global ranks in groups that are equal among themselves, the largest first.
    """

    name: str
    count: int
    ranks: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        groups = " and ".join(f"rank {', '.join(map(str, group))}" for group in self.ranks)
        more = f", and {self.count - 1} more" if self.count > 1 else ""
        return f"{self.name} differs between {groups}{more}"


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """64 bits that depend on all of a tensor's: int64, no dimensions, on the tensor's device."""
    flat = tensor.detach().contiguous().reshape(-1)
    bits = (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(
        _BITS[flat.element_size() // (2 if flat.is_complex() else 1)]
    )
    size = min(_CHUNK.get(bits.device.type, 2**20), max(bits.numel(), 1))
    weights = torch.arange(1, 2 * size, 2, dtype=torch.int64, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(size):
        total = total * _PRIME + (part.to(torch.int64) * weights[: part.numel()]).sum()
    return total


def fingerprints(model: nn.Module) -> dict[str, int]:
    """Of this rank's part of each parameter that it has."""
    parts = {name: _torch.local_tensor(p) for name, p in model.named_parameters() if not p.is_meta}
    if not parts:
        return {}
    found = torch.stack([fingerprint(part) for part in parts.values()]).tolist()
    return dict(zip(parts, found, strict=True))


def disagreement(
    model: nn.Module, mine: dict[str, int], agreement: Agreement, when: str
) -> Disagreement | None:
    """What ranks differ in that should be equal; the same answer on all of them, who all ask.

    Args:
        mine: this rank's ``fingerprints``.
    """
    places = _places(model)
    count = sum(number for _, number in places.values())
    if not count:
        return None
    slots = torch.full((2, count), _NOBODY)
    start, owners = 0, []
    for name, (place, number) in places.items():
        if name in mine:
            slots[:, start + place] = torch.tensor([mine[name], ~mine[name]])
        start += number
        owners += [name] * number
    every = agreement.reduced(slots, dist.ReduceOp.MAX, when)
    differing = ((every[0] != ~every[1]) & (every[0] != _NOBODY)).nonzero().flatten().tolist()
    if not differing:
        return None
    first = differing[0]
    held = agreement.numbers(slots[0, first : first + 1], when)[:, 0].tolist()
    return Disagreement(
        owners[first], len({owners[i] for i in differing}), _groups(held, agreement)
    )


def _places(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each parameter that several ranks may have: this rank's piece, and how many there are."""
    found = {}
    for name, parameter in model.named_parameters():
        place, number = 0, 1
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            cut = [d for d, p in enumerate(parameter.placements) if isinstance(p, Shard)]
            for dimension in cut:
                place = place * mesh.size(dimension) + mesh.get_local_rank(dimension)
                number *= mesh.size(dimension)
            if cut and number == mesh.size():
                continue  # every rank has a piece of its own
        found[name] = place, number
    return found


def _groups(held: Sequence[int], agreement: Agreement) -> tuple[tuple[int, ...], ...]:
    found: dict[int, list[int]] = {}
    for rank, value in zip(agreement.ranks, held, strict=True):
        if value != _NOBODY:
            found.setdefault(value, []).append(rank)
    return tuple(sorted(map(tuple, found.values()), key=lambda group: (-len(group), group)))
