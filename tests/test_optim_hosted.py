"""States in host memory: bitwise those on the device, and their memory where it is said to be."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path
from typing import Any

import optimizer_cases as cases
import pytest
import torch
from torch import nn

import fxzero
from fxzero import UsageError
from fxzero.optim import SGD, AdamW, Lion
from fxzero.optim.base import Optimizer
from fxzero.optim.hosted import turn_elements
from fxzero.optimizers import hostable_bytes, profile_optimizer

KINDS = (AdamW, Lion, SGD)
# The first is cut into several turns, and turns end inside of others.
SHAPES = ((160, 128), (7,), (64, 256), (), (9, 33), (1023,), (16, 64))


def pair(kind: Any, form: str, **options: Any) -> tuple[Optimizer, Optimizer]:
    """An optimizer with its states on the host, and one without, over equal parameters."""
    dtype, numerics = cases.FORMS[form]
    numerics = {**numerics, **options}
    hosted = kind(cases.parameters(dtype, SHAPES), offload=True, **numerics)
    return hosted, kind(cases.parameters(dtype, SHAPES), **numerics)


def assert_equal(one: Optimizer, other: Optimizer) -> None:
    """Weights and states, bit for bit."""
    for mine, theirs in zip(cases.owned(one), cases.owned(other), strict=True):
        assert torch.equal(cases.bits(mine), cases.bits(theirs))
        states, expected = one.state[mine], other.state[theirs]
        assert states.keys() == expected.keys()
        for name, state in states.items():
            assert torch.equal(cases.bits(state), cases.bits(expected[name])), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", cases.FORMS)
def test_steps_are_bitwise_those_with_states_on_the_device(kind: Any, form: str) -> None:
    one, other = pair(kind, form)
    elements = sum(p.numel() for p in cases.owned(one))
    assert elements > 16 * turn_elements(elements)
    for step in range(3):
        for optimizer in (one, other):
            cases.give_gradients(cases.owned(optimizer), step)
            optimizer.step()
    assert_equal(one, other)


def test_parameters_without_a_gradient_stay_where_they_are() -> None:
    one, other = pair(AdamW, "float32")
    for step in range(4):
        for optimizer in (one, other):
            cases.give_gradients(cases.owned(optimizer), step)
            for parameter in cases.owned(optimizer)[step % 2 :: 2]:
                parameter.grad = None
            optimizer.step()
    assert_equal(one, other)


def test_updates_in_a_backward_are_bitwise_those_of_a_step() -> None:
    one, other = pair(AdamW, "bfloat16 rounded stochastically with int8 moments")
    for step in range(3):
        cases.give_gradients(cases.owned(other), step)
        other.step()
        cases.give_gradients(cases.owned(one), step)
        one.begin({str(i): p for i, p in enumerate(cases.owned(one))})
        for parameter in reversed(cases.owned(one)):
            one.take(parameter, parameter.grad)
            parameter.grad = None
        one.step()
    assert_equal(one, other)


def test_a_factor_and_a_step_that_is_not_finite() -> None:
    one, other = pair(AdamW, "float32")
    for optimizer in (one, other):
        cases.give_gradients(cases.owned(optimizer), 0)
        optimizer.scale_next_step(torch.tensor(0.25))
        optimizer.step()
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
        optimizer.step()
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
    assert_equal(one, other)


def test_states_move_between_host_and_device() -> None:
    one, other = pair(AdamW, "bfloat16 with a whole master")
    for step in range(4):
        owned = cases.owned(one)
        one.keep_on_host(owned[step::2])
        for optimizer in (one, other):
            cases.give_gradients(cases.owned(optimizer), step)
            optimizer.step()
        assert hosted_of(one) == set(map(id, owned[step::2]))
    assert_equal(one, other)


def hosted_of(optimizer: Any) -> set[int]:
    """The parameters whose states are in host memory, by ``id``."""
    return {
        id(member.parameter)
        for update in optimizer._updates
        for member in update.arena.members
        if update.arena.on_host
    }


def test_a_state_dict_is_that_of_any_optimizer() -> None:
    one, other = pair(AdamW, "bfloat16 with a whole master")
    cases.give_gradients(cases.owned(other), 0)
    other.step()
    for mine, theirs in zip(cases.owned(one), cases.owned(other), strict=True):
        mine.data.copy_(theirs.data)
    one.load_state_dict(copy.deepcopy(other.state_dict()))
    for optimizer in (one, other):
        cases.give_gradients(cases.owned(optimizer), 1)
        optimizer.step()
    assert_equal(one, other)
    assert hosted_of(one) == set(map(id, cases.owned(one)))


def test_a_pickled_optimizer_keeps_its_states_where_they_were() -> None:
    one, other = pair(AdamW, "float32")
    one.keep_on_host(cases.owned(one)[:3])
    cases.give_gradients(cases.owned(one), 0)
    one.step()
    file = io.BytesIO()
    torch.save((cases.owned(one), one), file)
    file.seek(0)
    owned, loaded = torch.load(file, weights_only=False)
    cases.give_gradients(cases.owned(other), 0)
    other.step()
    for optimizer in (loaded, other):
        cases.give_gradients(cases.owned(optimizer), 1)
        optimizer.step()
    assert_equal(loaded, other)
    assert hosted_of(loaded) == set(map(id, owned[:3]))


@pytest.mark.parametrize("offload", [False, True])
def test_a_checkpoint_goes_on_with_states_here_or_there(tmp_path: Path, offload: bool) -> None:
    def made(offload: bool) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(100, 90), nn.Tanh(), nn.Linear(90, 3)).bfloat16()
        return model, AdamW(model.parameters(), offload=offload)

    def step(number: int, *optimizers: Optimizer) -> None:
        for optimizer in optimizers:
            cases.give_gradients(cases.owned(optimizer), number)
            optimizer.step()

    model, optimizer = made(offload)
    step(0, optimizer)
    fxzero.checkpoint.save(tmp_path, model, optimizer, step=1)
    other, loaded = made(not offload)
    fxzero.checkpoint.load(tmp_path, other, loaded)
    assert_equal(loaded, optimizer)
    step(1, optimizer, loaded)
    assert_equal(loaded, optimizer)
    assert bool(hosted_of(loaded)) == (not offload)


def test_weights_that_move_are_updated_where_they_are() -> None:
    one, other = pair(AdamW, "float32")
    for step in range(2):
        for optimizer in (one, other):
            for parameter in cases.owned(optimizer):
                parameter.data = parameter.data.clone()
            cases.give_gradients(cases.owned(optimizer), step)
            optimizer.step()
    assert_equal(one, other)


def test_a_backward_behind_a_step_is_refused_old_values() -> None:
    weight = nn.Parameter(torch.ones(2000))
    optimizer = AdamW([weight], offload=True)
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_cuda_graph_copies_states(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair(AdamW, "float32")
    for optimizer in (one, other):
        cases.give_gradients(cases.owned(optimizer), 0)
        optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr("fxzero._torch.is_capturing", lambda: True)
        with pytest.raises(UsageError) as caught:
            one.step()
    assert cases.text_of(caught) == (
        "a CUDA graph is being captured, and the optimizer's states are in host memory\n"
        "  keep them on the device, or run the step outside of the graph"
    )
    assert_equal(one, other)


def test_an_option_that_is_none() -> None:
    with pytest.raises(UsageError) as caught:
        AdamW([nn.Parameter(torch.ones(2))], offload="host")  # type: ignore[arg-type]
    assert cases.text_of(caught) == "offload='host' must be True or False"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["float32", "bfloat16 rounded stochastically with int8 moments"])
def test_bytes_are_those_that_were_said(kind: Any, form: str) -> None:
    dtype, numerics = cases.FORMS[form]
    owned = cases.parameters(dtype, SHAPES)
    cases.give_gradients(owned, 0)
    weights = sum(2 * p.nbytes for p in owned)
    chosen = functools.partial(kind, offload=True, **numerics)
    profile = profile_optimizer(chosen, owned, "cpu")
    plain = profile_optimizer(functools.partial(kind, **numerics), owned, "cpu")
    optimizer = chosen(owned)

    measured = fxzero.measure(optimizer.step)

    assert measured.host_bytes == profile.host_bytes
    assert profile.host_bytes == sum(hostable_bytes(functools.partial(kind, **numerics), owned))
    assert hostable_bytes(chosen, owned) == (0,) * len(owned)
    device = measured.peak_bytes - weights
    assert device <= profile.state_bytes + profile.transient_bytes
    assert profile.state_bytes - profile.scratch_bytes == 4 * len(owned)
    assert device < plain.state_bytes
    again = fxzero.measure(optimizer.step)
    assert again.host_bytes == profile.host_bytes
    assert again.peak_bytes <= weights + profile.state_bytes + profile.transient_bytes
