"""A run that others published, in the model, and whether fxzero's own plan is better."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fxzero.hardware import describe
from fxzero.plans import ModelStates
from fxzero.timeline import Alive

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from bench_published import PUBLISHED, EverySecondProduct, Job, row_of, stream_of, update_seconds

pytest.importorskip("transformers")


@pytest.mark.slow
def test_the_policy_saves_every_second_product_and_attention_of_a_block() -> None:
    plan = Job(8, layers=2).decide(EverySecondProduct()).plan
    first = [value for value in plan.saved if ".layers.0." in value.module]
    products = {v.module.rpartition(".")[2] for v in first if v.module.endswith("_proj")}
    assert products == {"q_proj", "v_proj", "gate_proj"}
    assert any(v.module.endswith("self_attn") for v in first)
    assert not [v for v in first if v.module.endswith(("act_fn", "layernorm", "up_proj"))]
    assert plan.recompute_flops > 0


@pytest.mark.slow
def test_with_no_more_memory_fxzeros_plan_is_faster_than_the_policy() -> None:
    job = Job(8, layers=2)
    policy = job.decide(EverySecondProduct()).plan
    own = job.decide("auto", policy.peak_bytes).plan
    assert own.peak_bytes <= policy.peak_bytes
    assert own.step_seconds < policy.step_seconds
    assert own.recompute_seconds < policy.recompute_seconds


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
@pytest.mark.parametrize("devices", PUBLISHED)
def test_the_published_memory_and_speed_come_out(devices: int) -> None:
    speed, memory = PUBLISHED[devices]
    row = row_of(Job(devices).decide(EverySecondProduct()))
    assert row["reserved_gib"] == pytest.approx(memory, rel=0.10)
    assert row["tokens_per_second"] == pytest.approx(speed, rel=0.20)


def test_the_update_moves_each_copy_once() -> None:
    hardware = describe("h100-96gb-hbm2e")
    seconds = update_seconds(ModelStates(2160, 2160, 4320), hardware)
    assert seconds * hardware.bandwidth == pytest.approx(24 * 2160)


def test_what_is_fixed_belongs_to_the_stream_that_computes() -> None:
    assert stream_of(Alive(1, "optimizer", "optimizer state", None)) == "compute"
