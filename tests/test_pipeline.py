"""Pipelines in real processes over gloo, against accumulation on one device."""

from __future__ import annotations

import pytest
from pipeline_cases import by_accumulation, by_pipeline, differences
from pool import Pool

from fxzero.pipelining.schedules import NAMES

pytestmark = [pytest.mark.timeout(300)]

MODELS = ("gpt2", "tied", "llama", "unet", "t5", "vit", "mlp")
MICROBATCHES = 4


@pytest.fixture(scope="module")
def expected():
    """What one device computes, once for each model."""
    known = {}

    def of(name, **given):
        key = name, *given.items()
        if key not in known:
            known[key] = by_accumulation(name, MICROBATCHES, **given)
        return known[key]

    return of


@pytest.fixture(scope="module")
def pool():
    with Pool(2) as pool:
        yield pool


def run(pool, name, schedule, **given):
    return pool.run(
        "pipeline_cases:by_pipeline",
        timeout=280,
        name=name,
        schedule=schedule,
        microbatches=MICROBATCHES,
        **given,
    )


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize(("name", "stages"), [("mlp", 2), ("unet", 3), ("tied", 4)])
def test_stages_on_one_rank_compute_what_the_model_does(expected, name, stages, schedule):
    if schedule in ("zbv", "dualpipev"):
        stages = 2
    given = {"schedule": schedule, "microbatches": MICROBATCHES, "stages": stages}
    answer = by_pipeline(name, **given)
    assert differences([answer], expected(name)) <= (1e-7 if name == "tied" else 0.0)
    assert answer[3] == answer[4]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MODELS if name != "mlp"),
    ],
)
def test_two_ranks_compute_what_one_device_does(pool, expected, name, schedule):
    answers = run(pool, name, schedule)
    assert differences(answers, expected(name)) <= 1e-6
    for *_, seen, scheduled in answers:
        assert seen == scheduled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "schedule"), [("gpt2", "1f1b"), ("unet", "interleavedzb"), ("t5", "zbv")]
)
def test_two_ranks_train_any_family(pool, expected, name, schedule):
    """Tied weights, skips over stages, two towers; clipping over all stages."""
    answers = run(pool, name, schedule, clip=0.05, first=True)
    assert differences(answers, expected(name, clip=0.05)) <= 1e-6
    assert not {n for n in answers[0][2] if n in answers[1][2]} - SHARED


SHARED = {
    "transformer.wte.weight",
    "lm_head.weight",
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
}
