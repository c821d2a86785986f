"""Budgets that no generated code meets: operators as eager runs them, and what is said of it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxzero
from fxzero import _inductor
from fxzero.errors import BudgetError, PlanError
from fxzero.fallback import Attempt, or_as_eager
from fxzero.options import Options, check_options

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler"),
]

_NOTE = "operators run one by one, as in eager: "


class Net(nn.Module):
    """Its norms and activations are taken apart for Inductor, and need more then."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()) for _ in range(3)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


class ConvNet(nn.Module):
    """Code for its backward needs more than its operators do one by one."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 8), (8, 8), (8, 8))
        layers = [
            nn.Sequential(nn.Conv2d(*width, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
            for width in widths
        ]
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


@pytest.mark.slow
def test_eagers_operators_are_taken_where_those_of_inductors_graph_would_run_one_by_one():
    def build() -> ConvNet:
        torch.manual_seed(0)
        return ConvNet()

    x = torch.randn(4, 3, 24, 24)
    budget = fxzero.plan(build(), (x,), inner="inductor").minimum_budget
    compiled = functools.partial(fxzero.compile, memory_budget=budget, inner="inductor")
    strict = compiled(build(), (x,), strict=True).plan
    assert any(note.startswith("operators of the backward run one by one") for note in strict.notes)
    model, eager = compiled(build(), (x,)), build()
    assert model.plan.notes[0] == f"{_NOTE}code that fits the budget is slower"
    assert model.plan.fits
    assert model.plan.step_seconds < strict.step_seconds
    for net in (model, eager):
        net(x).backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def _attempts(**found: Attempt[str] | int) -> Callable[..., Attempt[str]]:
    """What comes of each inner: an attempt, or the bytes that its refusal asks for."""

    def make(options: Options, notes: tuple[str, ...]) -> Attempt[str]:
        result = found[options.inner]
        if isinstance(result, int):
            raise BudgetError(budget_bytes=1, required_bytes=result, fixed={}, alternatives=())
        return result

    return make


_INDUCTOR = check_options(device="cpu", inner="inductor", memory_budget=1)
_SLOW, _FAST = Attempt("slow", 2.0, False), Attempt("fast", 1.0, False)


@pytest.mark.parametrize(
    ("first", "second", "chosen"),
    [
        (_SLOW, None, "slow"),  # code for all of it: nothing else is tried
        (Attempt("confined", 2.0, True), _FAST, "fast"),
        (Attempt("confined", 0.5, True), _FAST, "confined"),
        (Attempt("confined", 2.0, True), 7, "confined"),
        (7, _SLOW, "slow"),
    ],
)
def test_which_of_two_attempts_is_taken(first, second, chosen):
    found = {"inductor": first} | ({} if second is None else {"eager": second})
    assert or_as_eager(_INDUCTOR, _attempts(**found)) == chosen


@pytest.mark.parametrize(("first", "second"), [(5, 7), (7, 5), (5, 5)])
def test_of_two_refusals_the_one_that_asks_for_less_is_raised(first, second):
    with pytest.raises(BudgetError) as refusal:
        or_as_eager(_INDUCTOR, _attempts(inductor=first, eager=second))
    assert refusal.value.required_bytes == 5


@pytest.mark.parametrize("first", [7, Attempt("confined", 2.0, True)])
@pytest.mark.parametrize("change", [{"strict": True}, {"inner": "eager"}])
def test_strict_options_and_eager_have_no_second_attempt(first, change):
    options = check_options(device="cpu", **{"inner": "inductor", "memory_budget": 1} | change)
    calls = []

    def make(options: Options, notes: tuple[str, ...]) -> Attempt[str]:
        calls.append(notes)
        return _attempts(inductor=first, eager=first)(options, notes)

    if isinstance(first, int):
        with pytest.raises(BudgetError):
            or_as_eager(options, make)
    else:
        assert or_as_eager(options, make) == "confined"
    assert calls == [()]
