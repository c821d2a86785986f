"""The passes on a tiny model, the list of passes, and what the runner reports, dumps and logs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import graphs
import pytest
import torch
from torch import nn
from torch.testing import FileCheck

import fxzero
from fxzero.errors import UsageError
from fxzero.graph import TrainGraph
from fxzero.passes.accumulate import accumulate_pass
from fxzero.passes.context import PassContext
from fxzero.passes.listing import format_graph
from fxzero.passes.pipeline import PASSES, describe, select
from fxzero.passes.rematerialize import rematerialize_pass
from fxzero.passes.replay_randomness import replay_randomness_pass
from fxzero.passes.runner import run_passes
from fxzero.passes.write_back import write_back_pass

NOTHING = PassContext()
DROPOUT = graphs.recompute(("native_dropout", "native_layer_norm_backward"))


def names(graph: TrainGraph) -> list[str]:
    return [node.name for node in graph.graph.nodes]


def test_rematerialize_clones_a_value_right_before_the_node_that_the_plan_names() -> None:
    graph = graphs.tiny()
    FileCheck().check_count("aten.gelu.default", 1, exactly=True).run(format_graph(graph))
    graph = rematerialize_pass(graph, graphs.recompute(("clone", "mul_4")))
    FileCheck().check("clone  aten.clone.default(primals_7)").check(
        "native_dropout_backward  "
    ).check_next("clone_recomputed  aten.clone.default(primals_7)  float32[8]  B").check_next(
        "mul_4  aten.mul.Tensor(native_dropout_backward, clone_recomputed)"
    ).run(format_graph(graph))


def test_accumulate_adds_a_gradient_where_it_is_made() -> None:
    graph = accumulate_pass(graphs.tiny(), PassContext(accumulates=True))
    added = {
        role.of.name: node
        for role, node in graph.result_pairs()
        if role.kind == "gradient" and role.of is not None
    }
    assert [role.name for role in graph.inputs if role.kind == "gradient"] == list(added)
    for role, node in graph.pairs():
        if role.kind == "gradient":
            (user,) = node.users
            assert user is added[role.name]
            assert user.target is torch.ops.aten.add_.Tensor
            assert user.prev in user.all_input_nodes


def test_rematerialize_rebuilds_views_of_inputs_without_being_asked() -> None:
    graph = graphs.tiny()
    FileCheck().check("t_2  aten.t.default(t_1)").run(format_graph(graph))
    graph = rematerialize_pass(graph, NOTHING)
    FileCheck().check("t_1_recomputed  aten.t.default(primals_3)").check_next(
        "t_2  aten.t.default(t_1_recomputed)"
    ).run(format_graph(graph))


def test_rematerialize_feeds_a_chain_of_clones_from_clones() -> None:
    context = graphs.recompute(
        ("addmm", "gelu_backward"), ("gelu", "gelu_backward"), ("mul", "gelu_backward")
    )
    graph = rematerialize_pass(graphs.tiny(), context)
    FileCheck().check("addmm_recomputed  aten.addmm.default(primals_2, primals_8, t_re").check_next(
        "gelu_recomputed  aten.gelu.default(addmm_recomputed)"
    ).check_next("mul_recomputed  aten.mul.Tensor(gelu_recomputed, clone)").check_next(
        "gelu_backward  aten.gelu_backward.default(mul_4, addmm_recomputed)"
    ).run(format_graph(graph))


def test_rematerialize_takes_a_recomputed_tuple_apart_at_once() -> None:
    graph = rematerialize_pass(graphs.tiny(), DROPOUT)
    FileCheck().check("native_dropout_recomputed  aten.native_dropout.default(mul").check_next(
        "getitem_recomputed  getitem(native_dropout_recomputed, 0)"
    ).check_next("getitem_1_recomputed  getitem(native_dropout_recomputed, 1)").run(
        format_graph(graph)
    )


def test_rematerialize_with_no_decisions_settles_after_one_run() -> None:
    once = rematerialize_pass(graphs.tiny(), NOTHING)
    text = format_graph(once)
    assert format_graph(rematerialize_pass(once, NOTHING)) == text


def test_write_back_writes_a_buffer_at_the_end_of_the_forward() -> None:
    graph = graphs.tiny()
    FileCheck().check_not("copy_").check("output([add, sum_1,").run(format_graph(graph))
    graph = write_back_pass(graph, NOTHING)
    FileCheck().check("sum_1  ").check_next("aten.copy_.default(primals_7, add)").check_next(
        "expand  aten.expand.default(tangents_1"
    ).check("output((sum_1,").run(format_graph(graph))
    assert [role.kind for role in graph.outputs].count("mutation") == 0


def test_write_back_keeps_the_old_value_that_the_backward_reads() -> None:
    graph = rematerialize_pass(graphs.tiny(), graphs.recompute(("clone", "mul_4")))
    graph = write_back_pass(graph, NOTHING)
    FileCheck().check("clone_default  aten.clone.default(primals_7)  float32[8]  F").check(
        "aten.copy_.default(primals_7"
    ).check("clone_recomputed  aten.clone.default(clone_default)").run(format_graph(graph))


def test_write_back_has_nothing_to_do_the_second_time() -> None:
    once = write_back_pass(graphs.tiny(), NOTHING)
    text = format_graph(once)
    assert format_graph(write_back_pass(once, NOTHING)) == text


def test_replay_randomness_runs_the_clone_from_the_state_of_the_draw() -> None:
    graph = replay_randomness_pass(rematerialize_pass(graphs.tiny(), DROPOUT), DROPOUT)
    FileCheck().check(
        "draw  draw(aten.native_dropout.default, mul, 0.25, True)  (uint8"
    ).check_next("getitem_8  getitem(draw, 0)").check_next(
        "native_dropout  getitem(draw, 1)"
    ).check("draw_again(getitem_8, aten.native_dropout.default, mul, 0.25, True)").run(
        format_graph(graph)
    )


def test_replay_randomness_leaves_an_operator_alone_that_is_not_recomputed() -> None:
    graph = graphs.tiny()
    text = format_graph(graph)
    assert format_graph(replay_randomness_pass(graph, NOTHING)) == text


def test_replay_randomness_has_nothing_to_do_the_second_time() -> None:
    once = replay_randomness_pass(rematerialize_pass(graphs.tiny(), DROPOUT), DROPOUT)
    text = format_graph(once)
    assert format_graph(replay_randomness_pass(once, DROPOUT)) == text


def test_a_copy_has_the_same_nodes_and_is_not_changed_with_the_original() -> None:
    graph = graphs.tiny()
    copy, text = graph.copy(), format_graph(graph)
    assert format_graph(copy) == text
    assert copy.digest() == graph.digest()
    rematerialize_pass(graph, graphs.recompute_most(graph))
    assert format_graph(graph) != text
    assert format_graph(copy) == text


def test_the_graph_that_passes_are_run_on_stays_as_it_is() -> None:
    graph = graphs.tiny()
    text = format_graph(graph)
    rewritten, _ = run_passes(graph, graphs.recompute_most(graph))
    assert format_graph(rewritten) != text
    assert format_graph(graph) == text


def test_the_list_of_passes_prints() -> None:
    lines = describe().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["shard", "exact"],
        ["quantize", "changes"],
        ["deduplicate", "exact"],
        ["accumulate", "exact"],
        ["update", "exact"],
        ["offload", "exact"],
        ["rematerialize", "exact"],
        ["write_back", "exact"],
        ["replay_randomness", "exact"],
        ["bucket", "exact"],
        ["overlap", "exact"],
        ["postpone_updates", "exact"],
    ]
    assert lines[7].endswith("Buffer updates become writes at the end of the forward.")
    assert all(item.summary for item in PASSES)
    assert "write_back" in repr(PASSES)


def test_a_pass_is_switched_off_by_name() -> None:
    assert select(()) == PASSES
    chosen = select(["write_back"])
    kept = ["offload", "rematerialize", "replay_randomness", "bucket", "overlap"]
    kept += ["postpone_updates"]
    assert [item.name for item in chosen] == kept
    graph, reports = run_passes(graphs.tiny(), NOTHING, chosen)
    assert [report.name for report in reports] == kept
    assert "mutation" in [role.kind for role in graph.outputs]


def test_an_unknown_pass_is_a_usage_error_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'write_back'"):
        select(["write_bak"])


def test_the_environment_switches_passes_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)), torch.randn(4, 8)
    monkeypatch.setenv("FXZERO_SKIP", "rematerialize,replay_randomness")
    plan = fxzero.plan(model, (x,), recompute="full")
    kept = ("shard", "quantize", "deduplicate", "accumulate", "update")
    kept += ("offload", "write_back", "bucket", "overlap")
    assert plan.passes == (*kept, "postpone_updates")
    assert plan.decisions.recompute == ()
    assert "pass rematerialize is switched off by FXZERO_SKIP" in plan.notes
    with pytest.raises(UsageError, match="strict=True, but\n  pass rematerialize is switched off"):
        fxzero.compile(model, (x,), strict=True, inner="eager")


@pytest.mark.parametrize("name", ["write_back", "replay_randomness"])
def test_a_pass_that_others_need_is_not_switched_off(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXZERO_SKIP", name)
    with pytest.raises(UsageError, match=f"pass {name} completes .*results would be wrong"):
        fxzero.plan(nn.Linear(4, 4), (torch.randn(2, 4),))


def test_reports_count_nodes_and_time_including_the_check() -> None:
    graph = graphs.tiny()
    before = len(graph.graph.nodes)
    graph, reports = run_passes(graph, DROPOUT, check=True)
    assert [report.name for report in reports] == [item.name for item in PASSES]
    assert reports[0].nodes_before == before
    assert reports[-1].nodes_after == len(graph.graph.nodes)
    assert all(a.nodes_after == b.nodes_before for a, b in pairwise(reports))
    assert all(report.seconds > 0 for report in reports)
    with pytest.raises(dataclasses.FrozenInstanceError):
        reports[0].seconds = 0.0  # type: ignore[misc]


def test_dumps_hold_the_graph_before_each_pass_and_after_it_if_it_changed(tmp_path: Path) -> None:
    run_passes(graphs.tiny(), NOTHING, dump=tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "00-offload.before.txt",
        "01-rematerialize.after.txt",
        "01-rematerialize.before.txt",
        "02-write_back.after.txt",
        "02-write_back.before.txt",
        "03-replay_randomness.before.txt",
        "04-bucket.before.txt",
        "05-overlap.before.txt",
        "06-postpone_updates.before.txt",
    ]
    text = (tmp_path / "new" / "01-rematerialize.before.txt").read_text()
    FileCheck().check("primals_1  parameter up.weight  float32[8, 4]  F").check(
        "addmm  aten.addmm.default(primals_2, primals_8, t)  float32[2, 8]  F  up  graphs.py:"
    ).check("in forward: hidden = F.gelu(self.up(x))").run(text)


def test_the_environment_asks_for_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_DUMP", str(tmp_path))
    run_passes(graphs.tiny(), NOTHING, select(["offload", "rematerialize"]))
    assert (tmp_path / "00-write_back.before.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("logs", "heard"), [("+fxzero", True), ("+dynamo", False)])
def test_torch_logs_switches_the_loggers_on(logs: str, heard: bool) -> None:
    code = (
        "import graphs; from fxzero.passes.runner import run_passes; "
        "from fxzero.passes.context import PassContext; "
        "run_passes(graphs.tiny(), PassContext(), check=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TORCH_LOGS": logs}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ("write_back: 0." in done.stderr) is heard, done.stderr
    assert ("has a source line" in done.stderr) is heard
