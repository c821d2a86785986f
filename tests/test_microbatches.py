"""``model.step`` cuts a batch into micro-batches: means of losses and gradients, in a budget."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.errors import BudgetError, UsageError
from fxzero.microbatches import Batch

X, Y = torch.randn(12, 6, 24), torch.randn(12, 6, 4)


class Net(nn.Module):
    """A mask that is shared, keyword arguments, and activations that are most of its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 96), nn.Linear(96, 4)

    def forward(self, x: Tensor, *, target: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        x = torch.tanh(self.up(x) * mask)
        return (scale * self.down(torch.sigmoid(x).tanh()) - target).square().mean()


GIVEN: dict[str, Any] = {"target": Y, "mask": torch.ones(1, 6, 1), "scale": 2.0}


def compiled(**options: Any) -> tuple[Any, nn.Module]:
    model = Net()
    twin = copy.deepcopy(model)
    return fxzero.compile(model, **{"inner": "eager", "optimizer": "none"} | options), twin


def by_hand(twin: nn.Module, count: int) -> Tensor:
    """The same step in plain torch."""
    losses = []
    for x, y in zip(X.chunk(count), Y.chunk(count), strict=True):
        loss = twin(x, **{**GIVEN, "target": y}) / count
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


@pytest.mark.parametrize("count", [2, 3, 12])
def test_micro_batches_are_those_of_a_loop(count: int) -> None:
    model, twin = compiled(microbatches=count)
    for _ in range(2):  # the second time gradients exist from the start
        assert torch.equal(model.step(X, **GIVEN), by_hand(twin, count))
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)


def test_the_mean_over_micro_batches_is_that_of_the_batch() -> None:
    model, twin = compiled(microbatches=4)
    torch.testing.assert_close(model.step(X, **GIVEN), by_hand(twin, 1))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_micro_batches_take_less_memory_and_what_is_planned() -> None:
    peaks = []
    for count in (1, 4):
        model, _ = compiled(microbatches=count)
        model.step(X, **GIVEN)
        ours = fxzero.measure(lambda model=model: model.step(X, **GIVEN))
        assert ours.tensor_bytes <= model.plan.peak_bytes + 64  # losses
        peaks.append(ours.tensor_bytes)
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.slow
def test_auto_cuts_where_the_budget_asks_for_it() -> None:
    model, _ = compiled(microbatches="auto")
    model.step(X, **GIVEN)
    assert model._fxzero.microbatches_for(model, _batch()) == 1
    whole = model.plan.peak_bytes
    model, twin = compiled(microbatches="auto", recompute="none", memory_budget=whole // 2)
    assert torch.equal(model.step(X, **GIVEN), by_hand(twin, 3))
    assert model.plan.peak_bytes <= whole // 2


@pytest.mark.slow
def test_auto_prefers_recompute_where_that_is_faster() -> None:
    model, twin = compiled(microbatches="auto")
    model.step(X, **GIVEN)
    whole = model.plan.peak_bytes
    model, twin = compiled(microbatches="auto", memory_budget=int(0.95 * whole))
    assert torch.equal(model.step(X, **GIVEN), by_hand(twin, 1))
    assert model.plan.recomputed


def _batch() -> Any:
    from fxzero.microbatches import Batch

    return Batch.of((X,), GIVEN)


@pytest.mark.slow
def test_a_budget_for_less_than_one_example_is_refused() -> None:
    model, _ = compiled(microbatches="auto", memory_budget="1KiB")
    with pytest.raises(BudgetError, match=r"no plan fits memory_budget=1.00 KiB"):
        model.step(X, **GIVEN)


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "many", None])
def test_what_is_no_number_of_micro_batches_is_refused(given: object) -> None:
    with pytest.raises(UsageError) as caught:
        compiled(microbatches=given)
    assert str(caught.value).endswith(f'microbatches={given!r} must be a positive number or "auto"')


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    model, _ = compiled(microbatches=5)
    with pytest.raises(UsageError) as caught:
        model.step(X, **GIVEN)
    assert str(caught.value).splitlines()[-2:] == [
        "[FXZ101] a batch of 12 has no 5 micro-batches of one size",
        "  ask for 4, or change the batch",
    ]
    with pytest.raises(UsageError) as caught:
        model.step(X, **{**GIVEN, "mask": torch.ones(6, 1)})
    assert str(caught.value).splitlines()[-2:] == [
        "[FXZ101] step() cannot cut a batch of 12: argument ['mask'] is float32[6, 1]",
        "  give every tensor the batch's size, or 1, as its first dimension",
    ]
    model, _ = compiled(microbatches=2)
    for nothing in (torch.tensor(1.0), torch.ones(0, 3)):
        with pytest.raises(UsageError, match="nothing to cut"):
            model.step(nothing)
    with pytest.raises(UsageError) as caught:
        model.step(torch.ones(4, 3), [1, 2, 3, 4])
    assert str(caught.value).splitlines()[-2:] == [
        "[FXZ101] step() cannot cut a list: argument [1] has 4 items",
        "  give a tensor, or a tuple if it belongs to every micro-batch",
    ]


def test_examples_are_planned_as_they_are_cut() -> None:
    model, _ = compiled(microbatches=4, example_inputs={"x": X, **GIVEN}, zero=0)
    cut = model.plan
    model.step(x=X, **GIVEN)
    assert cut.peak_bytes <= model.plan.peak_bytes
    assert len(model._fxzero.steps) == 2


def test_a_budget_is_refused_before_the_first_micro_batch() -> None:
    model, _ = compiled(microbatches=4)
    model.step(X, **GIVEN)
    steps = {accumulates: s.plan.minimum_budget for (_, accumulates), s in _steps(model)}
    assert steps[False] < steps[True]
    model, _ = compiled(microbatches=4, memory_budget=steps[True] - 1)
    with pytest.raises(BudgetError):
        model.step(X, **GIVEN)
    assert all(p.grad is None for p in model.parameters())


def _steps(model: Any) -> Any:
    return model._fxzero.steps.items()


def test_auto_does_not_plan_beside_a_given_plan() -> None:
    model, _ = compiled(microbatches="auto", plan=fxzero.plan(Net(), {"x": X, **GIVEN}))
    with pytest.raises(UsageError, match="makes plans, but one was given"):
        model.step(X, **GIVEN)


def test_a_batch_once_over_keeps_its_strides_which_graphs_depend_on() -> None:
    batch = Batch.of((torch.zeros(8, 3)[::2],), {})
    assert batch.times(1).leaves[0].stride() == (6, 1)
    assert batch.times(2).leaves[0].shape == (8, 3)
