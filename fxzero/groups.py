"""Process groups that their members make, whatever other groups each of them is in.

Torch names a group that only its members make by their ranks and by how many groups the process is
in already.  Members that are in different numbers of groups, of the user's or of ours, would wait
for each other under different names, so they first make these numbers equal.

    rank 0, in 3 groups:                                  new_group([0, 1])
    rank 1, in 2 groups:  a group of its own,             new_group([0, 1])
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fxzero import _torch

# How long a rank waits for the others: to come here, to plan, or to write a checkpoint.
PATIENCE = timedelta(minutes=30)
# Of a message that nobody sends.
_NEVER_SENT = 2**20


def make_group(ranks: Sequence[int], **options: Any) -> Any:
    """A process group of some ranks, all of which call this, with options of ``new_group``.

    In it ranks wait for each other as long as in the default group, unless options say otherwise.
    """
    _level(tuple(ranks))
    options = {"timeout": _torch.default_timeout(), **options}
    return dist.new_group(list(ranks), use_local_synchronization=True, **options)


def close_group(group: Any) -> None:
    """Ends a process group of gloo, so that all who wait in it for this rank get an error.

    gloo closes the connections of a group where a wait takes too long.  Torch's own ways to end a
    group leave them open while anything refers to it.  NCCL has a watchdog.
    """
    others = [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]
    if not others or "cpu:gloo" not in str(dist.get_backend_config(group)):
        return
    with contextlib.suppress(RuntimeError):  # of the wait, or of a group that is closed
        message = dist.irecv(torch.empty(1), others[0], group=group, tag=_NEVER_SENT)
        if message is not None:
            message.wait(timedelta(milliseconds=1))


def _level(ranks: tuple[int, ...]) -> None:
    """Brings this process into as many groups as any of the ranks is in."""
    store, me = _torch.default_store(), dist.get_rank()
    place = f"fxzero groups {ranks}"
    number = store.add(f"{place} of {me}", 1)  # of groups of the same ranks, equal on all of them
    place = f"{place} {number}"
    store.set(f"{place} {me}", str(_torch.groups_of_this_process()))
    if me == ranks[0]:
        keys = [f"{place} {rank}" for rank in ranks]
        store.wait(keys, PATIENCE)
        store.set(place, str(max(int(store.get(key)) for key in keys)))
    store.wait([place], PATIENCE)
    for _ in range(int(store.get(place)) - _torch.groups_of_this_process()):
        dist.new_group([me], backend="gloo", use_local_synchronization=True)
