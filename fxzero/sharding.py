"""Parameters as shards: each rank keeps one part of each, all of one dtype in one arena.

A sharded parameter is an ``nn.Parameter`` that holds a DTensor with ``Shard(0)``: state dicts,
torch's distributed checkpoints and any torch optimizer work on it.  Rows are cut as DTensor cuts
them, every part padded to the size of the first, so that collectives move equal sizes and the rows
of all parts, one after the other, are the parameter with what was padded at its end:

    weight [5, 3] on 2 ranks      rank 0: rows 0 1 2      rank 1: rows 3 4 and one of padding
    arena of a dtype              | weight's part | bias's part | ...

Scalars, and weights whose memory is not contiguous, stay whole on every rank: DTensors with
``Replicate()``, so that an optimizer's list of parameters is of one kind.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fxzero import _torch, messages
from fxzero.collectives import all_gather, average, average_in_place, average_part
from fxzero.errors import UsageError
from fxzero.mesh import Axis, Mesh, Sharding

log = logging.getLogger(__name__)

_ELSEWHERE = "_fxzero_elsewhere"


def padded_rows(rows: int, shards: int) -> int:
    """Rows of each part of a parameter that has ``rows``."""
    return -(-rows // shards)


def padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The tensor with rows of zeros behind its own; itself if it has as many as that."""
    if tensor.shape[0] == rows:
        return tensor
    result = tensor.new_zeros((rows, *tensor.shape[1:]))
    result[: tensor.shape[0]] = tensor
    return result


def may_shard(tensor: torch.Tensor) -> bool:
    """Whether a parameter can be cut by rows."""
    return tensor.ndim > 0 and tensor.numel() > 0 and tensor.is_contiguous()


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether a parameter is one that ``shard_parameters`` made."""
    return isinstance(tensor, DTensor)


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether each rank keeps only a part of the parameter."""
    return isinstance(tensor, DTensor) and any(isinstance(p, Shard) for p in tensor.placements)


@dataclass(frozen=True)
class Shards:
    """The way from a model's sharded parameters to what graphs take and return.

    Attributes:
        mesh: the ranks.
        sharding: how parameters are spread over them.
    """

    mesh: Mesh
    sharding: Sharding

    @property
    def rank(self) -> int:
        """This process's place along the dimension that parameters are cut over."""
        place: int = self.mesh.devices.get_local_rank(self._axis.name)
        return place

    @property
    def group(self) -> Any:
        """The processes that parameters are cut over."""
        return self.mesh.devices.get_group(self._axis.name)

    def cut(self, rows: torch.Tensor, like: torch.Tensor) -> DTensor:
        """A rank's own rows as a DTensor of the shape of ``like``."""
        names = self.mesh.devices.mesh_dim_names
        placements = [Shard(0) if name == self._axis.name else Replicate() for name in names]
        return self._wrap(rows, like, placements)

    def whole(self, tensor: torch.Tensor) -> DTensor:
        """What all ranks have alike, as a DTensor."""
        return self._wrap(tensor, tensor, [Replicate()] * self.mesh.devices.ndim)

    def unreduced(self, gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A rank's gradient, which is still to be averaged with those of the others."""
        if not is_spread(like):
            return gradient
        return self._wrap(gradient, like, [Partial("avg")] * self.mesh.devices.ndim)

    def _wrap(self, local: torch.Tensor, like: torch.Tensor, placements: list[Any]) -> DTensor:
        return DTensor.from_local(
            local,
            self.mesh.devices,
            placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )

    def part(self, parameter: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter, padded: what a graph takes for it."""
        local = _torch.local_tensor(parameter)
        if not is_cut(parameter):
            return local
        rows = padded_rows(parameter.shape[0], self.sharding.shards)
        shape = (rows, *parameter.shape[1:])
        if local.shape == shape:
            return local
        stride = _contiguous_stride(shape)
        size = local.untyped_storage().nbytes() // local.element_size()
        if size - local.storage_offset() >= rows * stride[0] and local.is_contiguous():
            return local.as_strided(shape, stride, local.storage_offset())
        return padded(local, rows)  # somebody has put other memory behind the parameter

    def gradient(self, part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """The gradient that a graph returned for ``part``, as the parameter's."""
        if not is_cut(parameter):
            return self.whole(part) if is_spread(parameter) else part
        rows = _torch.local_tensor(parameter).shape[0]
        return self.cut(part if rows == part.shape[0] else part[:rows], parameter)

    def gather(
        self, parameter: torch.Tensor, dtype: torch.dtype | None = None, kind: str | None = None
    ) -> torch.Tensor:
        """The whole parameter, on every rank; all ranks must ask for it.

        Args:
            dtype: in which it travels, and is returned; None: its own.
            kind: of the codes that it travels as, if it is large; None: as it is.
        """
        part = self.part(parameter).detach().to(dtype or parameter.dtype)
        if not is_cut(parameter):
            return part
        count, group = self._axis.size, self.mesh.groups[self._axis.name]
        if kind is not None and messages.is_worth_it(part.numel(), part.dtype):
            arrived = all_gather(messages.write_message(part, 1, kind), count, group)
            flat: torch.Tensor = messages.read_message(
                arrived, count, part.numel(), kind, part.dtype
            )
            whole = flat.view(-1, *part.shape[1:])
        else:
            whole = all_gather(part, count, group)
        return whole[: parameter.shape[0]]

    def reduce(self, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """The average of all ranks' gradients for a parameter, spread as the parameter is."""
        groups, value = self.mesh.groups, gradient.contiguous()
        if is_cut(parameter):
            value = self._reduce_part(value, parameter)
        for axis in self.sharding.replicate if is_cut(parameter) else self.sharding.axes:
            value = average(value, groups[axis.name])
        return self.gradient(value, parameter)

    def reduce_in_place(self, gradient: torch.Tensor) -> None:
        """``reduce`` of a whole, contiguous gradient of a parameter that is whole, too."""
        for axis in self.sharding.axes:
            average_in_place(gradient, self.mesh.groups[axis.name])

    def _reduce_part(self, whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        rows = padded_rows(parameter.shape[0], self._axis.size) * self._axis.size
        group = self.mesh.groups[self._axis.name]
        return average_part(padded(whole, rows), self._axis.size, group)

    @property
    def _axis(self) -> Axis:
        """What parameters are cut over."""
        assert self.sharding.shard is not None
        return self.sharding.shard

    @contextlib.contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model's parameters are whole; all ranks must enter together."""
        whole = {id(p): self.gather(p) for p in model.parameters() if is_spread(p)}
        with replaced(model, lambda p: nn.Parameter(whole[id(p)], p.requires_grad)):
            yield


@contextlib.contextmanager
def replaced(model: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, ``make(parameter)`` stands wherever a parameter that is spread over ranks does."""
    made: dict[int, torch.Tensor] = {}
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (table, name, parameter)
        for table in (module._parameters for module in model.modules())
        for name, parameter in table.items()
        if parameter is not None and is_spread(parameter)
    ]
    for _, _, parameter in places:
        if id(parameter) not in made:
            made[id(parameter)] = make(parameter)
    try:
        for table, name, parameter in places:
            table[name] = made[id(parameter)]
        yield
    finally:
        for table, name, parameter in places:
            table[name] = parameter


def agree_on_values(model: nn.Module, mesh: Mesh) -> None:
    """Gives every rank the parameters and buffers of the first one.

    Raises:
        UsageError: no processes run.
    """
    if mesh.sizes and mesh.devices is None:
        sizes = ", ".join(f"{name}={size}" for name, size in mesh.sizes.items())
        raise UsageError(
            f"mesh of {sizes} describes ranks that do not run\n"
            "  start them with torchrun and leave mesh out, or ask fxzero.plan"
        )
    for name in mesh.sizes:
        group = mesh.devices.get_group(name)
        for tensor in dict.fromkeys([*model.parameters(), *model.buffers()]):
            if not is_spread(tensor) and not tensor.is_meta:
                _broadcast(tensor.detach(), group)


def _broadcast(tensor: torch.Tensor, group: Any) -> None:
    if tensor.is_contiguous():
        dist.broadcast(tensor, group=group, group_src=0)
    else:
        copy = tensor.contiguous()
        dist.broadcast(copy, group=group, group_src=0)
        tensor.copy_(copy)


def shard_parameters(model: nn.Module, shards: Shards) -> None:
    """Replaces the model's parameters by shards in arenas."""
    elsewhere = ids_elsewhere(model)
    found = [p for p in model.parameters() if not is_spread(p) and id(p) not in elsewhere]
    old = [weakref.ref(p) for p in found]
    whole = {p: nn.Parameter(shards.whole(p.detach()), p.requires_grad) for p in found}
    replace_tensors(model, whole | _arenas([p for p in found if may_shard(p)], shards))
    found.clear()
    whole.clear()
    held = sum(ref() is not None for ref in old)
    if held:
        log.warning(
            "%d parameters became shards, but something still holds them as they were: an "
            "optimizer that was made before fxzero.compile would not train the model",
            held,
        )


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """What stands for a parameter or buffer that only other ranks of a pipeline have."""
    nothing = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        nothing = nn.Parameter(nothing, tensor.requires_grad)
    setattr(nothing, _ELSEWHERE, True)
    return nothing


def ids_elsewhere(model: nn.Module) -> set[int]:
    """Ids of parameters and buffers that only other ranks of a pipeline have."""
    tensors = (*model.parameters(), *model.buffers())
    return {id(tensor) for tensor in tensors if hasattr(tensor, _ELSEWHERE)}


def replace_tensors(model: nn.Module, made: Mapping[Any, Any]) -> None:
    """Puts other parameters and buffers in the places of some."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor in made:
                    table[name] = made[tensor]


@torch.no_grad()
def _arenas(parameters: list[nn.Parameter], shards: Shards) -> dict[nn.Parameter, nn.Parameter]:
    """A sharded parameter for each whole one, side by side in memory by dtype and device."""
    count, rank = shards.sharding.shards, shards.rank
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    places = []
    for parameter in parameters:
        rows = padded_rows(parameter.shape[0], count)
        size = rows * (parameter.numel() // parameter.shape[0])
        kind = (parameter.dtype, parameter.device)
        places.append((parameter, kind, sizes.get(kind, 0), rows))
        sizes[kind] = sizes.get(kind, 0) + size
    arenas = {(t, d): torch.zeros(size, dtype=t, device=d) for (t, d), size in sizes.items()}
    made = {}
    for parameter, kind, offset, rows in places:
        mine = parameter.detach()[rank * rows : (rank + 1) * rows]
        local = arenas[kind].as_strided(mine.shape, _contiguous_stride(mine.shape), offset)
        local.copy_(mine)
        made[parameter] = nn.Parameter(shards.cut(local, parameter), parameter.requires_grad)
    return made


def _contiguous_stride(shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))
