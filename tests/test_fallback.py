"""Budgets that no generated code meets: operators as eager runs them, and what is said of it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import fxzero
from fxzero import _inductor
from fxzero.errors import BudgetError, PlanError

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler"),
]

_NOTE = "operators run one by one, as in eager: generated code needs "


class Net(nn.Module):
    """Its norms and activations are taken apart for Inductor, and need more then."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()) for _ in range(3)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def _model() -> Net:
    torch.manual_seed(0)
    return Net()


@functools.cache
def _batch() -> torch.Tensor:
    return torch.randn(256, 32, generator=torch.Generator().manual_seed(1))


@functools.cache
def _smallest(inner: str, **options: bool) -> int:
    return fxzero.plan(_model(), (_batch(),), inner=inner, **options).minimum_budget


def _train(model: nn.Module, steps: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    for _ in range(steps):
        loss = model(_batch())
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def _equal(first, second) -> bool:
    pairs = zip((first[0], *first[1]), (second[0], *second[1]), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_a_budget_between_the_two_is_met_by_eagers_operators(tmp_path):
    budget = (_smallest("eager") + _smallest("inductor")) // 2
    model = fxzero.compile(_model(), (_batch(),), memory_budget=budget, inner="inductor")
    plan = model.plan
    assert plan.fits
    assert plan.request.inner == "eager"
    assert any(note.startswith(_NOTE) for note in plan.notes)
    assert _equal(_train(model), _train(_model()))
    model.zero_grad()
    batch = _batch()
    measured = fxzero.measure(lambda: model(batch).backward())
    assert measured.tensor_bytes <= plan.peak_bytes <= budget
    assert any(note.startswith(_NOTE) for note in model.plan.notes)
    plan.save(tmp_path / "plan.json")
    replayed = fxzero.compile(_model(), (batch,), plan=tmp_path / "plan.json")
    assert replayed.plan.decisions == plan.decisions
    assert _equal(_train(replayed), _train(_model()))


@pytest.mark.slow
def test_a_step_that_adds_to_gradients_falls_back_alone():
    budget = _smallest("inductor")
    assert _smallest("eager", accumulate=True) < budget < _smallest("inductor", accumulate=True)
    model = fxzero.compile(_model(), (_batch(),), memory_budget=budget, inner="inductor")
    assert model.plan.request.inner == "inductor"
    found = _train(model, steps=2)
    assert model.plan.request.inner == "eager"
    for ours, theirs in zip(found[1], _train(_model(), steps=2)[1], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_what_neither_meets_is_refused_with_what_would_do_but_for_strict_options():
    with pytest.raises(BudgetError, match="smallest reachable peak") as refusal:
        fxzero.compile(_model(), (_batch(),), memory_budget=1, inner="inductor")
    required = refusal.value.required_bytes
    assert required == _smallest("eager") < _smallest("inductor")
    fallen_back = fxzero.compile(_model(), (_batch(),), memory_budget=required, inner="inductor")
    assert fallen_back.plan.fits
    with pytest.raises(BudgetError):
        fxzero.compile(_model(), (_batch(),), memory_budget=required, inner="inductor", strict=True)


@pytest.mark.slow
def test_torch_compile_falls_back_too(tmp_path, monkeypatch):
    monkeypatch.setenv("FXZERO_SPEC", "0")  # backends see graphs without the law's descriptions
    torch._dynamo.reset()
    options = {"memory_budget": _smallest("eager"), "plan_dir": str(tmp_path), "inner": "inductor"}
    model = torch.compile(_model(), backend="fxzero", options=options)
    assert _equal(_train(model), _train(_model()))
    plan = fxzero.Plan.load(tmp_path / "graph-0.json")
    assert plan.fits
    assert plan.request.inner == "eager"
    assert plan.notes[0].startswith(_NOTE)


def test_a_plan_for_eager_is_followed_by_default_and_named_where_another_was_asked_for():
    plan = fxzero.plan(_model(), (_batch(),))
    model = fxzero.compile(_model(), (_batch(),), plan=plan)
    assert _equal(_train(model), _train(_model()))
    with pytest.raises(PlanError, match='for inner="eager" where this is "inductor"'):
        fxzero.compile(_model(), (_batch(),), plan=plan, inner="inductor")
