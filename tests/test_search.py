"""Searches over ways to train: laws of ways, of sketches and of estimates; plans in full beside."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.cli import main
from fxzero.cluster.estimate import Estimator, _beside
from fxzero.cluster.search import Found, devices_of
from fxzero.cluster.ways import Way, ways
from fxzero.errors import UsageError
from fxzero.hardware import describe

WIDTH, LAYERS = 64, 8


class Blocks(nn.Module):
    """Layers of a language model's shape, with a tied head."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                          nn.Linear(4 * width, width))
            for _ in range(layers)
        )  # fmt: skip
        self.head = nn.Linear(width, 512, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def model_and_inputs() -> tuple[nn.Module, dict[str, Tensor]]:
    """For the command line."""
    return Blocks(), {"ids": torch.zeros(1, 128, dtype=torch.long)}


@functools.cache
def found(devices: int = 16, batch: int = 32, **options: Any) -> Found:
    with torch.device("meta"):
        model, ids = Blocks(), torch.zeros(1, 128, dtype=torch.long)
    options = {"hardware": "a100-40gb", **options}
    return fxzero.search(model, (ids,), devices=devices, global_batch=batch, **options)


def estimator_of(result: Found) -> Estimator:
    from fxzero.cluster.search import _estimator
    from fxzero.microbatches import Batch

    return _estimator(result.question, Batch.of(*result.question.call))


@pytest.mark.parametrize(("devices", "batch"), [(1, 1), (8, 8), (12, 48), (512, 4096)])
def test_all_ways_use_all_devices_and_train_the_same_examples(devices: int, batch: int) -> None:
    every = list(ways(devices, batch, units=100, node=8))
    assert len(set(every)) == len(every) > 0
    for way in every:
        assert devices_of(way) == devices
        assert way.microbatch * way.microbatches * way.replicate * way.shard == batch
        assert math.prod(way.mesh.sizes.values()) == devices
        assert (way.zero > 0) == (way.shard > 1)
        assert bool(way.schedule) == (way.pipeline > 1)
    if devices == 512:
        assert len(every) > 1000


def test_a_stage_that_is_asked_for_is_the_only_one() -> None:
    assert {way.zero for way in ways(8, 8, units=1, node=8, zero=(3,))} == {3}
    assert {way.zero for way in ways(8, 8, units=1, node=8, zero=(0,))} == {0}


@pytest.mark.slow
def test_stages_add_up_to_the_model() -> None:
    sketch = estimator_of(found()).sketch
    (whole,) = sketch.stages(1)
    for count in (2, 4, 7):
        stages = sketch.stages(count)
        assert len(stages) == count
        for part in ("forward", "input_gradient", "weight_gradient"):
            total = sum(float(getattr(stage, part).sum()) for stage in stages)
            assert total == pytest.approx(float(getattr(whole, part).sum()))
        assert sum(stage.saved for stage in stages) == pytest.approx(whole.saved)
        tied = 512 * WIDTH * 4  # both ends keep it
        assert sum(stage.weights.kept for stage in stages) == whole.weights.kept + tied
    parameters = sum(p.numel() for p in Blocks().parameters())
    assert whole.weights.kept == 4 * parameters
    counters = 4 * len(list(Blocks().parameters()))
    assert whole.weights.state == 8 * parameters + counters


def test_more_sharding_holds_less_and_never_communicates_less() -> None:
    by_zero = {
        each.way.zero: each
        for each in found().ranked
        if (each.way.pipeline, each.way.microbatches) == (1, 1)
        if each.way.shard in (1, 16)
    }
    peaks = [by_zero[stage].peak_bytes for stage in (0, 1, 2, 3)]
    assert peaks == sorted(peaks, reverse=True)
    assert by_zero[3].links >= by_zero[2].links


@pytest.mark.slow
def test_ways_that_fit_keep_to_the_budget_and_come_first_by_time() -> None:
    free = found()
    budget = free.best.peak_bytes // 2
    tight = found(memory_budget=budget)
    fitting = [each for each in tight.ranked if each.fits]
    assert fitting
    assert tuple(fitting) == tight.ranked[: len(fitting)]
    assert all(each.peak_bytes <= budget for each in fitting)
    seconds = [each.seconds for each in fitting]
    assert seconds == sorted(seconds)
    assert seconds[0] >= free.best.seconds
    needs = [each.required_bytes for each in tight.ranked[len(fitting) :]]
    assert needs == sorted(needs)
    assert all(need > budget for need in needs)


def test_seconds_are_made_of_their_parts() -> None:
    for each in found().ranked:
        parts = each.compute + each.recompute + each.links + each.bubble + each.update
        assert each.seconds == pytest.approx(parts, rel=0.02)


@pytest.mark.parametrize(
    ("gathers", "reduces", "expected"),
    [
        ([0, 0, 0], [0, 0, 0], 3),
        ([1, 0, 0], [0, 0, 0], 4),  # nothing runs before the first gather has ended
        ([0.5, 0.5, 0.5], [0, 0, 0], 3.5),  # later ones hide behind units
        ([0, 0, 0], [0.5, 0.5, 0.5], 3.5),  # of the last reduction nothing does
        ([0, 0, 0], [2, 2, 2], 7),  # links carry one after the other
        ([2, 2, 2], [0, 0, 0], 7),
    ],
)
def test_collectives_run_beside_units(
    gathers: list[float], reduces: list[float], expected: float
) -> None:
    assert _beside(torch.ones(3).double().numpy(), gathers, reduces) == pytest.approx(expected)


def test_a_way_that_lost_says_what_it_has_more_of() -> None:
    result = found()
    assert result.reason(result.best) == ""
    kinds = {"recompute", "waits for links", "waits for other stages", "uneven stages", "optimizer"}
    kinds.add("smaller micro-batches")
    for each in result.ranked[1:]:
        assert result.reason(each) in kinds
    worst = max(result.ranked, key=lambda each: each.bubble / each.seconds)
    assert result.reason(worst) == "waits for other stages"


@pytest.mark.slow
def test_the_fewest_devices_that_fit_are_found() -> None:
    budget = min(each.required_bytes for each in found(1, 32).ranked) - 1
    few = found(16, 32, goal="devices", memory_budget=budget)
    assert few.fits
    count = devices_of(few.best.way)
    assert 1 < count <= 16
    fewer = [n for n in (1, 2, 4, 8) if n < count]
    assert not any(found(n, 32, memory_budget=budget).fits for n in fewer)


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    budget = 2 * found(4, 4).best.peak_bytes
    largest = found(4, 4, goal="batch", memory_budget=budget)
    examples = largest.examples(largest.best)
    assert largest.fits
    assert all(each.way.microbatches == 1 for each in largest.ranked)
    more = found(4, examples + 4, memory_budget=budget)
    assert not any(each.fits for each in more.ranked if each.way.microbatches == 1)


@pytest.mark.slow
def test_the_cheapest_way_costs_no_more_than_any() -> None:
    result = found(16, 32, goal="cost", price=2.5)
    costs = [result.cost(each) for each in result.ranked if each.fits]
    assert costs[0] == min(costs)
    assert {devices_of(each.way) for each in result.ranked} == {1, 2, 4, 8, 16}


@pytest.mark.slow
def test_optimizers_and_codes_are_chosen_among() -> None:
    names = ["adamw", "sgd"]
    both = fxzero.search(
        Blocks(), (torch.zeros(1, 128, dtype=torch.long),), hardware="t4", devices=16,
        global_batch=16, optimizer=names, send_codes=True,
    )  # fmt: skip
    assert {each.way.optimizer for each in both.ranked} == {0, 1}
    assert {each.way.sends for each in both.ranked if each.way.zero} == {
        (None, None), ("int8", "int8"), ("int8", "int4"),
    }  # fmt: skip
    first = {each.way: each for each in both.ranked}
    way = next(w for w in first if w.zero == 3 and w.optimizer == 0 and w.sends == (None, None))
    assert first[way].peak_bytes > first[_with(way, optimizer=1)].peak_bytes
    assert first[way].links > first[_with(way, sends=("int8", "int8"))].links


def _with(way: Way, **changes: Any) -> Way:
    return Way(**{**vars(way), **changes})


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.exhaustive), 4])
def test_estimates_are_close_to_plans_in_full(microbatches: int) -> None:
    with torch.device("meta"):
        model, ids = Blocks(512, 8), torch.zeros(1, 512, dtype=torch.long)
    result = fxzero.search(model, (ids,), hardware="l4", devices=4, global_batch=16)
    tried = set()
    for each in result.ranked:
        way = each.way
        kind = way.pipeline, way.zero
        if kind in tried or way.microbatches != microbatches * way.pipeline:
            continue
        if not way.schedule and way.microbatches > 1 and way.zero < 2:
            continue  # a plan of one micro-batch reduces, which the step does once for all
        if microbatches > 1 and len(tried) == 4:
            continue  # others where one micro-batch is asked for, in make test-all
        tried.add(kind)
        plan = result.plan(each)
        parts = 1 if way.schedule else way.microbatches
        assert 0.8 <= (each.seconds - each.update) / (plan.step_seconds * parts) <= 1.25, way
        assert 0.8 <= each.peak_bytes / plan.peak_bytes <= 1.25, way
    assert len(tried) >= 3


def test_the_report_names_the_best_way_and_why_others_lost() -> None:
    text = str(found())
    assert f"fastest: {found().best.way} on 16 devices, 32 examples in " in text
    assert "waits for" in text
    assert "found.plan() plans a way in full" in text
    tight = str(found(memory_budget=1000))
    assert "DOES NOT FIT: the way that needs least, " in tight


@pytest.mark.slow
def test_the_command_ranks_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["search", "test_search:model_and_inputs", "--hardware", "l4", "--devices", "4"]
    path = tmp_path / "ways.json"
    assert main([*common, "--global-batch", "8", "--rows", "3", "--json", str(path)]) == 0
    assert "ways, of which" in capsys.readouterr().out
    data = json.loads(path.read_text())
    assert data["question"]["devices"] == 4
    assert data["ways"][0]["fits"]
    assert main([*common, "--memory-budget", "100KiB"]) == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"goal": "speed"}, "goal: unknown option 'speed'"),
        ({"devices": 0}, "devices=0 must be a positive number"),
        ({"global_batch": 3}, "a global batch of 3 cannot be divided over 16 devices"),
        ({"global_batch": -4}, "global_batch=-4 must be a multiple of the smallest micro-batch, 1"),
        ({"goal": "cost"}, 'goal="cost" needs the price of a device-hour'),
        ({"price": -1.0}, "price=-1.0 must be a positive number"),
        ({"hardware": "h200"}, "no hardware 'h200'; did you mean 'h200-141gb'"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(options: dict[str, Any], text: str) -> None:
    given = {"hardware": "l4", "devices": 16, **options}
    with pytest.raises(UsageError, match=text), torch.device("meta"):
        fxzero.search(Blocks(16, 1), (torch.zeros(1, 8, dtype=torch.long),), **given)


def test_the_library_has_nodes_of_a_size() -> None:
    assert describe("a100-40gb").devices == 8
