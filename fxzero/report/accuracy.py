"""How far measured figures lay from planned ones: what README.md and docs/design record.

Nothing here is estimated.  Where nothing was measured a report says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxzero.plans import Plan
from fxzero.units import format_bytes


@dataclass(frozen=True)
class Error:
    """One figure of plans.

    Attributes:
        found: measured against planned.
        where: what was run for it.
    """

    figure: str
    modelled: str
    found: str
    where: str


_PEAK = "every storage of the two graphs that run, from the operator that makes it to its last use"
_RANK = "its part of the schedule, played on tensors without memory"
_TIME = "operators one after the other, collectives beside them until they are waited for"
_SCHEDULE = "turns of all ranks by the modelled times of their stages"
_GPT = "GPT-2 shapes on a CPU"

_ERRORS = (
    Error(
        "peak, operators run one by one", _PEAK, "0.95 to 1.00 of planned", "model families, CPU"
    ),
    Error("peak of a sharded rank", _PEAK, "as planned, to 0.1 MiB", f"{_GPT}, 2 processes"),
    Error(
        "peak of a pipeline's rank", _RANK, "as planned, to a few bytes", "models on 2 and 4 ranks"
    ),
    Error(
        "peak of a pipeline's rank beside data parallelism",
        _RANK,
        "0.80 to 1.00 of planned; buffers of gloo are no tensors",
        "GPT-2 and MLPs, ZeRO 0, 2, 3",
    ),
    Error(
        "peak of generated code",
        "the generated functions, played on tensors without memory",
        "scratch memory inside operators comes on top",
        "not tabulated",
    ),
    Error(
        "step time, calibrated", _TIME, "planned is 0.91 to 1.03 of measured", f"{_GPT}, operators"
    ),
    Error(
        "step time, calibrated, generated code",
        _TIME,
        "planned is 0.97 to 1.02 of measured",
        _GPT,
    ),
    Error(
        "step time of a pipeline",
        _SCHEDULE,
        "planned is 0.80 to 0.90 of measured",
        f"{_GPT}, 2 processes",
    ),
    Error("step time without `fxzero calibrate`", "a roofline of the device", "", "not measured"),
    Error("times on accelerators", "a roofline of the device", "", "not measured"),
)


def errors() -> tuple[Error, ...]:
    """What is modelled, and how far off it was."""
    return _ERRORS


def peak_range(plan: Plan) -> str:
    """The error bar of the planned peak in words, or '' where nothing like it was measured."""
    if plan.request.inner != "eager":
        return ""
    where, lowest = "operators run one by one on a CPU, up to 2 processes", 0.95
    if plan.pipeline is not None:
        if len(plan.ranks) == plan.pipeline.ranks:
            return (
                "where it was measured (2 and 4 processes on a CPU) the peak of a rank was the "
                "planned one, to a few bytes"
            )
        where, lowest = "pipelines beside data parallelism on a CPU", 0.8
    return (
        f"where it was measured ({where}) the peak was {lowest:.2f} to 1.00 of planned: here that "
        f"is {format_bytes(lowest * plan.peak_bytes)} to {format_bytes(plan.peak_bytes)}"
    )
