"""What plans know about optimizers of fxzero.optim: planned bytes against those that are there."""

from __future__ import annotations

import functools
from typing import Any

import optimizer_cases as cases
import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero import UsageError
from fxzero.kernels import update as kernel
from fxzero.optim import SGD, AdamW, Lion, footprint
from fxzero.optimizers import profile_optimizer

WIDE = ((700, 800), (500, 1024), (1000,), (33, 64))


@pytest.mark.parametrize("kind", [AdamW, SGD, Lion])
@pytest.mark.parametrize("form", cases.FORMS)
def test_state_bytes_are_those_of_the_arenas(kind: Any, form: str) -> None:
    dtype, numerics = cases.FORMS[form]
    owned = cases.parameters(dtype)
    profile = profile_optimizer(functools.partial(kind, lr=0.1, **numerics), owned, "cpu")
    optimizer = kind(owned, **numerics)
    cases.give_gradients(owned, 0)
    optimizer.step()
    arenas = [update.arena for update in optimizer._updates]
    kept = sum(t.nbytes for arena in arenas for t in (*arena.tensors.values(), arena.steps))
    assert profile.state_bytes - profile.scratch_bytes == kept
    assert profile.bytes_per_parameter == kept / sum(p.numel() for p in owned)


@pytest.mark.slow
@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("shapes", [cases.SHAPES, WIDE], ids=["small", "wide"])
def test_a_step_needs_no_more_than_was_said(form: str, shapes: Any) -> None:
    dtype, numerics = cases.FORMS[form]
    owned = cases.parameters(dtype, shapes)
    profile = profile_optimizer(functools.partial(AdamW, **numerics), owned, "cpu")
    optimizer = AdamW(owned, **numerics)
    for step in range(2):
        cases.give_gradients(owned, step)
        optimizer.step()
    weights = sum(p.nbytes for p in owned)
    measured = fxzero.measure(optimizer.step).tensor_bytes
    kept = profile.state_bytes - profile.scratch_bytes
    slack = 1024  # scalars
    assert 2 * weights + kept <= measured + slack
    assert measured <= 2 * weights + profile.state_bytes + profile.transient_bytes + slack


class Deep(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(6))
        self.layers = nn.Sequential(*layers).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.layers(x).float().square().mean()
        return loss


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    ["float32", "bfloat16 with a whole master", "bfloat16 with 24 bits and int8 moments"],
)
def test_a_plan_holds_what_is_measured(form: str) -> None:
    dtype, numerics = cases.FORMS[form]
    chosen = functools.partial(AdamW, **numerics)
    torch.manual_seed(0)
    model = fxzero.compile(Deep(dtype), inner="eager", optimizer=chosen)
    optimizer = chosen(model.parameters())
    x = torch.randn(256, 512).to(dtype)

    def step() -> None:
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    measured, planned = fxzero.measure(step).tensor_bytes, model.plan.peak_bytes
    scratch = profile_optimizer(chosen, list(model.parameters()), "cpu").scratch_bytes
    assert measured <= planned
    assert measured >= 0.95 * (planned - scratch)


def test_8_bit_moments_leave_room_under_a_budget() -> None:
    model, x = Deep(torch.bfloat16), torch.randn(8, 512, dtype=torch.bfloat16)
    wide = fxzero.plan(model, x, optimizer="fxzero.optim.AdamW")
    narrow = fxzero.plan(
        model, x, optimizer=functools.partial(AdamW, moments="int8", master_bits=24)
    )
    assert wide.request.optimizer == "fxzero.optim.AdamW"
    assert narrow.request.optimizer == "fxzero.optim.AdamW(master_bits=24, moments='int8')"
    count = wide.model.parameters
    matrices = 6 * 512 * 512
    biases = count - matrices
    saved = matrices * (6 - 3 - 2 * 4 / 128) + biases * (6 - 9)
    per_parameter = wide.request.optimizer_bytes_per_parameter
    per_parameter -= narrow.request.optimizer_bytes_per_parameter
    assert per_parameter * count == pytest.approx(saved)


@pytest.mark.parametrize("kind", [AdamW, SGD, Lion])
def test_a_class_its_name_and_a_partial_are_the_same(kind: Any) -> None:
    owned = cases.parameters(torch.float32)
    forms = (kind, f"fxzero.optim.{kind.__name__}", functools.partial(kind, lr=1.0))
    profiles = [profile_optimizer(form, owned, "cpu") for form in forms]
    assert profiles[0] == profiles[1] == profiles[2]
    count = 2 if kind is AdamW else 1
    expected = sum(4 * count * p.numel() + 4 for p in owned)
    assert profiles[0].state_bytes - profiles[0].scratch_bytes == expected


def test_on_cuda_places_are_aligned_and_a_table_is_kept() -> None:
    owned = [nn.Parameter(torch.zeros(3000)), nn.Parameter(torch.zeros(1))]
    profile = profile_optimizer(AdamW, owned, "cuda")
    arenas = 2 * 4 * (3072 + 256)
    assert profile.state_bytes == arenas + 2 * 4 + (3 + 1) * 64 + 2 * 64
    assert profile.transient_bytes == 0


def test_constants_are_those_of_kernels() -> None:
    assert min(kernel.BLOCK, kernel.QUANTIZED_BLOCK) == footprint._BLOCK
    assert kernel.COLUMNS * 8 == footprint._ROW_BYTES


def test_options_that_cannot_be_right_are_refused_when_planning() -> None:
    with pytest.raises(UsageError, match="moments='int4' must be one of float32"):
        profile_optimizer(functools.partial(AdamW, moments="int4"), [], "cpu")
    with pytest.raises(UsageError, match=r"did you mean 'fxzero\.optim\.AdamW'"):
        profile_optimizer("fxzero.optim.adamw", [], "cpu")
    with pytest.raises(UsageError, match=r"a class of fxzero\.optim, alone or in a functools"):
        profile_optimizer(functools.partial(torch.optim.AdamW), [], "cpu")
