"""Folding, the terminal report, the page, the difference of two plans, the explanation."""

from __future__ import annotations

import html.parser
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from synthetic import MiB, gpt_plan

from fxzero.errors import UsageError
from fxzero.explanation import explain, explain_plan
from fxzero.plans import Plan, Rank, Value
from fxzero.report import charts, diff_page, tables, terminal
from fxzero.report import html as page
from fxzero.report.diff import diff
from fxzero.report.folding import fold, pattern
from fxzero.report.wording import ROLES, verdict

HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}\x1b[31m\n\ud800"


def value(name: str, module: str = "", **changes: Any) -> Value:
    made = Value(name, 4 * MiB, "float32[1]", module, "m.py:1 in forward: y = f(x)", "saved")
    return replace(made, **changes)


# Folding


def labels(*values: Value) -> list[str]:
    return [row.label for row in fold(values)]


def test_equal_layers_fold_into_one_row() -> None:
    values = [value(f"gelu_{i}", f"transformer.h.{i}.mlp", seconds=0.5) for i in range(12)]
    (row,) = fold(values)
    assert row.label == "transformer.h.0-11.mlp gelu (x12)"
    assert (row.bytes, row.total_bytes, row.seconds) == (4 * MiB, 48 * MiB, 6.0)


def test_a_parameter_is_named_once() -> None:
    values = [value(f"h.{i}.fc.weight", f"h.{i}.fc") for i in range(3)]
    assert labels(*values) == ["h.0-2.fc.weight (x3)"]


def test_layers_with_gaps_show_their_gaps_and_many_gaps_show_their_ends() -> None:
    assert labels(*(value("a", f"h.{i}") for i in (0, 2, 3, 4))) == ["h.0,2-4 a (x4)"]
    assert labels(*(value("a", f"h.{i}") for i in (0, 2, 4, 6, 8))) == ["h.0..8 a (x5)"]


def test_numbers_inside_names_are_not_layers() -> None:
    assert len(fold([value("a", "conv1"), value("a", "conv2")])) == 2


@pytest.mark.parametrize(
    "change",
    [{"bytes": 8}, {"role": "temporary"}, {"shape": "int8[4]"}, {"source": ""}, {"name": "mm_2"}],
)
def test_values_that_differ_in_more_than_the_layer_stay_apart(change: dict[str, Any]) -> None:
    assert len(fold([value("gelu", "h.0"), replace(value("gelu_1", "h.1"), **change)])) == 2


def test_reasons_that_differ_in_numbers_become_a_range() -> None:
    times = ("2.5", "0.75", "10")
    values = [value("a", f"h.{i}", reason=f"{t} ms, read 2 times") for i, t in enumerate(times)]
    (row,) = fold(values)
    assert row.reason == "0.75-10 ms, read 2 times"


def test_rows_come_largest_total_first() -> None:
    rows = fold([value("big", bytes=9 * MiB), *(value("a", f"h.{i}") for i in range(3))])
    assert [row.total_bytes // MiB for row in rows] == [12, 9]


def test_a_single_value_without_module_keeps_its_number() -> None:
    assert labels(value("arg_1")) == ["arg_1"]
    assert pattern(value("gelu_3", "h.3.mlp")) == "h.#.mlp gelu"


NAMES = st.text(st.sampled_from("ab01._ "), max_size=8)


@given(st.lists(st.builds(value, NAMES, NAMES, bytes=st.integers(0, 3), reason=NAMES)))
def test_folding_loses_no_value_and_no_byte(values: list[Value]) -> None:
    rows = fold(values)
    assert sum(row.count for row in rows) == len(values)
    assert sum(row.total_bytes for row in rows) == sum(v.bytes for v in values)


# Terminal


def test_terminal_report_of_a_plan_that_fits() -> None:
    text = terminal.render(gpt_plan())
    text = re.sub(r"plan [0-9a-f]{8}", "plan 01234567", text)
    assert_expected_inline(
        text,
        """\
fxzero 0.1.0 plan 01234567  gpt2  cpu  budget 5.00 GiB  FITS, 393 MiB headroom
model   124 M parameters (475 MiB), adamw, inputs int64[8, 1024], int64[8, 1024]
peak    4.62 GiB; 5.55 GiB without recompute; smallest budget with a plan 4.23 GiB
step    1.98 s modelled, forward and backward; solver: optimal

rank      parameter   gradient  optimizer      saved  temporary       peak  of budget
0           363 MiB    147 MiB    726 MiB   1.88 GiB   1.53 GiB   4.62 GiB     92.3 %
phases  forward 4.50 GiB   backward 4.62 GiB   optimizer step 1.93 GiB

alive at the peak: backward, _log_softmax_backward_data, modeling_gpt2.py:712 logits = self.lm_he...
 1.53 GiB  33.2 %  temporary  lm_head mm                                     modeling_gpt2.py:712...
 1.12 GiB  24.4 %  saved      transformer.h.0-11.mlp.c_fc addmm (x12)        modeling_gpt2.py:244...
  294 MiB   6.2 %  optimizer  transformer.wte.weight state
  288 MiB   6.1 %  saved      transformer.h.0-11.ln...tive_layer_norm (x12)  modeling_gpt2.py:281...
  288 MiB   6.1 %  saved      transformer.h.0-11.at...led_dot_product (x12)  modeling_gpt2.py:224...
  216 MiB   4.6 %  optimizer  transformer.h.0-11.mlp.c_fc.weight (x12)
  192 MiB   4.1 %  saved      transformer.h.10-11.mlp.act mul (x2)           modeling_gpt2.py:245...
  168 MiB   3.6 %  optimizer  transformer.h.0-11.attn.c_attn.weight (x12)
  147 MiB   3.1 %  parameter  transformer.wte.weight
  147 MiB   3.1 %  gradient   transformer.wte.weight gradient
  108 MiB   2.3 %  parameter  transformer.h.0-11.mlp.c_fc.weight (x12)
 84.0 MiB   1.8 %  parameter  transformer.h.0-11.attn.c_attn.weight (x12)
 72.0 MiB  in 24 smaller values

recompute 10 values: peak -960 MiB, +80.0 ms (4.0 % of the step), +2.01 GFLOP
  960 MiB   80.0 ms  transformer.h.0-9.mlp.act mul (x10)  modeling_gpt2.py:245 hidden_states = se...

alternatives
 3.81 GiB    1.90 s  fits  memory_budget="4GiB"
 2.54 GiB    2.51 s  fits  recompute="full"
 3.90 GiB    1.90 s  fits  optimizer="sgd"

notes
 - buffers that inductor fuses away are counted: the measured peak may be lower
 - times are modelled for this CPU, from 41 GFLOP/s and 11 GiB/s measured at start""",
    )


def test_the_report_is_ascii_within_its_width_and_short() -> None:
    for width in (100, 80):
        lines = terminal.render(gpt_plan(), width).splitlines()
        assert max(map(len, lines)) <= width
        assert len(lines) <= 45
        assert all(line.isascii() and line == line.rstrip() for line in lines)


def test_str_of_a_plan_is_the_report() -> None:
    plan = gpt_plan()
    assert str(plan) == terminal.render(plan)


def test_the_verdict_says_by_how_much() -> None:
    assert verdict(gpt_plan()) == "FITS, 393 MiB headroom"
    assert verdict(gpt_plan(budget=None)) == "no budget, peak 4.62 GiB"
    tight = gpt_plan(budget=1024 * MiB, status="infeasible", gap=None)
    assert verdict(tight) == "DOES NOT FIT, 3.23 GiB short"
    assert str(tight).splitlines()[0].endswith("DOES NOT FIT, 3.23 GiB short")


@pytest.mark.parametrize(
    ("status", "gap", "expected"),
    [
        ("optimal", 0.0, "solver: optimal"),
        ("feasible", 0.012, "solver: feasible, within 1.2 % of optimal"),
        ("timeout", None, "solver: timeout, no bound proved"),
    ],
)
def test_the_status_is_always_shown(status: str, gap: float | None, expected: str) -> None:
    (step,) = [
        line
        for line in str(gpt_plan(status=status, gap=gap)).splitlines()
        if line.startswith("step")
    ]
    assert step.endswith(expected)


def test_a_long_model_name_does_not_push_the_verdict_out() -> None:
    plan = gpt_plan()
    plan = replace(plan, model=replace(plan.model, name="organisation/" + "long" * 40))
    first = str(plan).splitlines()[0]
    assert len(first) <= 100
    assert first.endswith("FITS, 393 MiB headroom")


def test_places_and_lines_that_are_too_long_are_cut() -> None:
    module = "encoder." + "deeply.nested." * 8 + "block.3"
    long = value("where", module, source="m" * 90 + ".py:12 in forward: y = x")
    for width in (80, 100):
        plan = gpt_plan()
        plan = replace(plan, peak=replace(plan.peak, alive=(long,)), recomputed=(long,))
        text = terminal.render(plan, width)
        assert max(map(len, text.splitlines())) <= width
        assert "encoder." in text
        assert "3 where" in text


def test_equal_ranks_are_one_row() -> None:
    ranks = tuple(Rank(i, 7 * MiB, {"saved": 7 * MiB}) for i in range(8))
    text = str(gpt_plan(ranks=(*ranks, Rank(8, 9 * MiB, {"saved": 9 * MiB}))))
    assert "\n0-7        7.00 MiB   7.00 MiB" in text
    assert "\n8          9.00 MiB   9.00 MiB" in text


def test_an_empty_plan_still_reports() -> None:
    plan = gpt_plan(recomputed=0)
    plan = replace(
        plan,
        recomputed=(),
        saved=(),
        alternatives=(),
        notes=(),
        timeline=(),
        ranks=(),
        phases=(),
        step_seconds=0.0,
        peak=replace(plan.peak, alive=(), node="", source=""),
    )
    assert "recompute nothing" in str(plan)
    assert "Recompute nothing" in page.render(plan)


def hostile_plan() -> Plan:
    plan = gpt_plan()
    bad = value(HOSTILE, HOSTILE, source=HOSTILE, shape=HOSTILE, reason=HOSTILE, role=HOSTILE)
    return replace(
        plan,
        model=replace(plan.model, name=HOSTILE, inputs=(HOSTILE,)),
        request=replace(plan.request, device=HOSTILE, optimizer=HOSTILE),
        peak=replace(plan.peak, alive=(bad,), node=HOSTILE, source=HOSTILE, phase=HOSTILE),
        ranks=(Rank(0, 5, {HOSTILE: 5}),),
        saved=(bad,),
        recomputed=(bad,),
        notes=(HOSTILE,),
    )


def test_a_hostile_plan_cannot_drive_the_terminal() -> None:
    plan = hostile_plan()
    for text in (str(plan), explain_plan(plan), diff(gpt_plan(), plan)):
        assert text.isascii()
        assert "\x1b" not in text
    assert len(str(plan).splitlines()) <= 45


# Page


class Page(html.parser.HTMLParser):
    """Checks that tags balance, and collects texts, attributes and scripts."""

    VOID = ("meta", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_verdict_chart_and_tables() -> None:
    found = Page(page.render(gpt_plan()))
    text = " ".join(found.texts)
    for expected in ("FITS, 393 MiB headroom", "budget 5.00 GiB", "transformer.h.0-9.mlp.act mul"):
        assert expected in text
    tags = [tag for tag, _ in found.tags]
    assert tags.count("table") == 4  # the timeline, what else could be, tensors, errors
    names = [attributes.get("class") for tag, attributes in found.tags if tag == "path"]
    roles = ("parameter", "optimizer", "gradient", "saved", "temporary")
    assert all(names.count(f"band f-other f-{role}") == 1 for role in roles)


def test_a_plan_that_does_not_fit_says_first_what_to_change() -> None:
    text = page.render(gpt_plan(budget=1024 * MiB, status="infeasible", gap=None))
    body = text[text.index("<main>") :]
    order = ["DOES NOT FIT, 3.23 GiB short", "The smallest budget with a plan is", "planned peak"]
    places = [body.index(each) for each in order]
    assert places == sorted(places)
    assert "This fits: recompute=" in body


def test_what_is_needed_to_fit_is_in_the_terminal_too() -> None:
    tight = gpt_plan(budget=1024 * MiB, status="infeasible", gap=None)
    assert 'to fit  memory_budget="4327.0MiB"; or ' in str(tight)
    assert "to fit" not in str(gpt_plan())


def test_a_bands_path_is_the_steps_of_its_bytes() -> None:
    """Against the areas under the curve, found by walking the path."""
    plan = gpt_plan()
    timeline = charts.timeline(plan)
    assert timeline is not None
    (area,) = timeline.areas
    track = area.track
    top = 1.08 * plan.unplanned_peak_bytes
    for band in area.bands:
        points = walked(band.path)
        assert points[0][0] == points[-1][0] == 0
        rights = [*area.lefts[1:], 100.0]
        sizes = track.of(band.role)
        expected = sum(
            (right - left) * size / top
            for left, right, size in zip(area.lefts, rights, sizes, strict=True)
        )
        assert surface(points) / 100 == pytest.approx(expected, abs=0.02)


def walked(path: str) -> list[tuple[float, float]]:
    """The corners of a path of M, H and V."""
    start = re.match(r"M([\d.]+),([\d.]+)", path)
    assert start is not None
    x, y = map(float, start.groups())
    points = [(x, y)]
    for letter, number in re.findall(r"([HV])([\d.]+)", path):
        x, y = (float(number), y) if letter == "H" else (x, float(number))
        points.append((x, y))
    return points


def surface(points: list[tuple[float, float]]) -> float:
    around = zip(points, [*points[1:], points[0]], strict=True)
    return abs(sum(x * b - a * y for (x, y), (a, b) in around)) / 2


@given(st.floats(1e-9, 1e12), st.integers(2, 8))
def test_an_axis_has_a_few_round_ticks(end: float, most: int) -> None:
    ticks = list(charts._round_steps(end, most))
    assert 1 <= len(ticks) <= most + 1
    assert ticks[0] == 0
    assert ticks[-1] <= end * 1.0001


def test_every_value_is_in_the_table_once() -> None:
    plan = gpt_plan()
    rows = tables.tensor_rows(plan)
    there = sum(each.row.count for each in rows if each.at_peak)
    assert there == len(plan.peak.alive)
    assert sum(each.row.count for each in rows) == there + len(plan.recomputed)
    saved = next(
        each for each in rows if each.row.place.startswith("transformer.h.0-11.mlp.c_fc a")
    )
    assert saved.row.reason.startswith("input of a matmul")  # of the saved value
    single = tables.single_values(plan)
    assert len(single["rows"]) == there + len(plan.recomputed)
    sizes = {row[0] for row in single["rows"]}
    assert sizes == {v.bytes for v in (*plan.peak.alive, *plan.recomputed)}


def test_a_value_says_when_it_is_alive() -> None:
    plan = gpt_plan()
    last = len(plan.timeline[0].seconds) - 1
    assert tables.when(plan, 0, last) == "all the time"
    assert tables.when(plan, last, last) == "optimizer step"
    assert tables.when(plan, 14, 27) == "99.0 ms to 198 ms"
    assert tables.when(plan, -1, -1) == ""
    rows = fold(
        [value("a", "h.0"), value("a", "h.1", first=3, last=5), value("a", "h.2", first=9, last=9)]
    )
    assert [(row.first, row.last) for row in rows] == [(3, 9)]
    assert tables.when(plan, 0, last + 1) == ""


def test_every_role_has_a_colour_of_its_own() -> None:
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", page.render(gpt_plan())))
    of_roles = [colours[role.replace(" ", "-")] for role in ROLES]
    assert len(set(of_roles)) == len(ROLES)


def test_the_page_needs_no_network() -> None:
    text = page.render(gpt_plan())
    assert text.isascii()
    assert "http://" not in text
    assert "https://" not in text
    for _, attributes in Page(text).tags:
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"


def test_a_hostile_plan_puts_no_tag_and_no_template_into_the_page() -> None:
    text = page.render(hostile_plan())
    scripts = [attributes for tag, attributes in Page(text).tags if tag == "script"]
    assert [each.get("type") for each in scripts] == ["application/json", None]
    assert "<script>alert" not in text
    assert "{{ 7*7 }}" in text


def test_a_budget_far_above_the_curve_is_told_in_words() -> None:
    text = page.render(gpt_plan(budget=100 * 1024 * MiB))
    assert "The budget of 100 GiB lies far above" in text
    assert 'class="mark budget"' not in text


def test_to_html_writes_the_page(tmp_path: Path) -> None:
    plan = gpt_plan()
    plan.to_html(tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text() == page.render(plan)


# Difference


def test_difference_of_two_plans() -> None:
    after = gpt_plan(recomputed=12, budget=4096 * MiB, notes=("one new note",))
    text = re.sub(r"plan [0-9a-f]{8}", "plan 01234567", diff(gpt_plan(), after))
    assert_expected_inline(
        text,
        """\
before  plan 01234567  gpt2  cpu  budget 5.00 GiB  FITS, 393 MiB headroom  optimal
after   plan 01234567  gpt2  cpu  budget 4.00 GiB  DOES NOT FIT, 439 MiB short  optimal

budget                       5.00 GiB -> 4.00 GiB  (-20.0 %)
peak                         4.62 GiB -> 4.43 GiB  (-4.1 %)
smallest budget with a plan  4.23 GiB -> 4.04 GiB  (-4.4 %)
step                         1.98 s -> 2.00 s  (+0.8 %)
recompute                    80.0 ms -> 96.0 ms  (+20.0 %)
recomputed work              2.01 GFLOP -> 2.42 GFLOP  (+20.0 %)
recomputed values            10 -> 12  (+20.0 %)
saved values                 38 -> 36  (-5.3 %)

alive at the peak
  -192 MiB  saved       transformer.h.#.mlp.act mul  192 MiB -> 0 B
saved
  -192 MiB  saved       transformer.h.#.mlp.act mul  192 MiB -> 0 B
recomputed
  +192 MiB  recomputed  transformer.h.#.mlp.act mul  960 MiB -> 1.12 GiB

note gone: buffers that inductor fuses away are counted: the measured peak may be lower
note gone: times are modelled for this CPU, from 41 GFLOP/s and 11 GiB/s measured at start
note new: one new note""",
    )


def test_the_page_of_a_difference_holds_its_facts() -> None:
    after = gpt_plan(recomputed=12, budget=4096 * MiB, notes=("one new note",))
    found = Page(text := diff_page.render(gpt_plan(), after))
    words = re.sub(r"\s+", " ", " ".join(found.texts))
    for expected in (
        "Peak -192 MiB: no longer fits",
        "before: FITS, 393 MiB headroom",
        "after: DOES NOT FIT, 439 MiB short",
        "5.00 GiB 4.00 GiB -20.0 %",
        "transformer.h.#.mlp.act mul 960 MiB 1.12 GiB",
        "new: one new note",
    ):
        assert expected in words
    assert text.isascii()
    assert "http:" not in text
    hostile = [tag for tag, _ in Page(diff_page.render(hostile_plan(), gpt_plan())).tags]
    assert hostile.count("script") == 2


def test_the_charts_of_a_difference_share_their_axes() -> None:
    small, large = gpt_plan(), gpt_plan(recomputed=0)
    before, after = charts.timeline(small, large), charts.timeline(large, small)
    assert before is not None
    assert after is not None
    assert before.seconds == after.seconds
    assert before.areas[0].ticks == after.areas[0].ticks


def test_equal_plans_have_no_difference() -> None:
    assert diff(gpt_plan(), gpt_plan()).splitlines()[-1] == "the plans are equal"


def test_the_difference_names_changed_settings() -> None:
    plan = gpt_plan()
    after = replace(
        plan, graph_digest="f" * 16, request=replace(plan.request, optimizer="sgd", inner="eager")
    )
    text = diff(plan, after)
    assert "the graphs differ" in text
    assert re.search(r"optimizer +adamw -> sgd", text)
    assert re.search(r"inner +inductor -> eager", text)


def test_a_budget_that_appears_is_no_division_by_zero() -> None:
    text = diff(gpt_plan(budget=None), gpt_plan())
    assert re.search(r"budget +none -> 5.00 GiB", text)


# Explanation


class Compiled:
    plan = gpt_plan()


def test_explain_lists_saved_and_recomputed_values_with_line_and_reason() -> None:
    explanation = explain(Compiled())  # type: ignore[arg-type]
    assert str(explanation) == explain_plan(Compiled.plan)
    assert [row.role for row in explanation.rows] == ["saved"] * 4 + ["recomputed"]
    assert sum(row.count for row in explanation.rows) == 48
    text = str(explanation)
    assert "transformer.h.0-9.mlp.act mul (x10)  float32[8, 1024, 3072], 96.0 MiB each" in text
    assert "modeling_gpt2.py:245 in forward: hidden_states = self.act(hidden_states)" in text
    assert "input of a matmul, 2.0-2.9 ms to compute again" in text


def test_explain_refuses_a_budget_for_a_compiled_model() -> None:
    with pytest.raises(UsageError, match="this model is compiled"):
        explain(Compiled(), memory_budget="4GiB")  # type: ignore[arg-type]
