"""One training step on many ranks: what graphs take for parameters, and what becomes of gradients.

A graph either averages its gradients over the ranks or returns them as this rank has them:

    graph that reduces        every step, unless one of these
    graph that does not       inside ``no_sync``: gradients are added up, unreduced
                              the step that ends an accumulation: added up, then averaged

An unreduced gradient of a sharded parameter is a DTensor with the placement ``Partial("avg")`` of
the parameter's shape, so that autograd adds up what is alike and ``zero_grad`` forgets it; that of
a whole parameter is a plain tensor, as in DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from fxzero import _torch
from fxzero.agreement import Agreement
from fxzero.errors import UsageError
from fxzero.failures import Transfer, TransferError
from fxzero.mesh import Mesh, Sharding
from fxzero.sharding import Shards, is_spread, shard_parameters
from fxzero.storages import storage_identity


@dataclass
class Ranks:
    """What a compiled model on many ranks remembers between steps.

    Attributes:
        mesh: the processes.
        shards: the way to sharded parameters.
        agreement: what they settle before they run anything.
        syncing: whether gradients are averaged; False inside ``no_sync``.
        local: ids of whole parameters whose gradient was left unreduced.
        gathered: by id and dtype, parameters that micro-batches of the step under way share.
        steps: how many training steps were begun.
    """

    mesh: Mesh
    shards: Shards
    agreement: Agreement
    syncing: bool = True
    local: set[int] = field(default_factory=set)
    gathered: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict)
    steps: int = 0

    def pending(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """What earlier steps have added up for the parameter and not reduced, if anything."""
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            partial = any(isinstance(p, Partial) for p in gradient.placements)
            return _torch.local_tensor(gradient) if partial else None
        return gradient if id(parameter) in self.local else None

    def any_pending(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether an accumulation is under way."""
        return any(self.pending(p) is not None for p in parameters if p.requires_grad)

    def whole(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A parameter of all ranks' parts, gathered when the step under way asks first for it."""
        key = id(parameter), dtype
        if key not in self.gathered:
            kind = self.shards.sharding.send_weights
            try:
                self.gathered[key] = self.shards.gather(parameter, dtype, kind)
            except RuntimeError as error:
                what = f"gather of a parameter {list(parameter.shape)} for all micro-batches"
                failed = self.moved(what, parameter, error)
                raise self.agreement.explained(failed, f"step {self.steps}") from error
        return self.gathered[key]

    def moved(self, what: str, parameter: torch.Tensor, error: RuntimeError) -> TransferError:
        """The error of a collective, outside of graphs, that moves a parameter or its gradient."""
        names = [axis.name for axis in self.shards.sharding.axes]
        peers = sorted({rank for name in names for rank in self.mesh.members(name)})
        size = parameter.numel() * parameter.element_size()
        return TransferError(Transfer(what, size, " and ".join(names), peers), error)

    def step(
        self, *, reduces: bool, syncs: bool | None = None, explains: bool = True
    ) -> StepParameters:
        """The parameters of one step.

        Args:
            reduces: whether the step's graph averages gradients.
            syncs: whether gradients are averaged behind it; None: as ``no_sync`` says.
            explains: whether errors of collectives are explained; a pipeline explains them itself.
        """
        self.steps += 1
        syncs = self.syncing if syncs is None else syncs
        return StepParameters(self, reduces, syncs, self.steps if explains else None)


def connect(model: nn.Module, mesh: Mesh, sharding: Sharding) -> Ranks | None:
    """Shards a model, whose values are equal on all ranks, over the mesh; None on one device.

    Weights that only other ranks of a pipeline have (``sharding.stand_in``) stay as they are.

    Raises:
        UsageError: the model is already spread another way.
        DivergenceError: ranks ask for different things.
    """
    if mesh.size == 1:
        return None
    agreement = Agreement(mesh)
    agreement.on_result(
        lambda: sharding,
        str,
        "ranks were given different options",
        "compile the model with the same zero and precision on every rank",
    )
    shards = Shards(mesh, sharding)
    if any(is_spread(p) for p in model.parameters()) and sharding.shard is None:
        raise UsageError("zero=0, but parameters are already sharded: compile the model anew")
    if sharding.shard is not None:
        shard_parameters(model, shards)
    return Ranks(mesh, shards, agreement)


class StepParameters:
    """What one step's graphs take and return (``runtime.Parameters``)."""

    def __init__(self, ranks: Ranks, reduces: bool, sync: bool, number: int | None) -> None:
        self.ranks = ranks
        self.reduces = reduces
        self.sync = sync
        self.number = number
        self.tensors: tuple[torch.Tensor | None, ...] = ()

    def taken(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of sharded parameters this rank's padded part, all else as it is."""
        self.tensors = tuple(t if isinstance(t, nn.Parameter) else None for t in tensors)
        return [self.ranks.shards.part(t) for t in tensors]

    def existing(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """This rank's padded part of a reduced gradient, or all of an unreduced one."""
        gradient, pending = parameter.grad, self.ranks.pending(parameter)
        if not self.reduces:
            return pending if is_spread(parameter) else gradient
        return None if gradient is None or pending is not None else self._part(gradient, parameter)

    def _part(self, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor | None:
        if not isinstance(parameter, DTensor):
            return gradient
        if not isinstance(gradient, DTensor) or gradient.placements != parameter.placements:
            return None
        part, local = self.ranks.shards.part(gradient), _torch.local_tensor(gradient)
        return part if storage_identity(part) == storage_identity(local) else None

    def returned(
        self,
        gradients: list[torch.Tensor | None],
        in_place: Collection[int],
        kept: Collection[int],
    ) -> list[torch.Tensor | None]:
        """Gradients as autograd adds them to those of the parameters, or hands them out."""
        found = list(gradients)
        for i, (gradient, parameter) in enumerate(zip(gradients, self.tensors, strict=True)):
            if parameter is not None and i in kept:
                try:
                    found[i] = self._returned(gradient, parameter, i in in_place)
                except RuntimeError as error:
                    what = f"average of what was added up for a gradient {list(parameter.shape)}"
                    raise self.ranks.moved(what, parameter, error) from error
            elif parameter is not None and gradient is not None:
                found[i] = self._handed_out(gradient, parameter)
        return found

    def handed_over(self, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """A reduced gradient that the backward does not return, as the parameter's."""
        return self.ranks.shards.gradient(gradient, parameter)

    def _handed_out(self, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """What ``torch.autograd.grad`` returns; what earlier steps have added up stays as it is."""
        shards = self.ranks.shards
        if self.reduces:
            return shards.gradient(gradient, parameter)
        if self.sync:
            return shards.reduce(gradient, parameter)
        return shards.unreduced(gradient, parameter)

    def explained(self, error: RuntimeError) -> RuntimeError:
        """The error of a failed collective names the step and who did not answer."""
        if self.number is None:
            return error
        return self.ranks.agreement.explained(error, f"step {self.number}")

    def _returned(
        self, gradient: torch.Tensor | None, parameter: torch.Tensor, is_added: bool
    ) -> torch.Tensor | None:
        ranks = self.ranks
        if not self.sync:
            return None if gradient is None else self._kept(gradient, parameter, is_added)
        if is_added and self.reduces:
            return None
        pending = gradient if is_added else ranks.pending(parameter)
        ranks.local.discard(id(parameter))
        whole = not is_spread(parameter)
        if is_added and whole and gradient is not None and gradient.is_contiguous():
            ranks.shards.reduce_in_place(gradient)  # there may be no room for averages beside all
            return None
        if pending is not None:
            parameter.grad = None
        if self.reduces:
            found = None if gradient is None else ranks.shards.gradient(gradient, parameter)
            if pending is None:
                return found
            reduced = ranks.shards.reduce(pending, parameter)
            return reduced if found is None else reduced.add_(found)
        total = pending if gradient is None else gradient
        if pending is not None and gradient is not None and not is_added:
            total = pending.add_(gradient)
        return None if total is None else ranks.shards.reduce(total, parameter)

    def _kept(
        self, gradient: torch.Tensor, parameter: torch.Tensor, is_added: bool
    ) -> torch.Tensor | None:
        if not is_spread(parameter):
            self.ranks.local.add(id(parameter))
        return None if is_added else self.ranks.shards.unreduced(gradient, parameter)
