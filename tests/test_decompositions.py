"""Operators that tracing would replace by other formulas run as eager runs them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero
from fxzero import _inductor
from fxzero.decompositions import decompositions_for


class Resampled(nn.Module):
    def __init__(self, mode: str, align: bool | None) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.mode, self.align = mode, align

    def forward(self, image: Tensor) -> Tensor:
        features = self.convolution(image)
        larger = F.interpolate(features, size=(13, 11), mode=self.mode, align_corners=self.align)
        return larger.square().mean()


class Dropped(nn.Module):
    def __init__(self, p: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32, dtype=dtype)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), self.p).square().float().sum()


def assert_step_equals_eager(model: nn.Module, x: Tensor) -> None:
    eager = copy.deepcopy(model)
    compiled = fxzero.compile(model, inner="eager", optimizer="sgd")
    found = []
    for runner in (eager, compiled):
        torch.manual_seed(3)
        loss = runner(x)
        loss.backward()
        gradients = [p.grad for p in runner.parameters()]
        found.append([loss.detach(), torch.rand(4), *gradients])
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize(
    ("mode", "align"),
    [("nearest", None), ("bilinear", False), ("bilinear", True), ("bicubic", False)],
)
def test_resampling_is_bitwise_that_of_eager(mode: str, align: bool | None) -> None:
    assert_step_equals_eager(Resampled(mode, align), torch.randn(2, 3, 7, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.37, 0.9, 1.0])
def test_dropout_is_bitwise_that_of_eager(p: float, dtype: torch.dtype) -> None:
    assert_step_equals_eager(Dropped(p, dtype), torch.randn(16, 32, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3, 3)])
def test_the_gradient_of_a_classification_loss_is_bitwise_that_of_eager(
    shape: tuple[int, ...], reduction: str, ignored: int, dtype: torch.dtype
) -> None:
    aten = torch.ops.aten
    forward, backward = aten.nll_loss_forward.default, aten.nll_loss_backward.default
    if len(shape) == 4:
        forward, backward = aten.nll_loss2d_forward.default, aten.nll_loss2d_backward.default
    ours = decompositions_for("inductor")[backward]
    scores = torch.randn(shape, dtype=dtype).log_softmax(min(len(shape) - 1, 1))
    target = torch.randint(5, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if target.ndim and ignored < 0:
        target.flatten()[0] = ignored
    for weight in (None, torch.rand(5, dtype=dtype)):
        given = (scores, target, weight, ["none", "mean", "sum"].index(reduction), ignored)
        loss, total = forward(*given)
        gradient = torch.randn_like(loss)
        expected = backward(gradient, *given, total)
        found = ours(gradient, *given, total)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.bernoulli(torch.sigmoid(self.linear(x)).detach())
        return (self.linear(x) * kept).square().sum()


@pytest.mark.slow
@pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler")
def test_a_draw_that_inductor_refuses_to_call_is_eagers() -> None:
    model, x = Gate(), torch.randn(8, 16)
    found = []
    for runner in (model, fxzero.compile(copy.deepcopy(model), inner="inductor")):
        torch.manual_seed(3)
        found.append((runner(x), torch.rand(4)))
    (expected, stream), (loss, stream_after) = found
    torch.testing.assert_close(loss, expected)
    assert torch.equal(stream_after, stream)
