"""model.verify on many ranks over gloo: one verdict for all, stale ranks, spoilt passes."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def _run(pools: Any, task: str, world: int = 2, **given: Any) -> list[Any]:
    return list(pools[world].run(f"verification_rank_cases:{task}", **given))


@pytest.mark.parametrize("zero", [0, 3])
def test_right_steps_are_exact_and_accumulations_go_on(pools: Any, zero: int) -> None:
    for answers in _run(pools, "right", zero=zero):
        for answer in answers:
            assert answer["ok"], answer["text"]
            assert answer["exact"]


def test_a_stale_rank_is_named_with_its_first_other_parameter(pools: Any) -> None:
    for answer in _run(pools, "stale", of="up.weight"):
        assert not answer["ok"]
        assert answer["exact"]  # each rank computes what eager does with its own weights
        assert answer["stale"] == [(1, "up.weight", 0, 1)]
        assert answer["text"].startswith("WRONG WEIGHTS: ")
        assert "  stale rank     rank 1 has another up.weight than rank 0" in answer["text"]


def test_the_one_of_four_that_is_stale_is_named(pools: Any) -> None:
    for answer in _run(pools, "stale", world=4, of="embed.weight"):
        assert answer["stale"] == [(3, "embed.weight", 0, 1)]


@pytest.mark.parametrize(
    ("zero", "name", "spoil", "of"),
    [
        (0, "shard", "scale_gradient", "up.bias"),
        (3, "shard", "scale_gradient", "up.bias"),
        (3, "bucket", "scale_gradient", "down.weight"),
        (3, "rematerialize", "change_constant", None),
        (2, "replay_randomness", "draw_anew", None),
    ],
)
def test_spoilt_passes_are_found(pools: Any, zero: int, name: str, spoil: str, of: Any) -> None:
    answers = _run(pools, "spoilt", zero=zero, name=name, spoil=spoil, of=of)
    assert len({str(answer["guilt"]) for answer in answers}) == 1
    for answer in answers:
        assert not answer["ok"]
        assert answer["guilt"][:2] == ("pass", name), answer["text"]
        assert answer["node"] == answers[0]["node"]
        assert answer["result"] == (f"gradient of {of}" if of else ""), answer["text"]


@pytest.mark.parametrize("zero", [0, 3])
def test_what_is_not_finite_on_one_rank_fails_all(pools: Any, zero: int) -> None:
    first, second = _run(pools, "not_finite_on_one", zero=zero)
    assert first["text"].startswith("NOT FINITE: ")  # its gradients are averaged with the other's
    assert not first["ok"]
    assert not second["ok"]
    assert "in forward: x = self.embed(ids) * torch.log(scale)" in second["origins"][0]
