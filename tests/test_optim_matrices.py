"""fxzero.optim.Muon: torch's to the bit on whole matrices, and the same on any number of ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimizer_cases import (
    assert_equal,
    assert_same,
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
from fxzero.optim import Muon
from fxzero.optim.homes import choose_homes, turns
from fxzero.optimizers import profile_optimizer

SHAPES = ((33, 65), (64, 16), (1, 7), (5, 1), (48, 48))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.8, "nesterov": False},
    {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
    {"adjust_lr_fn": "original", "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
    {"lr": torch.tensor(0.02), "ns_steps": 0},
    {"lr": torch.tensor([0.02])},
]
WORLDS = (1, 2, 4)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_matrices_are_bitwise_torchs(dtype: torch.dtype, options: dict[str, Any]) -> None:
    ours = Muon(parameters(dtype, SHAPES), **options)
    theirs = torch.optim.Muon(parameters(dtype, SHAPES), **options)
    for step in range(4):
        train(ours, [step])
        train(theirs, [step])
        assert_equal(ours, theirs)


def test_bfloat16_is_bitwise_torchs_where_torch_rounds_once() -> None:
    shapes = ((32, 64), (48, 48))
    ours = Muon(parameters(torch.bfloat16, shapes), lr=0.1)
    theirs = torch.optim.Muon(parameters(torch.bfloat16, shapes), lr=0.1)
    train(ours, range(4))
    train(theirs, range(4))
    assert_equal(ours, theirs)


def test_bfloat16_is_within_a_rounding_of_torchs_elsewhere() -> None:
    ours = Muon(parameters(torch.bfloat16, ((64, 16), (33, 65))), lr=0.1)
    theirs = torch.optim.Muon(parameters(torch.bfloat16, ((64, 16), (33, 65))), lr=0.1)
    train(ours, [0])
    train(theirs, [0])
    for a, b in zip(owned(ours), owned(theirs), strict=True):
        # Half a unit of the product's last place each, and one of the sum's.
        assert torch.allclose(a, b, rtol=2**-7, atol=2**-8 * 0.3)


def test_a_bfloat16_momentum_is_not_overwritten_by_the_iteration() -> None:
    narrow, wide = (
        Muon(parameters(dtype, ((32, 64),)), lr=0.1, nesterov=False)
        for dtype in (torch.bfloat16, torch.float32)
    )
    train(narrow, range(3))
    train(wide, range(3))
    one, two = (o.state[owned(o)[0]]["momentum_buffer"].float() for o in (narrow, wide))
    assert torch.allclose(one, two, rtol=0.02, atol=1e-3)


def test_groups_schedulers_and_closures_are_as_torchs() -> None:
    losses, made = [], []
    for kind in (Muon, torch.optim.Muon):
        first, second = (parameters(torch.float32, s) for s in (SHAPES[:2], SHAPES[2:]))
        optimizer = kind([{"params": first, "lr": 0.1}], lr=0.01)
        optimizer.add_param_group({"params": second, "weight_decay": 0.0})
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)

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
    ours, theirs = (kind(parameters(torch.float32, SHAPES)) for kind in (Muon, torch.optim.Muon))
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


def test_a_model_learns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    optimizer, losses = Muon(model.parameters(), lr=0.02), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_matrices_without_gradients_wait() -> None:
    ours, theirs = (kind(parameters(torch.float32, SHAPES)) for kind in (Muon, torch.optim.Muon))
    for optimizer in (ours, theirs):
        for step in range(4):
            give_gradients(owned(optimizer), step)
            owned(optimizer)[step].grad = None
            optimizer.step()
    assert_equal(ours, theirs)


def test_a_vector_is_refused_and_its_group_not_added() -> None:
    with pytest.raises(UsageError) as caught:
        Muon([nn.Parameter(torch.ones(7))])
    assert text_of(caught) == (
        "Muon updates matrices, not a parameter of shape [7]\n"
        "  give it to fxzero.optim.AdamW, in an optimizer of its own"
    )
    optimizer = Muon(parameters(torch.float32, SHAPES))
    with pytest.raises(UsageError, match=r"shape \[2, 3, 4\]"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 3, 4))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(UsageError, match=r"matrices of real numbers, not of torch\.complex64"):
        Muon([nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr=-1.0 must be a finite number, at least 0"),
        ({"momentum": float("nan")}, "momentum=nan must be a finite number, at least 0"),
        ({"ns_steps": 100}, "ns_steps=100 must be at least 0 and below 100"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients=(1.0, 2.0) must be three numbers"),
        (
            {"adjust_lr_fn": "match_rms"},
            "adjust_lr_fn: unknown option 'match_rms'; did you mean 'match_rms_adamw'?\n"
            "  known: match_rms_adamw, original",
        ),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Muon(parameters(torch.float32, SHAPES), **options)
    assert text_of(caught) == text


def test_a_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UsageError, match=r"shape \[5, 3\] is sparse"):
        Muon(embedding.parameters()).step()


def test_homes_share_the_work_and_every_matrix_has_one() -> None:
    costs = [7, 100, 7, 50, 49, 1, 7]
    homes = choose_homes(costs, 2)
    assert homes == [[1, 2, 5], [3, 4, 0, 6]]
    assert sorted(n for own in homes for n in own) == list(range(len(costs)))
    many = list(range(1, 200))
    loads = [sum(many[n] for n in own) for own in choose_homes(many, 4)]
    assert max(loads) - min(loads) <= 199
    assert choose_homes([3], 3) == [[0], [], []]


def test_small_matrices_share_a_turn_and_large_ones_have_their_own() -> None:
    sizes = [30, 4, 4, 4, 20, 5]
    found = list(turns([[0, 1, 2, 3], [4, 5]], sizes, 10))
    assert found == [[[0], [4]], [[1, 2], [5]], [[3], []]]
    assert list(turns([[], []], [], 10)) == []


def test_profiles_hold_the_momentum_of_matrices_and_the_moments_of_the_rest() -> None:
    matrices = parameters(torch.float32, SHAPES)
    optimizer = Muon(matrices)
    train(optimizer, [0])
    profile = profile_optimizer(Muon, matrices, "cpu")
    assert profile == profile_optimizer("fxzero.optim.Muon", matrices, "cpu")
    kept = sum(optimizer.state[p]["momentum_buffer"].nbytes for p in matrices)
    assert profile.state_bytes == kept
    rest = [nn.Parameter(torch.ones(10))]
    adamw = profile_optimizer("fxzero.optim.AdamW", rest, "cpu").state_bytes
    assert profile_optimizer(Muon, [*matrices, *rest], "cpu").state_bytes == kept + adamw


@pytest.mark.parametrize("shape", [(300, 200), (64, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_needs_no_more_than_was_said(shape: Any, dtype: torch.dtype) -> None:
    matrices = parameters(dtype, (shape, shape))
    optimizer = Muon(matrices)
    train(optimizer, [0])
    profile = profile_optimizer(Muon, matrices, "cpu")
    fixed = 2 * sum(p.nbytes for p in matrices) + profile.state_bytes
    measured, slack = fxzero.measure(optimizer.step).tensor_bytes, 1024
    assert fixed <= measured + slack
    assert measured <= fixed + profile.transient_bytes + slack


def run(pool: Pool, case: str, **given: Any) -> Any:
    return pool.run(f"matrix_rank_cases:{case}", **given)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}, marks=pytest.mark.exhaustive
        ),
        pytest.param({"dtype": torch.bfloat16}, marks=pytest.mark.exhaustive),
    ],
)
def test_weights_and_momenta_are_the_same_on_any_number_of_ranks(
    pools: Any, options: dict[str, Any]
) -> None:
    ((losses, state),) = run(pools[1], "trained", zero=3, **options)
    for world, zero in ((2, 3), (4, 3), (4, 1), (2, 0)):
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
def test_a_rank_keeps_the_momentum_of_its_rows(pools: Any) -> None:
    kept, totals = zip(*run(pools[4], "elements_kept", zero=3), strict=True)
    assert sum(kept) == totals[0]
    assert max(kept) <= 1.1 * totals[0] / 4


@pytest.mark.slow
def test_a_checkpoint_goes_on_bit_for_bit_on_any_number_of_ranks(pools: Any, tmp_path: Any) -> None:
    for writers, readers, zero in ((1, 4, 3), (4, 2, 3), (2, 1, 0), (4, 2, 0)):
        root = str(tmp_path / f"{writers} {readers} {zero}")
        losses, state = run(pools[writers], "train_and_save", root=root)[0]
        for others, there in run(pools[readers], "load_and_train", root=root, zero=zero):
            assert others == losses
            assert_same(there, state)


@pytest.mark.slow
def test_states_go_through_torchs_functions_and_from_whole_to_cut(pools: Any) -> None:
    for full in (False, True):
        assert run(pools[2], "through_torchs_state_dicts", full=full) == [True] * 2
    assert run(pools[4], "from_a_whole_state") == [True] * 4


@pytest.mark.slow
def test_shards_of_fsdp2_are_updated_as_the_whole_is(pools: Any) -> None:
    assert run(pools[2], "under_fsdp") == [True] * 2


@pytest.mark.slow
def test_all_ranks_say_so_where_only_some_have_a_gradient(pools: Any) -> None:
    for text, changed in run(pools[4], "some_without_gradients", missing={1: [2], 3: [2]}):
        assert text == (
            "[FXZ601] of 4 ranks that share a parameter of shape [3, 40] only rank 0, 2 has a "
            "gradient of it; no weight was changed\n"
            "  a matrix is updated by all ranks together: give it a gradient on all, or on none"
        )
        assert changed == [False] * 3
    everywhere = {rank: [1] for rank in range(4)}
    for answer in run(pools[4], "some_without_gradients", missing=everywhere):
        assert answer == ("", [True, False, True])


@pytest.mark.slow
def test_a_matrix_without_whole_rows_is_refused(pools: Any) -> None:
    for text in run(pools[2], "cut_along_columns"):
        assert "shape [6, 8] is spread over ranks as" in text
        assert "cut into rows over one dimension of a mesh" in text


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_plans_hold_what_is_measured(pools: Any, zero: int) -> None:
    for measured, planned in run(pools[4], "measured_and_planned", zero=zero):
        assert measured <= planned
        assert measured >= 0.7 * planned
