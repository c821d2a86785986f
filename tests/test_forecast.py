"""Plans of pipelines that nobody runs: their ranks, their schedule, and whether to pipeline."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
import torch
from click.testing import CliRunner
from pipeline_cases import build
from torch import nn

import fxzero
from fxzero.calibration import cost_model
from fxzero.cli import cli
from fxzero.errors import UsageError
from fxzero.microbatches import Batch, loss_of
from fxzero.options import Options
from fxzero.pipelining import rank_plan
from fxzero.pipelining.places import hinted_cuts
from fxzero.pipelining.planning import Chooser, _Search
from fxzero.pipelining.rank_plan import representative
from fxzero.pipelining.schedules import NAMES, make_schedule
from fxzero.pipelining.stages import Exports
from fxzero.precision import Precision

pytestmark = [pytest.mark.timeout(300)]


def planned(name, **options):
    model, args, kwargs, loss = build(name)
    options = {"inner": "eager", "loss_fn": loss, **options}
    return fxzero.plan(model, args, kwargs=kwargs, **options)


def pipeline(**options):
    return fxzero.Pipeline(**{"stages": 2, "microbatches": 4, **options})


def chooser(name, rows=4, **options):
    model, args, kwargs, loss = build(name)
    call = next(Batch.of(args, kwargs).cut(Batch.of(args, kwargs).size // rows))
    loss = functools.partial(loss_of, loss_fn=loss)
    exports = Exports(model, *call, loss=loss, precision=Precision())
    return Chooser(exports, Options(**options), cost_model("cpu"))


@pytest.fixture(scope="module")
def of_mlp():
    return planned("mlp", pipeline=pipeline())


def test_a_plan_shows_every_rank_stage_and_turn(of_mlp):
    plan = of_mlp
    assert plan.status == "feasible"
    assert [rank.index for rank in plan.ranks] == [0, 1]
    assert all(sum(rank.breakdown.values()) == rank.peak_bytes for rank in plan.ranks)
    assert plan.peak_bytes == max(rank.peak_bytes for rank in plan.ranks)
    first, second = plan.pipeline.stages
    assert (first.rank, first.begins, first.in_flight) == (0, "layers.0.0", 2)
    assert (second.rank, second.sent_bytes, second.in_flight) == (1, 0, 1)
    assert first.sent_bytes == 4 * 24 * 4
    assert len(plan.pipeline.turns) == 2 * 2 * 4
    assert plan.step_seconds == max(turn.end for turn in plan.pipeline.turns)
    assert plan.model.parameters == sum(p.numel() for p in build("mlp")[0].parameters())
    assert plan.request.mesh == {"pp": 2}
    assert fxzero.Plan.from_json(plan.to_json()) == plan


def test_a_plan_shows_what_each_rank_holds_over_the_step(of_mlp):
    plan = of_mlp
    assert [track.rank for track in plan.timeline] == [0, 1]
    for track, rank in zip(plan.timeline, plan.ranks, strict=True):
        assert max(track.totals) == rank.peak_bytes
        ends = [turn.end for turn in plan.pipeline.turns if turn.rank == track.rank]
        assert all(any(at == pytest.approx(end) for at in track.seconds) for end in ends)
        saved = track.of("saved")
        assert saved[0] == saved[-1] == 0
    # The first rank keeps two micro-batches in flight, the second one.
    first, second = (max(track.of("saved")) for track in plan.timeline)
    assert first > second
    (step,) = [phase for phase in plan.phases if phase.name == "optimizer step"]
    assert step.start == plan.step_seconds


def test_reports_draw_the_schedule(of_mlp, tmp_path):
    text = str(of_mlp)
    assert "pipeline 1f1b: 2 stages on 2 ranks, 4 micro-batches; ranks wait" in text
    lines = text.splitlines()
    rank = next(line for line in lines if line.startswith("     1  ."))
    assert set(rank.split()[1]) == {".", "F", "B"}
    assert max(map(len, lines)) <= 100
    of_mlp.to_html(tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text()
    assert page.count('class="turn-F"') == 2 * 4
    assert 'title="B1.3: ' in page


@pytest.mark.slow
@pytest.mark.parametrize(
    "zero", [1, *(pytest.param(zero, marks=pytest.mark.exhaustive) for zero in (0, 2, 3))]
)
def test_more_ranks_beside_a_pipeline_share_its_weights(of_mlp, zero):
    """What is whole is gathered once for all micro-batches, not once for each in flight."""
    plan = planned("mlp", pipeline=pipeline(), devices=4, zero=zero)
    assert plan.request.mesh == {"pp": 2, "dp": 2}
    assert [rank.index for rank in plan.ranks] == [0, 1, 2, 3]
    states, alone = (each.ranks[0].breakdown["optimizer"] for each in (plan, of_mlp))
    assert states == pytest.approx(alone / (2 if zero else 1), rel=0.02)
    gathered = plan.ranks[0].breakdown.get("gathered", 0)
    weights = plan.pipeline.stages[0].weight_bytes
    assert gathered == weights if zero in (1, 2) else gathered < weights


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpipe"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_few_micro_batches_stand_for_many(name, ranks):
    schedule = make_schedule(name, ranks, 48)
    for rank in range(ranks):
        few = representative(schedule, rank)
        assert sum(map(len, few.orders)) < 0.6 * sum(map(len, schedule.orders))
        for stage in few.stages_of(rank):
            assert few.in_flight(stage) == schedule.in_flight(stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    ["zbv", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("gpipe", "1f1b", "zb1p"))],
)
def test_few_micro_batches_need_as_much_as_all(monkeypatch, schedule):
    options = {"pipeline": fxzero.Pipeline(schedule=schedule, microbatches=16), "mesh": {"pp": 2}}
    few = planned("mlp", **options)
    monkeypatch.setattr(rank_plan, "representative", lambda schedule, rank: schedule)
    every = planned("mlp", **options)
    assert [rank.peak_bytes for rank in few.ranks] == [rank.peak_bytes for rank in every.ranks]


class Uneven(nn.Module):
    """Cheap layers that leave much, then dear ones that leave little."""

    def __init__(self):
        super().__init__()
        wide = [nn.Sequential(nn.Linear(8, 512), nn.GELU(), nn.Linear(512, 8)) for _ in range(3)]
        self.wide = nn.Sequential(*wide)
        self.head = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))

    def forward(self, x):
        return self.head(self.wide(x)).square().mean()


def of_uneven(**options):
    exports = Exports(
        Uneven(), (torch.randn(64, 8),), {}, loss=lambda loss: loss, precision=Precision()
    )
    return Chooser(exports, Options(optimizer="sgd", **options), cost_model("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    ["zb1p", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("1f1b", "interleaved1f1b"))],
)
def test_a_budget_is_met_by_recompute_or_named(schedule):
    def planned_within(budget):
        asked = fxzero.Pipeline(schedule=schedule, microbatches=8)
        inputs, options = torch.randn(512, 8), {"optimizer": "sgd", "inner": "eager"}
        options |= {"pipeline": asked, "devices": 2, "memory_budget": budget}
        return fxzero.plan(Uneven(), inputs, **options)

    free, none = planned_within(None), planned_within(1000)
    assert not none.fits
    assert none.status == "infeasible"
    assert none.peak_bytes == none.minimum_budget < 0.9 * free.peak_bytes
    assert planned_within(none.minimum_budget).fits
    tight = planned_within((free.peak_bytes + none.minimum_budget) // 2)
    assert tight.fits
    assert tight.step_seconds > free.step_seconds
    moved = tight.pipeline.stages[1].begins != free.pipeline.stages[1].begins
    assert free.recompute_seconds == 0 < tight.recompute_seconds + moved


def test_cuts_under_a_budget_are_the_best_of_all_cuts():
    """Against every cut into two stages, each with the recompute that its ranks need."""
    model = of_uneven()
    free = next(model.choices("1f1b", 2, 2, 8))
    needs = []
    search = _Search(model, "1f1b", 2, 2, 8)
    for stage, (start, stop) in enumerate(itertools.pairwise((0, *free.cuts, len(model.row.work)))):
        held = search.stage(start, stop)
        needs.append(int((held.static + (2 - stage) * held.saved + held.working)[0]))
    changed = 0
    for share in (0.95, 0.85, 0.75, 0.65, 0.5):
        room = int(share * max(needs))
        best = min(search.played((cut,), room)[0] for cut in model.row.cuts)
        within = model.under(Options(optimizer="sgd", memory_budget=room))
        found = next(within.choices("1f1b", 2, 2, 8))
        seconds = found.simulated(found.schedule("1f1b", 2, 8)).step_seconds
        if best < float("inf"):
            assert seconds == pytest.approx(best)
            changed += found.cuts != free.cuts
    assert changed


def test_what_no_budget_fits_is_cut_where_the_largest_need_is_least():
    model = of_uneven(memory_budget=1)
    search = _Search(model, "1f1b", 2, 2, 8)

    def need(cut):
        stages = [search.stage(0, cut), search.stage(cut, len(model.row.work))]
        return max(
            float((stage.static + held * stage.saved + stage.working).min())
            for stage, held in zip(stages, (2, 1), strict=True)
        )

    (cut,) = next(model.choices("1f1b", 2, 2, 8)).cuts
    assert need(cut) == min(map(need, model.row.cuts))


def test_levels_go_from_no_recompute_to_the_least_memory():
    model = of_uneven()
    whole = model.footprint.stage(0, len(model.row.work), 0)
    assert whole.seconds[0] == 0
    assert list(whole.seconds) == sorted(whole.seconds)
    assert whole.saved[0] == whole.saved.max()
    assert whole.saved[-1] < 0.5 * whole.saved[0]


@pytest.mark.slow
def test_models_of_transformers_say_where_they_may_be_cut():
    model = chooser("llama")
    hinted = hinted_cuts(model.exports)
    assert len(hinted) >= 4
    assert set(hinted) <= set(model.bounds)
    assert hinted_cuts(chooser("mlp").exports) == ()


@pytest.mark.slow
def test_a_model_is_not_pipelined_where_that_is_slower():
    plan = planned("mlp", pipeline="auto", devices=2)
    assert plan.pipeline is None
    assert plan.request.mesh == {"dp": 2}
    (reason, *_) = [note for note in plan.notes if note.startswith('pipeline="auto"')]
    assert "times as long; its ranks wait" in reason
    assert any("micro-batches" in other.change for other in plan.alternatives)


@pytest.mark.slow
def test_a_model_is_pipelined_where_nothing_else_fits():
    options = {"devices": 2, "zero": 0, "optimizer": "adamw"}
    budget = planned("mlp", **options).minimum_budget - 4096
    plan = planned("mlp", pipeline="auto", memory_budget=budget, **options)
    assert plan.fits
    assert plan.pipeline.ranks == 2
    assert any("no pipeline does not fit: it needs" in note for note in plan.notes)
    # A pipeline of two ranks has the batches of both.
    rows = int(plan.model.inputs[0].split("[")[1].split(",")[0])
    assert rows * plan.pipeline.microbatches == 2 * Batch.of(*build("mlp")[1:3]).size


@pytest.mark.slow
def test_a_mesh_with_a_pipeline_gets_the_best_schedule():
    plan = planned("mlp", pipeline="auto", mesh={"pp": 2})
    assert plan.pipeline.ranks == 2
    assert any("would take" in note for note in plan.notes)


def test_wrong_requests_say_what_would_be_right():
    with pytest.raises(UsageError, match=r"a pipeline of how many ranks\?\n  give devices="):
        planned("mlp", pipeline=fxzero.Pipeline(schedule="zb1p"))
    with pytest.raises(UsageError, match="3 ranks cannot form pipelines of 2 ranks each"):
        planned("mlp", pipeline=2, devices=3)
    with pytest.raises(UsageError, match="but there is no pipeline\n  give pipeline="):
        planned("mlp", mesh={"pp": 2})
    with pytest.raises(UsageError, match="a batch of 16 has no 5 micro-batches"):
        planned("mlp", pipeline=fxzero.Pipeline(2, microbatches=5))
    model, args, *_ = build("mlp")
    with pytest.raises(UsageError, match="is chosen before the first step: give example_inputs"):
        fxzero.compile(model, pipeline="auto")
    compiled = fxzero.compile(model, args, pipeline="auto", inner="eager")  # one process: no choice
    assert compiled.step(*args).ndim == 0
    assert compiled.plan.pipeline is None


@pytest.mark.slow
def test_the_command_line_plans_pipelines(tmp_path):
    run = CliRunner().invoke
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--batch", "4", "--seq", "32", "--pipeline", "2", "--schedule", "zb1p"]
    result = run(
        cli,
        ["plan", str(tmp_path / "config.json"), *options, "--json", str(tmp_path / "plan.json")],
    )
    assert result.exit_code == 0, result.output
    assert "pipeline zb1p: 2 stages on 2 ranks, 4 micro-batches" in result.output
    assert fxzero.Plan.load(tmp_path / "plan.json").pipeline.ranks == 2
    wrong = run(cli, ["plan", "gpt2", "--schedule", "zb1p"], standalone_mode=False)
    assert "--schedule is of a pipeline: give --pipeline STAGES" in str(wrong.exception)
    wrong = run(cli, ["plan", "gpt2", "--pipeline", "many"], standalone_mode=False)
    assert '--pipeline many: give the number of stages, or "auto"' in str(wrong.exception)
