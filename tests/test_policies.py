"""What cannot be applied: a note in the Plan, and an error under ``strict=True``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.errors import UsageError


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
