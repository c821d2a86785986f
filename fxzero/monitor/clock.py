"""Times steps from the outside: from the beginning of one to that of the next.

    with step:  ....  load  with step: ....  load  with step: (measured)  record
    |<------------- timed, 2 steps ---------------->|

A step in which something is measured takes longer, and is timed only where there is no other.  A
CUDA device is waited for at both ends of a stretch and not between.
"""

from __future__ import annotations

import time

import torch
from torch import nn


class Clock:
    """Times the steps between two records.

    Attributes:
        seconds: of a step, what lies between steps included.
        loading: the part of it that lies between steps.
    """

    def __init__(self, model: nn.Module) -> None:
        self._cuda = any(p.is_cuda for p in model.parameters())
        self._start: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begins a stretch of steps."""
        self._timed = self._all = 0
        self._loading = 0.0
        self.seconds = 0.0
        if self._start is not None:
            self._start = self._ended = time.perf_counter()

    def begin(self, measured: bool) -> None:
        """A step begins, in which something may be measured."""
        now = self._now(measured)
        if self._start is None:
            self._start = self._ended = now
        self._loading += now - self._ended
        if measured and self._timed:
            self.seconds = (now - self._start) / self._timed

    def end(self, measured: bool) -> None:
        """It has ended."""
        self._ended = self._now(measured)
        self._all += 1
        if not measured:
            self._timed += 1
        elif not self._timed:
            assert self._start is not None
            self.seconds = self._ended - self._start

    @property
    def loading(self) -> float:
        return self._loading / max(self._all, 1)

    def _now(self, waits: bool) -> float:
        if waits and self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
