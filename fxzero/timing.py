"""Times operators, where they stand in a graph that runs as a whole or each by itself.

An operator that runs again and again by itself finds its arguments in the caches and its result's
memory in the allocator, which in a step it seldom does; operators that are bound by memory take a
few times as long there.  So a graph that the device can hold runs in order, memory freed at each
value's last use.  What follows an operator up to the next one, views and memory given back,
counts as its own: times add up to what the graph takes.

What an operator takes and gives back while it runs, its workspace, is measured by itself: it does
not depend on what runs beside it.
"""

from __future__ import annotations

import functools
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.profiler import ProfilerActivity, profile

from fxzero import _torch
from fxzero.allocations import given_back
from fxzero.cost import call_key, drawn_operator, makes_view, operator_key, unwrapped
from fxzero.execution import last_uses
from fxzero.graph import TrainGraph
from fxzero.options import device_memory
from fxzero.storages import tensor_leaves

_RUNS = 5
_SECONDS = 0.02  # an operator by itself is run more often until it took this long
_LARGEST = 2 * 2**30  # bytes of arguments and results beyond which an operator is not run
_ROUNDS = range(5, 40)  # of a graph: so many at least, and no more than
_LEAST, _LONGEST = 2.0, 30.0  # seconds until which, and after which no further round begins
_SHARE = 0.5  # of the device's memory that a graph may take
# What operators raise that cannot be run on numbers made up.
REFUSALS = (RuntimeError, IndexError, ValueError, TypeError, MemoryError)


def times_in_place(graph: TrainGraph, device: str) -> dict[str, float]:
    """Seconds of the operators of a joint graph by ``cost.operator_key``: means over equal ones.

    Args:
        device: "cpu" or "cuda", on which it is run several times on numbers made up.

    Returns:
        An empty dict if the graph is too large for the device, or one of its operators refuses.
    """
    if not fits(graph.graph, device):
        return {}
    try:
        run_in_order(graph, device)
        rounds = [run_in_order(graph, device) for _ in rounds_of_a_graph()]
    except REFUSALS:
        return {}
    found: dict[str, list[float]] = defaultdict(list)
    for node in rounds[0]:
        found[operator_key(node)].append(statistics.median(times[node] for times in rounds))
    return {key: statistics.fmean(times) for key, times in found.items()}


def rounds_of_a_graph() -> Iterator[int]:
    """Counts runs of a graph: more of a short one, as the machine's speed changes meanwhile."""
    start = time.perf_counter()
    for done in range(_ROUNDS.stop):
        taken = time.perf_counter() - start
        if done and (taken > _LONGEST or (done >= _ROUNDS.start and taken > _LEAST)):
            return
        yield done


def fits(graph: fx.Graph, device: str) -> bool:
    """Whether the device surely has the memory that a run of a joint graph takes."""
    memory = device_memory(device)
    return memory is not None and _largest_bytes(graph) <= _SHARE * memory


@dataclass(frozen=True)
class Call:
    """An operator with arguments whose tensors need no memory.

    Attributes:
        bytes: of all tensors among arguments and results.
    """

    operator: Any
    args: Any
    kwargs: Any
    bytes: int


def call_of(node: fx.Node) -> Call:
    """The call that a node of a captured graph stands for."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    return Call(drawn_operator(node), args, kwargs, _bytes((node, *node.all_input_nodes)))


class Calls(_torch.TransparentDispatchMode):
    """Records the operators that are called inside the ``with`` block.

    Attributes:
        made: by ``cost.operator_key``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[str, Call] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        key, kwargs = call_key(func, args, kwargs or {}), kwargs or {}
        if key in self.made:
            return func(*args, **kwargs)
        operator, given = unwrapped(func, args)
        alike = pytree.tree_map_only(torch.Tensor, _without_memory, (tuple(given), kwargs))
        result = func(*args, **kwargs)
        size = sum(leaf.nbytes for leaf in tensor_leaves((args, kwargs, result)))
        self.made[key] = Call(operator, alike[0], alike[1], size)
        return result


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def times_alone(calls: Mapping[str, Call], device: str) -> tuple[dict[str, float], tuple[str, ...]]:
    """Seconds by key of operators run by themselves, and the names of those that cannot be."""
    measured: dict[str, float] = {}
    failed: dict[str, None] = {}
    for key, call in calls.items():
        try:
            measured[key] = seconds_of(_runner(call, device), device)
        except REFUSALS:
            failed[str(call.operator)] = None
    return measured, tuple(failed)


def workspaces_alone(calls: Mapping[str, Call], device: str) -> dict[str, int]:
    """Bytes by key that operators take and give back while they run, of those that do."""
    found: dict[str, int] = {}
    for key, call in calls.items():
        try:
            size = _workspace(_runner(call, device), device)
        except REFUSALS:
            continue
        if size > 0:
            found[key] = size
    return found


def _workspace(run: Callable[[], Any], device: str) -> int:
    run()  # what an operator keeps from its first run on is none
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        size = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            result = run()
        size = given_back(record)
    del result  # it had to be there until now
    return size


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """What a function takes: the median of several runs, the first one apart."""
    run()
    times: list[float] = []
    while len(times) < _RUNS or sum(times) < _SECONDS:
        watch = Watch(device)
        result = run()
        watch.stop()
        del result
        times.append(watch.seconds())
    return statistics.median(times)


def device_description(device: str) -> str:
    """'Xeon 8259CL, 2 threads, torch 2.13.0' for the CPU; the device's name for CUDA."""
    version = torch.__version__.partition("+")[0]
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {version}"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads, torch {version}"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "CPU"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else "CPU"


class Watch:
    """Runs from when it is made until it is stopped, by the device's clock."""

    def __init__(self, device: str) -> None:
        self.events = None
        if device == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        self.start = self.end = time.perf_counter()

    def stop(self) -> None:
        self.end = time.perf_counter()
        if self.events is not None:
            self.events[1].record()

    def seconds(self) -> float:
        if self.events is None:
            return self.end - self.start
        self.events[1].synchronize()
        return float(self.events[0].elapsed_time(self.events[1])) / 1e3


def run_in_order(graph: TrainGraph, device: str) -> dict[fx.Node, float]:
    """Seconds of each operator in one run of the graph."""
    dying, values = last_uses(graph.graph), dict[fx.Node, Any]()
    watches: list[tuple[fx.Node, Watch]] = []
    current: fx.Node | None = None
    for node in graph.graph.nodes:
        if node.op == "call_function":
            if not _is_free(node):
                current = node
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            watch = Watch(device)
            values[node] = node.target(*args, **kwargs)
            del args, kwargs
            for dead in dying.get(node, ()):
                del values[dead]
            watch.stop()
            if current is not None:
                watches.append((current, watch))
        elif node.op != "output":
            values[node] = example(node.meta.get("val"), device)
    times: dict[fx.Node, float] = defaultdict(float)
    for node, watch in watches:
        times[node] += watch.seconds()
    return times


def _is_free(node: fx.Node) -> bool:
    """Whether plans take a node to cost nothing."""
    operator = drawn_operator(node)
    return operator is None or makes_view(operator)


def _largest_bytes(graph: fx.Graph) -> int:
    """The most bytes at once in a run of the graph; views have none."""
    dying, now, most = last_uses(graph), 0, 0
    for node in graph.nodes:
        now += _bytes([node]) if node.op != "call_function" or not _is_free(node) else 0
        most = max(most, now)
        now -= _bytes(dead for dead in dying.get(node, ()) if not _is_free(dead))
    return most


def _bytes(nodes: Iterable[fx.Node]) -> int:
    leaves = (leaf for node in nodes for leaf in tensor_leaves(node.meta.get("val")))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def _runner(call: Call, device: str) -> Callable[[], Any]:
    if call.bytes > _LARGEST:
        raise MemoryError
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, functools.partial(example, device=device), (call.args, call.kwargs)
    )
    return lambda: call.operator(*args, **kwargs)


def example(value: Any, device: str) -> Any:
    """A tensor of the same shape, strides and dtype: random numbers, zeros for indices."""
    if not isinstance(value, torch.Tensor):
        return value
    span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    size = max(span, 0) if value.numel() else 0
    if value.is_floating_point():
        base = torch.rand(size, device=device).to(value.dtype)
    else:
        base = torch.zeros(size, dtype=value.dtype, device=device)
    return base.as_strided(value.shape, value.stride())
