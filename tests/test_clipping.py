"""Clipping by an optimizer's step, which scales gradients as it reads them."""

from __future__ import annotations

from typing import Any

import optimizer_cases as cases
import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero import UsageError
from fxzero.optim import SGD, AdamW, Lion


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 1))

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.layers(x).square().mean()
        return loss


def trained(kind: Any, fused: bool, compiled: bool = False, limit: float = 0.05) -> Any:
    """(norms, weights) of a few steps with clipped gradients."""
    torch.manual_seed(0)
    model: Any = fxzero.compile(Net(), inner="eager") if compiled else Net()
    optimizer = kind(model.parameters(), lr=0.01)
    norms = []
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).backward()
        before = [p.grad.clone() for p in model.parameters()]
        given = {"optimizer": optimizer} if fused else {}
        norms.append(fxzero.clip_grad_norm_(model, limit, **given))
        if fused:
            assert all(map(torch.equal, before, (p.grad for p in model.parameters())))
        optimizer.step()
    return [*norms, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("kind", [AdamW, SGD, Lion])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_the_step_scales_gradients_to_the_same_bits(
    kind: Any, compiled: bool, limit: float
) -> None:
    scaled = trained(kind, False, compiled, limit)
    assert all(map(torch.equal, trained(kind, True, compiled, limit), scaled))


@pytest.mark.parametrize("norm_type", [1.0, float("inf")])
def test_the_norm_is_torchs(norm_type: float) -> None:
    model = Net()
    model(torch.ones(4, 8)).backward()
    found = fxzero.clip_grad_norm_(model, 0.1, norm_type, optimizer=AdamW(model.parameters()))
    expected = nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type)
    assert torch.equal(found, expected)


def test_the_last_of_two_factors_counts_and_only_for_these_gradients() -> None:
    results = []
    for limits in ([0.5], [1e-3, 0.5], []):
        model = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            model.weight.fill_(1.0)
        optimizer = SGD(model.parameters(), lr=1.0, momentum=0.0)
        cases.give_gradients([model.weight], 0)
        for limit in limits:
            fxzero.clip_grad_norm_(model, limit, optimizer=optimizer)
        if not limits:  # a step that is skipped
            fxzero.clip_grad_norm_(model, 1e-3, optimizer=optimizer)
            optimizer.zero_grad()
            cases.give_gradients([model.weight], 0)
            nn.utils.clip_grad_norm_([model.weight], 0.5)
        optimizer.step()
        results.append(model.weight.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_norm_that_is_not_finite_may_be_an_error() -> None:
    model = Net()
    optimizer = AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    with pytest.raises(RuntimeError, match="the norm of the gradients is inf, so they were not"):
        fxzero.clip_grad_norm_(model, 1.0, error_if_nonfinite=True, optimizer=optimizer)
    assert optimizer._scale is None
    assert fxzero.clip_grad_norm_(model, 1.0, optimizer=optimizer).isinf()


def test_a_loss_scale_and_clipping_go_together() -> None:
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = Net()
        optimizer = AdamW(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        scaler.scale(model(torch.ones(2, 8))).backward()
        scaler.unscale_(optimizer)
        fxzero.clip_grad_norm_(model, 0.01, **({"optimizer": optimizer} if fused else {}))
        scaler.step(optimizer)
        results.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_an_optimizer_of_torch_is_refused() -> None:
    model = Net()
    with pytest.raises(UsageError) as caught:
        fxzero.clip_grad_norm_(model, 1.0, optimizer=torch.optim.AdamW(model.parameters()))
    assert str(caught.value) == (
        "[FXZ101] optimizer=AdamW of torch.optim.adamw cannot scale gradients in its step\n"
        "  leave it out, or use fxzero.optim.AdamW, SGD or Lion"
    )


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model, other = Net(), Net()
    for one in (model, other):
        one(torch.ones(2, 8)).backward()
    parameters = [*list(model.parameters())[:3], *other.parameters()]
    with pytest.raises(UsageError) as caught:
        fxzero.clip_grad_norm_(model, 1.0, optimizer=AdamW(parameters))
    assert str(caught.value) == (
        "[FXZ101] of the parameters with gradients 1 are the model's and not the optimizer's, "
        "4 the optimizer's and not the model's\n"
        "  leave optimizer= out to scale the model's gradients in place"
    )
