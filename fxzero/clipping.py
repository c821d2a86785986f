"""Clipping gradients by their global norm, to the bit what one device would compute.

The norm of a sum of squares depends on the order of the sum, so shards' norms do not add up to the
bits of the whole gradient's.  Instead each rank gets some of the gradients whole, one in as many as
there are ranks, and computes their norms as torch does; that moves a fraction of what the
reduction of the gradients has moved.

    gradients a b c d on 2 ranks     rank 0: |a| |c|     rank 1: |b| |d|     all: |a| |b| |c| |d|

Stages of a pipeline tell each other the norms of theirs.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fxzero import _torch
from fxzero.errors import RuntimeStateError, UsageError
from fxzero.failures import Transfer, TransferError
from fxzero.optim.base import Optimizer
from fxzero.pipelining.training import PipelinedModel
from fxzero.ranks import Ranks
from fxzero.sharding import Shards, is_cut, padded, padded_rows


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.Tensor:
    """Scales the model's gradients so that their norm is at most ``max_norm``.

    On many ranks all of them must call it.  The result, and the gradients, are bitwise those of
    ``torch.nn.utils.clip_grad_norm_`` over whole gradients.

    Args:
        optimizer: of ``fxzero.optim``, with all of the model's parameters: its next step scales
            gradients as it reads them, and this function writes none.

    Returns:
        The norm before clipping, a scalar tensor, the same on every rank.

    Raises:
        UsageError: the optimizer is not of ``fxzero.optim``, or has other parameters, or the model
            was compiled with ``update="backward"``.
        RuntimeStateError: gradients of ``no_sync`` steps were not reduced yet.
        RuntimeError: the norm is not finite, and ``error_if_nonfinite`` is set.
    """
    state = vars(model).get("_fxzero")
    if state is not None and state.options.updates:
        raise UsageError(
            'clipping needs the norm of all gradients, which update="backward" never has at once\n'
            '  compile with update="step" to clip'
        )
    ranks: Ranks | None = state.ranks if state is not None else None
    pipeline: PipelinedModel | None = state.pipeline if state is not None else None
    parameters = [p for p in model.parameters() if p.grad is not None]
    if optimizer is not None:
        optimizer = _checked(optimizer, parameters)
    is_whole = pipeline is None and (ranks is None or not parameters)
    if is_whole and optimizer is None:
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
    if ranks is not None and ranks.any_pending(parameters):
        raise RuntimeStateError(
            "gradients of no_sync steps are not reduced yet\n"
            "  run the last backward of an accumulation outside of no_sync, then clip"
        )
    total = gradient_norm(model, norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the norm of the gradients is {total.item()}, so they were not clipped")
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    if optimizer is not None:
        optimizer.scale_next_step(scale)
        return total
    for parameter in parameters:
        _local_gradient(parameter).mul_(scale)
    return total


@torch.no_grad()
def gradient_norm(model: nn.Module, norm_type: float = 2.0) -> torch.Tensor:
    """The norm of all gradients of the model, which have been reduced; a scalar, 0 without any.

    On many ranks all of them must call it; it is the same on every rank.
    """
    state = vars(model).get("_fxzero")
    ranks: Ranks | None = state.ranks if state is not None else None
    pipeline: PipelinedModel | None = state.pipeline if state is not None else None
    parameters = [p for p in model.parameters() if p.grad is not None]
    if pipeline is None and (ranks is None or not parameters):
        gradients = [p.grad for p in parameters if p.grad is not None]
        total: torch.Tensor = nn.utils.get_total_norm(gradients, norm_type)
        return total.full_tensor() if isinstance(total, DTensor) else total
    with contextlib.nullcontext() if pipeline is None else pipeline.told():
        norms = _explained_norms(parameters, ranks, norm_type, explains=pipeline is None)
        if pipeline is not None:
            norms = pipeline.of_all_stages(model, norms)
    total = torch.linalg.vector_norm(norms, norm_type)
    return total


def _checked(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> Optimizer:
    """An optimizer that can scale the gradients of these parameters, and of no others."""
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"optimizer={type(optimizer).__name__} of {type(optimizer).__module__} cannot scale "
            "gradients in its step\n  leave it out, or use fxzero.optim.AdamW, SGD or Lion"
        )
    owned = {id(p) for g in optimizer.param_groups for p in g["params"] if p.grad is not None}
    clipped = {id(p) for p in parameters}
    if owned != clipped:
        raise UsageError(
            f"of the parameters with gradients {len(clipped - owned)} are the model's and not the "
            f"optimizer's, {len(owned - clipped)} the optimizer's and not the model's\n"
            "  leave optimizer= out to scale the model's gradients in place"
        )
    return optimizer


def _explained_norms(
    parameters: list[nn.Parameter], ranks: Ranks | None, norm_type: float, *, explains: bool
) -> torch.Tensor:
    """``_norms``; the error of a failed collective names the step and who did not answer.

    Args:
        explains: whether that is done here; a pipeline explains errors itself.
    """
    if ranks is None:
        return _norms(parameters, None, norm_type)
    try:
        return _norms(parameters, ranks.shards, norm_type)
    except RuntimeError as error:
        axis, size = ranks.shards.sharding.shard, sum(_local_gradient(p).nbytes for p in parameters)
        over = "dp" if axis is None else axis.name
        what = f"exchange of {len(parameters)} gradients for their norm"
        failed = TransferError(Transfer(what, size, over, ranks.mesh.members(over)), error)
        if not explains:
            raise failed from error
        raise ranks.agreement.explained(failed, f"step {ranks.steps}, clipping") from error


def _norms(parameters: list[nn.Parameter], shards: Shards | None, norm_type: float) -> torch.Tensor:
    """The norm of each gradient, in order, on every rank."""
    gradients = [_local_gradient(p) for p in parameters]
    if not parameters:
        return torch.zeros(0)
    if shards is None:
        return torch.stack([torch.linalg.vector_norm(g, norm_type) for g in gradients])
    norms = torch.zeros(len(parameters), device=gradients[0].device)
    cut = [i for i, p in enumerate(parameters) if is_cut(p)]
    count = shards.sharding.shards
    for start in range(0, len(cut), count):
        chunk = cut[start : start + count]
        rows = (padded_rows(parameters[i].shape[0], count) for i in chunk)
        parts = [padded(gradients[i], n) for i, n in zip(chunk, rows, strict=True)]
        whole = _exchange(parts, shards)
        if whole is not None:
            mine = chunk[shards.rank]
            whole = whole.view(-1, *parameters[mine].shape[1:])[: parameters[mine].shape[0]]
            norms[mine] = torch.linalg.vector_norm(whole, norm_type)
    if cut:
        dist.all_reduce(norms, group=shards.group)
    for i, parameter in enumerate(parameters):
        if not is_cut(parameter):
            norms[i] = torch.linalg.vector_norm(gradients[i], norm_type)
    return norms


def _exchange(parts: list[torch.Tensor], shards: Shards) -> torch.Tensor | None:
    """Sends the i-th part to rank i; returns what all ranks sent to this one, if anything."""
    count, rank = shards.sharding.shards, shards.rank
    sent = [part.numel() for part in parts] + [0] * (count - len(parts))
    received = [sent[rank]] * count
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    flat = torch.cat([part.flatten().to(dtype) for part in parts])
    whole = flat.new_empty(sum(received))
    dist.all_to_all_single(whole, flat, received, sent, group=shards.group)
    return whole.to(parts[rank].dtype) if rank < len(parts) else None


def _local_gradient(parameter: torch.Tensor) -> Any:
    assert parameter.grad is not None
    return _torch.local_tensor(parameter.grad)
