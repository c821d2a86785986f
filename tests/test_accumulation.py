"""Gradients are added to those that exist as autograd does it: to the bit, and within the plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import zoo
from helpers import tiers
from torch import Tensor, nn

import fxzero
from fxzero import _inductor, training_step
from fxzero.errors import BudgetError, RecompileLimitError

X = torch.randn(32, 24)


class Net(nn.Module):
    """A weight used twice, dropout, a parameter without a gradient and one that is frozen."""

    def __init__(self, depth: int = 3, width: int = 24) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.unused, self.frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(width))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[0]):
            x = nn.functional.dropout(torch.tanh(layer(x)), 0.2, self.training) * self.frozen
        return x.square().mean()


def pair(model: nn.Module, **options: Any) -> tuple[Any, nn.Module]:
    """The model compiled, and as it is."""
    twin = copy.deepcopy(model)
    return fxzero.compile(model, **{"inner": "eager", "optimizer": "none"} | options), twin


def equal(mine: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
    return all(
        (a.grad is None) == (b.grad is None)
        and (a.grad is None or bool(torch.equal(a.grad, b.grad)))
        for a, b in pairs
    )


def seeded(run: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return run()


@pytest.mark.parametrize("name", tiers(("gpt2", "unet", "mixed_dtype"), (), ("gpt2",)))
def test_micro_batches_equal_eager_and_need_what_is_planned(name: str) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.args, self.kwargs, self.loss = zoo.build(name)

        def forward(self) -> Tensor:
            return self.loss(self.model(*self.args, **self.kwargs))

    model, twin = pair(Step())
    peaks = []
    for set_to_none in (True, False, False):
        for seed in range(2):
            ours = fxzero.measure(lambda seed=seed: seeded(lambda: model().backward(), seed))
            seeded(lambda: twin().backward(), seed)
            assert equal(model, twin)
            assert 0.98 * model.plan.peak_bytes <= ours.tensor_bytes <= model.plan.peak_bytes
            peaks.append(model.plan.peak_bytes)
        for module in (model, twin):
            module.zero_grad(set_to_none=set_to_none)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert peaks[0] < peaks[1] <= peaks[0] + gradients
    assert peaks == [*peaks[:2], *peaks[:2], peaks[1], peaks[1]]


def test_gradients_that_are_gone_before_the_backward_are_made_anew() -> None:
    model, twin = pair(Net())
    for module in (model, twin):
        seeded(lambda module=module: module(X).backward())
        loss = seeded(lambda module=module: module(X))
        module.zero_grad()
        loss.backward()
    assert equal(model, twin)
    assert model.unused.grad is None


def test_gradients_that_come_before_the_backward_are_added_to() -> None:
    model, twin = pair(Net())
    for module in (model, twin):
        losses = [seeded(lambda module=module: module(X), seed) for seed in range(2)]
        for loss in losses:
            loss.backward()
    assert equal(model, twin)


def test_negative_zeros_stay() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * x).sum()

    model, _ = pair(Product())
    x = torch.tensor([-0.0, 0.0, 1.0])
    model(x).backward()
    loss = model(x)
    model.zero_grad()
    loss.backward()
    assert torch.signbit(model.weight.grad).tolist() == [True, False, False]


def test_hooks_see_the_new_gradient() -> None:
    seen: dict[str, list[Tensor]] = {"model": [], "twin": []}
    model, twin = pair(Net())
    for name, module in (("model", model), ("twin", twin)):
        weight, bias = module.layers[0].weight, module.layers[1].bias
        weight.register_hook(lambda g, name=name: seen[name].append(g.clone()))
        bias.register_post_accumulate_grad_hook(lambda p, n=name: seen[n].append(p.grad.clone()))
        for seed in range(2):
            seeded(lambda module=module: module(X).backward(), seed)
    assert equal(model, twin)
    assert len(seen["model"]) == len(seen["twin"]) == 4
    for mine in seen["model"]:
        assert any(torch.equal(mine, theirs) for theirs in seen["twin"])


@pytest.mark.slow
def test_autograd_grad_leaves_gradients_alone() -> None:
    model, twin = pair(Net())
    found = []
    for module in (model, twin):
        seeded(lambda module=module: module(X).backward())
        before = [p.grad.clone() for p in module.layers.parameters()]
        loss = seeded(lambda module=module: module(X), 1)
        found.append(torch.autograd.grad(loss, list(module.layers.parameters())))
        after = [p.grad for p in module.layers.parameters()]
        assert all(map(torch.equal, before, after))
    assert all(map(torch.equal, *found))


def test_a_backward_to_some_parameters_leaves_the_others() -> None:
    model, twin = pair(Net())
    for module in (model, twin):
        seeded(lambda module=module: module(X).backward())
        loss = seeded(lambda module=module: module(X), 1)
        loss.backward(inputs=[module.layers[1].weight], retain_graph=True)
        loss.backward()
    assert equal(model, twin)


def test_a_gradient_of_another_layout_is_added_to_by_autograd() -> None:
    model, twin = pair(Net())
    for module in (model, twin):
        for layer in module.layers:
            layer.weight.grad = torch.ones(24, 24).tril().t()
        mine = module.layers[1].weight.grad
        seeded(lambda module=module: module(X).backward())
        assert module.layers[1].weight.grad is mine
    assert equal(model, twin)


def test_a_loss_that_leaves_parameters_out_leaves_their_gradients() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(24, 4), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x).square().mean(), self.right(x).square().mean()

    model, twin = pair(Two())
    for module in (model, twin):
        module(X)[0].backward()
        assert module.right.weight.grad is None
        module(X)[0].backward()
        assert module.right.weight.grad is None
        sum(module(X)).backward()
        module(X)[1].backward()
    assert equal(model, twin)


def test_what_a_loss_does_not_reach_is_not_added_to() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(24, 4), nn.Linear(24, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x).square().mean(), self.right(y).square().mean()

    model, twin = pair(Two())
    for module in (model, twin):
        sum(module(X, X)).backward()
        module(X, X * float("inf"))[0].backward()
    assert equal(model, twin)
    assert model.right.weight.grad.isfinite().all()


def test_weights_of_any_layout_are_accumulated() -> None:
    class Layouts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(24, 24, 3, groups=24, bias=False)
            self.holes = nn.Parameter(torch.randn(24, 48)[:, ::2])
            self.expanded = nn.Parameter(torch.randn(1, 24).expand(4, 24))
            self.last = nn.Conv2d(24, 8, 3).to(memory_format=torch.channels_last)

        def forward(self, x: Tensor) -> Tensor:
            y = self.last(self.depthwise(x)).square().mean()
            return y + (x[:, :, 0, 0] @ self.holes @ self.expanded.t()).square().mean()

    twin = seeded(Layouts)  # a copy's parameters would be contiguous
    model, _ = pair(seeded(Layouts))
    image = torch.randn(2, 24, 9, 9).to(memory_format=torch.channels_last)
    for _ in range(3):
        for module in (model, twin):
            module(image).backward()
        assert equal(model, twin)
    model.zero_grad()
    beyond = []
    for _ in range(2):
        measured = fxzero.measure(lambda: model(image).backward()).tensor_bytes
        beyond.append(measured - model.plan.peak_bytes)
    assert beyond[0] == beyond[1] <= 16  # numbers that are tensors while an operator runs


@pytest.mark.slow
def test_plans_serve_steps_that_add_and_steps_that_do_not(tmp_path: Any) -> None:
    model, _ = pair(Net())
    for _ in range(2):
        model(X).backward()
    model.plan.save(tmp_path / "plan.json")
    assert model.plan.request.accumulate
    again, twin = pair(Net(), plan=tmp_path / "plan.json")
    for _ in range(2):
        for module in (again, twin):
            seeded(lambda module=module: module(X).backward())
    assert equal(again, twin)
    assert again.plan == model.plan


def test_a_given_plan_is_left_where_outputs_ask_for_another_graph() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            return y.square().mean(), y

    model, twin = pair(Two(), plan=fxzero.plan(Two(), X, optimizer="none"))
    for module in (model, twin):
        module(X)[0].backward()
        loss, output = module(X)
        (loss + output.sum()).backward()
        module.zero_grad()
        loss, output = module(X)
        (loss + output.sum()).backward()
    assert equal(model, twin)


def test_a_plan_for_a_step_that_adds_adds_up() -> None:
    x = X.clone().requires_grad_()
    plan = fxzero.plan(Net(), x, accumulate=True, optimizer="adamw")
    assert sum(value.bytes for value in plan.peak.alive) == plan.peak_bytes
    assert sum(plan.ranks[0].breakdown.values()) == plan.peak_bytes


def _asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by one with each plan that a solver is asked for."""
    asked: list[bool] = []
    decide = training_step.Planner.decide
    monkeypatch.setattr(
        training_step.Planner, "decide", lambda self: (asked.append(True), decide(self))[1]
    )
    return asked


def test_a_plan_that_fits_serves_both_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, traced = _asked(monkeypatch), []
    capture = training_step.capture
    monkeypatch.setattr(
        training_step, "capture", lambda *a, **k: (traced.append(True), capture(*a, **k))[1]
    )
    model, _ = pair(Net())
    for _ in range(3):
        model(X).backward()
    assert len(asked) == len(traced) == 1
    model.recompile_limit = 1
    model.zero_grad()
    model(X).backward()
    with pytest.raises(RecompileLimitError, match="graph number 2"):
        model(X[:8])


def _peaks(**options: Any) -> tuple[Any, Any]:
    plans = (fxzero.plan(Net(6), X, optimizer="none", accumulate=a, **options) for a in (0, 1))
    first, second = plans
    return first, second


@pytest.mark.slow
def test_a_budget_holds_for_the_step_that_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _peaks()
    assert first.peak_bytes < second.peak_bytes
    asked = _asked(monkeypatch)
    model, twin = pair(Net(6), memory_budget=first.peak_bytes)
    for seed in range(2):
        ours = fxzero.measure(lambda seed=seed: seeded(lambda: model(X).backward(), seed))
        seeded(lambda: twin(X).backward(), seed)
        assert ours.tensor_bytes <= first.peak_bytes
    assert equal(model, twin)
    assert len(asked) == 2
    assert model.plan.recomputed
    assert second.minimum_budget < first.peak_bytes


@pytest.mark.slow
def test_a_budget_that_only_the_first_micro_batch_meets_is_refused_at_the_second() -> None:
    first, second = _peaks()
    assert first.minimum_budget < second.minimum_budget
    model, _ = pair(Net(6), memory_budget=first.minimum_budget)
    model(X).backward()
    before = [p.grad.clone() for p in model.layers.parameters()]
    with pytest.raises(BudgetError) as caught:
        model(X)
    assert caught.value.required_bytes == second.minimum_budget
    assert all(map(torch.equal, before, (p.grad for p in model.layers.parameters())))


def test_a_given_plan_serves_both_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fxzero.plan(Net(), X, optimizer="none", recompute="full")
    asked = _asked(monkeypatch)
    model, twin = pair(Net(), plan=plan)
    for _ in range(2):
        for module in (model, twin):
            seeded(lambda module=module: module(X).backward())
    assert equal(model, twin)
    assert not asked
    assert model.plan.decisions == plan.decisions
    assert model.plan.peak_bytes > plan.peak_bytes


def test_without_the_pass_autograd_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_SKIP", "accumulate")
    model, twin = pair(Net())
    for _ in range(2):
        for module in (model, twin):
            seeded(lambda module=module: module(X).backward())
    assert equal(model, twin)
    assert "pass accumulate is switched off by FXZERO_SKIP" in model.plan.notes


@pytest.mark.exhaustive
@pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler")
def test_generated_code_adds_within_its_plan() -> None:
    model, twin = pair(Net(), inner="inductor")
    for seed in range(3):
        ours = fxzero.measure(lambda seed=seed: seeded(lambda: model(X).backward(), seed))
        seeded(lambda: twin(X).backward(), seed)
        assert ours.tensor_bytes <= model.plan.peak_bytes
        _assert_close(model.parameters(), twin.parameters())


def _assert_close(mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)
