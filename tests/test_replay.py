"""Reproducers: graphs as data and back, replay of failures, and nothing run for a stranger."""

from __future__ import annotations

import builtins
import contextlib
import copy
import json
import math
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
import zoo
from helpers import tiers
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from fxzero import _torch
from fxzero.capture import capture
from fxzero.cli import main
from fxzero.errors import GraphLawError, InternalError, PlanError
from fxzero.graph import InputRole, OutputRole, TrainGraph
from fxzero.passes import pipeline
from fxzero.passes.context import PassContext
from fxzero.passes.listing import format_graph
from fxzero.passes.pipeline import Pass, make_pass
from fxzero.passes.runner import replay, run_passes
from fxzero.passes.serialize import dump_graph, load_graph
from fxzero.passes.spec import check_graph
from fxzero.passes.write_back import write_back_pass
from fxzero.storages import analyse

DROPOUT = graphs.recompute(("native_dropout", "native_layer_norm_backward"))


def data_of(graph: TrainGraph) -> Any:
    return json.loads(json.dumps(dump_graph(graph), allow_nan=False))


def record(data: Any, name: str) -> Any:
    return next(node for node in data["nodes"] if node["name"] == name)


# Data and back.


@pytest.mark.parametrize(
    "name",
    tiers(
        zoo.CASES,
        quick=(),
        exhaustive=(
            *("llama_bf16", "bert", "t5", "vit", "dict_output", "dataclass_output"),
            *("kwargs_only", "logging", "no_loss", "module_twice", "unused_parameter"),
            *("llama", "frozen", "buffers", "mixed_dtype", "tied"),
        ),
    ),
)
def test_a_graph_goes_to_data_and_back(name: str) -> None:
    model, args, kwargs, _ = zoo.build(name)
    graph = capture(model, args, kwargs).graph
    data = data_of(graph)
    loaded = load_graph(data)
    assert loaded.digest() == graph.digest()
    assert format_graph(loaded) == format_graph(graph)
    assert data_of(loaded) == data
    before, after = analyse(graph.graph.nodes), analyse(loaded.graph.nodes)
    assert after.bytes == before.bytes
    assert list(after.of.values()) == list(before.of.values())
    check_graph(loaded, stage="traced")


def test_a_scheduled_graph_goes_to_data_and_back() -> None:
    graph, _ = run_passes(graphs.tiny(), DROPOUT)
    loaded = load_graph(data_of(graph))
    assert format_graph(loaded) == format_graph(graph)
    check_graph(loaded, stage="scheduled")


def test_arguments_of_every_kind_survive() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    with _torch.FakeTensorMode():
        x.meta["val"] = torch.empty(16, device="cuda:0").as_strided((3, 2), (4, 2), 4)
    kinds: tuple[Any, ...] = (
        [math.inf, -math.inf, 1.5, 2, True, None, "a'b\n"],
        (x, [x], ()),
        slice(None, 3, None),
        {"key": [1, (2,)]},
        1 + 2j,
        torch.bfloat16,
        torch.strided,
        torch.channels_last,
        torch.device("cuda", 1),
        torch.ops.aten.mm.default,
    )
    call = graph.call_function(torch.ops.aten.mm.default, kinds, {"out": x, "nan": math.nan})
    graph.output((call,))
    role = InputRole("parameter", "w.x")
    made = TrainGraph(fx.GraphModule({}, graph), (role,), (OutputRole("gradient", of=role),))
    loaded = load_graph(data_of(made))
    assert loaded.digest() == made.digest()
    (value,) = (node.meta["val"] for node in loaded.placeholders)
    assert value.device == torch.device("cuda:0")
    assert (value.shape, value.stride(), value.storage_offset()) == ((3, 2), (4, 2), 4)
    assert (loaded.inputs, loaded.outputs) == (made.inputs, made.outputs)


def test_a_graph_of_another_device_is_read_and_checked_without_it() -> None:
    data = data_of(graphs.tiny())
    for storage in data["storages"]:
        storage["device"] = "cuda:0"
    graph = load_graph(data)
    assert {node.meta["val"].device.type for node in graph.placeholders} == {"cuda"}
    check_graph(graph, stage="traced")
    run_passes(graph, PassContext(DROPOUT.decisions, "cuda"), check=True)


def test_a_graph_with_a_function_of_the_users_has_no_data_form() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(math.sqrt, (2.0,)),))
    with pytest.raises(NotImplementedError, match="sqrt"):
        dump_graph(TrainGraph(fx.GraphModule({}, graph), (), ()))


# Failures.


def forgets_a_copy(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Write-backs before their last read."""
    graph = write_back_pass(graph, context)
    (write,) = (n for n in graph.graph.nodes if n.target is torch.ops.aten.copy_.default)
    node = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.default)[0]
    with graph.graph.inserting_before(node.next):
        again = graph.graph.call_function(write.target, write.args)
    again.meta = dict(write.meta)
    return graph


def crashes(graph: TrainGraph, context: PassContext) -> TrainGraph:
    graph.graph.erase_node(next(n for n in graph.graph.nodes if n.op == "output"))
    raise KeyError("lost")


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], tuple[Pass, ...]]:
    def replace_write_back(function: Any) -> tuple[Pass, ...]:
        sabotaged = make_pass("write_back", function)
        passes = tuple(sabotaged if p.name == "write_back" else p for p in pipeline.PASSES)
        monkeypatch.setattr(pipeline, "PASSES", passes)
        return passes

    return replace_write_back


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (forgets_a_copy, GraphLawError, r"after pass postpone_updates: .*\n *\[writes\]"),
        (crashes, InternalError, r"pass write_back failed: KeyError: 'lost'"),
    ],
)
def test_a_sabotaged_pass_leaves_a_reproducer_that_replays_to_the_same_error(
    fault: Any, kind: type[InternalError], message: str, tmp_path: Path, sabotage: Any
) -> None:
    passes = sabotage(fault)
    graph = graphs.tiny()
    text = format_graph(graph)
    with pytest.raises(kind, match=message) as caught:
        run_passes(graph, DROPOUT, passes, check=True, dump=tmp_path)
    directory = caught.value.reproducer
    assert directory == tmp_path / "reproducer"
    assert str(caught.value).endswith(
        f"\n  written to {directory}\n  run it again: fxzero replay {directory}"
    )
    assert {path.name for path in directory.iterdir()} == {
        "graph.json",
        "context.json",
        "passes.json",
        "error.txt",
    }
    assert fault.__name__ in (directory / "error.txt").read_text() or kind is GraphLawError
    assert format_graph(load_graph(json.loads((directory / "graph.json").read_text()))) == text

    with pytest.raises(kind) as again:
        replay(directory)
    assert str(again.value) == str(caught.value)


def test_a_reproducer_of_what_is_mended_passes_now(
    tmp_path: Path, sabotage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mended = pipeline.PASSES
    with pytest.raises(InternalError) as caught:
        run_passes(graphs.tiny(), DROPOUT, sabotage(crashes), dump=tmp_path)
    monkeypatch.setattr(pipeline, "PASSES", mended)
    assert caught.value.reproducer is not None
    assert replay(caught.value.reproducer) == "passes now"


def test_a_reproducer_lies_in_a_temporary_directory_unless_told(
    tmp_path: Path, sabotage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(InternalError) as caught:
        run_passes(graphs.tiny(), DROPOUT, sabotage(crashes))
    directory = caught.value.reproducer
    assert directory is not None
    assert directory.parent == tmp_path
    assert directory.name.startswith("fxzero-reproducer-")


def test_the_error_of_the_pass_is_raised_even_if_no_reproducer_can_be_written(
    tmp_path: Path, sabotage: Any
) -> None:
    (tmp_path / "reproducer").write_text("in the way")
    with pytest.raises(InternalError, match="'lost'") as caught:
        run_passes(graphs.tiny(), DROPOUT, sabotage(crashes), dump=tmp_path)
    assert caught.value.reproducer is None
    assert "no reproducer was written: FileExistsError" in caught.value.__notes__[0]


def test_the_command_replays(tmp_path: Path, sabotage: Any, capsys: Any) -> None:
    with pytest.raises(InternalError):
        run_passes(graphs.tiny(), DROPOUT, sabotage(crashes), dump=tmp_path)
    assert main(["replay", str(tmp_path / "reproducer")]) == 4
    assert "pass write_back failed: KeyError: 'lost'" in capsys.readouterr().err


# Strangers.


@pytest.fixture(scope="module")
def honest() -> Any:
    return data_of(graphs.tiny())


def _target(text: str) -> Callable[[Any], None]:
    return lambda data: record(data, "gelu").update(target=text)


def _edit(node: str, **fields: Any) -> Callable[[Any], None]:
    return lambda data: record(data, node).update(fields)


_CODE = "x=__import__('os').system('touch HERE')"
HOSTILE: dict[str, Callable[[Any], None]] = {
    "os.system": _target("os.system"),
    "builtins.eval": _target("builtins.eval"),
    "a method of torch.ops": _target("load_library.__call__.x"),
    "a dunder": _target("aten.__class__.__init__"),
    "a TorchScript operator that writes a file": _target("aten.save.default"),
    "a TorchScript operator that prints": _target("prim.Print.default"),
    "a higher order operator": _target("higher_order.cond.default"),
    "an overload that is none": _target("aten.gelu.nonsense"),
    "too many parts": _target("aten.gelu.default.x"),
    "a function inside arguments": _edit("gelu", args=[{"operator": "os.system"}]),
    "code in an input's name": _edit("primals_1", target=_CODE),
    "code in a node's name": _edit("gelu", name=_CODE),
    "code in a keyword": _edit("gelu", kwargs={f"a=1)\nimport os\n{_CODE}#": 1}),
    "a constant that replaces a method": _edit("gelu", op="get_attr", target="forward"),
    "a module to call": _edit("gelu", op="call_module"),
    "a method to call": _edit("gelu", op="call_method", target="system"),
    "an unknown device": _edit("gelu", args=[{"device": "os:system"}]),
    "an unknown dtype": _edit("gelu", args=[{"dtype": "torch.os"}]),
    "an unknown float": _edit("gelu", args=[{"float": "1e5"}]),
    "an unknown mark": _edit("gelu", meta={"val": 1}),
    "a mark of the wrong kind": _edit("gelu", meta={"stack_trace": 1}),
    "a node twice": _edit("gelu", name="addmm"),
    "a node before it is made": _edit("gelu", args=[{"node": "mul"}]),
    "a view beyond its storage": lambda data: record(data, "gelu")["value"]["tensor"].update(
        shape=[1000, 1000]
    ),
    "an endless view": lambda data: record(data, "gelu")["value"]["tensor"].update(
        shape=[2**59, 2**59], stride=[0, 0]
    ),
    "an endless storage": lambda data: data["storages"][0].update(bytes=2**70),
    "an output that is no node": lambda data: data["nodes"][-1]["args"][0].append(1),
    "no output": lambda data: data["nodes"].pop(),
    "another format": lambda data: data.update(format=2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_refused_and_runs_nothing(
    name: str, honest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(os, "system", ran.append)
    monkeypatch.chdir(tmp_path)
    data = copy.deepcopy(honest)
    HOSTILE[name](data)
    write_reproducer(tmp_path / "r", data)
    with pytest.raises(PlanError):
        replay(tmp_path / "r")
    assert not ran
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def write_reproducer(directory: Path, data: Any) -> None:
    directory.mkdir(exist_ok=True)
    context = {"decisions": {"saved": [], "recompute": []}, "device": "cpu"}
    files = {"graph": data, "context": context, "passes": ["write_back"]}
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_an_operator_that_touches_files_is_not_run_by_the_law(honest: Any, tmp_path: Path) -> None:
    data = copy.deepcopy(honest)
    victim = tmp_path / "victim"
    record(data, "gelu").update(
        target="aten.from_file.default", args=[str(victim), True, 64], kwargs={}
    )
    write_reproducer(tmp_path / "r", data)
    with pytest.raises((GraphLawError, PlanError)):
        replay(tmp_path / "r")
    assert not victim.exists()


def test_a_source_line_from_a_stranger_opens_no_file(
    honest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = copy.deepcopy(honest)
    record(data, "gelu")["meta"]["stack_trace"] = 'File "/dev/zero", line x, in\nFile "'
    record(data, "mul")["meta"]["stack_trace"] = 'File "/dev/zero", line 1, in f\n  f(x)'
    graph = load_graph(data)
    monkeypatch.setattr(builtins, "open", None)
    assert "zero:1 in f: f(x)" in format_graph(graph)


def test_missing_or_wrong_files_are_plan_errors(honest: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"context.json is missing: No such file"):
        replay(tmp_path)
    for name, content in {
        "passes.json": '["no_such_pass"]',
        "context.json": '{"decisions": {}, "device": "cpu"}',
        "graph.json": "[" * 100_000,
    }.items():
        write_reproducer(tmp_path / "r", honest)
        (tmp_path / "r" / name).write_text(content)
        with pytest.raises(PlanError):
            replay(tmp_path / "r")


@pytest.fixture(scope="module")
def reproducer(honest: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reproducer")
    write_reproducer(directory, honest)
    return directory


@given(st.data())
def test_a_cut_off_file_is_a_plan_error(reproducer: Path, data: st.DataObject) -> None:
    text = (reproducer / "graph.json").read_text()
    length = data.draw(st.integers(0, len(text) - 1))
    cut = reproducer.with_name("cut")
    cut.mkdir(exist_ok=True)
    for path in reproducer.iterdir():
        (cut / path.name).write_text(path.read_text()[: length if path.stem == "graph" else None])
    with pytest.raises(PlanError):
        replay(cut)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside nested data."""
    found: list[tuple[Any, Any]] = []
    stack = [data]
    while stack:
        item = stack.pop()
        keys = item if isinstance(item, dict) else range(len(item))
        for key in keys:
            found.append((item, key))
            if isinstance(item[key], (dict, list)):
                stack.append(item[key])
    return found


@pytest.mark.slow
@given(st.data())
def test_corrupted_data_is_a_plan_error_or_a_graph_that_the_law_judges(
    honest: Any, data: st.DataObject
) -> None:
    broken = copy.deepcopy(honest)
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(broken)))
        other, source = data.draw(st.sampled_from(places(broken)))
        if data.draw(st.booleans()):
            container[key] = data.draw(_JSON)
        else:
            container[key] = copy.deepcopy(other[source])
    try:
        graph = load_graph(broken)
    except PlanError:
        return
    with contextlib.suppress(GraphLawError):
        check_graph(graph, stage="traced")


def test_getitem_and_the_random_functions_are_the_only_functions(honest: Any) -> None:
    graph, _ = run_passes(graphs.tiny(), DROPOUT)
    targets = {n["target"] for n in data_of(graph)["nodes"] if n["op"] == "call_function"}
    assert {t for t in targets if not t.startswith("aten.")} == {
        "operator.getitem",
        "fxzero.randomness.draw",
        "fxzero.randomness.draw_again",
    }
    assert operator.getitem in {n.target for n in load_graph(honest).graph.nodes}
