"""The peak of tensor memory in one step: the allocator's on CUDA, counted storages on a CPU.

Counting takes some 50 microseconds for each operator, so on a CPU one in ten asked-for steps is
measured, the first among them, and what it came to stands until the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fxzero.measurement import (
    StorageCounter,
    host_tensors_of,
    runs_generated_code,
    tensors_of,
)

_ONE_IN = 10


class PeakMeter:
    """Measures some of a model's steps.

    Attributes:
        bytes: the peak of the latest step that was measured; None: there is none.
        is_new: whether that was the latest step of all that were asked for.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.model, self.optimizer = model, optimizer
        self.bytes: int | None = None
        self.is_new = False
        self._asked = 0
        self._cuda = any(p.is_cuda for p in model.parameters())
        self._counter: StorageCounter | None = None

    @property
    def obstacle(self) -> str:
        """Why nothing is measured; "" if it is."""
        if not self._cuda and runs_generated_code(self.model):
            return "generated code allocates on a CPU where nobody counts; model.verify measures it"
        return ""

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Inside is one step."""
        turn, self._asked = self._asked, self._asked + 1
        self.is_new = not self.obstacle and (self._cuda or turn % _ONE_IN == 0)
        if not self.is_new:
            yield
        elif self._cuda:
            torch.cuda.reset_peak_memory_stats()
            yield
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            # One counter for all steps: it stays with every storage that it has seen.
            if self._counter is None:
                self._counter = StorageCounter()
            counter = self._counter
            known = [*tensors_of(self.model), *tensors_of(self.optimizer)]
            counter.add(known, host_tensors_of(self.optimizer))
            counter.peak = counter.current
            with counter:
                yield
            self.bytes = counter.peak

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Inside a measured step, what the monitor itself allocates."""
        before = None if self._counter is None else self._counter.peak
        yield
        if self._counter is not None and before is not None:
            self._counter.peak = before
