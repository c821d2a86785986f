"""Ranks that send one another weights and gradients in few bits: they stay equal, and near."""

import pytest
import torch
from pool import Pool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
_MIX = {"send_weights": "int8", "send_gradients": "int4"}
_CASE = "message_rank_cases:trained"


@pytest.fixture(scope="module")
def pools():
    made = {world: Pool(world) for world in (2, 4)}
    yield made
    for pool in made.values():
        pool.close()


def _check(plain, narrow, loss, weights):
    """Ranks agree to the bit, and are near ranks that send numbers as they are."""
    first = narrow[0][1]
    for ours, theirs in zip(narrow, plain, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=loss)
        for name, value in ours[1].items():
            if name in first:
                assert torch.equal(value, first[name]), name
            assert (value - theirs[1][name]).norm() <= weights * theirs[1][name].norm(), name
        assert not all(map(torch.equal, ours[1].values(), theirs[1].values()))


@pytest.mark.parametrize(
    ("world", "zero"),
    [
        (4, 3),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in ((2, 1), (2, 2), (2, 3), (2, "auto"), (4, 1), (4, 2), (4, "auto"))
        ),
    ],
)
def test_training_stays_near_that_with_whole_numbers(pools, world, zero):
    plain = pools[world].run(_CASE, zero=zero)
    narrow = pools[world].run(_CASE, zero=zero, **_MIX)
    _check(plain, narrow, loss=0.02, weights=0.02)
    assert any("4 of 8 weights travel as int8" in note for note in narrow[0][2])
    assert any("4 of 8 gradients travel as int4" in note for note in narrow[0][2])


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.exhaustive)])
def test_generated_code_sends_the_same(pools, kind):
    sent = {"send_weights": kind, "send_gradients": kind}
    eager = pools[2].run(_CASE, zero=3, **sent)
    generated = pools[2].run(_CASE, zero=3, inner="inductor", **sent)
    for ours, theirs in zip(generated, eager, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-3)


@pytest.mark.parametrize("zero", [2, 3])
def test_a_step_needs_what_is_planned(pools, zero):
    for _, _, _, measured, planned in pools[2].run(_CASE, zero=zero, **_MIX):
        assert measured <= planned


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_stages_of_pipelines_send_few_bits_too(pools, zero):
    given = {"zero": zero, "sizes": {"pp": 2, "dp": 2}}
    given["pipeline"] = {"schedule": "1f1b", "microbatches": 2}
    plain, narrow = pools[4].run(_CASE, **given), pools[4].run(_CASE, **given, **_MIX)
    _check(plain, narrow, loss=0.02, weights=0.02)
    assert any("weights travel as int8" in note for note in narrow[0][2])
