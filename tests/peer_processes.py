"""Ranks that are processes of this machine, each with the memory of all of them mapped.

A rank's memory is a file that has no name (``memfd_create``), so that none is left behind, however
a process ends.  Every process maps the memories in another order and finds them at addresses of its
own.

    run(2, case, layout, tmp_path)      case(peers, buffers) in two processes; what each returned
"""

from __future__ import annotations

import faulthandler
import mmap
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxzero.kernels.peers import PROGRAMS, Layout, Peers, bytes_of

_SECONDS = 40.0
Case = Callable[[Peers, list[torch.Tensor]], Any]


def run(
    ranks: int, case: Case, layout: Layout, results: Path, *, programs: int = 2, epoch: int = 0
) -> list[Any]:
    """What ``case`` returned in each of the ranks' processes, which may take 40 seconds.

    Args:
        layout: of the ranks' buffers.
        results: a folder for them.
        programs: of a kernel at the most.
        epoch: how many barriers have been before.
    """
    files = [os.memfd_create(f"rank{rank}") for rank in range(ranks)]
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=_rank, args=(rank, files, case, layout, results, programs, epoch))
        for rank in range(ranks)
    ]
    try:
        for file in files:
            os.ftruncate(file, bytes_of(layout, ranks))
            os.pwrite(file, epoch.to_bytes(4, "little") * PROGRAMS * ranks, 0)
        for process in processes:
            process.start()
        _wait(processes)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        for file in files:
            os.close(file)
    assert codes == [0] * ranks, f"exit codes {codes}; None: it was still running"
    return [torch.load(results / f"{rank}.pt") for rank in range(ranks)]


def _wait(processes: list[Any]) -> None:
    """Until all are done, one has failed, in which case others wait for it, or time is up."""
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        codes = [process.exitcode for process in processes]
        if all(code == 0 for code in codes) or any(codes):
            return
        time.sleep(0.01)


def _rank(
    rank: int,
    files: list[int],
    case: Case,
    layout: Layout,
    results: Path,
    programs: int,
    epoch: int,
) -> None:
    faulthandler.cancel_dump_traceback_later()  # pytest's, of the process that this is a copy of
    _sleep_while_waiting()
    memories = {}
    for turn in range(len(files)):
        peer = (rank + turn) % len(files)
        size = os.fstat(files[peer]).st_size
        memories[peer] = torch.frombuffer(mmap.mmap(files[peer], size), dtype=torch.uint8)
    peers = Peers.of(rank, [memories[peer] for peer in range(len(files))], programs)
    peers.epochs.fill_(epoch)
    torch.save(case(peers, peers.buffers(layout)), results / f"{rank}.pt")


def _sleep_while_waiting() -> None:
    """Ranks look at their pads in a loop: where there are fewer cores, others must have a turn."""
    from triton.runtime.interpreter import InterpreterBuilder

    look = InterpreterBuilder.create_atomic_rmw

    def look_and_sleep(self: Any, *arguments: Any) -> Any:
        seen = look(self, *arguments)
        time.sleep(0.0005)
        return seen

    InterpreterBuilder.create_atomic_rmw = look_and_sleep
