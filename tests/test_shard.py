"""Parameters as shards in graphs: what is gathered when, what is reduced where, and its bytes."""

import pytest
import torch
import zoo
from helpers import tiers
from torch import nn

import fxzero
from fxzero.capture import capture
from fxzero.collectives import collective_of, is_collective, is_gather, is_reduction, is_wait
from fxzero.mesh import Mesh, planned_mesh
from fxzero.options import Options
from fxzero.passes.shard import WHOLE
from fxzero.planner import Planner
from fxzero.precision import Precision
from fxzero.report.html import render
from fxzero.storages import storage_identity

_ATEN = torch.ops.aten


class Chain(nn.Module):
    """Linear layers of which every weight but the first is read by the backward."""

    def __init__(self, layers=4, width=64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def planner(model, args=(), kwargs=None, ranks=4, zero=3, **options):
    sharding = Mesh({"dp": ranks}).sharding(zero)
    given = {"optimizer": "adamw", "recompute": "none", **options}
    graph = capture(model, args, kwargs or {}).graph
    return Planner(graph, Options(sharding=sharding, **given), "model")


def emitted(*args, **options):
    decided = planner(*args, **options).decide()
    return decided.plan, decided.emitted.split


def parts(module, kind):
    """What is made by collectives of a kind: one for each part of a bucket, also of a flat one."""
    waits = [n for n in module.graph.nodes if is_wait(n) and kind(collective_of(n))]
    return sum(_parts_of(wait) for wait in waits)


def _parts_of(node):
    """Among how many the value is split."""
    for user in node.users:
        if "split" in str(user.target):
            return len(user.users)
        if "view" in str(user.target):
            return _parts_of(user)
    return 1


def chain(**options):
    return emitted(Chain(), (torch.randn(8, 64),), **options)


@pytest.mark.parametrize(("zero", "again"), [(1, 0), (2, 0), (3, 3)])
def test_only_stage_3_gathers_for_the_backward(zero, again):
    _plan, split = chain(zero=zero)
    assert parts(split.forward, is_gather) == 8
    assert parts(split.backward, is_gather) == again
    assert parts(split.backward, is_reduction) == 8


def test_stage_3_saves_no_whole_weight():
    _, split = chain(zero=3)
    saved = [n for n in split.backward.graph.find_nodes(op="placeholder") if n.name in split.saved]
    assert saved
    assert max(n.meta["val"].numel() for n in saved) < 64 * 64


def test_stage_1_reduces_when_the_backward_has_ended():
    _, split = chain(zero=1)
    nodes = list(split.backward.graph.nodes)
    first = next(i for i, node in enumerate(nodes) if is_reduction(node))
    assert not [n for n in nodes[first:] if "mm" in str(n.target) or "tanh" in str(n.target)]


def test_stage_0_averages_whole_gradients():
    _plan, split = chain(zero=0)
    assert parts(split.forward, is_collective) == 0
    assert parts(split.backward, is_reduction) == 8
    targets = {str(n.target) for n in split.backward.graph.nodes if is_reduction(n)}
    assert targets == {"_c10d_functional.all_reduce_coalesced.default"}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_arithmetic_of_the_stages(zero):
    ranks, size = 4, 4 * (64 * 64 + 64) * 4
    plan, _ = chain(zero=zero, ranks=ranks)
    breakdown = {role: value for role, value in plan.ranks[0].breakdown.items()}
    assert len(plan.ranks) == ranks
    assert plan.model.parameter_bytes == size
    cut = size // (1 if zero == 0 else ranks)
    counters = 4 * 8
    assert breakdown["parameter"] == cut
    assert breakdown["optimizer"] == 2 * cut + counters
    (step,) = [p for p in plan.phases if p.name == "optimizer step"]
    update = 2 * 64 * 64 * 4 // (1 if zero == 0 else ranks)
    inputs = 8 * 64 * 4
    assert abs(step.peak_bytes - (4 * cut + counters + update + inputs)) <= 64


@pytest.mark.slow
def test_a_smaller_budget_gathers_more_often():
    free = planner(Chain(), (torch.randn(8, 64),), zero=None).decide().plan
    assert not free.decisions.recompute
    smallest = free.minimum_budget
    assert smallest < free.peak_bytes
    gathers = []
    for share in (0.0, 0.5, 1.0):
        budget = int(smallest * share + free.peak_bytes * (1 - share))
        plan = (
            planner(Chain(), (torch.randn(8, 64),), zero=None, memory_budget=budget).decide().plan
        )
        assert plan.peak_bytes <= budget
        gathers.append(sum(value.role == "gathered" for value in plan.recomputed))
    assert gathers == sorted(gathers)
    assert gathers[0] == 0 < gathers[-1]


@pytest.mark.parametrize("ranks", [2, 3, 7, 100])
def test_rows_are_padded_to_equal_parts(ranks):
    made = planner(
        nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)), (torch.randn(3, 5),), ranks=ranks
    )
    graph = made.variants[0].graph
    for role, node in graph.pairs():
        if role.kind == "parameter":
            rows = node.meta[WHOLE].shape[0]
            assert node.meta["val"].shape[0] == -(-rows // ranks)
    assert made.decide().plan.fits


@pytest.mark.slow
def test_a_tied_weight_is_gathered_once():
    model, args, kwargs, _ = zoo.build("tied")
    _, split = emitted(model, args, kwargs, zero=2)
    assert parts(split.forward, is_gather) == len(list(model.parameters()))


def test_a_gradient_in_another_dtype_is_reduced_in_it():
    sharding = Mesh({"dp": 4}).sharding(3, Precision(reduce=torch.float64))
    graph = capture(Chain(2), (torch.randn(8, 64),)).graph
    made = Planner(graph, Options(sharding=sharding, optimizer="none"), "model").variants[0].graph
    dtypes = {n.meta["val"].dtype for n in made.graph.nodes if is_reduction(n)}
    assert dtypes == {torch.float64}
    results = [v.meta["val"].dtype for r, v in made.result_pairs() if r.kind == "gradient" and v]
    assert set(results) == {torch.float32}


def test_what_travels_is_as_narrow_as_what_is_computed():
    precision = fxzero.Precision(param=torch.bfloat16)
    graph = capture(Chain(2), (torch.randn(8, 64),), precision=precision).graph
    sharding = Mesh({"dp": 4}).sharding(3)
    made = Planner(graph, Options(sharding=sharding, optimizer="none"), "model").variants[0].graph
    assert {n.meta["val"].dtype for n in made.graph.nodes if is_gather(n)} == {torch.bfloat16}
    assert {n.meta["val"].dtype for r, n in made.pairs() if r.kind == "parameter"} == {
        torch.float32
    }


def test_hybrid_sharding_reduces_in_both_directions():
    mesh = planned_mesh("dp_replicate=2,dp_shard=4", None, "cpu")
    plan = fxzero.plan(Chain(), (torch.randn(8, 64),), mesh=mesh, zero=3)
    assert len(plan.ranks) == 8
    assert plan.ranks[0].breakdown["parameter"] == 4 * (64 * 64 + 64)
    assert plan.request.mesh == {"dp_replicate": 2, "dp_shard": 4} or plan.request.mesh


def test_the_report_names_the_mesh():
    plan = fxzero.plan(Chain(), (torch.randn(8, 64),), devices=8, zero=3)
    assert "mesh    dp 8, zero 3; collectives take " in str(plan)
    page = render(plan)
    assert "wait for collectives" in page
    assert "of them; dp 8, zero 3" in page
    assert "wait for collectives" not in render(fxzero.plan(Chain(), (torch.randn(8, 64),)))
    assert fxzero.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"zero": 4}, 'zero=4 must be 0, 1, 2, 3 or "auto"'),
        ({"zero": True}, 'zero=True must be 0, 1, 2, 3 or "auto"'),
        ({"mesh": {"tp": 2}}, "mesh: unknown option 'tp'"),
        ({"mesh": {"dp": 0}}, "mesh: dp must be a number of ranks, at least 1, not 0"),
        ({"mesh": {"pp": 2}}, 'mesh has "pp" of 2 ranks, but there is no pipeline'),
        ({"mesh": {"dp": 2, "dp_shard": 2}}, 'mesh has "dp" beside its parts'),
        ({"mesh": "dp"}, "mesh='dp': expected \"dp=16\""),
        ({"mesh": {"dp": 4}, "devices": 8}, "mesh has 4 ranks, devices=8"),
        (
            {"mesh": {"dp_replicate": 2, "dp_shard": 4}, "devices": 6},
            "mesh has 8 ranks (dp_replicate 2 x dp_shard 4), devices=6",
        ),
        ({"precision": "bf16"}, "precision='bf16' must be a fxzero.Precision"),
    ],
)
def test_bad_input_is_named(given, text):
    with pytest.raises(fxzero.UsageError) as caught:
        fxzero.plan(Chain(), (torch.randn(8, 64),), **given)
    assert text in str(caught.value)


def test_precision_refuses_other_dtypes():
    with pytest.raises(fxzero.UsageError, match=r"must be a floating torch\.dtype"):
        fxzero.Precision(param=torch.int8)


def test_ranks_that_do_not_run_can_only_be_planned():
    with pytest.raises(fxzero.UsageError, match="mesh of dp=4 describes ranks that do not run"):
        fxzero.compile(Chain(), mesh={"dp": 4})


def test_a_weight_that_is_not_contiguous_stays_whole_and_is_noted():
    model = Chain(2)
    model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach().t())
    plan, split = emitted(model, (torch.randn(8, 64),), zero=3)
    note = "parameter layers.0.weight stays whole on every rank: its memory is not contiguous"
    assert note in plan.notes
    assert parts(split.forward, is_gather) == 3
    with pytest.raises(fxzero.UsageError, match="stays whole on every rank"):
        emitted(model, (torch.randn(8, 64),), zero=3, strict=True)


@pytest.mark.parametrize(
    "zero", [3, *(pytest.param(zero, marks=pytest.mark.slow) for zero in (1, 2, None))]
)
def test_casts_of_parts_are_where_their_buckets_need_them(zero):
    precision = fxzero.Precision(param=torch.bfloat16, reduce=torch.float32)
    graph = capture(Chain(), (torch.randn(8, 64),), precision=precision).graph
    sharding = Mesh({"dp": 4}).sharding(zero, Precision(reduce=torch.float32))
    for recompute in ("none", "auto", "full"):
        options = Options(sharding=sharding, precision=precision, recompute=recompute)
        split = Planner(graph, options, "model").decide().emitted.split
        assert parts(split.forward, is_gather) == 8
        assert parts(split.backward, is_reduction) == 8


@pytest.mark.parametrize("bucket", [0, 1 << 20])
def test_values_of_views_are_views(bucket):
    variant = planner(Chain(), (torch.randn(8, 64),)).variants[0]
    schedule = variant.solver.smallest
    split = variant._carry_out(variant._decisions(schedule, bucket, 2)).split
    for graph in (split.forward.graph, split.backward.graph):
        views = [n for n in graph.nodes if n.target in (_ATEN.t.default, _ATEN.view.default)]
        assert views
        for node in views:
            (source,) = node.all_input_nodes
            assert storage_identity(node.meta["val"]) == storage_identity(source.meta["val"])


@pytest.mark.parametrize("zero", [0, 1, 2, 3, "auto"])
@pytest.mark.parametrize("recompute", tiers(("none", "full"), quick=("full",)))
def test_the_smallest_budget_is_what_its_graphs_need(zero, recompute):
    """The solver's peak of a schedule is the timeline's, what collectives need included."""
    model, inputs = Chain(width=61), (torch.randn(64, 61),)
    variant = planner(model, inputs, zero=zero, recompute=recompute).variants[0]
    schedule = variant._smallest_schedule()
    emitted = variant._carry_out(variant._decisions(schedule))
    assert emitted.timeline.peak_bytes == schedule.peak
