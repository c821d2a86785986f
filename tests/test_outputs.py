"""Whatever a model returns has the gradients of eager: views, aliases of inputs, parameters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero import _inductor
from fxzero.structure import flatten


class Returns(nn.Module):
    def __init__(self, what: Callable[[Returns, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(self, self.linear(x), x)


KINDS: dict[str, Callable[[Returns, Tensor, Tensor], Any]] = {
    "views_of_one_value": lambda m, h, x: (h, h[:, 0], h.view(-1)),
    "one_value_twice": lambda m, h, x: (h, h),
    "the_input": lambda m, h, x: (h, x),
    "a_view_of_the_input": lambda m, h, x: (h, x.view(-1)),
    "a_parameter": lambda m, h, x: (h, m.linear.weight),
    "a_scalar_and_a_view_of_a_parameter": lambda m, h, x: (h.sum(), m.linear.weight.t()),
    "a_scalar_and_views": lambda m, h, x: (h.sum(), h, h.view(-1)),
    "constants_beside_tensors": lambda m, h, x: {"a": h, "b": None, "c": [3, "text"]},
    "chunks": lambda m, h, x: h.chunk(2, -1),
    "in_place_result": lambda m, h, x: h.relu_().sum(),
}


def gradients_of(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    x.grad = None
    outputs, _ = flatten(model(x))
    attached = [t for t in outputs if t.requires_grad]
    total = torch.stack([(i + 1) * t.sum() for i, t in enumerate(attached)]).sum()
    total.backward()
    return [p.grad for p in (*model.parameters(), x)]


@pytest.mark.parametrize("x_requires_grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_any_output_are_those_of_eager(kind: str, x_requires_grad: bool) -> None:
    model = Returns(KINDS[kind])
    x = torch.randn(3, 4, requires_grad=x_requires_grad)
    expected = gradients_of(copy.deepcopy(model), x)
    expected = [g if g is None else g.clone() for g in expected]
    fxzero.compile(model, inner="eager")
    for _ in range(3):
        for found, wanted in zip(gradients_of(model, x), expected, strict=True):
            assert (found is None) == (wanted is None)
            assert found is None or wanted is None or torch.equal(found, wanted)


def test_a_step_runs_again_once_and_not_each_time(caplog: pytest.LogCaptureFixture) -> None:
    model = fxzero.compile(Returns(KINDS["a_scalar_and_views"]), inner="eager")
    with caplog.at_level(logging.WARNING, logger="fxzero"):
        for _ in range(3):
            gradients_of(model, torch.randn(3, 4))
    assert sum("runs again" in record.message for record in caplog.records) == 1


def test_constants_come_back_as_they_were() -> None:
    model = fxzero.compile(Returns(KINDS["constants_beside_tensors"]), inner="eager")
    result = model(torch.randn(3, 4))
    assert (result["b"], result["c"]) == (None, [3, "text"])


@pytest.mark.slow
@pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler")
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.t().contiguous().square().mean()])
def test_generated_code_takes_gradients_with_any_strides(loss: Any) -> None:
    x, original = torch.randn(16, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model = fxzero.compile(copy.deepcopy(original), inner="inductor")
    for runner in (original, model):
        loss(runner(x)).backward()
    for mine, theirs in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
