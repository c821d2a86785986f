"""model.verify on many ranks over gloo: one verdict for all, stale ranks, spoilt passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize(
    ("name", "zero", "sizes", "schedule"),
    [
        ("mlp", 0, {"pp": 2}, "1f1b"),
        pytest.param("mlp", 0, {"pp": 2}, "zb1p", marks=pytest.mark.exhaustive),
        ("mlp", 3, {"pp": 2, "dp": 2}, "1f1b"),
        pytest.param(
            *("mlp", 1, {"pp": 2, "dp": 2}, "interleaved1f1b"), marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_pipeline_equals_eager_accumulation(
    pools: Any, name: str, zero: int, sizes: Any, schedule: str
) -> None:
    world = 2 * sizes.get("dp", 1)
    given = {"name": name, "zero": zero, "sizes": sizes, "schedule": schedule}
    answers = _run(pools, "pipeline", world=world, **given)
    for answer in answers:
        assert answer["exact"], answer["text"]
        assert answer["ok"]
    assert sum(answer["count"] for answer in answers) == sizes.get("dp", 1) * 34


def test_tied_weights_of_a_pipeline_are_added_up_otherwise(pools: Any) -> None:
    given = {"name": "tied of 2 layers", "zero": 0, "sizes": {"pp": 2}}
    for answer in _run(pools, "pipeline", **given):
        assert answer["ok"], answer["text"]


@pytest.mark.parametrize(("of", "stage"), [("layers.0.0.weight", 0), ("layers.8.bias", 1)])
def test_a_spoilt_pass_of_one_stage_is_found(pools: Any, of: str, stage: int) -> None:
    given = {"name": "mlp", "zero": 0, "sizes": {"pp": 2}, "spoil": "deduplicate", "of": of}
    for answer in _run(pools, "pipeline", **given):
        assert not answer["ok"]
        assert answer["guilt"][:2] == ("pass", "deduplicate"), answer["text"]
        assert answer["stage"] == stage
        assert f", in stage {stage}" in answer["text"]
        assert answer["result"] == f"gradient of {of}"
        assert answer["failed"] == (stage,)


def test_a_stale_rank_of_a_pipeline_is_named_on_all(pools: Any) -> None:
    given = {"name": "mlp", "zero": 0, "sizes": {"pp": 2, "dp": 2}, "stale": 3}
    for answer in _run(pools, "pipeline", world=4, **given):
        assert not answer["ok"]
        assert [rank for rank, *_ in answer["stale"]] == [3], answer["text"]


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.exhaustive), 2])
def test_gradients_are_averaged_in_the_dtype_asked_for(pools: Any, zero: int) -> None:
    dtypes = {"param": torch.bfloat16, "reduce": torch.float32}
    for answer in _run(pools, "in_precision", zero=zero, **dtypes):
        assert answer["ok"], answer["text"]
    dtypes = {"reduce": torch.bfloat16}
    for answer in _run(pools, "in_precision", zero=zero, **dtypes):
        assert answer["exact"], answer["text"]


def test_codes_change_numbers_by_design(pools: Any) -> None:
    for answer in _run(pools, "in_precision", zero=2, send_gradients="int8"):
        assert answer["guilt"][:2] == ("pass", "quantize"), answer["text"]
        assert answer["by_design"]
        assert "quantize, number 2 of 12, which changes numbers by design" in answer["text"]
