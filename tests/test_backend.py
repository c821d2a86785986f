"""torch.compile(model, backend="fxzero"): Dynamo's graphs under a budget, bit for bit eager."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from helpers import NOT_TRACED_AS_RUN, Outcome, assert_same, eager, run, tiers
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed

import fxzero
from fxzero import BudgetError, Plan, UsageError
from fxzero.errors import BackendOptionError

pytestmark = pytest.mark.usefixtures("shared_solvers")
X = torch.randn(32, 16)


@pytest.fixture(autouse=True)
def _fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    # The law is checked on the zoo's graphs in test_spec.py.
    monkeypatch.setitem(os.environ, "FXZERO_SPEC", "0")


def compiled(model: nn.Module, **options: Any) -> Any:
    given = {"inner": "eager", "optimizer": "sgd"} | options
    return torch.compile(model, backend="fxzero", dynamic=False, options=given)


def two_steps(name: str, **options: Any) -> list[Outcome]:
    model, args, kwargs, loss = zoo.build(name)
    call = compiled(model, **options)
    return [run(model, args, kwargs, loss, seed=seed, call=call) for seed in range(2)]


def plans_in(directory: Path) -> list[Plan]:
    return [Plan.load(path) for path in sorted(directory.glob("*.json"))]


def unused_bytes(name: str, outcome: Outcome) -> int:
    """Parameters that a model does not use are no inputs of Dynamo's graph."""
    model, *_ = zoo.build(name)
    unused = (p for n, p in model.named_parameters() if outcome.gradients[n] is None)
    return sum(p.untyped_storage().nbytes() for p in unused if p.requires_grad)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def half(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(F.gelu(self.up(x))), 0.2, self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.half(torch.tanh(self.half(x))).square().mean()


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.half(x)
        torch._dynamo.graph_break()
        return self.half(torch.tanh(x)).square().mean()


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.half(x)
        if x.sum() > 0:
            x = self.half(x)
        return self.half(torch.tanh(x)).square().mean()


class Shares:
    """A backend for many budgets: Dynamo traces once, ``chosen`` says whose graphs run."""

    def __init__(self, budgets: dict[int, int], directory: Path) -> None:
        self.budgets = budgets
        self.directory = directory
        self.chosen = max(budgets)

    def __call__(self, gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made = {share: self.made(gm, inputs, share) for share in self.budgets}

        def call(*args: Any) -> Any:
            graph = made[self.chosen]
            if isinstance(graph, BudgetError):
                raise graph
            return graph(*args)

        return call

    def made(self, gm: fx.GraphModule, inputs: list[Tensor], share: int) -> Any:
        options = {"inner": "eager", "optimizer": "sgd", "plan_dir": self.directory / str(share)}
        try:
            return lookup_backend("fxzero")(
                gm, inputs, options={**options, "memory_budget": self.budgets[share]}
            )
        except BudgetError as refusal:
            return refusal


@pytest.mark.parametrize(
    "name",
    tiers(
        zoo.CASES,
        quick=(),
        exhaustive=(
            *("mixtral", "t5", "vit", "frozen", "llama_bf16", "resnet", "tied"),
            *("llama", "bert"),
            *("unused_parameter", "logging", "module_twice", "kwargs_only"),
            *("no_loss", "dataclass_output", "rand_ops", "buffers", "gpt2"),
        ),
    ),
)
def test_a_zoo_model_equals_eager_bitwise_within_its_plan(name: str, tmp_path: Path) -> None:
    expected: Sequence[Outcome] = eager(name)
    budgets = {share: expected[0].peak * share // 100 for share in (100, 60, 40)}
    if name in NOT_TRACED_AS_RUN:
        expected = two_steps(name, recompute="none")
        torch._dynamo.reset()
    model, args, kwargs, loss = zoo.build(name)
    start = copy.deepcopy(model.state_dict())
    backend = Shares(budgets, tmp_path)
    call = torch.compile(model, backend=backend, dynamic=False)
    for share, budget in budgets.items():
        backend.chosen = share
        model.load_state_dict(start)
        try:
            found = [run(model, args, kwargs, loss, seed=seed, call=call) for seed in range(2)]
        except BudgetError as refusal:
            if refusal.required_bytes > budget:
                continue
            raise
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
        plans = plans_in(tmp_path / str(share))
        assert plans
        assert all(plan.fits for plan in plans)
        if len(plans) == 1:
            assert found[1].peak - unused_bytes(name, found[1]) <= plans[0].peak_bytes


@pytest.mark.parametrize("name", ["rand_ops", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_backend_asked_for_by_name_is_exact_and_keeps_its_budget(
    name: str, tmp_path: Path
) -> None:
    expected = eager(name)
    budget = expected[0].peak * 6 // 10
    for one, other in zip(
        two_steps(name, memory_budget=budget, plan_dir=tmp_path), expected, strict=True
    ):
        assert_same(one, other)
        assert one.peak <= budget
    assert all(plan.fits for plan in plans_in(tmp_path))


@pytest.mark.parametrize("kind", [Broken, Branching])
def test_graph_breaks_are_exact_and_noted_in_every_piece(kind: type[Net], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = kind()
    expected = [run(model, (X,), seed=seed) for seed in range(3)]
    call = compiled(model, recompute=lambda node: "recompute", plan_dir=tmp_path)
    for seed in range(3):
        assert_same(run(model, (X,), seed=seed, call=call), expected[seed])
    plans = plans_in(tmp_path)
    assert len(plans) >= 2
    pieces = [p for p in plans if "one piece of a model with graph breaks" in p.notes[0]]
    assert pieces
    assert any(plan.decisions.recompute for plan in plans)


def test_a_budget_that_nothing_fits_is_a_budget_error_with_a_budget_that_works(
    tmp_path: Path,
) -> None:
    model = Net()
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(model, memory_budget=1)(X)
    error = caught.value.inner_exception
    assert isinstance(error, BudgetError)
    torch._dynamo.reset()
    call = compiled(model, memory_budget=error.required_bytes, plan_dir=tmp_path)
    found = run(model, (X,), call=call)
    (plan,) = plans_in(tmp_path)
    assert plan.fits
    assert found.peak <= plan.peak_bytes <= error.required_bytes


def refusal(**options: Any) -> BaseException:
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(Net(), **options)(X)
    return caught.value.inner_exception


@pytest.mark.parametrize("options", [{"zero": 3}, {"pipeline": 4}, {"mesh": "pp"}])
def test_options_that_need_the_whole_model_name_fxzero_compile(options: dict[str, Any]) -> None:
    error = refusal(**options)
    ((name, value),) = options.items()
    assert isinstance(error, BackendOptionError)
    assert str(error) == (
        f"[FXZ401] options['{name}'] needs the whole model, and a backend sees one graph of it\n"
        f"  call fxzero.compile(model, {name}={value!r}) instead of torch.compile"
    )


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    error = refusal(memory_buget="1GiB")
    assert isinstance(error, UsageError)
    assert str(error).startswith(
        "[FXZ101] torch.compile(backend=\"fxzero\"): unknown option 'memory_buget'; "
        "did you mean 'memory_budget'?"
    )


def test_modes_are_refused() -> None:
    call = torch.compile(Net(), backend="fxzero", mode="max-autotune")
    with pytest.raises(BackendCompilerFailed) as caught:
        call(X)
    error = caught.value.inner_exception
    assert isinstance(error, UsageError)
    assert "mode='max-autotune': this backend has no modes; pass options={...}" in str(error)


def test_without_gradients_the_backend_is_eager() -> None:
    model = Net().eval()
    expected = model(X)
    with torch.no_grad():
        assert torch.equal(compiled(model)(X), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Net, zoo.ConvBlock])
def test_inductor_is_close_and_leaves_eagers_random_stream(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = kind() if kind is Net else kind(4, 8)
    x = X if kind is Net else torch.randn(4, 4, 8, 8)

    def loss(output: Tensor) -> Tensor:
        return output.square().mean()

    expected = run(model, (x,), loss=loss)
    call = compiled(model, inner="inductor", recompute="full", plan_dir=tmp_path)
    found = run(model, (x,), loss=loss, call=call)
    assert torch.equal(found.stream, expected.stream)
    assert any(plan.decisions.recompute for plan in plans_in(tmp_path))
    torch.testing.assert_close(found.loss, expected.loss)
    largest = max(float(g.abs().max()) for g in expected.gradients.values() if g is not None)
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(
            gradient, expected.gradients[name], rtol=0, atol=1e-3 * largest, msg=name
        )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_generated_code_stays_within_the_budget_and_its_plan_says_how_far(tmp_path: Path) -> None:
    model, args, kwargs, loss = zoo.build("unet")
    freely = fxzero.plan(model, args, kwargs=kwargs, optimizer="none")
    budget = freely.minimum_budget + (freely.peak_bytes - freely.minimum_budget) // 3
    options: dict[str, Any] = {"inner": "inductor", "optimizer": "none", "memory_budget": budget}
    call = compiled(model, plan_dir=tmp_path, **options)

    def step() -> None:
        loss(call(*args, **kwargs)).backward()

    for _ in range(2):
        step()
        model.zero_grad()
    (plan,) = plans_in(tmp_path)
    assert fxzero.measure(step).tensor_bytes == plan.peak_bytes <= budget
    assert any(note.startswith("by rehearsal, the peak of the generated") for note in plan.notes)
