"""Regions of ``torch.utils.checkpoint``, and wishes that cannot be met: a note, or an error."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from helpers import run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxzero
from fxzero.errors import UsageError


class EndsInNorm(nn.Module):
    """What leaves a region is one result of several, and the next one looks at it in a view."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 32)
        hidden = self.down(torch.nn.functional.gelu(self.up(rows)))
        return self.norm(x + hidden.view_as(x))


class EndsInRelu(nn.Module):
    """What leaves a region is read by the region's own backward, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(16, 64, 1), nn.Conv1d(64, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.down(torch.relu(self.up(x))))


class Stack(nn.Module):
    """Equal blocks, each of them a region."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x.square().mean()


@pytest.mark.parametrize("block", [EndsInNorm, EndsInRelu])
def test_regions_keep_no_more_than_they_do_in_eager(block: type[nn.Module]) -> None:
    model, x = Stack(block), torch.randn(4, 16, 32)
    expected = run(copy.deepcopy(model), (x,))
    compiled = fxzero.compile(model, inner="eager", optimizer="sgd")
    found = run(compiled, (x,))
    assert found.peak <= compiled.plan.peak_bytes <= expected.peak
    again = [item.node for item in compiled.plan.decisions.recompute]
    assert again
    assert len(again) == len(set(again))
    assert torch.equal(found.loss, expected.loss)


class Halved(nn.Module):
    """Between two layers an operator that need not give the same bits twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.ops.fxzero_policies.halve(self.up(x))).square().mean()


@pytest.fixture(autouse=True)
def operator() -> Iterator[None]:
    with torch.library._scoped_library("fxzero_policies", "DEF") as library:
        library.define("halve(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_bitwise,))
        library.impl("halve", lambda x: x / 2, "CompositeExplicitAutograd")
        library.impl("halve", lambda x: torch.empty_like(x), "Meta")
        torch.library.register_autograd(
            "fxzero_policies::halve", lambda context, gradient: gradient / 2, lib=library
        )
        yield


def everything(node: torch.fx.Node) -> str:
    return "recompute"


def test_what_may_not_run_twice_is_saved_and_noted() -> None:
    plan = fxzero.plan(Halved(), (torch.randn(4, 8),), recompute=everything)
    (note,) = [note for note in plan.notes if "may not run twice" in note]
    assert note == (
        "halve is saved and not recomputed: fxzero_policies.halve.default may not run twice"
    )
    assert "halve" not in [item.node for item in plan.decisions.recompute]


def test_under_strict_it_is_an_error() -> None:
    with pytest.raises(UsageError, match="strict=True, but\n  halve is saved"):
        fxzero.plan(Halved(), (torch.randn(4, 8),), recompute=everything, strict=True)
    plan = fxzero.plan(Halved(), (torch.randn(4, 8),), strict=True)
    assert not any("may not" in note for note in plan.notes)
