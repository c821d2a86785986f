"""Measures the links between processes: gathers and reduce-scatters among all of them.

Two sizes tell startup and bandwidth apart.  Collectives and operators that run beside each other
compete for cores, memory or processors of the device; how much of a collective they hide is
measured, too, by products of matrices that take as long as it does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fxzero.collectives import ALL_GATHER, WAIT, all_gather, average_part
from fxzero.hardware import Hardware, Link
from fxzero.mesh import resolve_mesh

_MESSAGE_BYTES = {"cpu": 2**24, "cuda": 2**28}
_PRODUCT = {"cpu": 256, "cuda": 4096}  # rows and columns
_ROUNDS = 10


@dataclass(frozen=True)
class Links:
    """Links as they were measured.

    Attributes:
        processes: how many ran.
        inside: how many of them are in a node.
        bandwidth: bytes a second that each one receives.
        startup: seconds of a collective of next to nothing.
        overlap: the share of a collective's time that operators beside it hide, from 0 to 1.
    """

    processes: int
    inside: int
    bandwidth: float
    startup: float
    overlap: float

    def __str__(self) -> str:
        return (
            f"{self.bandwidth / 1e9:.3g} GB/s, {self.startup * 1e6:.3g} us to start; operators "
            f"hide {self.overlap:.0%} of a transfer"
        )

    def between(self, hardware: Hardware) -> Hardware:
        """A device with these links."""
        link = Link(self.bandwidth, 0.0)
        return replace(
            hardware,
            node=link,
            network=link,
            startup=self.startup,
            devices=self.inside,
            achieved=replace(hardware.achieved, links=1.0, overlap=self.overlap),
        )


def measure_links(device: str) -> Links | None:
    """By all processes of torchrun, or of the group that exists; None: there is one."""
    existed = dist.is_initialized()
    mesh = resolve_mesh(None, device)
    if mesh.size == 1:
        return None
    group, ranks, inside = mesh.groups["dp"], mesh.size, os.environ.get("LOCAL_WORLD_SIZE")
    place, size = torch.device(device), _MESSAGE_BYTES[device]
    whole = torch.zeros(size // 4 // ranks * ranks, device=place)
    part = whole[: len(whole) // ranks].clone()
    little, less = (torch.zeros(n, device=place) for n in (ranks, 1))

    def exchange(whole: torch.Tensor, part: torch.Tensor) -> None:
        all_gather(part, ranks, group)
        average_part(whole, ranks, group)

    exchange(little, less)  # connects
    nothing = _slowest(lambda: exchange(little, less), device)
    much = _slowest(lambda: exchange(whole, part), device)
    moved = 2 * size * (ranks - 1) / ranks
    overlap = _overlap(part, ranks, group, device)
    if not existed:
        dist.destroy_process_group()
    return Links(
        ranks, int(inside or ranks), moved / max(much - nothing, 1e-9), nothing / 2, overlap
    )


def is_first() -> bool:
    """Whether this is the process that writes what all of them measured."""
    rank = dist.get_rank() if dist.is_initialized() else os.environ.get("RANK", 0)
    return int(rank) == 0


def _overlap(part: torch.Tensor, ranks: int, group: str, device: str) -> float:
    """How much less than one after the other a gather and operators take beside each other."""
    matrix = torch.ones(_PRODUCT[device], _PRODUCT[device], device=device)
    alone = _slowest(lambda: all_gather(part, ranks, group), device)
    product = _slowest(lambda: matrix @ matrix, device)
    count = max(round(alone / product), 1)

    def compute() -> None:
        for _ in range(count):
            torch.mm(matrix, matrix)

    def both() -> None:
        arriving = ALL_GATHER(part, ranks, group)
        compute()
        WAIT(arriving)

    computing, together = _slowest(compute, device), _slowest(both, device)
    hidden = (alone + computing - together) / min(alone, computing)
    return round(min(max(hidden, 0.0), 1.0), 3)


def _slowest(run: Callable[[], object], device: str) -> float:
    """The longest median of all ranks, which run it equally often."""
    run()
    dist.barrier()
    median = sorted(_timed(run, device) for _ in range(_ROUNDS))[_ROUNDS // 2]
    times = torch.tensor(median, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return float(times)


def _timed(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
