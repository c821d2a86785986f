"""The Plan document: JSON there and back, and whatever a file may hold instead of one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import MiB, gpt_plan

from fxzero.errors import PlanError
from fxzero.plans import Plan

DOCUMENT = gpt_plan(recomputed=3).to_json()


def read(text: str) -> Plan | None:
    """The plan, or None where it is refused; anything but PlanError fails the test."""
    try:
        return Plan.from_json(text)
    except PlanError:
        return None


@pytest.mark.parametrize("changes", [{}, {"budget": None}, {"gap": None}, {"gap": 0.5}])
def test_a_plan_survives_json(changes: dict[str, Any]) -> None:
    plan = gpt_plan(**changes)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.hash == plan.hash


def test_a_plan_survives_a_file(tmp_path: Path) -> None:
    plan = gpt_plan()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_the_hash_depends_on_every_decision() -> None:
    assert gpt_plan(recomputed=3).hash != gpt_plan(recomputed=4).hash


def test_fits_compares_peak_and_budget() -> None:
    plan = gpt_plan()
    assert plan.fits
    assert gpt_plan(budget=None).fits
    assert gpt_plan(budget=plan.peak_bytes).fits
    assert not gpt_plan(budget=plan.peak_bytes - 1).fits
    assert not gpt_plan(status="infeasible").fits


def paths(item: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a JSON document is; of a list, only the first item."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(item, dict):
        inner = list(item.items())
    if isinstance(item, list):
        inner = list(enumerate(item[:1]))
    return [path, *(found for key, child in inner for found in paths(child, (*path, key)))]


PATHS = paths(json.loads(DOCUMENT))[1:]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def changed(path: tuple[Any, ...], change: Any) -> dict[str, Any]:
    document = copy.deepcopy(json.loads(DOCUMENT))
    at: Any = document
    for key in path[:-1]:
        at = at[key]
    change(at, path[-1])
    assert isinstance(document, dict)
    return document


@pytest.mark.slow
@given(st.sampled_from(PATHS), JSON)
def test_a_replaced_field_is_refused_or_read(path: tuple[Any, ...], other: Any) -> None:
    document = changed(path, lambda at, key: at.__setitem__(key, other))
    plan = read(json.dumps(document))
    if plan is not None:
        assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


@pytest.mark.parametrize(
    "path", [p for p in PATHS if isinstance(p[-1], str) and not {"breakdown", "bytes"} & {*p[:-1]}]
)
def test_a_missing_field_is_refused(path: tuple[Any, ...]) -> None:
    document = changed(path, lambda at, key: at.pop(key))
    with pytest.raises(PlanError, match=str(path[-1])):
        Plan.from_json(json.dumps(document))


def test_an_unknown_field_is_refused_by_name() -> None:
    document = changed(("model", "surprise"), lambda at, key: at.__setitem__(key, 1))
    with pytest.raises(PlanError, match=r"plan.model: missing \[\], unknown \['surprise'\]"):
        Plan.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("path", "other", "message"),
    [
        (("peak_bytes",), "5", r"plan.peak_bytes must be int, not str"),
        (("peak_bytes",), True, r"plan.peak_bytes must be int, not bool"),
        (("peak_bytes",), 5.0, r"plan.peak_bytes must be int, not float"),
        (("saved", 0, "bytes"), None, r"plan.saved\[0\].bytes must be int"),
        (("timeline", 0), [1, 2], r"plan.timeline\[0\] must be an object, not list"),
        (("timeline", 0, "seconds", 0), -1.0, r"plan.timeline\[0\].seconds must ascend from 0"),
        (("timeline", 0, "seconds", 1), 9.0, r"plan.timeline\[0\].seconds must ascend from 0"),
        (("timeline", 0, "seconds", 0), float("nan"), r"a plan has a number that is nan"),
        (("timeline", 0, "seconds", 281), float("inf"), r"a plan has a number that is inf"),
        (("timeline", 0, "seconds"), [], r"plan.timeline\[0\] has no instant"),
        (("timeline", 0, "bytes"), {}, r"plan.timeline\[0\] has no instant or no role"),
        (("timeline", 0, "bytes", "saved"), [1, 2], r"bytes.saved must have 282 items, not 2"),
        (("timeline", 0, "bytes", "parameter"), [-1], r"bytes.parameter must not be negative"),
        (("ranks", 0, "breakdown"), [], r"plan.ranks\[0\].breakdown must be an object"),
        (("status",), "great", r"plan.status is 'great'"),
        (("schema_version",), 1, r"plan has schema_version 1, this fxzero reads 8"),
        (("schema_version",), True, r"plan has schema_version True, this fxzero reads 8"),
        (("peak_bytes",), 10**50, r"plan.peak_bytes is larger than anything"),
        (("step_seconds",), 10**50, r"plan.step_seconds must be float, not int"),
        (("step_seconds",), 10**400, r"a plan has a number of more than 100 digits"),
    ],
)
def test_the_error_names_the_field(path: tuple[Any, ...], other: Any, message: str) -> None:
    document = changed(path, lambda at, key: at.__setitem__(key, other))
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(document))


@given(st.integers(0, len(DOCUMENT)), st.text(max_size=3), st.integers(0, 3))
def test_a_damaged_text_is_refused_or_read(at: int, inserted: str, dropped: int) -> None:
    read(DOCUMENT[:at] + inserted + DOCUMENT[at + dropped :])


@given(st.text() | JSON.map(json.dumps))
def test_other_texts_are_refused(text: str) -> None:
    assert read(text) is None


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "1" * 10_000, ""])
def test_deep_long_and_empty_texts_are_refused(text: str) -> None:
    assert read(text) is None


@pytest.mark.parametrize("content", [None, b"\x80\x81\xff", b"\x00" * 100, b"", b"[]", b"null"])
def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError):
        Plan.load(path)


def test_a_path_that_cannot_be_is_refused() -> None:
    with pytest.raises(PlanError, match="cannot read a\0b: embedded null byte"):
        Plan.load("a\0b")


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read .*: not a file"):
        Plan.load(tmp_path)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(300 * MiB)  # sparse: takes no space on disk
    with pytest.raises(
        PlanError, match="has 314572800 bytes, more than the 33554432 that are read"
    ):
        Plan.load(path)
