"""Measures the real peak of tensor memory of a function, on CPU and CUDA.

On CUDA the allocator keeps the books.  On CPU every storage that an operator returns is counted
when it first appears and subtracted when it is freed; memory that existed before counts if the
function can reach it (through its closure, arguments or globals) or touches it.  Code that
Inductor compiled allocates behind the dispatcher's back, so a function that holds such code is
measured by the profiler's record of allocations instead, which also counts scratch memory inside
operators.
"""

from __future__ import annotations

import contextlib
import functools
import time
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from fxzero import _torch
from fxzero.allocations import peak_of_allocations
from fxzero.optim.base import Optimizer
from fxzero.storages import storage_identity, tensor_leaves
from fxzero.structure import flatten
from fxzero.transfers import HOST_ZEROS, TO_HOST


@dataclass(frozen=True)
class Measurement:
    """What one call of a function took.

    Attributes:
        peak_bytes: most bytes alive at once, memory from before the call included.
        seconds: wall-clock time of the call, measuring included.
        output: what the function returned.
        baseline_bytes: memory of the function's own that existed before the call.
        method: "tensors", "allocator" (profiler record) or "cuda".
        tensor_bytes: the peak without what operators free before they return, which plans count
            only where it was calibrated; on CUDA the same as ``peak_bytes``.
        host_bytes: most bytes of offloaded values and states at once.  They are not in
            ``peak_bytes``, except by the method "allocator" what the call allocates: it cannot tell
            a CPU's host copies from its tensors.
    """

    peak_bytes: int
    seconds: float
    output: Any
    baseline_bytes: int
    method: str
    tensor_bytes: int
    host_bytes: int


def measure(fn: Callable[[], Any]) -> Measurement:
    """Calls ``fn()`` once and reports the peak of its tensor memory in bytes."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return _measure_cuda(fn)
    return _measure_cpu(fn)


def _measure_cuda(fn: Callable[[], Any]) -> Measurement:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_host_memory_stats()
    pinned = _pinned_peak()
    start = time.perf_counter()
    output = fn()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    host = _pinned_peak() - pinned
    return Measurement(peak, seconds, output, before, "cuda", peak, host)


def _pinned_peak() -> int:
    """Bytes of pinned blocks in use, which the allocator rounds up to powers of two."""
    return int(torch.cuda.host_memory_stats().get("active_bytes.peak", 0))


def _measure_cpu(fn: Callable[[], Any]) -> Measurement:
    held = _held_values(fn)
    counter = StorageCounter(
        (t for value in held for t in tensors_of(value)),
        (t for value in held for t in host_tensors_of(value)),
    )
    baseline = counter.current
    compiled = any(runs_generated_code(value) for value in held)
    record = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if compiled else None
    start = time.perf_counter()
    with record or contextlib.nullcontext(), counter:
        output = fn()
    seconds = time.perf_counter() - start
    if record is None:
        peak, host = counter.peak, counter.host_peak
        return Measurement(peak, seconds, output, baseline, "tensors", peak, host)
    peak = baseline + peak_of_allocations(record)
    tensors = baseline + peak_of_allocations(record, inside_operators=False)
    return Measurement(peak, seconds, output, baseline, "allocator", tensors, counter.host_peak)


def runs_generated_code(value: Any) -> bool:
    """Whether a value runs code that allocates behind the dispatcher's back."""
    if isinstance(value, torch.nn.Module):
        return any(_torch.is_compiled_callable(m) or _inner(m) for m in value.modules())
    if isinstance(value, (list, tuple, dict)):
        return any(
            runs_generated_code(v) for v in (value.values() if isinstance(value, dict) else value)
        )
    return _torch.is_compiled_callable(value)


def _inner(module: torch.nn.Module) -> bool:
    state = vars(module).get("_fxzero")
    return state is not None and state.options.inner == "inductor"


class StorageCounter(_torch.TransparentDispatchMode):
    """Bytes of the storages that operators touch inside the ``with`` block.

    Attributes:
        current: bytes alive now.
        peak: most bytes alive at once so far.
        host, host_peak: the same of what is in host memory.
    """

    def __init__(
        self, known: Iterable[torch.Tensor] = (), on_host: Iterable[torch.Tensor] = ()
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self.host = 0
        self.host_peak = 0
        self._seen: dict[int, int] = {}
        self._on_host: dict[int, int] = {}
        self.add(known, on_host)

    def add(self, known: Iterable[torch.Tensor], on_host: Iterable[torch.Tensor] = ()) -> None:
        """Counts tensors that exist; what is ``on_host`` may be among them."""
        for tensor in on_host:
            self._count_on_host(tensor)
        for tensor in known:
            self._count(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back for the operators on the local parts
        kwargs = kwargs or {}
        for tensor in tensor_leaves((args, kwargs)):
            self._count(tensor, existed=True)
        result = func(*args, **kwargs)
        if func in (TO_HOST, HOST_ZEROS):
            self._count_on_host(result)
        for tensor in tensor_leaves(result):
            self._count(tensor)
        return result

    def _count_on_host(self, copy: torch.Tensor) -> None:
        if not _torch.is_plain(copy):
            return
        storage, key = copy.untyped_storage(), storage_identity(copy)
        if key in self._on_host:
            return
        self._on_host[key] = storage.nbytes()
        self.host += storage.nbytes()
        self.host_peak = max(self.host_peak, self.host)
        weakref.finalize(storage, self._free, key)

    def _count(self, tensor: torch.Tensor, existed: bool = False) -> None:
        tensor = _torch.local_tensor(tensor)
        if not _torch.is_plain(tensor):
            return
        storage, key = tensor.untyped_storage(), storage_identity(tensor)
        if key in self._on_host:
            return
        size = storage.nbytes()
        known = self._seen.get(key)
        if known is None:
            weakref.finalize(storage, self._free, key)
        elif known == size:
            return
        self._seen[key] = size
        self.current += size - (known or 0)
        # What was there before the first look at it was there at the peak as well.
        self.peak = self.peak + size if existed and known is None else max(self.peak, self.current)

    def _free(self, key: int) -> None:
        self.current -= self._seen.pop(key, 0)
        self.host -= self._on_host.pop(key, 0)


def _held_values(fn: Any) -> list[Any]:
    """What ``fn`` holds: closure, bound arguments, and globals that its code names."""
    values: list[Any] = []
    if isinstance(fn, functools.partial):
        return [*_held_values(fn.func), *fn.args, *fn.keywords.values()]
    if isinstance(fn, types.MethodType):
        return [fn.__self__, *_held_values(fn.__func__)]
    if not isinstance(fn, types.FunctionType):
        return [fn]
    for cell in fn.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # a cell that is not filled yet
            continue
    names = dict.fromkeys(_global_names(fn.__code__))
    values += [fn.__globals__[name] for name in names if name in fn.__globals__]
    values += [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    nested = [v for v in values if isinstance(v, types.FunctionType) and v is not fn]
    for function in nested:
        values += [
            cell.cell_contents
            for cell in function.__closure__ or ()
            if cell.cell_contents is not function
        ]
    return values


def _global_names(code: types.CodeType) -> list[str]:
    """Global names in a function's code, comprehensions and inner functions included."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return [*code.co_names, *(name for item in inner for name in _global_names(item))]


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of a module, of an optimizer, or in any other value."""
    if isinstance(value, torch.nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        return tensors + [p.grad for p in value.parameters() if p.grad is not None]
    if isinstance(value, torch.optim.Optimizer):
        tensors = [p for group in value.param_groups for p in group["params"]]
        gradients = [p.grad for p in tensors if p.grad is not None]
        # Not flattened with its keys, which are parameters: their paths would print them.
        states = [tensor for state in value.state.values() for tensor in flatten(state)[0]]
        stages = value.stages if isinstance(value, Optimizer) else []
        return [*tensors, *gradients, *states, *stages]
    if isinstance(value, types.ModuleType | types.FunctionType | type):
        return []
    return flatten(value)[0]


def host_tensors_of(value: Any) -> list[torch.Tensor]:
    """Those of an optimizer that are in host memory."""
    return value.host_tensors if isinstance(value, Optimizer) else []
