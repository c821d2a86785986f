"""Processes that train together over gloo, for tests: each runs what it is sent, by name.

    with Pool(2) as pool:
        answers = pool.run("cases:train", zero=3)     # one answer a rank

A task that takes too long kills all processes; the pool is then of no more use.

Imports take seconds, so ranks are forks of processes that have imported what ranks need. There are
two of these: neighbours have different hash seeds, as processes of a launcher have.
"""

import functools
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path

_HERE = str(Path(__file__).resolve().parent)
_SEEDS = 2
# The law of graphs is checked where they are made by one process.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99", "FXZERO_SPEC": "0"}
_IMPORTED = (
    *("pipeline_cases", "rank_cases", "fxzero.compiler", "fxzero.pipelining.training"),
    "transformers.models.gpt2.modeling_gpt2",
)


class Pool:
    """``world`` processes with a default process group, or one without.

    They meet over a file, or over a server of this process: it needs no file that could be too
    large, or another user's.
    """

    def __init__(self, world, served=False, *, connected=True):
        assert connected or world == 1
        self.server = _server() if served else None
        port = self.server.port if served else None
        self.directory = tempfile.TemporaryDirectory()
        self.connections, self.processes = [], []
        for rank in range(world):
            ours, theirs = multiprocessing.Pipe()
            given = rank, world, self.directory.name if connected else None, port
            self.processes.append(_forker(rank % _SEEDS).fork(theirs, given))
            theirs.close()
            self.connections.append(ours)

    def run(self, task, timeout=120, dying=(), stuck=(), **given):
        """The ranks' answers; raises AssertionError with the first rank's traceback.

        Ranks that are to die in the task answer None, as do those that will be stuck.
        """
        for connection in self.connections:
            connection.send((task, given))
        deadline = time.monotonic() + timeout
        answers = []
        for rank, connection in enumerate(self.connections):
            if rank in stuck:
                answers.append((True, None))
                continue
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
        return [process.join(20) for process in self.processes]

    def close(self):
        for process in self.processes:
            process.kill()
        self.directory.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _server():
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class _Rank:
    """A process that a forker made."""

    def __init__(self, forker, number):
        self.forker, self.number, self.exitcode = forker, number, None

    def join(self, seconds):
        """Its exit code, or None if it still runs."""
        if self.exitcode is None:
            self.exitcode = self.forker.ask("wait", self.number, seconds)
        return self.exitcode

    def kill(self):
        if self.exitcode is None:  # it is not waited for yet, so the number is still its own
            os.kill(self.number, signal.SIGKILL)
            assert self.join(60) is not None


class _Forker:
    """A process with a hash seed of its own that imports what ranks need, and forks them."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_fork_ranks, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def fork(self, connection, given):
        self.connection.send(("fork", dict(os.environ), given))
        reduction.send_handle(self.connection, connection.fileno(), self.process.pid)
        return _Rank(self, self.connection.recv())

    def ask(self, *request):
        self.connection.send(request)
        return self.connection.recv()


_forker = functools.cache(lambda seed: _Forker())


def _fork_ranks(connection):
    os.environ.update(_ENVIRONMENT)
    sys.path.insert(0, _HERE)
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is imported is no garbage, and takes long to go through
    while True:
        try:
            request, *given = connection.recv()
        except EOFError:
            return
        if request == "wait":
            connection.send(_exit_code(*given))
            continue
        handle = reduction.recv_handle(connection)
        number = os.fork()
        if number == 0:
            connection.close()
            environment, place = given
            os.chdir(os.path.dirname(os.path.abspath(__file__)))  # that of its birth may be gone
            os.environ.clear()
            os.environ.update(environment | _ENVIRONMENT)
            _serve(Connection(handle), *place)
            return  # the process ends like one that was not forked
        os.close(handle)
        connection.send(number)


def _exit_code(number, seconds):
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def _serve(connection, rank, world, directory, port):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if port is not None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
    elif directory is not None:
        store = dist.FileStore(os.path.join(directory, "store"), world)
    if directory is not None:
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
