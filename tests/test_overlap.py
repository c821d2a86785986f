"""Collectives beside operators: where they start and are waited for, its bytes and its time."""

import functools
import operator
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import tiers
from test_shard import Chain, planner
from torch import fx, nn

from fxzero.capture import capture
from fxzero.clock import elapsed, exposed_share
from fxzero.collectives import (
    ALL_GATHER,
    REDUCE_SCATTER,
    WAIT,
    collective_of,
    group_of,
    is_collective,
    is_gather,
    is_reduction,
    is_wait,
    waits_of,
)
from fxzero.cost import NodeCost
from fxzero.execution import last_uses
from fxzero.mesh import Mesh
from fxzero.options import Options
from fxzero.passes.context import PassContext
from fxzero.passes.overlap import overlap_pass
from fxzero.planner import Planner
from fxzero.precision import Precision

INPUTS = (torch.randn(8, 64),)
DIMENSIONS = ("dp", "dp_replicate", "dp_shard")


def carried_out(made, **decisions):
    """The graphs of a planner's first plan with other decisions about collectives."""
    variant = made.variants[0]
    given = replace(variant._decisions(variant.proposed.solution.schedule), **decisions)
    return variant._carry_out(given).split


def hybrid(zero=3, **options):
    sharding = Mesh({"dp_replicate": 2, "dp_shard": 4}).sharding(zero)
    graph = capture(Chain(), INPUTS).graph
    return Planner(graph, Options(sharding=sharding, optimizer="adamw", **options), "model")


def narrow():
    precision = Precision(param=torch.bfloat16, reduce=torch.float32)
    graph = capture(Chain(), INPUTS, precision=precision).graph
    sharding = Mesh({"dp": 4}).sharding(3, Precision(reduce=torch.float32))
    return Planner(graph, Options(sharding=sharding, precision=precision), "model")


MADE = {
    **{f"zero={zero}": lambda zero=zero: planner(Chain(), INPUTS, zero=zero) for zero in range(4)},
    "hybrid": hybrid,
    "hybrid, whole": lambda: hybrid(zero=0),
    "narrow": narrow,
}


@functools.cache
def made(name):
    return MADE[name]()


def running_at_most(graph, kind):
    """The largest number of collectives of a kind that operators run beside, by dimension."""
    running, most = Counter(), Counter()
    missing = {}
    for node in graph.nodes:
        transfers = is_wait(node) or is_collective(node) or node.target is operator.getitem
        if node.op == "call_function" and not transfers:
            most |= running
        if is_collective(node) and kind(node):
            running[group_of(node)] += 1
            missing[node] = len(waits_of(node))
        elif is_wait(node) and kind(collective_of(node)):
            start = collective_of(node)
            if missing[start] == len(waits_of(start)):  # the first one waits for all
                running[group_of(start)] -= 1
            missing[start] -= 1
    assert not any(missing.values())
    return max(most.values(), default=0)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("bucket", [0, 40_000])
@pytest.mark.parametrize("in_flight", tiers((0, 1, 2, 5), quick=(0, 2)))
def test_so_many_run_beside_operators_and_no_more(name, bucket, in_flight):
    split = carried_out(made(name), bucket_bytes=bucket, in_flight=in_flight)
    for graph in (split.forward.graph, split.backward.graph):
        # Behind the last reductions of stages 0 and 1 nothing runs but casts and copies.
        for kind in (is_gather, is_reduction):
            assert running_at_most(graph, kind) <= in_flight
    gathers = sum(map(is_gather, split.forward.graph.nodes))
    assert running_at_most(split.forward.graph, is_gather) == min(in_flight, max(gathers - 1, 0))


@pytest.mark.parametrize("name", MADE)
def test_collectives_start_in_the_same_order(name):
    """Of one dimension: that is what ranks have to agree about, and buckets are made in it."""
    orders = []
    for in_flight in (0, 2):
        split = carried_out(made(name), bucket_bytes=40_000, in_flight=in_flight)
        nodes = [*split.forward.graph.nodes, *split.backward.graph.nodes]
        starts = [node for node in nodes if is_collective(node)]
        for kind in (is_gather, is_reduction):
            mine = [node for node in starts if kind(node)]
            orders.append({g: [n.name for n in mine if group_of(n) == g] for g in DIMENSIONS})
    assert orders[:2] == orders[2:]
    assert any(any(order.values()) for order in orders)


@pytest.mark.parametrize("name", MADE)
def test_what_is_read_lives_until_it_is_waited_for(name):
    split = carried_out(made(name), bucket_bytes=40_000, in_flight=2)
    for graph in (split.forward.graph, split.backward.graph):
        place = {node: index for index, node in enumerate(graph.nodes)}
        dies = {dead: place[at] for at, nodes in last_uses(graph).items() for dead in nodes}
        for node in graph.nodes:
            if is_collective(node):
                last = max(place[wait] for wait in waits_of(node))
                assert all(dies.get(source, last) >= last for source in node.all_input_nodes)


def test_a_step_is_shorter_where_collectives_run_beside_operators():
    wide = planner(Chain(layers=8, width=512), (torch.randn(4096, 512),))
    costs = wide.variants[0].costs
    times = []
    for in_flight in (0, 1, 2):
        split = carried_out(wide, bucket_bytes=0, in_flight=in_flight)
        times.append(elapsed((split.forward.graph, split.backward.graph), costs.price))
    assert times[0].exposed == pytest.approx(times[0].communication)
    assert times[0].communication == times[1].communication == times[2].communication
    assert times[2].step < times[1].step < times[0].step
    for time in times:
        assert time.step - time.exposed == pytest.approx(times[0].step - times[0].exposed)


def test_a_wait_costs_what_operators_have_not_hidden():
    graph = fx.Graph()
    x = graph.placeholder("x")
    prices = {}

    def call(target, *args, seconds=0.0):
        node = graph.call_function(target, args)
        prices[node] = NodeCost(seconds, 0)
        return node

    first = call(ALL_GATHER, x, 2, "dp", seconds=4.0)
    second = call(ALL_GATHER, x, 2, "dp", seconds=2.0)
    busy = call(torch.relu, x, seconds=3.0)
    one = call(WAIT, first)  # at 3, ends at 4
    more = call(torch.add, busy, one, seconds=5.0)
    two = call(WAIT, second)  # at 9, ended at 6
    third = call(REDUCE_SCATTER, two, "avg", 2, "dp", seconds=1.0)
    graph.output((call(WAIT, third), more))  # at 9, ends at 10

    time = elapsed([graph], prices.__getitem__)
    assert (time.step, time.communication, time.exposed) == (10.0, 7.0, 2.0)
    # Where operators and collectives share cores, nothing is hidden: 8 of operators, 7 of these.
    time = elapsed([graph], prices.__getitem__, overlap=0.0)
    assert (time.step, time.communication, time.exposed) == (15.0, 7.0, 7.0)


def test_a_wait_for_a_collective_of_the_models_own_costs_nothing():
    graph = fx.Graph()
    x = graph.placeholder("x")
    sent = graph.call_function(torch.ops._c10d_functional.broadcast.default, (x, 0, "dp"))
    graph.output((graph.call_function(WAIT, (sent,)),))
    time = elapsed([graph], lambda node: NodeCost(3.0 if node is sent else 0.0, 0))
    assert (time.step, time.communication, time.exposed) == (3.0, 0.0, 0.0)


@pytest.mark.parametrize(("rows", "low", "high"), [(8, 1.0, 1.0), (1 << 17, 0.02, 0.02)])
def test_a_gather_costs_what_the_backward_does_not_hide(rows, low, high):
    with torch.device("meta"):
        model, inputs = Chain(width=512), (torch.empty(rows, 512),)
    variant = planner(model, inputs).variants[0]
    assert low <= exposed_share(variant.graph, variant.costs) <= high
    gather = next(n for n in variant.graph.graph.nodes if is_gather(n))
    again, once = variant.costs.price_again(gather), variant.costs.price(gather)
    assert again.seconds == pytest.approx(low * once.seconds)


def test_a_budget_without_room_has_no_collectives_beside_operators():
    given = {"zero": 3, "recompute": "auto", "optimizer": "none"}
    roomy = planner(Chain(), INPUTS, **given).decide().plan
    tight = planner(Chain(), INPUTS, memory_budget=roomy.minimum_budget, **given).decide().plan
    assert roomy.decisions.in_flight == 2
    assert tight.decisions.in_flight == 0
    assert tight.peak_bytes <= roomy.minimum_budget < roomy.peak_bytes
    assert roomy.exposed_seconds < tight.exposed_seconds


class Late(nn.Module):
    """A bias known before its weight, whose rows ranks do not divide, used at the end."""

    def __init__(self):
        super().__init__()
        self.bias, self.weight = (nn.Parameter(fill(7)) for fill in (torch.zeros, torch.ones))
        self.up, self.down = nn.Linear(7, 64), nn.Linear(64, 7)

    def forward(self, x):
        x = self.down(self.up(x))
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias).square().sum()


@pytest.mark.parametrize(
    ("model", "inputs", "given"),
    [
        (Late, (3, 7), {"ranks": 2}),
        pytest.param(
            Chain,
            (64, 64),
            {"zero": None, "recompute": "auto", "memory_budget": 160_000},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: Chain(6, 32),
            (64, 32),
            {"zero": None, "recompute": "auto"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gathers_that_run_again_are_waited_for_where_they_run(model, inputs, given):
    made = planner(model(), (torch.randn(*inputs),), **given)
    variant = made.variants[0]
    made.decide()
    for schedule in (variant.solver.everything, variant.solver.smallest):
        for bucket in (0, 2000, 40_000):
            for in_flight in (0, 1, 2):
                split = variant._carry_out(variant._decisions(schedule, bucket, in_flight)).split
                assert running_at_most(split.backward.graph, is_gather) <= in_flight


def test_without_decisions_the_graph_stays_as_it_is():
    graph = planner(Chain(), INPUTS).variants[0].graph
    before = [node.name for node in graph.graph.nodes]
    after = overlap_pass(graph.copy(), PassContext()).graph.nodes
    assert [node.name for node in after] == before


@pytest.mark.slow
def test_generated_code_recomputes_where_stage_3_gathers_again():
    """Gathers that have to run again are no reason to keep what costs next to nothing."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)))
    given = {"inner": "inductor", "recompute": "auto"}
    plan = planner(model, (torch.randn(512, 64),), **given).decide().plan
    assert {value.role for value in plan.recomputed} == {"gathered", "recomputed"}
