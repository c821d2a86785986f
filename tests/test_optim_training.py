"""A small model learns with the optimizers of fxzero, compiled and in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.optim import SGD, AdamW, Lion


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = (self.layers(x)[:, 0] - x.sum(1)).square().mean()
        return loss


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamW, {"lr": 1e-2}),
        (AdamW, {"lr": 1e-2, "moments": "int8"}),
        (SGD, {"lr": 1e-2}),
        (Lion, {"lr": 5e-3}),
    ],
)
def test_a_compiled_model_trains(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = fxzero.compile(Tiny(), inner="eager", microbatches=2)
    optimizer = kind(model.parameters(), **options)
    x = torch.randn(64, 16)
    losses = []
    for _ in range(40):
        losses.append(model.step(x).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.2 * losses[0]


def test_a_bfloat16_model_trains_as_its_float32_master_does() -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = Tiny().to(dtype)
        optimizer = AdamW(model.parameters(), lr=1e-3)
        x = torch.randn(64, 16).to(dtype)
        for _ in range(100):
            loss = model(x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
