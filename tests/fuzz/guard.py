"""Notes what a loader does besides loading: files of others, code, processes, network.

``sys.addaudithook`` cannot be undone, so this is for processes of their own.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import sysconfig
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.fx import operator_schemas

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEVER = (
    *(
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "os.forkpty",
        "os.startfile",
    ),
    *("subprocess.Popen", "pty.spawn", "pickle.find_class", "webbrowser.open", "code.__new__"),
    *("ctypes.dlopen", "urllib.Request", "os.setxattr", "os.putenv", "sys.addaudithook"),
)
_CHANGES = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink"),
    *("os.truncate", "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile"),
)
# Where libraries lie, whose modules may be imported late; torch reads lines of whatever calls it.
_LIBRARIES = tuple(
    {
        *(os.path.realpath(path) for path in sysconfig.get_paths().values()),
        str(Path(__file__).resolve().parents[2] / "fxzero"),
        str(Path(__file__).resolve().parents[2] / "passes"),
        str(Path(__file__).resolve().parents[2] / "kernels"),
        str(Path(__file__).resolve().parent),
    }
)
# What fx writes of a graph whose every name was checked; modules of the interpreter.
_GENERATED = ("<eval_with_key>", "<frozen ")
# Evaluate types in the signatures of registered operators, and in our own dataclasses.
_OF_TYPES = (operator_schemas.__file__, typing.__file__)


class Hang(BaseException):
    """No loader catches it."""


class Guard:
    """Notes violations between ``start`` and ``stop``."""

    def __init__(self) -> None:
        self.folder, self.readable = "", ()
        self.active = False
        self.violations: list[str] = []
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGALRM, self._hang)
        signal.signal(signal.SIGPROF, self._hang)

    def start(self, folder: Path, seconds: float, readable: tuple[Path, ...] = ()) -> None:
        self.folder = os.path.realpath(folder)
        self.readable = tuple(map(os.path.realpath, readable))
        self.violations.clear()
        # Of a processor, which others may use, too; and for a loader that only waits.
        signal.setitimer(signal.ITIMER_PROF, 3 * seconds)
        signal.setitimer(signal.ITIMER_REAL, 20 * seconds)
        self.active = True

    def stop(self) -> list[str]:
        self.active = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return list(self.violations)

    def _hang(self, *_: Any) -> None:
        raise Hang

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        judge: Callable[..., str | None] | None = None
        if event == "open":
            judge = self._open
        elif event in ("exec", "compile"):
            judge = self._code
        elif event in _CHANGES:
            judge = self._change
        elif event in _NEVER or event.startswith(("socket.", "http.", "ftplib.", "smtplib.")):
            judge = lambda *given: f"{event} {given!r:.200}"  # noqa: E731
        if judge is None:
            return
        self.active = False  # what is asked here is not judged
        try:
            found = judge(*arguments)
        finally:
            self.active = True
        if found is not None:
            frames = traceback.extract_stack(limit=8)[:-1]
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
            self.violations.append(f"{found} at {where}")
            raise PermissionError(f"guard: {found}")

    def _open(self, path: Any, mode: Any, flags: int) -> str | None:
        if isinstance(path, int):
            return None
        real = os.path.realpath(os.fsdecode(path))
        if _within(real, (self.folder, "/dev/null")):
            return None
        if not flags & _WRITES and _within(real, (*_LIBRARIES, *self.readable)):
            return None
        return f"open {path!r:.200} {mode} {flags:#x}"

    def _change(self, path: Any, *_: Any) -> str | None:
        inside = _within(os.path.realpath(os.fsdecode(path)), (self.folder,))
        return None if inside else f"change {path!r:.200}"

    def _code(self, code: Any, name: Any = None) -> str | None:
        name = os.fsdecode(name) if name is not None else getattr(code, "co_filename", "?")
        if sys._getframe(2).f_code.co_filename in _OF_TYPES:
            return None
        if name.startswith(_GENERATED) or _within(os.path.realpath(name), _LIBRARIES):
            return None
        return f"code {name!r:.100} {code!r:.200}"


def _within(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(root + os.sep) for root in roots)


def limit_memory(more: int) -> None:
    """This process can take ``more`` bytes of address space than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
