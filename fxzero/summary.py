"""Writes the Plan: decisions, graphs and their timeline as the document that people read."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx

from fxzero import __version__
from fxzero.capture import user_line
from fxzero.clock import Elapsed, elapsed
from fxzero.collectives import (
    arrives_as,
    collective_of,
    is_collective,
    is_gather,
    is_wait,
    preparation,
)
from fxzero.cost import CostModel, NodeCost
from fxzero.graph import TrainGraph, describe
from fxzero.optimizers import OptimizerProfile
from fxzero.options import Options
from fxzero.passes.bucket import GATHERED
from fxzero.passes.listing import module_of
from fxzero.passes.partition import Split
from fxzero.passes.quantize import what_is_sent
from fxzero.passes.rematerialize import CLONE_OF
from fxzero.passes.shard import WHOLE
from fxzero.plans import (
    SCHEMA_VERSION,
    Alternative,
    CurvePoint,
    Decisions,
    ModelStates,
    ModelSummary,
    Peak,
    Phase,
    Plan,
    Rank,
    Request,
    Track,
    Value,
)
from fxzero.policies import name_of
from fxzero.solver.schedule import Schedule
from fxzero.state_offload import HostStates, StateOffload
from fxzero.timeline import Alive, Timeline
from fxzero.tracks import kept, track
from fxzero.transfers import TRANSFERS
from fxzero.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Facts:
    """Everything a Plan is written from."""

    graph: TrainGraph
    digest: str
    name: str
    options: Options
    optimizer: OptimizerProfile
    states: StateOffload
    device: str
    costs: CostModel
    decisions: Decisions
    split: Split
    timeline: Timeline
    passes: tuple[str, ...]
    smallest: Schedule
    everything: Schedule
    sweep: tuple[Schedule, ...]
    outputs_held: bool
    loss_bytes: int
    is_stage: bool
    unapplied: tuple[str, ...]
    apart: frozenset[str]

    def price(self, node: fx.Node) -> NodeCost:
        """Of a node where it runs: in a kernel with others, or apart from them."""
        phase = "forward" if node.graph is self.split.forward.graph else "backward"
        return (self._costs_apart if phase in self.apart else self.costs).price(node)

    @cached_property
    def _costs_apart(self) -> CostModel:
        return replace(self.costs, fused=False)

    @cached_property
    def prices(self) -> dict[fx.Node, NodeCost]:
        """Of everything that runs."""
        return {node: self.price(node) for node in _steps(self.split)}

    @cached_property
    def time(self) -> Elapsed:
        """Of the step."""
        graphs = (self.split.forward.graph, self.split.backward.graph)
        return elapsed(graphs, self.prices.__getitem__, self.costs.overlap)

    @cached_property
    def seconds(self) -> list[float]:
        """When each point of the timeline begins."""
        seconds, following = [], self.time.step
        for node in reversed(self.timeline.nodes):
            following = self.time.starts[node] if node is not None else following
            seconds.append(following)
        return seconds[::-1]

    @cached_property
    def instants(self) -> list[int]:
        """The points of the timeline that the Plan keeps."""
        return kept(self.seconds, self.timeline.points)

    @property
    def optimizer_roles(self) -> dict[str, int]:
        """Bytes by role in the optimizer's step: all that is fixed, gradients, the update's own."""
        roles = dict(self.timeline.fixed)
        roles["gradient"] = roles.get("gradient", 0) + self.timeline.gradient_bytes
        roles["temporary"] = self.optimizer.transient_bytes
        return roles

    def step_bytes(self, hosted: tuple[str, ...]) -> int:
        """Bytes in the optimizer's step if the state of these parameters was in host memory."""
        here = sum(self.optimizer_roles.values()) - self.optimizer.whole_bytes
        return here + self.states.profile(hosted).whole_bytes

    def peak(self, schedule: Schedule, states: HostStates) -> int:
        """Bytes of the whole step with a schedule, if so much state was in host memory."""
        return max(schedule.peak - states.freed, self.step_bytes(states.names))

    @property
    def state_seconds(self) -> float:
        """Of the optimizer's state to the device and back."""
        return self.states.seconds(self.decisions.host_states)


def summarise(facts: Facts, *, status: str, gap: float | None) -> Plan:
    """The Plan document for ``facts``."""
    timeline = facts.timeline
    step_bytes = sum(facts.optimizer_roles.values())
    peak = _optimizer_peak(facts, step_bytes) if step_bytes > timeline.peak_bytes else _peak(facts)
    recomputed = _recomputed(facts)
    breakdown = peak.breakdown
    prices, time = facts.prices, facts.time
    recompute = [c for n, c in prices.items() if CLONE_OF in n.meta and not is_collective(n)]
    recompute_seconds = sum((cost.seconds for cost in recompute), 0.0)
    transfers = [cost.seconds for node, cost in prices.items() if node.target in TRANSFERS]
    transfer_seconds = sum(transfers, 0.0)
    base = time.step - transfer_seconds - recompute_seconds - _gather_seconds(facts)
    return Plan(
        schema_version=SCHEMA_VERSION,
        fxzero_version=__version__,
        torch_version=torch.__version__,
        model=_model_summary(facts),
        request=_request(facts),
        status=status,
        gap=gap,
        peak_bytes=peak.bytes,
        minimum_budget=_minimum_budget(facts),
        unplanned_peak_bytes=max(facts.everything.peak, facts.step_bytes(())),
        step_seconds=time.step + facts.state_seconds,
        recompute_seconds=recompute_seconds,
        recompute_flops=sum(cost.flops for cost in recompute),
        transfer_seconds=transfer_seconds + facts.state_seconds,
        communication_seconds=time.communication,
        exposed_seconds=time.exposed,
        host_bytes=timeline.host_bytes + facts.optimizer.host_bytes,
        decisions=facts.decisions,
        peak=peak,
        ranks=tuple(Rank(i, peak.bytes, breakdown) for i in range(facts.options.sharding.ranks)),
        phases=(
            Phase("forward", timeline.peak_of("forward")),
            Phase("backward", timeline.peak_of("backward"), _backward_start(facts)),
            Phase("optimizer step", step_bytes, time.step),
        ),
        saved=_saved(facts),
        recomputed=recomputed,
        offloaded=_offloaded(facts),
        alternatives=_alternatives(facts, base),
        curve=_curve(facts, base),
        timeline=(_track(facts),),
        graph_digest=facts.digest,
        notes=_notes(facts),
        passes=facts.passes,
        states=_states(facts),
    )


def _minimum_budget(facts: Facts) -> int:
    """The smallest peak that is found, with all the state away that may be."""
    least = facts.states.all
    graphs = min(facts.smallest.peak - least.freed, facts.timeline.peak_bytes)
    return max(graphs, facts.step_bytes(least.names))


def _states(facts: Facts) -> ModelStates:
    sharding, graph = facts.options.sharding, facts.graph
    # Stage 3 keeps the smallest of what it gathers (``policies``), which are none of its states.
    saved = set(facts.decisions.saved) if sharding.zero is None else set()
    gathered = {
        preparation(gather)[-1]: arrives_as(gather).meta["val"]
        for gather in graph.graph.nodes
        if is_gather(gather)
        if sharding.gathers_once or arrives_as(gather).name in saved
    }
    parameters = gradients = 0
    for role, node in graph.pairs():
        if role.kind != "parameter":
            continue
        own, whole = node.meta["val"], gathered.get(node)
        parameters += _size([own] if whole is None else [whole])
        if whole is not None and whole.dtype != own.dtype:
            parameters += _size([own])  # kept in another dtype than it is computed in
        if role in graph.trainable:
            gradients += _size([node.meta.get(WHOLE, own) if sharding.zero == 1 else own])
    if facts.options.updates:  # each is gone when its weight has been updated
        gradients = max(roles.get("gradient", 0) for roles in facts.timeline.roles)
    return ModelStates(parameters, gradients, facts.optimizer.state_bytes)


def _steps(split: Split) -> list[fx.Node]:
    graphs = (split.forward.graph, split.backward.graph)
    return [n for graph in graphs for n in graph.nodes if n.op == "call_function"]


def _gather_seconds(facts: Facts) -> float:
    """What the gathers that run again make the step longer."""
    again = Counter(item.node for item in facts.decisions.recompute)
    gathers = [node for node in facts.graph.graph.nodes if is_gather(node)]
    return sum((facts.costs.price_again(n).seconds * again[n.name] for n in gathers), 0.0)


def _backward_start(facts: Facts) -> float:
    later = facts.seconds[facts.timeline.forward_nodes :]
    return later[0] if later else facts.time.step


def _track(facts: Facts) -> Track:
    """Forward, backward, and the optimizer's step as the last instant."""
    seconds = [facts.seconds[index] for index in facts.instants]
    roles = [facts.timeline.roles[index] for index in facts.instants]
    return track(0, [*seconds, facts.time.step], [*roles, facts.optimizer_roles])


def _life(entry: Alive, facts: Facts) -> tuple[int, int]:
    """Between which instants of the track something is there; -1, -1: at none."""
    instants, last = facts.instants, entry.last
    first = bisect_left(instants, entry.first)
    if last is None:
        fixed = entry.node is None or entry.node.op != "call_function"
        stays = entry.role == "gradient" or (fixed and entry.role in facts.timeline.fixed)
        return first, len(instants) - (not stays)
    end = bisect_right(instants, last) - 1
    return (first, end) if first <= end else (-1, -1)


def _model_summary(facts: Facts) -> ModelSummary:
    values = [(role, n.meta.get(WHOLE, n.meta["val"])) for role, n in facts.graph.pairs()]
    parameters = [value for role, value in values if role.kind == "parameter"]
    buffers = [value for role, value in values if role.kind == "buffer"]
    return ModelSummary(
        name=facts.name,
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=_size(parameters),
        trainable_bytes=_size(value for role, value in values if role in facts.graph.trainable),
        buffer_bytes=_size(buffers),
        inputs=tuple(describe(value) for role, value in values if role.kind == "input"),
        nodes=len(facts.graph.graph.nodes),
    )


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _request(facts: Facts) -> Request:
    options = facts.options
    recompute = options.recompute if isinstance(options.recompute, str) else "function"
    return Request(
        memory_budget=options.memory_budget,
        optimizer=facts.optimizer.name,
        optimizer_bytes_per_parameter=facts.optimizer.bytes_per_parameter,
        recompute=recompute,
        objective=options.objective,
        inner=options.inner,
        offload=options.offload,
        device=facts.device,
        mesh={axis.name: axis.size for axis in options.sharding.axes},
        zero="auto" if options.sharding.zero is None else str(options.sharding.zero),
        accumulate=facts.graph.accumulates,
        update=facts.options.update,
        hardware=options.hardware.name if options.hardware else None,
    )


def _peak(facts: Facts) -> Peak:
    timeline = facts.timeline
    node = timeline.peak_node
    backward = timeline.points.index(timeline.peak_bytes) >= timeline.forward_nodes
    return Peak(
        bytes=timeline.peak_bytes,
        phase="backward" if backward else "forward",
        node=str(node.target) if node is not None else "loss outside the model",
        source=(user_line(node) or "") if node is not None else "",
        alive=tuple(_value(entry, facts) for entry in timeline.alive if entry.bytes),
    )


def _optimizer_peak(facts: Facts, step_bytes: int) -> Peak:
    timeline = facts.timeline
    fixed = [
        entry
        for entry in timeline.alive
        if entry.role in timeline.fixed
        if entry.node is None or entry.node.op != "call_function"  # no gradient made in this step
    ]
    values = [_value(entry, facts) for entry in fixed if entry.bytes]
    end = len(facts.instants)
    made = timeline.gradient_bytes, facts.optimizer.transient_bytes
    gradients = Value("gradients", made[0], "", "", "", "gradient", first=end, last=end)
    update = Value("update", made[1], "", "", "", "temporary", first=end, last=end)
    alive = sorted((*values, gradients, update), key=lambda value: -value.bytes)
    return Peak(step_bytes, "optimizer step", facts.optimizer.name, "", tuple(alive))


def _value(entry: Alive, facts: Facts, reason: str = "", seconds: float = 0.0) -> Value:
    node = entry.node
    first, last = _life(entry, facts)
    if node is None:
        name, size = entry.name, entry.bytes
        return Value(name, size, "", "", "", entry.role, reason, first=first, last=last)
    return Value(
        name=name_of(node) or entry.name,
        bytes=entry.bytes,
        shape=_shape(node),
        module=module_of(node),
        source=user_line(node) or "",
        role=entry.role,
        reason=reason,
        seconds=seconds,
        first=first,
        last=last,
    )


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = next((item for item in value if isinstance(item, torch.Tensor)), None)
    return describe(value) if value is not None else ""


def _saved(facts: Facts) -> tuple[Value, ...]:
    values = []
    for entry in sorted(facts.timeline.saved, key=lambda item: -item.bytes):
        assert entry.node is not None
        cost = facts.price(entry.node)
        reason = _why_saved(entry, cost.seconds, facts)
        values.append(_value(entry, facts, reason, cost.seconds))
    return tuple(values)


def _why_saved(entry: Alive, seconds: float, facts: Facts) -> str:
    if entry.role == "rng state":
        return "replays the random numbers of a recomputed operator"
    if entry.role == "output" and facts.outputs_held:
        return "a model output, which the caller holds anyway"
    if facts.options.memory_budget is None:
        return "the backward reads it, and no budget asks for recompute"
    return (
        f"the budget has room for it; computing it again takes at least {format_seconds(seconds)}"
    )


def _recomputed(facts: Facts) -> tuple[Value, ...]:
    clones: dict[str, list[fx.Node]] = defaultdict(list)
    for node in _steps(facts.split):
        if CLONE_OF in node.meta:
            clones[node.meta[CLONE_OF]].append(node)
    wanted = {item.node for item in facts.decisions.recompute}
    called = {node.name: name_of(node) for node in facts.graph.graph.nodes}
    values = _gathered_again(facts)
    for name in wanted:
        for node in clones[name]:
            if is_gather(node):
                continue
            cost = facts.price(node)
            size = sum(_own_bytes(node))
            entry = Alive(size, "recomputed", called[name] or name, node, *_lived(node, facts))
            reason = f"not kept: {format_bytes(size)} for {format_seconds(cost.seconds)}"
            values.append(_value(entry, facts, reason, cost.seconds))
    return tuple(sorted(values, key=lambda value: (-value.bytes, value.name)))


def _gathered_again(facts: Facts) -> list[Value]:
    """Parameters that the backward gathers anew: clones of waits, or copies out of a bucket."""
    wanted = {item.node for item in facts.decisions.recompute}
    names = {node: role.name for role, node in facts.graph.pairs()}
    parts = defaultdict(list)
    for node in facts.split.backward.graph.nodes:
        if (name := node.meta.get(GATHERED) or node.meta.get(CLONE_OF)) is not None:
            parts[name].append(node)
    values = []
    for gather in facts.graph.graph.nodes:
        if gather.name not in wanted or not is_gather(gather):
            continue
        parameter = preparation(gather)[-1]
        seconds = facts.costs.price_again(gather).seconds
        for wait in (part for user in gather.users for part in parts[user.name]):
            size = sum(_own_bytes(wait))
            name = names[parameter].rpartition(".")[2]
            entry = Alive(size, "gathered", name, wait, *_lived(wait, facts))
            reason = f"gathered again: {format_bytes(size)} for {format_seconds(seconds)}"
            values.append(replace(_value(entry, facts, reason, seconds), name=entry.name))
    return values


def _lived(node: fx.Node, facts: Facts) -> tuple[int, int | None]:
    """The first and last point of what a node makes; none for a view."""
    maker = collective_of(node) if is_wait(node) else node
    return facts.timeline.lives.get(maker, (0, -1))


def _offloaded(facts: Facts) -> tuple[Value, ...]:
    """Values in host memory; each costs one copy there, and one back for each fetch."""
    fetches = Counter(item.node for item in facts.decisions.offload)
    named = {node.name: node for node in facts.graph.graph.nodes}
    values = []
    for entry in sorted(facts.timeline.offloaded, key=lambda item: -item.bytes):
        assert entry.node is not None
        (original,) = entry.node.all_input_nodes
        one_way = facts.costs.price(entry.node).seconds
        seconds = one_way * (1 + fetches[original.name])
        reason = f"not kept on the device: {format_bytes(entry.bytes)} in host memory"
        here = replace(entry, name=original.name, node=named[original.name])
        values.append(_value(here, facts, reason, seconds))
    return (*values, *_host_states(facts))


def _host_states(facts: Facts) -> list[Value]:
    """State of the optimizer, by parameter; each is copied to the device and back in a step."""
    reason, values = "needed in the optimizer's step only", []
    for name in facts.decisions.host_states:
        size = facts.states.sizes[name]
        seconds = facts.state_seconds * size / facts.optimizer.host_bytes
        title = f"optimizer state of {name}"
        values.append(Value(title, size, "", "", "", "offloaded", reason, seconds))
    return sorted(values, key=lambda value: -value.bytes)


def _own_bytes(node: fx.Node) -> list[int]:
    value = node.meta.get("val")
    items: Sequence[object] = value if isinstance(value, (tuple, list)) else [value]
    return [i.untyped_storage().nbytes() for i in items if isinstance(i, torch.Tensor)]


def _alternatives(facts: Facts, base: float) -> tuple[Alternative, ...]:
    budget = facts.options.memory_budget
    options = [
        ("no recompute", facts.everything, HostStates()),
        ("the smallest reachable peak", facts.smallest, facts.states.all),
    ]
    away, result = facts.states.possible, []
    if away.freed > 0 and not facts.options.offload and not facts.is_stage:
        options.append(("offload=True, smallest peak", facts.smallest, away))
    for change, schedule, states in options:
        peak = facts.peak(schedule, states)
        fits = budget is None or peak <= budget
        result.append(Alternative(change, peak, base + schedule.seconds + states.seconds, fits))
    if state_bytes := facts.states.profile(()).state_bytes:
        peak = max(facts.smallest.peak - state_bytes, 0)
        fits = budget is None or peak <= budget
        result.append(
            Alternative('optimizer="sgd", smallest peak', peak, base + facts.smallest.seconds, fits)
        )
    return tuple(result)


def _curve(facts: Facts, base: float) -> tuple[CurvePoint, ...]:
    points = [
        CurvePoint(
            facts.peak(s, states),
            base + s.seconds + states.seconds,
            s.seconds + states.seconds,
            s.flops,
        )
        for s in (facts.smallest, *facts.sweep, facts.everything)
        for states in (HostStates(), facts.states.all)
    ]
    kept: list[CurvePoint] = []
    for point in sorted(points, key=lambda p: (p.peak_bytes, p.step_seconds)):
        if not kept or point.step_seconds < kept[-1].step_seconds:
            kept.append(point)
    return tuple(kept)


def _notes(facts: Facts) -> tuple[str, ...]:
    notes = [*facts.unapplied, *what_is_sent(facts.graph, facts.options.sharding)]
    if not facts.is_stage:
        notes.append(
            "the caller is taken to hold the model's outputs during the backward"
            if facts.outputs_held
            else "the caller was seen to drop the model's outputs before the backward"
        )
    if facts.loss_bytes:
        notes.append(
            f"the model returns no loss; one outside of it is taken to need "
            f"{format_bytes(facts.loss_bytes)}, three times the outputs"
        )
    if facts.options.updates:
        notes.append(
            "the optimizer updates each weight in the backward; gradients are not clipped, scaled "
            "or added up"
        )
    elif "gradient" in facts.timeline.fixed:
        notes.append("gradients exist before the step, and new ones are added where they are made")
    elif facts.timeline.gradient_bytes:
        size = format_bytes(facts.timeline.gradient_bytes)
        notes.append(f"a step that finds gradients adds to them, and needs up to {size} more")
    if facts.options.offload and facts.optimizer.state_bytes and not facts.states.can_any:
        notes.append(
            "the optimizer's state stays on the device; that of fxzero.optim.AdamW, SGD and Lion "
            "may be in host memory"
        )
    away = facts.timeline.offloaded or facts.optimizer.host_bytes
    if away and facts.device == "cpu":
        notes.append("this device is the CPU: what is offloaded stays in the same memory")
    notes.append(
        "memory inside operators (workspaces) is counted as measured"
        if facts.costs.workspaces
        else "memory inside operators (workspaces) is not counted; fxzero calibrate measures it"
    )
    if facts.options.inner == "inductor":
        notes.append(
            "memory is planned as if every operator ran alone; code that Inductor generates may "
            "need less, and runs under a budget only if its rehearsed peak is within it"
        )
    if facts.apart:
        graphs = " and ".join(sorted(facts.apart, reverse=True))
        notes.append(
            f"operators of the {graphs} run one by one: code that Inductor generates does not fit"
        )
    notes.append(facts.costs.source)
    if facts.options.hardware is not None:
        notes += facts.options.hardware.assumptions()
    return tuple(notes)
