"""A Plan as a snapshot of a caching allocator, which pytorch.org/memory_viz draws.

Values of the plan whose life is known are blocks with the line of the user's code that makes them.
What else a role holds at an instant are blocks without one, so that at each instant of the plan's
timeline the blocks sum to its bytes.  There is one device for each track.  Nothing here reads a
pickle.

    instants   0       1       2             alloc a, alloc rest     free rest    free a
    saved a    [---------------]       ->
    rest       [-------]
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxzero.errors import UsageError
from fxzero.plans import Plan, Track, Value
from fxzero.report.tables import entries

_BASE, _DEVICE_SPAN = 0x7F00_0000_0000, 1 << 44
_SEGMENT = 2 << 20
# The viewer reads 2 to 4.
_PROTOCOL = 4
_SOURCE = re.compile(r"(?P<file>.+?):(?P<line>\d+) in (?P<name>[^:]+)")
_Frames = list[dict[str, Any]]


def write(plan: Plan, path: Path) -> None:
    """Writes the snapshot of ``plan`` as a pickle."""
    path.write_bytes(pickle.dumps(snapshot(plan), protocol=_PROTOCOL))


def snapshot(plan: Plan) -> dict[str, Any]:
    """As ``torch.cuda.memory._snapshot()`` returns it.

    Raises:
        UsageError: the plan has no timeline, as the plan of one rank of a running pipeline.
    """
    if not plan.timeline:
        raise UsageError("this plan has no timeline to draw: make one with `fxzero plan`")
    segments, traces = [], []
    for device, track in enumerate(plan.timeline):
        values = [value for value, _ in entries(plan)] if len(plan.timeline) == 1 else []
        blocks = [*_known(track, values, left := _sizes(track)), *_rest(track, left)]
        base = _BASE + device * _DEVICE_SPAN
        extent = _place(blocks, len(track.seconds))
        segments.append(_segment(blocks, device, base, extent, len(track.seconds) - 1))
        traces.append(list(_events(blocks, track, base, extent)))
    return {"segments": segments, "device_traces": traces}


@dataclass
class _Block:
    """Bytes that are there from instant ``first`` to ``last``, at ``offset`` in the segment."""

    size: int
    first: int
    last: int
    frames: _Frames
    offset: int = 0


def _sizes(track: Track) -> dict[str, list[int]]:
    return {role: list(track.of(role)) for role in track.bytes}


def _known(track: Track, values: list[Value], left: dict[str, list[int]]) -> Iterator[_Block]:
    """Values that fit into what is ``left`` of their role at each instant, which they lower."""
    count = len(track.seconds)
    for value in values:
        role = left.get(value.role)
        if role is None or not 0 <= value.first <= value.last < count or value.bytes <= 0:
            continue
        alive = range(value.first, value.last + 1)
        if any(role[instant] < value.bytes for instant in alive):
            continue
        for instant in alive:
            role[instant] -= value.bytes
        yield _Block(value.bytes, value.first, value.last, _frames(value))


def _rest(track: Track, left: dict[str, list[int]]) -> Iterator[_Block]:
    """What is left of each role: the latest blocks go first, and what goes too far comes back."""
    for role, sizes in left.items():
        frames = [{"filename": "fxzero plan", "line": 0, "name": f"{role}, not listed"}]
        open_blocks: list[_Block] = []
        held = 0
        for instant, size in enumerate(sizes):
            while held > size:
                block = open_blocks.pop()
                held -= block.size
                block.last = instant - 1
                yield block
            if held < size:
                open_blocks.append(_Block(size - held, instant, len(sizes) - 1, frames))
                held = size
        yield from open_blocks


def _frames(value: Value) -> _Frames:
    """What the value is, then the line that makes it."""
    what = f"{value.name} {value.shape} ({value.role})"
    frames: _Frames = [{"filename": value.module or "fxzero plan", "line": 0, "name": what}]
    if found := _SOURCE.match(value.source):
        frames.append(
            {"filename": found["file"], "line": int(found["line"][:9]), "name": found["name"]}
        )
    return frames


def _place(blocks: list[_Block], instants: int) -> int:
    """Gives each block the first gap that is large enough; returns the bytes that all need."""
    begins, ends = _by_instant(blocks, instants)
    taken: list[_Block] = []  # by offset
    extent = 0
    for instant in range(instants):
        gone = {id(block) for block in ends[instant]}
        taken = [block for block in taken if id(block) not in gone]
        for block in sorted(begins[instant], key=lambda each: -each.size):
            at, before = 0, 0
            for other in taken:
                if other.offset - at >= block.size:
                    break
                at, before = other.offset + other.size, before + 1
            block.offset = at
            taken.insert(before, block)
            extent = max(extent, at + block.size)
    return -(-extent // _SEGMENT) * _SEGMENT


def _by_instant(blocks: list[_Block], instants: int) -> tuple[list[list[_Block]], ...]:
    """Which blocks begin at each instant, and which are gone by then."""
    begins: list[list[_Block]] = [[] for _ in range(instants)]
    ends: list[list[_Block]] = [[] for _ in range(instants + 1)]
    for block in blocks:
        begins[block.first].append(block)
        ends[block.last + 1].append(block)
    return begins, ends


def _events(blocks: list[_Block], track: Track, base: int, extent: int) -> Iterator[dict[str, Any]]:
    """What the allocator would have done, in order."""

    begins, ends = _by_instant(blocks, len(track.seconds))
    yield _event("segment_alloc", base, extent, [], 0.0)
    for instant, at in enumerate(track.seconds):
        for block in ends[instant]:
            for action in ("free_requested", "free_completed"):
                yield _event(action, base + block.offset, block.size, block.frames, at)
        for block in sorted(begins[instant], key=lambda each: -each.size):
            yield _event("alloc", base + block.offset, block.size, block.frames, at)


def _event(action: str, address: int, size: int, frames: _Frames, seconds: float) -> dict[str, Any]:
    return {
        "action": action, "addr": address, "size": size, "stream": 0, "frames": frames,
        "time_us": round(1e6 * seconds),
    }  # fmt: skip


def _segment(blocks: list[_Block], device: int, base: int, extent: int, end: int) -> dict[str, Any]:
    """The device's memory at the end of the trace: blocks and the gaps between them."""
    there = sorted((b for b in blocks if b.last == end), key=lambda b: b.offset)
    used = sum(block.size for block in there)
    cut: list[dict[str, Any]] = []
    at = 0

    def add(size: int, state: str, frames: _Frames) -> None:
        cut.append(
            {
                "address": base + at, "size": size, "requested_size": size, "state": state,
                "frames": frames,
            }
        )  # fmt: skip

    for block in there:
        if block.offset > at:
            add(block.offset - at, "inactive", [])
            at = block.offset
        add(block.size, "active_allocated", block.frames)
        at += block.size
    if at < extent:
        add(extent - at, "inactive", [])
    return {
        "device": device, "address": base, "total_size": extent, "stream": 0,
        "segment_type": "large", "segment_pool_id": (0, 0), "allocated_size": used,
        "active_size": used, "requested_size": used, "is_expandable": False, "frames": [],
        "blocks": cut,
    }  # fmt: skip
