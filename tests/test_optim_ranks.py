"""fxzero.optim over sharded parameters: how many ranks there are changes no bit.

But for float32, which is torch's fused kernel to the bit: that rounds the last elements of a
tensor, which do not fill a vector, in another way, and a shard has other last elements.
"""

from __future__ import annotations

from typing import Any

import pytest
from optimizer_cases import FORMS, assert_same
from optimizer_rank_cases import NARROW, RANDOM
from pool import Pool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
WORLDS = (1, 2, 4)
_FLOAT32, _NARROW, _WHOLE = (
    pytest.param(form, marks=pytest.mark.exhaustive)
    for form in ("float32", NARROW, "bfloat16 with a whole master")
)


def run(pool: Pool, case: str, **given: Any) -> Any:
    return pool.run(f"optimizer_rank_cases:{case}", **given)


@pytest.mark.parametrize("world", WORLDS)
def test_float32_is_bitwise_torchs(pools: Any, world: int) -> None:
    for zero in (0, 3):
        assert run(pools[world], "differing_from_torch", zero=zero) == [[]] * world


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("adamw", NARROW),
        ("adamw", RANDOM),
        ("lion", RANDOM),
        ("sgd", NARROW),
        *(
            pytest.param("adamw", form, marks=pytest.mark.exhaustive)
            for form in FORMS
            if form not in {"float32", NARROW, RANDOM}
        ),
    ],
)
def test_weights_and_states_are_the_same_on_any_number_of_ranks(
    pools: Any, kind: str, form: str
) -> None:
    (losses, state), *_ = run(pools[1], "trained", form=form, kind=kind)
    for world, zero in ((2, 3), (4, 3), (4, 1)):
        for others, there in run(pools[world], "trained", form=form, kind=kind, zero=zero):
            assert others == losses
            assert_same(there, state)


@pytest.mark.parametrize("form", ["bfloat16 with a whole master", NARROW, _FLOAT32])
def test_a_checkpoint_goes_on_bit_for_bit_on_any_number_of_ranks(
    pools: Any, tmp_path: Any, form: str
) -> None:
    for writers, readers in ((1, 4), (4, 2), (2, 1), (4, 4)):
        root = str(tmp_path / f"{writers} {readers}")
        saved, losses, state = run(pools[writers], "train_and_save", root=root, form=form)[0]
        for loaded, others, there in run(pools[readers], "load_and_train", root=root, form=form):
            assert_same(loaded, saved)
            if form != "float32" or readers == writers:
                assert others == losses
                assert_same(there, state)
            else:
                assert others == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("form", ["bfloat16 with a whole master", _NARROW, _FLOAT32])
def test_torchs_functions_get_and_set_states(pools: Any, form: str, full: bool) -> None:
    for world in WORLDS:
        answers = run(pools[world], "through_torchs_state_dicts", form=form, full=full)
        assert answers == [True] * world


@pytest.mark.parametrize("world", WORLDS)
def test_clipping_in_the_step_is_that_of_gradients(pools: Any, world: int) -> None:
    results = [
        run(pools[world], "trained", form="float32", clip=clip)
        for clip in ("in place", "in the step")
    ]
    for (losses, state), (others, there) in zip(*results, strict=True):
        assert losses == others
        assert_same(state, there)


@pytest.mark.parametrize("form", [NARROW, RANDOM, "bfloat16 with a whole master"])
def test_shards_of_fsdp2_are_updated_as_the_whole_is(pools: Any, form: str) -> None:
    assert run(pools[2], "differing_under_fsdp", form=form) == [[]] * 2


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("form", [NARROW, _FLOAT32, _WHOLE])
def test_plans_hold_what_is_measured(pools: Any, form: str, zero: int) -> None:
    for answer in run(pools[4], "measured_and_planned", form=form, zero=zero):
        measured, planned, scratch = answer
        assert measured <= planned
        # A transfer that ends early gives its workspace back before it is waited for.
        assert measured >= 0.75 * (planned - scratch)


@pytest.mark.parametrize("form", [RANDOM, "bfloat16 with a whole master"])
def test_states_in_host_memory_change_no_bit(pools: Any, form: str) -> None:
    (losses, state), *_ = run(pools[1], "trained", form=form)
    for world, zero in ((2, 3), (4, 1)):
        for others, there in run(pools[world], "trained", form=form, zero=zero, offload=True):
            assert others == losses
            assert_same(there, state)


@pytest.mark.parametrize("zero", [1, 3])
def test_a_budget_has_states_wait_in_host_memory_on_all_ranks(pools: Any, zero: int) -> None:
    for (plain, away), (measured, planned), (host, there) in run(
        pools[2], "with_states_away", zero=zero
    ):
        assert away == plain
        assert 0.75 * planned <= measured <= planned
        assert host == there > 0


def test_scales_are_cut_as_rows_are_or_refused(pools: Any) -> None:
    assert run(pools[2], "cut_along_columns", columns=256) == [[[6, 2], [6, 2]]] * 2
    for text in run(pools[2], "cut_along_columns", columns=128):
        assert text == (
            "[FXZ101] 128 neighbours of a parameter of shape [6, 128] share a scale of 8-bit "
            "moments, but it is cut into rows of 64\n"
            '  cut it along its first dimension, or give it moments="bfloat16"'
        )


def test_stages_of_a_pipeline_are_updated_as_by_torch(pools: Any) -> None:
    assert run(pools[2], "differing_in_a_pipeline", name="tied", stages=2) == [[]] * 2
