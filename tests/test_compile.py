"""fxzero.compile: the model stays what it was, and everything a training loop does to it works."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from helpers import assert_equal, assert_same, run, tiers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxzero
from fxzero import BudgetError, Plan
from fxzero.errors import PlanError, RecompileLimitError, RuntimeStateError, UsageError
from fxzero.policies import name_of
from fxzero.precision import autocast_state

X, Y = torch.randn(32, 16), torch.randn(32, 16)


class Net(nn.Module):
    """Returns a loss; more activations than parameters, dropout, and a tensor with a name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(16, 48), nn.Linear(48, 48), nn.Linear(48, 16)

    def inner(self, x: Tensor) -> Tensor:
        x = fxzero.name(torch.tanh(F.gelu(self.up(x))), "hidden")
        x = F.dropout(x, 0.2, self.training)
        return self.down(F.gelu(self.middle(x)) + x)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Any:
        return F.mse_loss(self.inner(x), y) * scale


class WithLogits(Net):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        logits = self.inner(x)
        return F.mse_loss(logits, y), logits


class Counting(WithLogits):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        self.count += 1
        return super().forward(x, y)


class TwoHeads(Net):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        hidden = self.inner(x)
        return self.one(hidden), {"two": self.two(hidden)}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = F.dropout(torch.relu(self.norm(self.up(x))), 0.2, self.training)
        return F.mse_loss(self.down(hidden), y)


class Checkpointed(Net):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        x = checkpoint(self.region, torch.tanh(x), use_reentrant=False)
        return F.mse_loss(torch.sigmoid(x), y)

    def region(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.tanh(F.gelu(self.up(x))), 0.2, self.training)
        return self.down(F.gelu(self.middle(x)))


def compiled(model: Any, *inputs: Any, **options: Any) -> Any:
    """Compiled with as much recompute as there is, unless told otherwise."""
    settings = {"inner": "eager", "optimizer": "sgd", "recompute": "full"} | options
    return fxzero.compile(model, inputs or None, **settings)


def pair(kind: type[nn.Module], *inputs: Any, **options: Any) -> tuple[Any, Any]:
    """A compiled model and its eager twin."""
    twin = kind()
    return compiled(copy.deepcopy(twin), *inputs, **options), twin


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_trains_alike(one: Any, other: Any, *inputs: Any, seed: int = 0, **kwargs: Any) -> None:
    expected = run(other, inputs, kwargs, seed=seed)
    assert_same(run(one, inputs, kwargs, seed=seed), expected)


# The model stays what it was.


def test_the_compiled_model_is_the_same_object_of_the_same_class() -> None:
    model = Net()
    assert compiled(model) is model
    assert isinstance(model, Net)
    assert type(model).__name__ == "Net"
    assert not hasattr(Net, "plan")


def test_parameters_and_state_dict_keys_stay() -> None:
    model = Net()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    compiled(model, X, Y)
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_a_deep_copy_trains_apart_from_its_original() -> None:
    model, twin = pair(Net, X, Y)
    model.recompile_limit = 3
    clone = copy.deepcopy(model)
    assert isinstance(clone, Net)
    assert clone.recompile_limit == 3
    with torch.no_grad():
        model.up.weight.zero_()
    assert_trains_alike(clone, twin, X, Y)
    assert clone.plan.decisions.recompute
    assert model.up.weight.grad is None


def test_a_pickled_model_comes_back_compiled() -> None:
    model, twin = pair(Net)
    model.recompile_limit = 3
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again, Net)
    assert again.recompile_limit == 3
    assert_trains_alike(again, twin, X, Y)
    assert again.plan.decisions.recompute


def test_a_model_compiled_twice_follows_the_second_call() -> None:
    model, twin = pair(Net, X, Y)
    assert compiled(model, X, Y, recompute="none") is model
    assert not model.plan.decisions.recompute
    assert [c.__name__ for c in type(model).__mro__].count("CompiledModule") == 1
    assert_trains_alike(model, twin, X, Y)


def test_inference_without_gradients_is_eagers() -> None:
    model, twin = pair(WithLogits)
    for module in (model, twin):
        module.eval()
    with torch.no_grad():
        (loss, logits), (expected, expected_logits) = model(X, Y), twin(X, Y)
    assert torch.equal(loss, expected)
    assert torch.equal(logits, expected_logits)
    assert not loss.requires_grad
    with pytest.raises(UsageError, match="there is no plan yet"):
        _ = model.plan


# Calls that differ.


def test_train_and_eval_have_graphs_of_their_own() -> None:
    model, twin = pair(Normed)
    for seed, mode in enumerate((True, False, True, False)):
        model.train(mode)
        twin.train(mode)
        assert_trains_alike(model, twin, X, Y, seed=seed)
    assert model.norm.num_batches_tracked == 2


def test_new_input_shapes_are_compiled_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, twin = pair(Net)
    with caplog.at_level(logging.WARNING, "fxzero"):
        assert_trains_alike(model, twin, X, Y)
        assert_trains_alike(model, twin, X, Y)
        assert not caplog.messages
        assert_trains_alike(model, twin, X[:5], Y[:5])
        assert_trains_alike(model, twin, X, Y)
    assert caplog.messages == [
        "compiling graph 2 of at most 16: new input shapes or modes float32[5, 16], float32[5, 16]"
    ]


def test_more_shapes_than_the_limit_are_refused_with_all_of_them() -> None:
    model = compiled(Net(), X, Y)
    model.recompile_limit = 1
    with pytest.raises(RecompileLimitError) as caught:
        model(X[:5], Y[:5])
    assert str(caught.value) == (
        "[FXZ203] graph number 2 for inputs float32[5, 16], float32[5, 16], but recompile_limit "
        "is 1\n  compiled so far for: float32[32, 16], float32[32, 16]\n"
        "  pad inputs to a few fixed shapes, or raise model.recompile_limit"
    )


def test_keyword_arguments_come_in_any_order() -> None:
    model, twin = pair(Net)
    for order in ({"x": X, "y": Y, "scale": 2.0}, {"scale": 2.0, "y": Y, "x": X}):
        assert_trains_alike(model, twin, **order)
    assert_trains_alike(model, twin, X, scale=3.0, y=Y)


def test_a_parameter_frozen_after_compile_gets_no_gradient() -> None:
    model, twin = pair(Net, X, Y)
    for module in (model, twin):
        module.middle.weight.requires_grad_(False)
    assert_trains_alike(model, twin, X, Y)
    assert model.middle.weight.grad is None


def test_assigned_weights_are_the_ones_that_train() -> None:
    model, twin = pair(Net, X, Y)
    state = Net().state_dict()
    for module in (model, twin):
        module.load_state_dict(copy.deepcopy(state), assign=True)
    assert_trains_alike(model, twin, X, Y)


def test_settings_of_autocast_are_told_apart() -> None:
    plain = autocast_state()
    with torch.autocast("cpu", torch.bfloat16):
        inside = autocast_state()
        with torch.autocast("cpu", torch.float16):
            other = autocast_state()
    assert len({plain, inside, other}) == 3
    assert autocast_state() == plain


def test_autocast_around_the_call_is_followed() -> None:
    model, twin = pair(Net, X, Y)
    for module in (model, twin):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(X, Y)
        loss.backward()
    assert_equal(gradients(model), gradients(twin))
    assert_trains_alike(model, twin, X, Y, seed=1)


# Backward in all its forms.


def test_gradients_accumulate_over_calls() -> None:
    model, twin = pair(Net)
    for module in (model, twin):
        torch.manual_seed(0)
        for half in (slice(0, 16), slice(16, 32)):
            module(X[half], Y[half]).backward()
    assert_equal(gradients(model), gradients(twin))


def test_inputs_get_gradients() -> None:
    model, twin = pair(Net)
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    for module, x in zip((model, twin), inputs, strict=True):
        torch.manual_seed(0)
        module(x, Y).backward()
    assert inputs[0].grad is not None
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_a_retained_graph_runs_backward_twice() -> None:
    model, twin = pair(Net)
    for module in (model, twin):
        torch.manual_seed(0)
        loss = module(X, Y)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_equal(gradients(model), gradients(twin))
    torch.manual_seed(0)
    loss = model(X, Y)
    loss.backward()
    with pytest.raises(RuntimeStateError) as caught:
        loss.backward()
    assert str(caught.value) == (
        "[FXZ301] backward ran a second time, but its saved values are freed after the first\n"
        "  call the first one with retain_graph=True"
    )


def test_a_gradient_of_a_gradient_is_refused() -> None:
    model = compiled(Net())
    loss = model(X, Y)
    with pytest.raises(RuntimeStateError) as caught:
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    assert str(caught.value) == (
        "[FXZ301] create_graph=True asks for gradients of gradients, which a compiled step has "
        "not\n  compute them with the model before fxzero.compile"
    )


def test_a_parameter_modified_before_the_backward_is_refused() -> None:
    model = compiled(Net())
    loss = model(X, Y)
    with torch.no_grad():
        model.middle.weight.mul_(2)
    with pytest.raises(RuntimeStateError) as caught:
        loss.backward()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("[FXZ301] a tensor of shape [48, 48] that the backward needs was m")
    assert lines[1] == "  call optimizer.step() and in-place updates after backward()"


def test_a_gradient_through_the_logits_runs_the_step_again_and_later_steps_plan_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, twin = pair(WithLogits)

    def both(output: Any) -> Tensor:
        return output[0] + output[1].square().mean()

    warnings = []
    for seed in range(3):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fxzero"):
            found = run(model, (X, Y), loss=both, seed=seed)
        warnings.append(len(caplog.messages))
        assert_same(found, run(twin, (X, Y), loss=both, seed=seed))
        if seed:
            assert found.peak <= model.plan.peak_bytes
    assert warnings == [1, 0, 0]


def test_a_step_that_updates_buffers_cannot_run_again_and_says_what_to_do() -> None:
    model = compiled(Counting())
    loss, logits = model(X, Y)
    with pytest.raises(RuntimeStateError) as caught:
        (loss + logits.sum()).backward()
    assert "output [1], but only the model's scalars were planned for" in str(caught.value)
    assert "because it updates count" in str(caught.value)


def test_parameters_that_no_gradient_reaches_have_none() -> None:
    model, twin = pair(TwoHeads)
    for seed in range(3):
        found = run(model, (X,), loss=lambda output: output[0].square().mean(), seed=seed)
        assert_same(
            found, run(twin, (X,), loss=lambda output: output[0].square().mean(), seed=seed)
        )
    assert model.two.weight.grad is None
    assert model.one.weight.grad is not None


def test_another_output_may_get_a_gradient_after_all() -> None:
    model, twin = pair(TwoHeads)
    for seed, pick in enumerate((lambda o: o[0], lambda o: o[1]["two"], lambda o: o[0])):
        found, expected = (
            run(m, (X,), loss=lambda o, pick=pick: pick(o).square().mean(), seed=seed)
            for m in (model, twin)
        )
        assert_same(found, expected)


def test_outputs_that_the_caller_keeps_are_in_the_plan() -> None:
    model = compiled(WithLogits())
    kept = []

    def keep(output: Any) -> Tensor:
        kept[:] = [output[1]]
        return output[0]

    dropped = compiled(WithLogits())
    for seed in range(2):
        found = run(model, (X, Y), loss=keep, seed=seed)
        assert found.peak <= model.plan.peak_bytes
        run(dropped, (X, Y), loss=lambda output: output[0], seed=seed)
    assert any("taken to hold the model's outputs" in note for note in model.plan.notes)
    assert any("seen to drop the model's outputs" in note for note in dropped.plan.notes)


# What a compiled model can do.


def test_step_is_forward_and_backward() -> None:
    model, twin = pair(Net)
    torch.manual_seed(0)
    loss = model.step(X, y=Y)
    expected = run(twin, (X, Y))
    assert not loss.requires_grad
    assert torch.equal(loss, expected.loss)
    assert_equal(gradients(model), expected.gradients)


def test_step_takes_the_loss_from_the_output_or_from_loss_fn() -> None:
    for options in ({}, {"loss_fn": lambda output: output[1].square().mean()}):
        model, twin = pair(WithLogits, **options)
        torch.manual_seed(0)
        loss = model.step(X, Y)
        pick = options.get("loss_fn", lambda output: output[0])
        expected = run(twin, (X, Y), loss=pick)
        assert torch.equal(loss, expected.loss)
        assert_equal(gradients(model), expected.gradients)


def test_no_sync_changes_nothing_on_one_device() -> None:
    model, twin = pair(Net)
    torch.manual_seed(0)
    with model.no_sync():
        model(X, Y).backward()
    assert_equal(gradients(model), run(twin, (X, Y)).gradients)


@pytest.mark.parametrize(
    "name", tiers(("buffers", "resnet", "gpt2"), quick=(), exhaustive=("gpt2",))
)
def test_verify_finds_zoo_models_exact_and_leaves_them_alone(name: str) -> None:
    model, args, kwargs, _ = zoo.build(name)
    before = copy.deepcopy(model.state_dict())
    stream = torch.get_rng_state()
    compiled(model)
    found = model.verify(*args, **kwargs)
    assert found.exact, str(found)
    assert found.ok
    assert found.measured_bytes <= found.planned_bytes <= 1.05 * found.measured_bytes
    assert found.measured_bytes < found.eager_bytes
    assert str(found).startswith("EXACT")
    assert_equal(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None for p in model.parameters())


def test_verify_finds_a_wrong_gradient_and_names_it() -> None:
    model = compiled(Net())
    model.up.weight.register_hook(
        lambda gradient: gradient * (1 if model._fxzero.latest is None else 2)
    )
    run(model, (X, Y))
    calls = iter((1.0, 3.0, 1.0))  # compiled, eager, compiled again to add to the eager one's
    model.middle.bias.register_hook(lambda gradient: gradient * next(calls))
    found = model.verify(X, Y)
    assert not found.ok
    assert found.worst_gradient == "middle.bias"
    assert str(found).startswith("DIFFERS")


# Plans.


def test_a_plan_is_replayed_without_a_solver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = pair(Net, X, Y)
    plan = model.plan
    plan.save(tmp_path / "plan.json")
    monkeypatch.setattr("fxzero.solver.search.Solver.solve", None)
    for given in (tmp_path / "plan.json", str(tmp_path / "plan.json"), plan, copy.deepcopy(plan)):
        again = compiled(copy.deepcopy(twin), X, Y, recompute="auto", plan=given)
        assert again.plan == plan
        assert again.plan.hash == plan.hash
    assert_trains_alike(again, twin, X, Y)
    assert again.plan.decisions == plan.decisions


def test_a_plan_survives_copy_and_pickle() -> None:
    plan = compiled(Net(), X, Y).plan
    assert copy.deepcopy(plan) == plan
    again = pickle.loads(pickle.dumps(plan))
    assert isinstance(again, Plan)
    assert again == plan
    assert again.hash == plan.hash


def test_a_plan_of_another_graph_is_refused() -> None:
    plan = compiled(Net(), X, Y).plan
    with pytest.raises(PlanError) as caught:
        compiled(Net(), X[:5], Y[:5], plan=plan)
    text = str(caught.value)
    assert text.startswith(f"[FXZ501] the plan belongs to graph {plan.graph_digest}, this model")
    assert "it was made for Net with inputs float32[32, 16], float32[32, 16]" in text


def test_a_meta_model_has_the_plan_of_a_real_one() -> None:
    with torch.device("meta"):
        model = Net()
    options: dict[str, Any] = {"recompute": "full", "optimizer": "sgd"}
    plan = fxzero.plan(model, (X.to("meta"), Y.to("meta")), **options)
    assert all(p.is_meta for p in model.parameters())
    real = compiled(Net(), X, Y).plan
    assert plan.graph_digest == real.graph_digest
    assert plan.decisions == real.decisions
    assert plan.peak_bytes == real.peak_bytes


def test_recompute_none_and_full_are_the_ends_of_the_scale() -> None:
    none, full = (compiled(Net(), X, Y, recompute=mode).plan for mode in ("none", "full"))
    assert not none.decisions.recompute
    assert none.status == "feasible"
    assert len(full.decisions.recompute) >= 3
    assert full.peak_bytes < none.peak_bytes
    assert full.peak_bytes == full.minimum_budget
    assert none.peak_bytes == none.unplanned_peak_bytes


def test_the_budget_that_recompute_none_requires_is_enough_for_it() -> None:
    with pytest.raises(BudgetError) as caught:
        compiled(Net(), X, Y, recompute="none", memory_budget=1)
    required = caught.value.required_bytes
    plan = compiled(Net(), X, Y, recompute="none", memory_budget=required).plan
    assert plan.fits
    assert not plan.decisions.recompute


def test_a_recompute_function_decides_by_node() -> None:
    def choose(node: Any) -> str | None:
        return "recompute" if node.target is torch.ops.aten.addmm.default else None

    model, twin = pair(Net, recompute=choose)
    assert_trains_alike(model, twin, X, Y)
    again = [item.node for item in model.plan.decisions.recompute]
    assert again == ["addmm_2", "addmm_1", "addmm"]


def test_a_recompute_function_that_saves_everything_cannot_meet_a_small_budget() -> None:
    everything = compiled(Net(), X, Y, recompute=lambda node: "save").plan
    assert not everything.decisions.recompute
    with pytest.raises(BudgetError) as caught:
        compiled(
            Net(),
            X,
            Y,
            recompute=lambda node: "save",
            memory_budget=everything.peak_bytes - 1,
        )
    assert caught.value.required_bytes == everything.peak_bytes


def test_checkpoint_regions_of_the_model_are_recomputed() -> None:
    model, twin = pair(Checkpointed, recompute="auto")
    assert_trains_alike(model, twin, X, Y)
    saved = {value.name: value.role for value in model.plan.saved}
    assert saved == {"tanh": "saved", "sigmoid": "saved", "draw": "rng state"}
    inside = {"addmm", "gelu", "tanh_1", "native_dropout", "addmm_1", "gelu_1"}
    assert {value.name for value in model.plan.recomputed} == inside


def test_a_tensor_is_known_by_the_name_the_model_gave_it() -> None:
    plan = compiled(Net(), X, Y, recompute="none").plan
    assert "hidden" in [value.name for value in plan.saved]


def test_a_recompute_function_finds_a_tensor_by_its_name() -> None:
    def choose(node: Any) -> str | None:
        return "recompute" if name_of(node) == "hidden" else None

    plan = compiled(Net(), X, Y, recompute=choose).plan
    assert [value.name for value in plan.recomputed] == ["hidden"]


class Constants(Net):
    """A tensor that is a plain attribute, and one that is made in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(16.0)

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return F.mse_loss(self.inner(x) * self.table + torch.tensor([2.0] * 16), y)


def test_tensors_that_are_neither_parameters_nor_buffers_are_followed() -> None:
    model, twin = pair(Constants)
    assert_trains_alike(model, twin, X, Y)
    for module in (model, twin):
        module.table.mul_(2)
    assert_trains_alike(model, twin, X, Y)


def test_a_plain_tensor_attribute_that_is_replaced_is_followed() -> None:
    model, twin = pair(Constants)
    assert_trains_alike(model, twin, X, Y)
    for module in (model, twin):
        module.table = torch.ones(16)
    assert_trains_alike(model, twin, X, Y)
