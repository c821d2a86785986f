"""A pipeline as a Plan shows it: its stages, and who computes what when."""

from __future__ import annotations

from fxzero.pipelining.planning import Choice
from fxzero.pipelining.schedules import Schedule
from fxzero.pipelining.simulation import Simulation
from fxzero.pipelining.stages import Routes
from fxzero.plans import PipelinePlan, PipelineStage, Turn


def outline(choice: Choice, schedule: Schedule, played: Simulation, routes: Routes) -> PipelinePlan:
    """The part of a Plan that says how stages train side by side.

    Args:
        played: what the simulator says of the schedule.
    """
    sent = [sum(routes.passed[name].bytes for name in ports.sent) for ports in routes.ports]
    stages = tuple(
        PipelineStage(
            rank=rank,
            begins=choice.begins[stage],
            weight_bytes=routes.weight_bytes[stage],
            in_flight=schedule.in_flight(stage),
            forward_seconds=choice.times[stage].forward,
            input_seconds=choice.times[stage].input_gradient,
            weight_seconds=choice.times[stage].weight_gradient,
            sent_bytes=sent[stage],
        )
        for stage, rank in enumerate(schedule.placement)
    )
    turns = tuple(
        Turn(
            span.rank,
            str(span.action.kind),
            span.action.stage,
            span.action.microbatch,
            span.start,
            span.end,
        )
        for span in played.spans
    )
    return PipelinePlan(schedule.name, schedule.microbatches, played.bubble, stages, turns)
