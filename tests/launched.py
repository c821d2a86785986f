"""Runs a script as a user would, and ends all processes that it started when its time is up.

A launcher that is killed alone leaves its processes behind, which hold its output open: whoever
waits for that output then waits for ever.
"""

import contextlib
import os
import signal
import subprocess
import sys


def launched(*arguments, timeout, **given):
    """What ``python *arguments`` comes to, as ``subprocess.run`` says it, its output as text."""
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes, **given) as process:
        try:
            printed, said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            said = _ended(process)
            raise AssertionError(f"not done after {timeout} s\n{said[-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, printed, said)


def _ended(process):
    """What a process has said that is ended with all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):  # torchrun ends its workers when it is told
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return "".join(process.communicate(timeout=10))
    return ""
