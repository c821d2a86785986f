"""fxzero.optim.Adafactor: torch's to the bit, and the same on any number of ranks."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from optimizer_cases import (
    assert_equal,
    assert_same,
    bits,
    give_gradients,
    owned,
    parameters,
    text_of,
    train,
)
from pool import Pool
from torch import Tensor, nn

import fxzero
from fxzero import UsageError
from fxzero.optim import Adafactor
from fxzero.optimizers import profile_optimizer

SHAPES = ((), (7,), (1,), (33, 65), (64, 16), (1, 7), (5, 1), (8, 3, 5), (6, 4, 3, 3))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.3, "weight_decay": 0.3},
    {"beta2_decay": -0.3, "eps": (1e-3, 0.1), "maximize": True},
    {"d": 2.0, "eps": (0.0, 0.0)},
    {"lr": torch.tensor(0.02), "weight_decay": 0.1},
    {"lr": torch.tensor([0.02])},
]
WORLDS = (1, 2, 4)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_of_all_ranks_are_bitwise_torchs(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    ours = Adafactor(parameters(dtype, SHAPES), **options)
    theirs = torch.optim.Adafactor(parameters(dtype, SHAPES), **options)
    for step in range(12):
        train(ours, [step])
        train(theirs, [step])
        assert_equal(ours, theirs)


def test_a_model_in_channels_last_is_bitwise_torchs() -> None:
    results = []
    for kind in (Adafactor, torch.optim.Adafactor):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        model = model.to(memory_format=torch.channels_last)
        optimizer = kind(model.parameters())
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(2, 3, 9, 9, generator=generator)
            optimizer.zero_grad()
            model(x.to(memory_format=torch.channels_last)).square().mean().backward()
            optimizer.step()
        results.append(optimizer)
    assert_equal(*results)


def test_parameters_without_gradients_wait() -> None:
    ours, theirs = (
        kind(parameters(torch.float32, SHAPES)) for kind in (Adafactor, torch.optim.Adafactor)
    )
    for optimizer in (ours, theirs):
        for step in range(9):
            give_gradients(owned(optimizer), step)
            for number in (step, 3):
                owned(optimizer)[number].grad = None
            optimizer.step()
    assert_equal(ours, theirs)
    assert not ours.state[owned(ours)[3]]


def test_groups_schedulers_and_closures_are_as_torchs() -> None:
    losses, made = [], []
    for kind in (Adafactor, torch.optim.Adafactor):
        first, second = (parameters(torch.float32, s) for s in (SHAPES[:4], SHAPES[4:]))
        optimizer = kind([{"params": first, "lr": 0.1}], lr=0.01)
        optimizer.add_param_group({"params": second, "weight_decay": 0.2, "d": 1.5})
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

        def closure(optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = torch.stack([p.square().sum() for p in owned(optimizer)]).sum()
            loss.backward()
            return loss

        for _ in range(4):
            losses.append(optimizer.step(closure).item())
            scheduler.step()
        made.append(optimizer)
    assert_equal(*made)
    assert losses[:4] == losses[4:]


def test_states_go_from_torch_and_back() -> None:
    ours, theirs = (
        kind(parameters(torch.float32, SHAPES)) for kind in (Adafactor, torch.optim.Adafactor)
    )
    train(theirs, range(2))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    with torch.no_grad():
        for mine, other in zip(owned(ours), owned(theirs), strict=True):
            mine.copy_(other)
    train(ours, range(2, 4))
    train(theirs, range(2, 4))
    assert_equal(ours, theirs)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(ours, [4])
    train(theirs, [4])
    assert_equal(ours, theirs)


def test_a_bfloat16_weight_is_that_of_float32_rounded_once() -> None:
    narrow = Adafactor(parameters(torch.bfloat16, SHAPES), lr=0.1, weight_decay=0.1)
    wide = torch.optim.Adafactor(
        [nn.Parameter(p.detach().float()) for p in owned(narrow)], lr=0.1, weight_decay=0.1
    )
    for a in owned(narrow):
        a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    for a, b in zip(owned(narrow), owned(wide), strict=True):
        b.grad = a.grad.float()
    narrow.step()
    wide.step()
    for a, b in zip(owned(narrow), owned(wide), strict=True):
        assert torch.equal(bits(a), bits(b.bfloat16()))
        for name, moment in wide.state[b].items():
            assert torch.equal(bits(narrow.state[a][name]), bits(moment))


def test_moments_of_bfloat16_weights_stay_float32_when_they_are_loaded() -> None:
    one, other = (Adafactor(parameters(torch.bfloat16, SHAPES)) for _ in range(2))
    train(one, range(2))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for a, b in zip(owned(one), owned(other), strict=True):
        with torch.no_grad():
            b.copy_(a)
        assert all(moment.dtype == torch.float32 for moment in other.state[b].values())
    train(one, [2])
    train(other, [2])
    assert_equal(one, other)


def test_stochastic_rounding_is_right_on_average_and_goes_on_in_a_copy() -> None:
    options = {"lr": 1e-3, "stochastic_rounding": True, "seed": 5}
    narrow = Adafactor(parameters(torch.bfloat16, ((64, 512),)), **options)
    wide = torch.optim.Adafactor([nn.Parameter(p.detach().float()) for p in owned(narrow)], lr=1e-3)
    nearest = Adafactor(copy.deepcopy(owned(narrow)), lr=1e-3)
    for optimizer in (narrow, wide, nearest):
        optimizer.param_groups[0]["params"][0].grad = torch.full((64, 512), -0.1).to(
            optimizer.param_groups[0]["params"][0].dtype
        )
    start = owned(wide)[0].detach().clone()
    for step in range(8):
        if step == 4:
            kept = owned(narrow)[0].grad
            narrow = copy.deepcopy(narrow)
            owned(narrow)[0].grad = kept
        for optimizer in (narrow, wide, nearest):
            optimizer.step()
    moved, exact, lost = (
        (owned(o)[0].float() - start).mean().item() for o in (narrow, wide, nearest)
    )
    assert moved == pytest.approx(exact, rel=0.02)
    assert lost < 0.9 * exact


def test_an_empty_parameter_is_left_alone() -> None:
    optimizer = Adafactor(parameters(torch.float32, ((0,), (3, 0), (0, 3), (2, 3))))
    before = [p.detach().clone() for p in owned(optimizer)]
    train(optimizer, range(2))
    changed = [not torch.equal(p, b) for p, b in zip(owned(optimizer), before, strict=True)]
    assert changed == [False, False, False, True]


def test_a_model_learns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    optimizer, losses = Adafactor(model.parameters(), lr=0.05), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr=-1.0 must be a finite number, at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan must be a finite number, at least 0"),
        ({"beta2_decay": 0.5}, "beta2_decay=0.5 must be a finite number, at most 0"),
        ({"d": 0.5}, "d=0.5 must be a finite number, at least 1"),
        (
            {"eps": (None, None)},
            "eps=(None, None) must be a number or None, and a number, both at least 0",
        ),
        (
            {"eps": (-1.0, 0.0)},
            "eps=(-1.0, 0.0) must be a number or None, and a number, both at least 0",
        ),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Adafactor(parameters(torch.float32, SHAPES), **options)
    assert text_of(caught) == text


def test_complex_parameters_and_sparse_gradients_are_refused() -> None:
    with pytest.raises(UsageError, match=r"Adafactor updates real numbers, not torch\.complex64"):
        Adafactor([nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))])
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UsageError, match=r"shape \[5, 3\] is sparse"):
        Adafactor(embedding.parameters()).step()


def test_a_state_of_another_optimizer_is_refused_and_nothing_loaded() -> None:
    other = torch.optim.AdamW(parameters(torch.float32, ((3, 4), (5,))))
    train(other, [0])
    ours = Adafactor(parameters(torch.float32, ((3, 4), (5,))))
    with pytest.raises(UsageError) as caught:
        ours.load_state_dict(other.state_dict())
    assert text_of(caught) == (
        "the state of a parameter of shape [3, 4] has exp_avg [3, 4], exp_avg_sq [3, 4], step []; "
        "Adafactor keeps col_var [1, 4], row_var [3, 1], step []\n"
        "  load the state of an Adafactor, fxzero's or torch's"
    )
    assert not ours.state


def test_profiles_hold_rows_and_columns() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weights = parameters(dtype, SHAPES)
        optimizer = Adafactor(weights)
        train(optimizer, [0])
        profile = profile_optimizer(Adafactor, weights, "cpu")
        assert profile == profile_optimizer("fxzero.optim.Adafactor", weights, "cpu")
        kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        assert profile.state_bytes == kept


@pytest.mark.parametrize("shape", [(300, 200), (70000,), (64, 16, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind",
    [
        Adafactor,
        torch.optim.Adafactor,
        functools.partial(Adafactor, stochastic_rounding=True),
    ],
)
def test_a_step_needs_what_was_said(shape: Any, dtype: torch.dtype, kind: Any) -> None:
    weights = parameters(dtype, (shape, shape))
    optimizer = kind(weights)
    train(optimizer, [0])
    profile = profile_optimizer(kind, weights, "cpu")
    fixed = 2 * sum(p.nbytes for p in weights) + profile.state_bytes
    measured, slack = fxzero.measure(optimizer.step).tensor_bytes, 1024
    planned = fixed + profile.transient_bytes
    assert 0.95 * planned <= measured <= planned + slack


def test_torchs_is_planned_by_name_for_whole_parameters() -> None:
    weights = parameters(torch.float32, SHAPES)
    optimizer = torch.optim.Adafactor(weights)
    train(optimizer, [0])
    kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert profile_optimizer("adafactor", weights, "cpu").state_bytes == kept
    with pytest.raises(UsageError) as caught:
        profile_optimizer("adafactor", weights, "cpu", shards=2)
    assert text_of(caught) == (
        "torch.optim.Adafactor cannot update matrices that are cut over ranks\n"
        '  use "fxzero.optim.Adafactor", or zero=0'
    )


def run(pool: Pool, case: str, **given: Any) -> Any:
    return pool.run(f"adafactor_rank_cases:{case}", **given)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_shards_are_bitwise_torchs_on_whole_parameters(pools: Any, world: int) -> None:
    for zero in (0, 3):
        assert run(pools[world], "differing_from_torch", zero=zero) == [[]] * world


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 3}]
)
def test_weights_and_moments_are_the_same_on_any_number_of_ranks(
    pools: Any, options: dict[str, Any]
) -> None:
    ((losses, state),) = run(pools[1], "trained", zero=3, **options)
    for world, zero in ((2, 3), (4, 3), (4, 1)):
        for others, there in run(pools[world], "trained", zero=zero, **options):
            assert others == losses
            assert_same(there, state)


@pytest.mark.slow
def test_turns_and_replicas_change_no_bit(pools: Any) -> None:
    ((losses, state),) = run(pools[1], "trained", zero=3)
    for world, case in ((2, "trained_in_small_turns"), (4, "trained_with_replicas")):
        for others, there in run(pools[world], case):
            assert others == losses
            assert_same(there, state)


@pytest.mark.slow
def test_a_rank_keeps_its_part_of_moments(pools: Any) -> None:
    kept, totals = zip(*run(pools[2], "elements_kept"), strict=True)
    assert sum(kept) == totals[0]
    assert max(kept) <= 1.1 * totals[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_bit_for_bit_on_any_number_of_ranks(
    pools: Any, tmp_path: Any, dtype: torch.dtype
) -> None:
    for writers, readers, zero in ((1, 4, 3), (4, 2, 3), (2, 1, 0)):
        root = str(tmp_path / f"{writers} {readers} {zero}")
        losses, state = run(pools[writers], "train_and_save", root=root, dtype=dtype)[0]
        for others, there in run(
            pools[readers], "load_and_train", root=root, zero=zero, dtype=dtype
        ):
            assert others == losses
            assert_same(there, state)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_states_go_through_torchs_functions(pools: Any, full: bool) -> None:
    assert run(pools[2], "through_torchs_state_dicts", full=full) == [True] * 2


@pytest.mark.slow
def test_shards_of_fsdp2_are_updated_as_the_whole_is(pools: Any) -> None:
    assert run(pools[2], "under_fsdp") == [True] * 2


@pytest.mark.slow
def test_shards_without_gradients_wait(pools: Any) -> None:
    for changed in run(pools[2], "without_some_gradients"):
        assert [number for number, is_changed in enumerate(changed) if not is_changed] == [0, 3]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_hold_what_is_measured(pools: Any, zero: int, dtype: torch.dtype) -> None:
    peaks = run(pools[4], "measured_and_planned", zero=zero, dtype=dtype)
    assert all(measured <= planned for measured, planned in peaks)
    # A plan is that of the rank with most to do.
    measured, planned = max(peaks)
    assert measured >= 0.95 * planned
