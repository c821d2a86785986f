"""Processes that train together over gloo, for tests: each runs what it is sent, by name.

    with Pool(2) as pool:
        answers = pool.run("cases:train", zero=3)     # one answer a rank

A task that takes too long kills all processes; the pool is then of no more use.
"""

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

_HERE = str(Path(__file__).resolve().parent)


class Pool:
    """``world`` processes with a default process group."""

    def __init__(self, world):
        context = multiprocessing.get_context("spawn")
        self.directory = tempfile.TemporaryDirectory()
        self.connections, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world, self.directory.name), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, task, timeout=120, dying=(), **given):
        """The ranks' answers; raises AssertionError with the first rank's traceback.

        Ranks that are to die in the task answer None.
        """
        for connection in self.connections:
            connection.send((task, given))
        deadline = time.monotonic() + timeout
        answers = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(max(deadline - time.monotonic(), 0)):
                self.close()
                raise AssertionError(f"{task}({given}): rank {rank} took more than {timeout} s")
            try:
                answers.append(connection.recv())
            except EOFError:
                assert rank in dying, f"{task}({given}): rank {rank} died"
                answers.append((True, None))
        failed = [f"rank {r}: {text}" for r, (ok, text) in enumerate(answers) if not ok]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def leave(self):
        """Lets all processes end; their exit codes."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(20)
        return [process.exitcode for process in self.processes]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.directory.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _serve(connection, rank, world, directory):
    # The law of graphs is checked where they are made by one process.
    os.environ.update(OMP_NUM_THREADS="1", KINETO_LOG_LEVEL="99", FXZERO_SPEC="0")
    sys.path.insert(0, _HERE)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(directory, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    while True:
        try:
            task, given = connection.recv()
        except EOFError:
            return
        module, _, function = task.partition(":")
        try:
            answer = True, getattr(importlib.import_module(module), function)(**given)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)
