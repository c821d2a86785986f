"""Generated code needs no more memory than the plan says, which rehearses it."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero
from fxzero import _inductor, rehearsal
from fxzero.generated import without_kernels
from fxzero.rehearsal import Peaks, as_it_runs

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler"),
]


class Gated(nn.Module):
    """Gates, norms and dropout: fused kernels with several results, and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(32, 128) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(64, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            left, right = up(F.rms_norm(x, (32,))).chunk(2, -1)
            x = x + down(F.dropout(F.silu(left) * right, 0.2))
        return x.square().mean()


class Pooled(nn.Module):
    """Convolutions, whose indices and layouts differ from the plan's when fused."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        return (x + F.silu(self.second(x))).square().mean()


class Wide(nn.Module):
    """Chains of elementwise operators, which a kernel does without writing what is in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.norm(F.gelu(self.up(x))))).square().mean()


# Not counted by plans: the generator's state while a mask is drawn again, and Python numbers that
# are tensors while an operator runs.
UNPLANNED = 5056 + 16

MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "gated": (Gated, (256, 32)),
    "pooled": (Pooled, (8, 3, 32, 32)),
}


# "strict" keeps a step from running operators where generated code does not fit.
GENERATED: dict[str, Any] = {"optimizer": "none", "inner": "inductor", "strict": True}


def _step(model: Any, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        model(x).backward()

    return step


def _smallest(model: nn.Module, x: Tensor) -> int:
    with pytest.raises(fxzero.BudgetError) as caught:
        fxzero.compile(model, (x,), memory_budget=1, **GENERATED)
    return caught.value.required_bytes


def _peaks(model: Any) -> Peaks:
    step = model._fxzero.latest
    run = step._executable
    peaks: Peaks = step._planner.rehearse(step._decided, run.forward, run.backward)
    return peaks


_SHARES = {"no budget": None, "half way": 0.5, "smallest": 0.0}
_CORNERS = {("no budget", "gated"), ("smallest", "pooled")}


@pytest.mark.parametrize(
    ("share", "name"),
    [
        pytest.param(
            share,
            name,
            id=f"{label}-{name}",
            marks=() if (label, name) in _CORNERS else pytest.mark.exhaustive,
        )
        for label, share in _SHARES.items()
        for name in MODELS
    ],
)
def test_the_measured_peak_is_the_rehearsed_one_and_within_plan_and_budget(
    name: str, share: float | None
) -> None:
    kind, shape = MODELS[name]
    x, original = torch.randn(shape), kind()
    budget = None
    if share is not None:
        smallest = _smallest(copy.deepcopy(original), x)
        free = fxzero.plan(copy.deepcopy(original), (x,), optimizer="none", inner="inductor")
        budget = int(smallest + share * (free.peak_bytes - smallest))
    model = fxzero.compile(original, memory_budget=budget, **GENERATED)
    step = _step(model, x)
    for _ in range(2):
        step()
        model.zero_grad()
    gc.collect()
    measured = fxzero.measure(step).tensor_bytes
    assert measured == pytest.approx(_peaks(model).largest, abs=UNPLANNED)
    assert measured <= model.plan.peak_bytes + UNPLANNED
    assert model.plan.fits


def test_a_budget_that_only_generated_code_meets_is_met() -> None:
    x, original = torch.randn(512, 8), Wide()
    by_operators = fxzero.plan(
        Wide(), (x,), memory_budget=1, optimizer="none", inner="inductor"
    ).minimum_budget
    budget = _smallest(copy.deepcopy(original), x)
    assert budget < 0.8 * by_operators
    with pytest.raises(fxzero.BudgetError):
        fxzero.compile(Wide(), (x,), memory_budget=budget - 1, **GENERATED)
    model = fxzero.compile(original, (x,), memory_budget=budget, **GENERATED)
    assert model.plan.peak_bytes == budget
    step = _step(model, x)
    step()
    model.zero_grad()
    assert fxzero.measure(step).tensor_bytes <= budget + UNPLANNED


def test_a_plan_that_generated_code_exceeds_says_so_and_still_adds_up() -> None:
    x = torch.randn(256, 32)
    plan = fxzero.plan(Gated(), (x,), optimizer="none", inner="inductor")
    larger = as_it_runs(plan, Peaks(0, plan.peak_bytes + 1000))
    assert larger.peak_bytes == larger.peak.bytes == plan.peak_bytes + 1000
    assert sum(value.bytes for value in larger.peak.alive) == larger.peak_bytes
    assert sum(larger.ranks[0].breakdown.values()) == larger.peak_bytes
    assert fxzero.Plan.from_json(larger.to_json()) == larger
    smaller = as_it_runs(plan, Peaks(0, plan.peak_bytes - 1000))
    assert smaller.peak_bytes == smaller.peak.bytes == plan.peak_bytes - 1000
    assert sum(value.bytes for value in smaller.peak.alive) == smaller.peak_bytes
    assert sum(smaller.ranks[0].breakdown.values()) == smaller.peak_bytes
    (step,) = (item.peak_bytes for item in plan.phases if item.name == "optimizer step")
    assert as_it_runs(plan, Peaks(0, 1)).peak_bytes == step


@pytest.mark.parametrize("budget", [None, "900KiB"])
def test_generated_code_that_cannot_be_rehearsed_runs_only_without_a_budget(
    budget: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    def refuse(function: Any) -> Any:
        if hasattr(function, "__generated__"):
            raise NotImplementedError("a kernel nobody knows")
        return without_kernels(function)

    monkeypatch.setattr(rehearsal, "without_kernels", refuse)
    x, original = torch.randn(256, 32), Gated()
    model = fxzero.compile(
        copy.deepcopy(original),
        (x,),
        memory_budget=budget,
        optimizer="none",
        inner="inductor",
        strict=True,  # or eager's operators would be taken, which are faster
    )
    run = model._fxzero.latest._executable
    assert hasattr(run.forward, "__generated__") == (budget is None)
    assert hasattr(run.backward, "__generated__") == (budget is None)
    assert "cannot be rehearsed: NotImplementedError: a kernel nobody knows" in caplog.text
    noted = "the generated code could not be rehearsed" in model.plan.notes
    assert noted == (budget is None)
    apart = "operators of the forward and backward run one by one: code that Inductor generates"
    assert any(note.startswith(apart) for note in model.plan.notes) == (budget is not None)
    losses = []
    for subject in (original, model):
        torch.manual_seed(0)
        losses.append(subject(x))
    torch.testing.assert_close(*losses)
