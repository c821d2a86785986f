"""The graph law: planted faults are found and named, and every model of the zoo obeys it."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import graphs
import pytest
import torch
import torch.distributed._functional_collectives
import zoo
from helpers import tiers
from torch import fx

from fxzero import randomness
from fxzero.capture import capture
from fxzero.errors import GraphLawError
from fxzero.graph import OutputRole, TrainGraph
from fxzero.passes import spec
from fxzero.passes.offload import FETCH_OF
from fxzero.passes.partition import partition
from fxzero.passes.pipeline import select
from fxzero.passes.rematerialize import CLONE_OF
from fxzero.passes.runner import run_passes
from fxzero.passes.spec import (
    CHECKS,
    check_graph,
    check_split,
    find_violations,
    known_origins,
)
from fxzero.plans import Fetch

Fault = Callable[[TrainGraph], TrainGraph | None]
_DROPOUT = ("native_dropout", "native_layer_norm_backward")


def scheduled(*switched_off: str) -> TrainGraph:
    """The tiny model with a view, a tuple, a random operator and a buffer's clone recomputed.

    One value is offloaded.
    """
    context = graphs.recompute(_DROPOUT, ("gelu", "mul_4"), ("clone", "mul_4"))
    offload = (Fetch("addmm", "gelu_backward"),)
    context = replace(context, decisions=replace(context.decisions, offload=offload))
    graph, _ = run_passes(graphs.tiny(), context, select(switched_off), check=False)
    return graph


def node(graph: TrainGraph, name: str) -> fx.Node:
    return next(node for node in graph.graph.nodes if node.name == name)


def first(graph: TrainGraph, target: object) -> fx.Node:
    return next(node for node in graph.graph.nodes if node.target == target)


def insert(before: fx.Node, target: object, *args: object, like: fx.Node) -> fx.Node:
    """A new node before another, with the value and role of a third."""
    with before.graph.inserting_before(before):
        made = before.graph.call_function(target, args)  # type: ignore[arg-type]
    made.meta = {key: like.meta[key] for key in ("val", "partitioner_tag")}
    return made


def read_before_made(graph: TrainGraph) -> None:
    node(graph, "addmm").prepend(node(graph, "gelu"))


def role_lost(graph: TrainGraph) -> TrainGraph:
    return replace(graph, outputs=graph.outputs[:-1])


def two_inputs_one_role(graph: TrainGraph) -> TrainGraph:
    return replace(graph, inputs=(graph.inputs[1], *graph.inputs[1:]))


def tangent_unlike_its_output(graph: TrainGraph) -> None:
    tangent = node(graph, "tangents_1")
    tangent.meta["val"] = tangent.meta["val"].new_empty(3)


def output_without_a_value(graph: TrainGraph) -> TrainGraph:
    return replace(graph, outputs=(*graph.outputs[:-1], OutputRole("output", 7)))


def value_missing(graph: TrainGraph) -> None:
    del node(graph, "gelu").meta["val"]


def wrong_stride(graph: TrainGraph) -> None:
    gelu = node(graph, "gelu")
    gelu.meta["val"] = gelu.meta["val"].t().contiguous().t()


def wrong_dtype(graph: TrainGraph) -> None:
    gelu = node(graph, "gelu_backward")
    gelu.meta["val"] = gelu.meta["val"].to(torch.bfloat16)


def wrong_arguments(graph: TrainGraph) -> None:
    mm = node(graph, "mm_2")
    mm.args = (mm.args[1], mm.args[0])


def forward_reads_backward(graph: TrainGraph) -> None:
    node(graph, "gelu_backward").meta["partitioner_tag"] = "is_forward"


def forward_after_backward(graph: TrainGraph) -> None:
    node(graph, "gelu_backward").append(first(graph, torch.ops.aten.copy_.default))


def result_from_the_backward(graph: TrainGraph) -> None:
    (output,) = graph.graph.find_nodes(op="output")
    cloned = insert(
        output,
        torch.ops.aten.clone.default,
        node(graph, "sum_1"),
        like=node(graph, "tangents_1"),
    )
    cloned.meta["partitioner_tag"] = "is_backward"
    output.args = ((cloned, *output.args[0][1:]),)  # type: ignore[index]


def drawn_anew(graph: TrainGraph) -> None:
    again = first(graph, randomness.draw_again)
    _, target, *args = again.args
    fresh = insert(again, target, *args, like=again)
    fresh.meta = dict(again.meta)
    again.replace_all_uses_with(fresh)
    graph.graph.erase_node(again)


def state_of_another_draw(graph: TrainGraph) -> None:
    draw = first(graph, randomness.draw)
    other = insert(draw, randomness.draw, *draw.args, like=draw)
    state = insert(draw, operator.getitem, other, 0, like=first(graph, operator.getitem))
    state.meta["val"] = draw.meta["val"][0]
    first(graph, randomness.draw_again).update_arg(0, state)


def collective_never_waited_for(graph: TrainGraph) -> None:
    gelu = node(graph, "gelu")
    insert(gelu.next, torch.ops._c10d_functional.all_reduce.default, gelu, "sum", "0", like=gelu)


def collective_waited_for_twice(graph: TrainGraph) -> None:
    gelu, wait = node(graph, "gelu"), torch.ops._c10d_functional.wait_tensor.default
    start = torch.ops._c10d_functional.all_reduce.default
    reduced = insert(gelu.next, start, gelu, "sum", "0", like=gelu)
    for _ in range(2):
        insert(reduced.next, wait, reduced, like=gelu)


def collective_read_before_the_wait(graph: TrainGraph) -> None:
    gelu, wait = node(graph, "gelu"), torch.ops._c10d_functional.wait_tensor.default
    start = torch.ops._c10d_functional.all_reduce.default
    reduced = insert(gelu.next, start, gelu, "sum", "0", like=gelu)
    waited = insert(reduced.next, wait, reduced, like=gelu)
    insert(waited, torch.ops.aten.clone.default, reduced, like=gelu)


def clone_with_another_constant(graph: TrainGraph) -> None:
    node(graph, "gelu_recomputed").kwargs = {"approximate": "tanh"}


def clone_of_nothing(graph: TrainGraph) -> None:
    node(graph, "gelu_recomputed").meta[CLONE_OF] = "gone"


def clone_that_writes(graph: TrainGraph) -> None:
    copy = first(graph, torch.ops.aten.copy_.default)
    again = insert(node(graph, "expand"), copy.target, *copy.args, like=copy)
    again.meta = {**copy.meta, CLONE_OF: copy.name, "partitioner_tag": "is_backward"}


def fetched_from_another_value(graph: TrainGraph) -> None:
    node(graph, "addmm_fetched").meta[FETCH_OF] = "gelu"


def fetched_in_the_forward(graph: TrainGraph) -> None:
    node(graph, "addmm_fetched").meta["partitioner_tag"] = "is_forward"


def sent_in_the_backward(graph: TrainGraph) -> None:
    node(graph, "addmm_on_host").meta["partitioner_tag"] = "is_backward"


def written_twice(graph: TrainGraph) -> None:
    copy = first(graph, torch.ops.aten.copy_.default)
    insert(copy.next, copy.target, *copy.args, like=copy)


def old_value_read_in_the_backward(graph: TrainGraph) -> None:
    buffer = first(graph, torch.ops.aten.copy_.default).args[0]
    node(graph, "clone_recomputed").update_arg(0, buffer)


def old_value_read_through_a_view(graph: TrainGraph) -> None:
    copy = first(graph, torch.ops.aten.copy_.default)
    buffer = copy.args[0]
    assert isinstance(buffer, fx.Node)
    view = insert(node(graph, "t"), torch.ops.aten.alias.default, buffer, like=buffer)
    insert(copy.next, torch.ops.aten.clone.default, view, like=buffer)


def gradient_transposed(graph: TrainGraph) -> None:
    (output,) = graph.graph.find_nodes(op="output")
    results = list(output.args[0])  # type: ignore[arg-type]
    results[1] = node(graph, "t_7")
    output.args = (tuple(results),)


def clone_without_its_line(graph: TrainGraph) -> None:
    del node(graph, "gelu_recomputed").meta["stack_trace"]


FAULTS: dict[Fault, str] = {
    read_before_made: "lint",
    role_lost: "signature",
    two_inputs_one_role: "signature",
    tangent_unlike_its_output: "signature",
    output_without_a_value: "signature",
    value_missing: "values",
    wrong_stride: "values",
    wrong_dtype: "values",
    wrong_arguments: "values",
    forward_reads_backward: "phases",
    forward_after_backward: "phases",
    result_from_the_backward: "phases",
    drawn_anew: "draws",
    state_of_another_draw: "draws",
    collective_never_waited_for: "collectives",
    collective_waited_for_twice: "collectives",
    collective_read_before_the_wait: "collectives",
    clone_with_another_constant: "recomputed",
    clone_of_nothing: "recomputed",
    clone_that_writes: "recomputed",
    fetched_from_another_value: "transfers",
    fetched_in_the_forward: "transfers",
    sent_in_the_backward: "transfers",
    written_twice: "writes",
    old_value_read_in_the_backward: "writes",
    old_value_read_through_a_view: "writes",
    gradient_transposed: "gradients",
    clone_without_its_line: "origins",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_and_named(fault: Fault) -> None:
    graph = scheduled()
    assert find_violations(graph, stage="scheduled") == []
    graph = fault(graph) or graph
    found = find_violations(graph, stage="scheduled")
    assert FAULTS[fault] in [violation.check for violation in found]
    assert not [violation for violation in found if "cannot be checked" in violation.message]
    with pytest.raises(GraphLawError, match=rf"\[{FAULTS[fault]}\]"):
        check_graph(graph, stage="scheduled")


def test_every_check_has_a_planted_fault_and_states_its_law() -> None:
    assert {check.name for check in CHECKS} == set(FAULTS.values())
    assert all(check.law.endswith(".") and "\n" not in check.law for check in CHECKS)


def test_a_value_is_derived_once_for_a_graph_and_its_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = capture(graphs.Tiny(), (torch.randn(2, 4),)).graph
    derived = []

    def noted(item: fx.Node, mode: Any) -> Any:
        derived.append(item.name)
        return derive(item, mode)

    derive = spec._derive
    monkeypatch.setattr("fxzero.passes.spec._derive", noted)
    assert find_violations(graph, stage="traced") == []
    calls = [n.name for n in graph.graph.nodes if n.op == "call_function"]
    assert derived == calls
    for again in (graph, graph.copy()):
        assert find_violations(again, stage="traced") == []
    assert len(derived) == len(calls)
    changed = graph.copy()
    last = node(changed, calls[-1])
    last.target = torch.ops.aten.neg.default
    find_violations(changed, stage="traced")
    assert derived[len(calls) :] == [last.name]


def test_what_was_derived_is_not_kept_alive() -> None:
    graph = capture(graphs.Tiny(), (torch.randn(2, 4),)).graph
    assert find_violations(graph, stage="traced") == []
    value = weakref.ref(graph.results[0].meta["val"])
    assert value() is not None
    del graph
    gc.collect()
    assert value() is None


def test_the_error_lists_every_violation_and_shows_the_graph_around_the_first() -> None:
    graph = scheduled()
    clone_without_its_line(graph)
    wrong_stride(graph)
    with pytest.raises(GraphLawError) as caught:
        check_graph(graph, stage="scheduled", when="after pass x")
    text = str(caught.value)
    assert text.startswith("[FXZ902] after pass x: 3 violations of the graph's law (scheduled)\n")
    assert "  [values] gelu: value is recorded as float32[2, 8] on cpu, strides [[1, 2]]" in text
    assert "  [origins] gelu_recomputed: has not the stack_trace of gelu" in text
    shown = text.splitlines()[text.splitlines().index("") + 1 :]
    (at,) = [i for i, line in enumerate(shown) if line.startswith("> ")]
    assert shown[at].startswith("> gelu  aten.gelu.default(addmm)  float32[2, 8]  F")
    assert at == 10
    assert len(shown) == 21


def test_a_random_clone_without_its_pass_breaks_the_law_only_once_scheduled() -> None:
    graph = scheduled("replay_randomness")
    assert find_violations(graph, stage="traced") == []
    assert [v.check for v in find_violations(graph, stage="scheduled")] == ["draws"]


def test_a_graph_too_broken_for_a_check_is_a_violation_not_a_crash() -> None:
    graph = scheduled()
    node(graph, "gelu").meta["val"] = "nonsense"
    with pytest.raises(GraphLawError):
        check_graph(graph, stage="scheduled")


def test_a_split_that_saves_too_little_or_too_much_is_found() -> None:
    split = partition(scheduled())
    check_split(split)
    for broken in (replace(split, saved=split.saved[1:]), replace(split, output_count=2)):
        with pytest.raises(GraphLawError, match="do not fit"):
            check_split(broken)
    backward = split.backward.graph
    unread = next(n for n in backward.nodes if n.users)
    unread.replace_all_uses_with(backward.output_node().prev)
    with pytest.raises(GraphLawError, match="never read"):
        check_split(split)


@pytest.mark.parametrize(
    "name",
    tiers(
        zoo.CASES,
        quick=("rand_ops",),
        exhaustive=(
            *("llama_bf16", "bert", "vit", "dict_output", "dataclass_output"),
            *("kwargs_only", "logging", "no_loss", "module_twice"),
            *("llama", "frozen", "tied", "buffers", "unused_parameter"),
        ),
    ),
)
def test_zoo_models_obey_the_law_traced_and_scheduled(name: str) -> None:
    model, args, kwargs, _ = zoo.build(name)
    graph = capture(model, args, kwargs).graph
    assert known_origins(graph) >= 0.9
    context = graphs.recompute_most(graph)
    assert len(context.decisions.recompute) > 10
    graph, _ = run_passes(graph, context, check=True)
    check_split(partition(graph))
