"""Small captured graphs and recompute decisions, for tests of the passes."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxzero.capture import capture
from fxzero.cost import CPU, CostModel
from fxzero.graph import TrainGraph
from fxzero.passes.context import PassContext
from fxzero.plans import Decisions, Rematerialization
from fxzero.solver.problem import build_problem
from fxzero.solver.schedule import make_schedule


class Tiny(nn.Module):
    """Every feature that a pass cares about: views, a tuple, dropout, a buffer that is updated."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(8)
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x)) * self.mean.clone()
        self.mean.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        return self.down(self.norm(F.dropout(hidden, 0.25, self.training))).square().sum()


def tiny() -> TrainGraph:
    """A fresh copy each time, of one capture."""
    return _tiny().copy()


@functools.cache
def _tiny() -> TrainGraph:
    return capture(Tiny(), (torch.randn(2, 4),)).graph


def recompute(*pairs: tuple[str, str]) -> PassContext:
    """Recompute the first node of each pair before the second."""
    return PassContext(Decisions(recompute=tuple(Rematerialization(*pair) for pair in pairs)))


def recompute_most(graph: TrainGraph) -> PassContext:
    """Decisions that save one value in three."""
    problem = build_problem(
        graph, costs=CostModel(CPU), device="cpu", fixed_bytes=0, outputs_held=False
    )
    schedule = make_schedule(problem, range(0, len(problem.bytes), 3))
    return recompute(
        *((problem.operators[i].name, problem.steps[j]) for i, j in schedule.recompute)
    )
