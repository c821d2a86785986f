"""What other tools read of a Plan: torch's memory viewer, trace viewers, JSON Schema."""

from __future__ import annotations

import json
import pickle
import pickletools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import MiB, gpt_plan

from fxzero.errors import UsageError
from fxzero.plans import PipelinePlan, PipelineStage, Plan, Track, Turn, Value
from fxzero.report import memory_viz, schema, trace

PUBLISHED = Path(__file__).resolve().parent.parent / "docs" / "plan.schema.json"
# What the viewer at pytorch.org/memory_viz can read of a pickle.
OPCODES = {
    "APPENDS", "BINGET", "BININT", "BININT1", "BININT2", "EMPTY_DICT", "EMPTY_LIST", "FRAME",
    "LONG1", "LONG_BINGET", "MARK", "MEMOIZE", "PROTO", "SETITEMS", "SHORT_BINUNICODE", "STOP",
    "TUPLE2", "APPEND", "NEWFALSE", "BINUNICODE", "EMPTY_TUPLE", "NEWTRUE", "NONE", "BINFLOAT",
}  # fmt: skip


def dated() -> Plan:
    """The GPT of other tests, whose values know when they are there."""
    plan = gpt_plan()
    (track,) = plan.timeline
    last, at = len(track.seconds) - 1, track.totals.index(max(track.totals))
    lives = {"parameter": (0, last), "optimizer": (0, last), "temporary": (at, at)}

    def date(value: Value, index: int) -> Value:
        first, end = lives.get(value.role, (at - index % 5, at + index % 7))
        return replace(value, first=first, last=end)

    alive = tuple(date(value, index) for index, value in enumerate(plan.peak.alive))
    return replace(plan, peak=replace(plan.peak, alive=alive))


def pipeline_plan() -> Plan:
    """Two ranks with a turn each."""
    stages = tuple(PipelineStage(rank, "h", 5, 1, 1.0, 1.0, 0.0, 0) for rank in range(2))
    turns = (Turn(0, "F", 0, 0, 0.0, 1.0), Turn(1, "B", 1, 0, 1.0, 2.0))
    tracks = tuple(
        Track(rank, (0.0, 1.0, 2.0), {"saved": (0, 9 + rank, 5), "parameter": (7,)})
        for rank in range(2)
    )
    return replace(
        gpt_plan(), timeline=tracks, pipeline=PipelinePlan("1f1b", 1, 0.5, stages, turns)
    )


# Memory viewer


def played(events: list[dict[str, Any]]) -> tuple[list[int], dict[int, int]]:
    """Bytes after each event, and what is there at the end; no two blocks may overlap."""
    live: dict[int, int] = {}
    asked: set[int] = set()
    totals = []
    for event in events:
        at, size = event["addr"], event["size"]
        if event["action"] == "alloc":
            assert all(at + size <= other or other + n <= at for other, n in live.items())
            live[at] = size
        elif event["action"] == "free_requested":
            asked.add(at)
        elif event["action"] == "free_completed":
            asked.remove(at)
            assert live.pop(at) == size
        totals.append(sum(live.values()))
    assert not asked
    return totals, live


@pytest.mark.parametrize("plan", [gpt_plan(), dated(), pipeline_plan()], ids=str)
def test_the_snapshot_holds_the_bytes_of_the_timeline(plan: Plan) -> None:
    snapshot = memory_viz.snapshot(plan)
    for track, segment, events in zip(
        plan.timeline, snapshot["segments"], snapshot["device_traces"], strict=True
    ):
        totals, live = played(events)
        assert max(totals) == max(track.totals)
        assert sum(live.values()) == track.totals[-1] == segment["allocated_size"]
        blocks = segment["blocks"]
        assert sum(block["size"] for block in blocks) == segment["total_size"]
        active = [b for b in blocks if b["state"] == "active_allocated"]
        assert {b["address"]: b["size"] for b in active} == live
        at = segment["address"]
        for block in blocks:
            assert block["address"] == at
            at += block["size"]


def test_blocks_lead_to_the_users_lines() -> None:
    (events,) = memory_viz.snapshot(dated())["device_traces"]
    frames = [event["frames"] for event in events if event["action"] == "alloc"]
    (mlp,) = [each for each in frames if each[0]["name"].startswith("addmm_2 ")]
    assert mlp[0]["filename"] == "transformer.h.0.mlp.c_fc"
    assert mlp[1] == {"filename": "modeling_gpt2.py", "line": 244, "name": "forward"}


def test_the_viewers_of_torch_take_the_snapshot(tmp_path: Path) -> None:
    viewer = pytest.importorskip("torch.cuda._memory_viz")
    plan = dated()
    plan.to_memory_viz(tmp_path / "plan.pickle")
    snapshot = pickle.loads((tmp_path / "plan.pickle").read_bytes())
    assert "MemoryViz.js" in viewer.trace_plot(snapshot)
    assert "MemoryViz.js" in viewer.segment_plot(snapshot)
    text = viewer.trace(snapshot)
    assert "entries" in text
    assert "cudaMalloc" in text
    lines = viewer.memory(snapshot, format_flamegraph=lambda lines: lines).splitlines()
    (track,) = plan.timeline
    sizes = [int(line.rpartition(" ")[2]) for line in lines if ";active_allocated;" in line]
    assert sum(sizes) == track.totals[-1]


def test_the_viewer_in_the_browser_knows_every_opcode(tmp_path: Path) -> None:
    dated().to_memory_viz(tmp_path / "plan.pickle")
    content = (tmp_path / "plan.pickle").read_bytes()
    found = list(pickletools.genops(content))
    assert {opcode.name for opcode, _, _ in found} <= OPCODES
    assert next(argument for opcode, argument, _ in found if opcode.name == "PROTO") == 4


def test_a_plan_without_a_timeline_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no timeline"):
        replace(gpt_plan(), timeline=()).to_memory_viz(tmp_path / "plan.pickle")


# Trace


def test_the_trace_has_phases_values_and_a_counter(tmp_path: Path) -> None:
    plan = dated()
    plan.to_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    counters = [event for event in events if event["ph"] == "C"]
    (track,) = plan.timeline
    assert [sum(event["args"].values()) for event in counters] == list(track.totals)
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert spans["forward"]["dur"] == spans["backward"]["dur"] == 0.99e6
    assert spans["mm"]["args"]["bytes"] == 1571 * MiB
    assert all(event["dur"] >= 0 for event in spans.values())


def test_the_trace_of_a_pipeline_has_its_turns_by_rank() -> None:
    events = json.loads(trace.render(pipeline_plan()))["traceEvents"]
    turns = [(e["pid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert turns == [(0, "F0.0", 0, 1e6), (1, "B1.0", 1e6, 1e6)]
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["rank 0", "rank 1"]
    assert {e["pid"] for e in events if e["ph"] == "C"} == {0, 1}


# Schema


def test_the_published_schema_is_that_of_the_dataclasses() -> None:
    """Written by ``python -m fxzero.report.schema > docs/plan.schema.json``."""
    assert PUBLISHED.read_text() == schema.render()


@pytest.mark.parametrize("plan", [gpt_plan(budget=None), pipeline_plan()], ids=str)
def test_plans_obey_the_schema(plan: Plan) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema.schema())
    jsonschema.Draft202012Validator(schema.schema()).validate(json.loads(plan.to_json()))


@pytest.mark.parametrize(
    ("path", "other"),
    [
        (("peak_bytes",), "5"),
        (("schema_version",), 1),
        (("status",), "great"),
        (("surprise",), 1),
        (("saved", 0, "bytes"), None),
        (("ranks", 0, "breakdown"), []),
        (("timeline", 0, "seconds"), 5),
    ],
)
def test_the_schema_refuses_what_a_plan_is_not(path: tuple[Any, ...], other: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(gpt_plan().to_json())
    at: Any = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = other
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema.schema())
