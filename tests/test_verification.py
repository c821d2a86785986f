"""model.verify: what is planted is found, the guilty pass and node are named, and nothing is left.

Passes are spoilt by ``sabotage.py``.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import sabotage
import torch
import torch.nn.functional as F
import zoo
from helpers import assert_equal, tiers
from torch import Tensor, nn
from verification_cases import IDS, LABELS, Small, compiled, line_of

import fxzero
from fxzero.errors import UsageError
from fxzero.optim import AdamW
from fxzero.passes.pipeline import PASSES, PREPARATION
from fxzero.ties import TieChange
from fxzero.verification import Guilt, Verification, compare

PASS_COUNT = len(PREPARATION) + len(PASSES)


def everything(node: Any) -> str:
    return "recompute"


@pytest.fixture
def lawless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made without a check of their law, which some sabotage breaks."""
    monkeypatch.setenv("FXZERO_SPEC", "0")


# What is right


def test_a_right_step_is_exact_and_says_so() -> None:
    found = compiled(Small(), recompute="full").verify(IDS, LABELS)
    assert found.exact
    assert found.ok
    assert found.guilt is None
    assert found.within_plan
    first, *rows = str(found).splitlines()
    assert first == "EXACT: compiled against eager, same batch and seed"
    assert [row.strip() for row in rows[:4]] == [
        "loss           equal",
        "gradients      all 5 equal",
        "random stream  equal",
        "buffers        equal",
    ]
    assert rows[4].startswith("  peak           measured ")


def test_nothing_is_left_behind() -> None:
    model = compiled(Small(), recompute="full", optimizer="adamw")
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(3, requires_grad=True)
    for _ in range(2):
        model(IDS, LABELS).backward()
    optimizer.step()
    state, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    kept = {name: g.clone() for name, g in gradients.items() if g is not None}
    buffers = dict(model.named_buffers())
    stream, plan = torch.get_rng_state(), model.plan
    sabotage.plant(model, "deduplicate", sabotage.scale_gradient("up.bias"))
    model._fxzero.steps.clear()  # so that there is something to find out
    with torch.no_grad():
        assert not model.verify(IDS, LABELS).ok
    assert_equal(model.state_dict(), state)
    assert str(optimizer.state_dict()) == str(states)
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert_equal({name: p.grad for name, p in model.named_parameters()}, kept)
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), stream)
    assert model.plan == plan
    assert x.grad is None


class Replacing(nn.Module):
    """Makes a new tensor of its buffer, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fails = nn.Linear(8, 8), False
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(F.dropout(x, 0.5))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        if self.fails:
            raise ValueError("told to fail")
        return x.square().mean()


def test_nothing_is_left_behind_by_an_error_either() -> None:
    model, x = compiled(Replacing()), torch.randn(4, 8, requires_grad=True)
    buffer = model.mean
    assert model.verify(x).gradient_count == 3  # that of the input among them
    model(x).backward()
    before, gradient, stream = model.mean.clone(), x.grad, torch.get_rng_state()
    model.fails = True
    with pytest.raises(ValueError, match="told to fail"):
        model.verify(x)
    assert model.mean is buffer
    assert torch.equal(model.mean, before)
    assert x.grad is gradient
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), stream)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.layer(x)
        return logits.square().mean(), logits.tanh()


def test_verifying_teaches_nothing_about_outputs() -> None:
    model, x = compiled(TwoOutputs()), torch.randn(512, 64)
    for _ in range(2):
        model(x)[0].backward()  # drops the other output
        model.zero_grad()
    peak = model.plan.peak_bytes
    found = model.verify(x)
    assert found.exact
    assert found.measured_bytes <= found.planned_bytes <= 1.05 * found.measured_bytes
    model(x)[0].backward()
    assert model.plan.peak_bytes == peak
    assert found.planned_bytes > peak  # it has held the outputs


def test_one_of_the_micro_batches_is_verified() -> None:
    model = compiled(Small(), microbatches=2, recompute="full")
    found = model.verify(IDS, LABELS)
    assert found.exact
    assert found.accumulated is not None
    assert found.accumulated.exact
    shapes = {step.shapes for step in model._fxzero.steps.values()}
    assert shapes == {"int64[16, 16], int64[16, 16]"}


@pytest.mark.slow
def test_a_pipeline_cannot_be_compared_but_verified() -> None:
    model = compiled(Small(), pipeline=fxzero.Pipeline(2, microbatches=2))
    with pytest.raises(UsageError) as caught:
        compare(model, (IDS, LABELS), {})
    assert str(caught.value) == (
        "[FXZ101] compare() runs one step of a whole model, and this one is a pipeline\n"
        "  call model.verify(*inputs), on all ranks"
    )
    with pytest.raises(UsageError) as caught:
        model.verify(IDS, LABELS)
    assert str(caught.value) == (
        "[FXZ101] the model draws random numbers, and the stages of a pipeline draw them from "
        "streams of their own: nothing to compare with\n  verify it after model.eval()"
    )
    buffers = copy.deepcopy(dict(model.named_buffers()))
    found = model.eval().verify(IDS, LABELS)
    assert found.ok, str(found)
    assert found.gradient_count == 5
    assert all(p.grad is None for p in model.parameters())
    assert_equal(dict(model.named_buffers()), buffers)
    model.step(IDS, LABELS)
    assert model.steps == buffers["steps"] + 2  # micro-batches, and nothing for the cutting


# Spoilt passes


@pytest.mark.parametrize(
    "name", tiers([item.name for item in (*PREPARATION, *PASSES)], quick=("rematerialize",))
)
def test_whatever_pass_scales_a_gradient_is_named(name: str) -> None:
    model = compiled(Small(), recompute="full")
    sabotage.plant(model, name, sabotage.scale_gradient("up.bias", 1 + 1e-6))
    found = model.verify(IDS, LABELS)
    assert found.gradient_difference < found.tolerance
    assert found.ok is (name == "quantize")  # which says that it changes numbers
    assert found.guilt is not None
    assert (found.guilt.kind, found.guilt.name) == ("pass", name)
    assert found.guilt.node is not None
    assert found.guilt.node.result == "gradient of up.bias"


def test_a_scaled_gradient_is_printed_with_its_line() -> None:
    model = compiled(Small(), recompute="full")
    sabotage.plant(model, "deduplicate", sabotage.scale_gradient("embed.weight"))
    found = model.verify(IDS, LABELS)
    assert found.gradients == (("embed.weight", pytest.approx(0.5)),)
    lines = str(found).splitlines()
    assert lines[0] == "DIFFERS: compiled against eager, same batch and seed"
    assert lines[2:4] == [
        "  gradients      1 of 5 differ, the worst by 0.5 of its largest entry",
        "                 0.5       embed.weight",
    ]
    assert found.guilt is not None
    node = found.guilt.node
    assert node is not None
    assert node.found == pytest.approx(1.5 * node.expected)
    assert lines[7:] == [
        f"  comes from     pass deduplicate, number 3 of {PASS_COUNT}",
        f"  first node     {node.node}  float32[16, 8], the gradient of embed.weight",
        f"                 {line_of('x = self.embed(ids)')}",
        f"                 before: {node.before}",
        f"                 behind: {node.after}",
        f"                 differs by {node.largest:.3g} at most; at {list(node.index)} "
        f"{node.expected:.6g} became {node.found:.6g}",
    ]
    assert node.after.endswith(", 1.5)")


def test_a_dropped_accumulation_is_found() -> None:
    model = compiled(Small())
    sabotage.plant(model, "accumulate", sabotage.drop_accumulation("down.weight"))
    assert model.verify(IDS, LABELS).exact
    model(IDS, LABELS).backward()
    found = model.verify(IDS, LABELS)
    assert found.exact  # the step without gradients from before
    assert not found.ok
    assert found.accumulated is not None
    assert found.accumulated.gradients == (("down.weight", pytest.approx(0.5)),)
    assert found.guilt is not None
    assert (found.guilt.name, found.guilt.accumulates) == ("accumulate", True)
    text = str(found)
    assert "\n  accumulated    1 of 5 differ, the worst by 0.5 of its largest entry\n" in text
    assert "comes from     pass accumulate, number 4 of" in text
    assert ", where gradients exist that it adds to\n" in text
    assert "the gradient of down.weight\n" in text
    assert line_of("x = x + self.down(torch.tanh(hidden))") in text


@pytest.mark.usefixtures("lawless")
def test_a_changed_constant_of_a_recomputed_operator_is_found() -> None:
    model = compiled(Small(), recompute=everything)
    sabotage.plant(model, "rematerialize", sabotage.change_constant)
    found = model.verify(IDS, LABELS)
    assert not found.ok
    assert found.loss_difference == 0
    assert found.guilt is not None
    assert found.guilt.name == "rematerialize"
    node = found.guilt.node
    assert node is not None
    assert node.node.endswith("_recomputed")
    assert node.before.endswith(", 0.5)")
    assert node.after.endswith(", 0.625)")
    assert node.source == line_of("hidden = F.gelu(self.up(x)) * 0.5")
    assert node.found == pytest.approx(1.25 * node.expected)


@pytest.mark.usefixtures("lawless")
def test_a_dropout_that_is_drawn_anew_is_found() -> None:
    model = compiled(Small(), recompute=everything)
    sabotage.plant(model, "replay_randomness", sabotage.draw_anew)
    found = model.verify(IDS, LABELS)
    assert not found.ok
    assert not found.random_stream_equal
    assert found.guilt is not None
    assert found.guilt.name == "replay_randomness"
    assert found.guilt.node is not None
    assert found.guilt.node.source == line_of("hidden = F.dropout(hidden, 0.25, self.training)")
    assert "  random stream  DIFFERS\n" in str(found)


@pytest.mark.parametrize(
    "name", tiers(("shard", "update", "rematerialize", "postpone_updates"), quick=("update",))
)
def test_a_gradient_that_an_optimizer_would_take_is_compared(name: str) -> None:
    model = compiled(Small(), optimizer=AdamW, update="backward", recompute="full")
    optimizer = AdamW(model.parameters())
    model.update_with(optimizer)
    assert model.verify(IDS, LABELS).exact
    model._fxzero.steps.clear()
    sabotage.plant(model, name, sabotage.scale_gradient("up.bias"))
    weights, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    found = model.verify(IDS, LABELS)
    assert not found.ok
    assert found.guilt is not None
    assert found.guilt.name == name
    assert "mul" in str(found.guilt.node)
    assert_equal(model.state_dict(), weights)
    assert str(optimizer.state_dict()) == str(states)


@pytest.mark.slow
@pytest.mark.usefixtures("lawless")
@pytest.mark.parametrize(
    ("name", "spoil", "line"),
    [
        ("replay_randomness", sabotage.draw_anew, "hidden_states = self.dropout(hidden_states)"),
        *(
            pytest.param(*given, marks=pytest.mark.exhaustive)
            for given in (
                (
                    "shard",
                    sabotage.scale_gradient("transformer.wte.weight"),
                    "self.wte(input_ids)",
                ),
                (
                    "rematerialize",
                    sabotage.change_constant,
                    "return 0.5 * input * (1.0 + torch.tanh(",
                ),
            )
        ),
    ],
)
def test_spoilt_passes_are_found_in_a_hugging_face_model(
    name: str, spoil: sabotage.Spoil, line: str
) -> None:
    model, args, kwargs, _ = zoo.build("gpt2 of 2 layers")  # with tied weights and dropout
    model = sabotage.plant(compiled(model, recompute="full"), name, spoil)
    found = model.verify(*args, **kwargs)
    assert not found.ok
    assert found.guilt is not None
    assert found.guilt.name == name
    assert found.guilt.node is not None
    assert line in found.guilt.node.source


# What is wrong elsewhere


def test_a_hook_is_no_fault_of_a_pass() -> None:
    model = compiled(Small())
    factors = iter((3.0, 1.0))  # compiled, eager
    model.up.bias.register_hook(lambda gradient: gradient * next(factors))
    found = model.verify(IDS, LABELS)
    assert not found.ok
    assert found.guilt == Guilt("inner", "eager")
    assert str(found).endswith(
        "  comes from     what runs the graphs, or a hook of the model: no pass changes anything"
    )


class Scaled(nn.Module):
    """Multiplies by a number that no graph knows the changes of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(4, 4), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.layer(x).square().sum()


def test_a_number_that_changed_is_the_captures_fault() -> None:
    model, x = compiled(Scaled()), torch.randn(2, 4)
    assert model.verify(x).exact
    model.factor = 1.25
    found = model.verify(x)
    assert not found.ok
    assert found.guilt == Guilt("capture")
    assert found.loss_difference == pytest.approx(
        0.25 / 1.25 * float(model._fxzero.eager(model)(x))
    )


@torch.library.custom_op("test_verification::unsteady", mutates_args=())
def unsteady(x: Tensor) -> Tensor:
    CALLS.append(1)
    return x + 1e-3 * len(CALLS)


@unsteady.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


CALLS: list[int] = []
unsteady.register_autograd(lambda ctx, gradient: gradient)


class Unsteady(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return unsteady(self.layer(x)).square().sum()


def test_what_never_comes_to_the_same_is_not_bisected() -> None:
    found = compiled(Unsteady()).verify(torch.randn(2, 4))
    assert not found.exact
    assert found.guilt == Guilt("unknown")


@pytest.mark.parametrize(
    ("guilt", "text"),
    [
        (
            Guilt("inner", "inductor"),
            "the inner compiler: code of inductor computes something else; "
            "no pass changes anything",
        ),
        (
            Guilt("inner", "inductor", allowed=True),
            "the inner compiler: code of inductor rounds otherwise; no pass changes anything",
        ),
        (
            Guilt("capture"),
            "the capture: traced, the model computes something else; no pass changes anything",
        ),
        (
            Guilt("pass", "quantize", 2, 12, by_design=True, rank=1),
            "pass quantize, number 2 of 12, which changes numbers by design, on rank 1",
        ),
        (
            Guilt("unknown"),
            "an unknown step: the same graph does not come to the same twice on this device",
        ),
    ],
)
def test_whoever_is_guilty_is_named(guilt: Guilt, text: str) -> None:
    assert str(replace(_found(), guilt=guilt)).endswith(f"  comes from     {text}")


def _found() -> Verification:
    return Verification(
        exact=False,
        ok=False,
        tolerance=1e-4,
        loss_difference=0.25,
        output_difference=2.0,
        gradient_difference=float("inf"),
        worst_gradient="a",
        gradients=(("a", float("inf")), *((name, 0.1) for name in "bcdef")),
        gradient_count=8,
        buffers=("mean",),
        random_stream_equal=True,
        non_finite=(),
        measured_bytes=1200,
        planned_bytes=1000,
        eager_bytes=4096,
    )


def test_all_that_differs_is_printed() -> None:
    assert str(replace(_found(), failed_ranks=(1, 3))).splitlines() == [
        "DIFFERS: compiled against eager, same batch and seed",
        "  loss           differs by 0.25",
        "  outputs        differs by 2",
        "  gradients      6 of 8 differ, the worst by inf of its largest entry",
        "                 inf       a",
        "                 0.1       b",
        "                 0.1       c",
        "                 0.1       d",
        "                 0.1       e",
        "                 and 1 more",
        "  random stream  equal",
        "  buffers        DIFFER: mean",
        "  peak           measured 1.17 KiB, planned 1000 B, eager 4.00 KiB: "
        "20.0% MORE THAN PLANNED",
        "  ranks          wrong on rank 1, 3",
    ]


def test_json_has_all_of_it() -> None:
    data = json.loads(replace(_found(), ties=(TieChange("a", "b", True),)).to_json())
    assert data["gradients"][0] == ["a", "inf"]
    assert data["ties"] == [{"name": "a", "other": "b", "broken": True}]
    assert data["within_plan"] is False


@pytest.mark.slow
def test_the_inner_compiler_rounds_within_its_tolerance() -> None:
    model = compiled(Small(), inner="inductor")
    found = model.verify(IDS, LABELS)
    assert found.ok, str(found)
    assert found.guilt is not None
    assert found.guilt.allowed


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_spoilt_pass_is_found_under_the_inner_compiler_too() -> None:
    model = compiled(Small(), inner="inductor")
    sabotage.plant(model, "deduplicate", sabotage.scale_gradient("up.bias"))
    found = model.verify(IDS, LABELS)
    assert found.guilt is not None
    assert (found.guilt.name, found.ok) == ("deduplicate", False)


def test_a_comparison_alone_names_no_pass() -> None:
    model = sabotage.plant(compiled(Small()), "shard", sabotage.scale_gradient("up.bias"))
    found = compare(model, (IDS, LABELS), {})
    assert not found.ok
    assert found.worst_gradient == "up.bias"
    assert compare(compiled(Small()), (IDS,), {"labels": LABELS}).exact
