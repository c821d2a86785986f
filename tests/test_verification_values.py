"""model.verify: values that are not finite are traced to their origin, changed ties are named."""

from __future__ import annotations

import pytest
import torch
from helpers import tiers
from torch import Tensor, nn
from verification_cases import IDS, LABELS, Small, compiled, line_of

from fxzero.ties import TieChange


class Log(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((4, 4), float("-inf")).triu(1)  # which is meant to be infinite
        scores = torch.softmax(self.layer(x) + mask, -1)
        logs = torch.log(x)
        return (scores * logs).sum()


def test_a_nan_is_traced_to_the_line_that_makes_it() -> None:
    model, x = compiled(Log(), recompute="full"), torch.rand(4, 4) + 0.5
    assert model.verify(x).ok
    x[2, 3] = -1.0
    found = model.verify(x)
    assert found.exact  # eager computes the same
    assert not found.ok
    assert "output 0" in found.non_finite
    (origin,) = found.non_finite_origins
    assert (origin.kind, origin.index) == ("NaN", (2, 3))
    lines = str(found).splitlines()
    assert lines[0] == "NOT FINITE: compiled against eager, same batch and seed"
    assert lines[-3].startswith("  first NaN      log = aten.log.default(")
    assert lines[-2:] == [
        f"                 {line_of('logs = torch.log(x)', Log)}",
        f"                 at [2, 3], from input 0 in [-1, {float(x.max()):.4g}]",
    ]


def test_an_infinity_behind_a_nan_is_traced_too() -> None:
    model, x = compiled(Log()), torch.rand(4, 4) + 0.5
    x[0, 1] = 0.0  # the logarithm is infinite, and the masked score 0
    nan, infinity = model.verify(x).non_finite_origins
    assert (nan.kind, nan.index) == ("NaN", (0, 1))
    assert nan.source == line_of("return (scores * logs).sum()", Log)
    assert (infinity.kind, infinity.index) == ("inf", (0, 1))
    assert infinity.source == line_of("logs = torch.log(x)", Log)


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        root = (0.0 * self.layer(x)).sum(1).sqrt()
        return root.sum()


def test_a_gradient_that_is_not_finite_is_traced_to_the_line_that_it_is_of() -> None:
    found = compiled(Root()).verify(torch.rand(3, 4))  # the root of 0 has no derivative
    assert found.loss_difference == 0
    assert "output 0" not in found.non_finite
    assert found.non_finite_origins[0].kind == "NaN"
    lines = {origin.source for origin in found.non_finite_origins}
    assert lines == {line_of("root = (0.0 * self.layer(x)).sum(1).sqrt()", Root)}


def test_a_nan_that_a_parameter_has_is_named() -> None:
    model = compiled(Small())
    with torch.no_grad():
        model.down.weight[1, 2] = float("nan")
    found = model.verify(IDS, LABELS)
    assert not found.ok
    assert str(found).endswith(
        "  first NaN      the step is given it: parameter down.weight at [1, 2]"
    )


@pytest.mark.parametrize("known", tiers((False, True), quick=(True,)))
def test_a_tie_that_was_broken_is_named(known: bool) -> None:
    model = compiled(Small())
    if known:
        model(IDS, LABELS)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    found = model.verify(IDS, LABELS)
    assert not found.ok
    assert str(found).startswith("WRONG WEIGHTS: ")
    assert str(found).endswith(
        "  tied weights   embed.weight and head.weight were one parameter at compile, "
        "and are two now"
    )


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh()).square().sum()


def test_ties_that_were_exchanged_are_named() -> None:
    """The graph that is there would fit the shapes, and train the wrong weight."""
    model, x = compiled(Three()), torch.randn(2, 4)
    model(x)
    model.b.weight = model.c.weight
    found = model.verify(x)
    assert found.exact
    assert not found.ok
    assert found.ties == (
        TieChange("a.weight", "b.weight", broken=True),
        TieChange("b.weight", "c.weight", broken=False),
    )
    assert str(found).endswith("c.weight were two parameters at compile, and are one now")
