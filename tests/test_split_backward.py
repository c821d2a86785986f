"""The backward cut into gradients of inputs and of weights: bitwise the same, and what moves."""

from __future__ import annotations

import functools
import operator
import random
from collections import Counter
from typing import Any

import pytest
import torch
import zoo
from helpers import tiers
from test_shard import Chain
from test_shard import planner as sharding_planner
from torch import Tensor, fx, nn

from fxzero import _torch
from fxzero.capture import capture
from fxzero.collectives import (
    ALL_GATHER,
    COALESCED,
    WAIT,
    is_collective,
    is_gather,
    is_reduction,
    is_wait,
    waits_of,
)
from fxzero.cost import count_flops, makes_view
from fxzero.execution import compile_to_python
from fxzero.graph_planner import Decided
from fxzero.options import Options
from fxzero.passes import split_backward as module
from fxzero.passes.partition import Split
from fxzero.passes.rematerialize import CLONE_OF
from fxzero.passes.split_backward import BackwardSplit, split_backward
from fxzero.passes.writer import derived
from fxzero.planner import Planner
from fxzero.randomness import draw_again
from fxzero.storages import analyse, storage_identity, tensor_leaves
from fxzero.structure import flatten

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes before this one are checked by other tests, which takes longer than these."""
    monkeypatch.delenv("FXZERO_SPEC")


class MLP(nn.Module):
    """Linear layers with dropout between them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(torch.tanh(layer(x)), 0.1, self.training)
        return x


class Tied(MLP):
    """Its last weight is that of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.embed(ids)) @ self.embed.weight.T


def activations(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).requires_grad_()


# What the model gets from a stage before it, in the place of an input of the zoo.
ARRIVING: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "gpt2": ("input_ids", "inputs_embeds", (8, 64, 96)),
    "llama": ("input_ids", "inputs_embeds", (8, 64, 96)),
    "t5": ("input_ids", "inputs_embeds", (8, 64, 64)),
    "resnet": ("pixel_values", "pixel_values", (8, 3, 64, 64)),
}


class Subject:
    """A model whose inputs require gradients, traced once, and the graphs of its plans."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.model = model
        self.leaves, _ = flatten((args, kwargs))
        self.capture = capture(model, args, kwargs)

    def decide(self, accumulates: bool = False, **options: Any) -> Decided:
        given = Options(**{"optimizer": "sgd", **options})
        planner = Planner(self.capture.graph, given, "model", accumulates=accumulates)
        return planner.decide()

    def split(self, accumulates: bool = False) -> Split:
        return self.decide(accumulates, recompute="none").emitted.split

    def arguments(self, split: Split) -> list[Tensor]:
        """The backward's, from a real forward with fixed random numbers."""
        torch.manual_seed(0)
        owned = {**dict(self.model.named_parameters(remove_duplicate=False)),
                 **dict(self.model.named_buffers()), **self.capture.constants}  # fmt: skip
        given = [self.leaves[r.index] if r.kind == "input" else owned[r.name] for r in split.inputs]
        with torch.no_grad():
            results = compile_to_python(split.forward)([t.detach().clone() for t in given])
        _, *rest = split.backward_inputs()
        like = [node.meta["val"] for part in rest for node in part]
        made = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype).normal_() for v in like]
        return [*results[split.output_count :], *made]


@functools.cache
def subject(name: str) -> Subject:
    if name == "mlp":
        return Subject(MLP(), (activations(8, 16),), {})
    if name == "tied":
        return Subject(Tied(), (torch.arange(8) * 3,), {})
    model, args, kwargs, _ = zoo.build(name)
    if name == "unet":
        args = (args[0].requires_grad_(), *args[1:])
    if name in ARRIVING:
        old, new, shape = ARRIVING[name]
        kwargs = {key: value for key, value in kwargs.items() if key != old}
        kwargs[new] = activations(*shape)
    return Subject(model, args, kwargs)


def input_gradients(split: Split) -> list[int]:
    return positions(split, lambda role: role.kind == "input")


def positions(split: Split, wanted: Any) -> list[int]:
    """Where the backward returns the gradients of the wanted inputs."""
    found = zip(split.inputs, split.gradients, strict=True)
    return [position for role, position in found if position is not None and wanted(role)]


def calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def is_view(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return True
    return isinstance(target, torch._ops.OpOverload) and makes_view(target)


def flops(graph_module: fx.GraphModule) -> int:
    return sum(map(count_flops, graph_module.graph.nodes))


def results_of(graph_module: fx.GraphModule) -> list[fx.Node]:
    (output,) = graph_module.graph.find_nodes(op="output")
    return list(output.args[0])


def run_whole(backward: fx.GraphModule, arguments: list[Tensor]) -> list[Tensor]:
    return compile_to_python(backward)(list(arguments))


def run_parts(parts: BackwardSplit, arguments: list[Tensor]) -> list[Tensor]:
    """Results in the backward's order; the early ones as they are before the weight part runs."""
    made = compile_to_python(parts.input_part)([arguments[i] for i in parts.input_takes])
    early, handed = made[: len(parts.input_returns)], made[len(parts.input_returns) :]
    found = dict(zip(parts.input_returns, [tensor.clone() for tensor in early], strict=True))
    taken = [arguments[i] for i in parts.weight_takes]
    late = compile_to_python(parts.weight_part)([*handed, *taken])
    found.update(zip(parts.weight_returns, late, strict=True))
    return [found[i] for i in range(len(found))]


def assert_same_results(
    backward: fx.GraphModule, parts: BackwardSplit, arguments: list[Tensor]
) -> None:
    """Bitwise equal results, writes to arguments, and random numbers."""
    state = torch.get_rng_state()
    ends = []
    for run in (functools.partial(run_whole, backward), functools.partial(run_parts, parts)):
        torch.set_rng_state(state)
        own = [tensor.clone() for tensor in arguments]
        ends.append([*run(own), *own, torch.get_rng_state()])
    whole, split = ends
    assert len(whole) == len(split)
    assert [i for i, (a, b) in enumerate(zip(whole, split, strict=True)) if not a.equal(b)] == []


def assert_runs_once(backward: fx.GraphModule, parts: BackwardSplit) -> None:
    """Every operator but views is in one part, in the old order; masked ones may be in both."""
    order = {node.name: index for index, node in enumerate(backward.graph.nodes)}
    seen: Counter[str] = Counter()
    for part in (parts.input_part, parts.weight_part):
        part.graph.lint()
        operators = [node for node in calls(part.graph) if not is_view(node)]
        seen.update(node.name for node in operators)
        kept = [order[node.name] for node in operators if node.name in order]
        assert kept == sorted(kept)
        extra = {node.target for node in operators if node.name not in order}
        assert extra <= {aten.convolution_backward.default}
        assert not extra or part is parts.weight_part
    assert set(seen.values()) <= {1}
    assert {node.name for node in calls(backward.graph) if not is_view(node)} <= set(seen)


def assert_handed_once(parts: BackwardSplit) -> None:
    """What is handed over are tensors of different storages, none that of a placeholder."""
    handed = results_of(parts.input_part)[len(parts.input_returns) :]
    assert tuple(node.name for node in handed) == parts.handed
    assert all(isinstance(node.meta["val"], Tensor) for node in handed)
    storages = analyse(parts.input_part.graph.nodes)
    numbers = [number for node in handed for number in storages.of[node]]
    assert len(numbers) == len(set(numbers)) == len(handed)
    assert all(storages.maker[number].op == "call_function" for number in numbers)


def check(name: str, split: Split, early: list[int]) -> BackwardSplit:
    """Splits, runs and compares; returns the parts."""
    assert early
    before = str(split.backward.graph)
    parts = split_backward(split.backward, early)
    assert str(split.backward.graph) == before
    assert_runs_once(split.backward, parts)
    assert_handed_once(parts)
    assert_same_results(split.backward, parts, subject(name).arguments(split))
    return parts


@pytest.mark.parametrize(
    "name",
    tiers(("mlp", "gpt2", "llama", "t5", "resnet", "unet"), ("mlp",), ("llama", "t5")),
)
def test_both_parts_give_what_the_backward_gives(name: str) -> None:
    split = subject(name).split()
    parts = check(name, split, input_gradients(split))
    assert parts.handed
    assert 0.4 * flops(split.backward) < flops(parts.weight_part)
    assert flops(parts.input_part) + flops(parts.weight_part) == flops(split.backward)


@pytest.mark.parametrize("name", tiers(("mlp", "gpt2", "unet"), quick=("mlp",)))
def test_gradients_are_added_in_place_in_the_weight_part(name: str) -> None:
    split = subject(name).split(accumulates=True)
    parts = check(name, split, input_gradients(split))
    added = [n for n in calls(parts.weight_part.graph) if n.target is aten.add_.Tensor]
    assert len(added) == len(split.accumulated)
    existing = range(len(split.saved), len(split.saved) + len(split.accumulated))
    assert set(existing) <= set(parts.weight_takes)
    assert set(existing).isdisjoint(parts.input_takes)


@pytest.mark.slow
def test_what_is_recomputed_runs_once() -> None:
    plan = subject("gpt2").decide().plan
    budget = (plan.minimum_budget + plan.peak_bytes) // 2
    split = subject("gpt2").decide(memory_budget=budget).emitted.split
    clones = [node for node in calls(split.backward.graph) if CLONE_OF in node.meta]
    assert any(node.target is draw_again for node in clones)
    check("gpt2", split, input_gradients(split))


def test_a_gradient_that_two_uses_of_a_weight_add_up_to_may_be_the_early_one() -> None:
    split = subject("tied").split()
    embedding = positions(split, lambda role: role.name == "embed.weight")
    parts = check("tied", split, embedding)
    # The head's product is part of that gradient.  Left are those of three layers.
    assert flops(parts.weight_part) == 3 * (2 * 8 * 16 * 16)


@pytest.mark.parametrize("name", tiers(("unet", "resnet"), quick=("unet",)))
def test_without_masks_a_convolution_leaves_the_weight_part_nothing_to_compute(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = subject(name).split()
    monkeypatch.setattr(module, "count_flops", lambda node: 0)
    parts = check(name, split, input_gradients(split))
    # All but the classifier behind the convolutions.
    assert flops(parts.weight_part) < 1e-4 * flops(split.backward)


def test_masks_divide_the_items_of_a_convolution_and_leave_norms_whole() -> None:
    split = subject("unet").split()
    parts = split_backward(split.backward, input_gradients(split))
    masks = {
        part: {tuple(node.args[-1]) for node in calls(graphs.graph) if "convolution" in node.name}
        for part, graphs in (("input", parts.input_part), ("weight", parts.weight_part))
    }
    assert masks == {"input": {(True, False, False)}, "weight": {(False, True, True)}}
    norms = aten.native_group_norm_backward.default
    assert not parts.weight_part.graph.find_nodes(op="call_function", target=norms)
    for node in parts.input_part.graph.find_nodes(op="call_function", target=norms):
        assert all(node.args[-1])


def test_without_input_gradients_the_weight_part_is_the_backward() -> None:
    split = subject("unet").split()
    parts = split_backward(split.backward, ())
    assert not calls(parts.input_part.graph)
    assert (parts.handed, parts.input_takes, parts.input_returns) == ((), (), ())
    assert compile_to_python(parts.input_part)([]) == []
    assert parts.weight_takes == tuple(range(len(parts.weight_takes)))
    assert str(parts.weight_part.graph) == str(split.backward.graph)
    assert_same_results(split.backward, parts, subject("unet").arguments(split))


def test_without_weight_gradients_the_weight_part_is_empty() -> None:
    frozen = Subject(MLP().requires_grad_(False), (activations(8, 16),), {})
    split = frozen.split()
    parts = split_backward(split.backward, input_gradients(split))
    assert (parts.handed, parts.weight_takes, parts.weight_returns) == ((), (), ())
    assert len(parts.weight_part.graph.nodes) == 1
    assert_same_results(split.backward, parts, frozen.arguments(split))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_collective_is_waited_for_in_the_part_that_starts_it(zero: int) -> None:
    planner = sharding_planner(Chain(), (activations(8, 64),), zero=zero)
    split = planner.decide().emitted.split
    parts = split_backward(split.backward, input_gradients(split))
    assert_runs_once(split.backward, parts)
    assert_handed_once(parts)
    for part in (parts.input_part, parts.weight_part):
        waited = {
            wait for node in calls(part.graph) if is_collective(node) for wait in waits_of(node)
        }
        assert waited == {node for node in calls(part.graph) if is_wait(node)}
    assert not any(map(is_reduction, calls(parts.input_part.graph)))
    assert any(map(is_reduction, calls(parts.weight_part.graph)))
    assert any(map(is_gather, calls(parts.input_part.graph))) == (zero == 3)


# Graphs made by hand: operators on 3 x 3 matrices.


class Builder:
    """A graph without results that grows by calls, with fake values."""

    def __init__(self, inputs: int) -> None:
        self.graph = fx.Graph()
        self.values = [self.graph.placeholder(f"x{i}") for i in range(inputs)]
        with _torch.FakeTensorMode():
            for node in self.values:
                node.meta["val"] = torch.empty(3, 3)

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        if target is operator.getitem:
            node.meta["val"] = args[0].meta["val"][args[1]]
        elif target is WAIT:
            node.meta["val"] = args[0].meta["val"]
        else:
            node.meta["val"] = derived(node)
        return node

    def returning(self, *results: fx.Node) -> fx.GraphModule:
        self.graph.output(results)
        return fx.GraphModule(nn.Module(), self.graph)

    def check(self, early: list[int], *results: fx.Node) -> BackwardSplit:
        backward = self.returning(*results)
        parts = split_backward(backward, early)
        assert_runs_once(backward, parts)
        assert_same_results(backward, parts, [torch.randn(3, 3) for _ in self.values])
        return parts


def names(part: fx.GraphModule) -> list[str]:
    return [node.name for node in calls(part.graph)]


def test_a_write_that_an_early_gradient_reads_through_a_view_stays_before_it() -> None:
    build = Builder(2)
    view = build.call(aten.t.default, build.values[0])
    write = build.call(aten.add_.Tensor, view, build.values[1])
    parts = build.check([0], build.call(aten.sin.default, build.values[0]), write)
    assert names(parts.input_part) == ["t_default", "add__tensor", "sin_default"]
    assert names(parts.weight_part) == []


def test_a_read_before_an_early_write_stays_before_it() -> None:
    build = Builder(1)
    read = build.call(aten.sin.default, build.values[0])
    parts = build.check([0], build.call(aten.neg_.default, build.values[0]), read)
    assert names(parts.input_part) == ["sin_default", "neg__default"]


def test_an_early_gradient_is_final_when_the_input_part_ends() -> None:
    build = Builder(1)
    result = build.call(aten.sin.default, build.values[0])
    write = build.call(aten.neg_.default, result)
    parts = build.check([0], result, build.call(aten.cos.default, write))
    assert names(parts.input_part) == ["sin_default", "neg__default"]
    assert names(parts.weight_part) == ["cos_default"]


def test_a_write_without_users_runs_once_in_the_part_that_has_its_place() -> None:
    build = Builder(3)
    first = build.call(aten.sin.default, build.values[0])
    build.call(aten.copy_.default, build.values[1], first)
    late = build.call(aten.cos.default, build.values[2])
    build.call(aten.copy_.default, build.values[2], late)
    parts = build.check([0], build.call(aten.neg.default, build.values[1]), late)
    assert names(parts.input_part) == ["sin_default", "copy__default", "neg_default"]
    assert names(parts.weight_part) == ["cos_default", "copy__default_1"]


def test_draws_keep_their_order() -> None:
    build = Builder(1)
    one, two, three = (build.call(aten.rand_like.default, build.values[0]) for _ in range(3))
    parts = build.check([1], one, two, three)
    assert names(parts.input_part) == ["rand_like_default", "rand_like_default_1"]
    assert names(parts.weight_part) == ["rand_like_default_2"]


def test_results_may_repeat_and_may_be_arguments() -> None:
    build = Builder(2)
    x, y = build.values
    shared = build.call(aten.sin.default, x)
    parts = build.check([0, 2], shared, shared, x, x, y)
    assert parts.handed == ("sin_default",)
    assert (parts.input_takes, parts.weight_takes) == ((0,), (0, 1))


def test_views_of_one_storage_are_handed_over_as_their_base() -> None:
    build = Builder(1)
    base = build.call(aten.sin.default, build.values[0])
    view = build.call(aten.t.default, base)
    early = build.call(aten.mm.default, view, build.call(aten.view.default, view, [3, 3]))
    (row, *_) = (build.call(operator.getitem, build.call(aten.unbind.int, view), i) for i in (1, 2))
    parts = build.check([0], early, view, build.call(aten.cos.default, row), base)
    assert parts.handed == (base.name,)
    assert_handed_once(parts)


def test_no_tuple_is_handed_over() -> None:
    build = Builder(1)
    both = build.call(aten.sort.default, build.values[0])
    values, indices = (build.call(operator.getitem, both, i) for i in (0, 1))
    parts = build.check([0], values, build.call(aten.neg.default, indices))
    assert parts.handed == (indices.name,)


def test_all_that_one_collective_gathers_is_waited_for_in_its_part() -> None:
    build = Builder(2)
    both = build.call(COALESCED[ALL_GATHER], build.values, 2, "dp")
    waits = [build.call(WAIT, build.call(operator.getitem, both, i)) for i in (0, 1)]
    backward = build.returning(*(build.call(aten.sin.default, wait) for wait in waits))
    parts = split_backward(backward, [0])
    assert parts.handed == (waits[1].name,)
    assert names(parts.weight_part) == ["sin_default_1"]


def random_program(choose: random.Random) -> tuple[Builder, list[fx.Node]]:
    """Reads, writes, views and draws in any order."""
    build = Builder(3)
    values = list(build.values)
    for _ in range(choose.randint(4, 14)):
        value = choose.choice(values)
        own = storage_identity(value.meta["val"])
        others = [n for n in values if storage_identity(n.meta["val"]) != own]
        kind = choose.choice(["sin", "add", "t", "sin_", "add_", "draw", "sort", "split"])
        if kind in ("add", "add_"):
            target = {"add": aten.add.Tensor, "add_": aten.add_.Tensor}[kind]
            values.append(build.call(target, value, choose.choice(others)))
        elif kind in ("sort", "split"):
            made = build.call(*((aten.sort.default, value) if kind == "sort"
                                else (aten.split.Tensor, value, 3)))  # fmt: skip
            values.append(build.call(operator.getitem, made, 0))
        else:
            target = {"sin": aten.sin, "t": aten.t, "sin_": aten.sin_, "draw": aten.rand_like}[kind]
            values.append(build.call(target.default, value))
    return build, choose.choices(values, k=4)


@pytest.mark.slow
def test_programs_that_write_and_draw_are_the_same_in_two_parts() -> None:
    moved = 0
    for seed in range(200):
        choose = random.Random(seed)
        build, results = random_program(choose)
        early = choose.sample(range(4), choose.randint(0, 4))
        parts = build.check(early, *results)
        moved += bool(calls(parts.input_part.graph)) and bool(calls(parts.weight_part.graph))
    assert moved > 100


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("groups", "stride", "transposed"), [(1, 1, 0), (2, 2, 0), (1, 2, 1)])
def test_a_convolution_computes_the_same_under_a_mask(
    groups: int, stride: int, transposed: int, channels_last: bool, dtype: torch.dtype, rest: bool
) -> None:
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, 16, 17, 19, dtype=dtype).contiguous(memory_format=form)
    weight = torch.randn((16, 24, 3, 3) if transposed else (24, 16 // groups, 3, 3), dtype=dtype)
    options = ([stride] * 2, [1, 1], [1, 1], bool(transposed), [0, 0], groups)
    dy = torch.randn_like(aten.convolution(x, weight, None, *options))

    def backward(mask: list[bool]) -> list[Tensor | None]:
        return list(aten.convolution_backward(dy, x, weight, [24], *options, mask))

    whole, part = backward([True] * 3), backward([not rest, rest, rest])
    found = [(a, b) for a, b in zip(whole, part, strict=True) if b is not None]
    assert len(found) == (2 if rest else 1)
    assert all(torch.equal(a, b) for a, b in found)
    assert tensor_leaves(whole)
