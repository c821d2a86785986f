"""A small model with all that can go wrong in one, and how reports show its lines."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero

IDS = torch.arange(512).reshape(32, 16) * 7 % 16
LABELS = IDS.roll(3, 1)


class Small(nn.Module):
    """Tied weights, dropout, a constant, and a buffer that counts."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.steps += 1
        x = self.embed(ids)
        hidden = F.gelu(self.up(x)) * 0.5
        hidden = F.dropout(hidden, 0.25, self.training)
        x = x + self.down(torch.tanh(hidden))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def compiled(model: nn.Module, **options: Any) -> Any:
    return fxzero.compile(model, **({"inner": "eager", "optimizer": "sgd"} | options))


def line_of(code: str, of: type = Small) -> str:
    """A line of a model as reports show it."""
    lines, first = inspect.getsourcelines(of)
    number = next(i for i, line in enumerate(lines, first) if line.strip() == code)
    return f"{Path(inspect.getfile(of)).name}:{number} in forward: {code}"
