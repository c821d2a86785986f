"""What a monitor reports: one record every N steps, as plain data.

Names say where a figure comes from: ``planned_`` is of the model's Plan, ``measured_`` was measured
in the step itself, all else is counted or timed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fxzero.documents import format_json


@dataclass(frozen=True)
class Alarm:
    """Something that should not be, and what was done about it.

    Attributes:
        kind: one of ``KINDS``.
        step: where it was seen.
        observed, threshold: the number and the limit that it passed.
        last_good: the latest step behind which the weights are known to have been in order.
        message: one sentence with both numbers, and names of parameters or ranks.
        done: the actions that were carried out: "warn", "checkpoint", "rollback", "stop".
    """

    kind: str
    step: int
    observed: float
    threshold: float
    last_good: int
    message: str
    done: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """The steps since the record before, of all ranks together.

    Figures that nobody knows are None: a gradient norm of a step that keeps no gradients, a share
    of a peak that the hardware's description does not have.

    Attributes:
        step: the last of these steps, counted from 1.
        steps: how many they are.
        time: seconds since 1970.
        loss: of the last step, the mean over ranks.
        mean_loss: over the steps.
        gradient_norm: of the last step that has one, over all parameters, before clipping where
            the loop hands the norm over.
        step_seconds: wall-clock time of a step, from the beginning of one to that of the next,
            without the monitor's own; of the slowest rank.
        loading_seconds: the part of it between ``with`` blocks, where batches come from.
        samples_per_second, tokens_per_second: of all ranks; tokens are integer inputs with a batch
            and a sequence dimension.
        mfu: model FLOPs utilisation, from 0 to 1: operations of forward and backward without
            recompute, as a share of the hardware's dense peak in the dtype of the weights.
        measured_peak_bytes: most tensor memory of the last step, of the fullest rank; on a CPU of
            the latest step in which it was measured, that of one record in ten.
        planned_peak_bytes: this rank's, by the plan.
        planned_step_seconds: forward and backward.
        planned_recompute_seconds: of recompute.
        planned_communication_seconds, planned_exposed_seconds: of all collectives, and the part of
            them that operators wait for.
        planned_bubble: the share of time in which ranks of the pipeline wait, from 0 to 1.
        input_drift: the largest population stability index of the inputs against the reference.
        monitor_seconds: what making and writing the record before this one took.
        alarms: what was seen.
        notes: what cannot be watched, and why; in the first record.
    """

    step: int
    steps: int
    time: float
    loss: float
    mean_loss: float
    gradient_norm: float | None
    step_seconds: float
    loading_seconds: float
    samples_per_second: float | None
    tokens_per_second: float | None
    mfu: float | None
    measured_peak_bytes: int | None
    planned_peak_bytes: int | None
    planned_step_seconds: float | None
    planned_recompute_seconds: float | None
    planned_communication_seconds: float | None
    planned_exposed_seconds: float | None
    planned_bubble: float | None
    input_drift: float | None
    monitor_seconds: float
    alarms: tuple[Alarm, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def numbers(self) -> dict[str, float]:
        """The figures that are known, by name, without the step and the time."""
        fields = (field.name for field in dataclasses.fields(self))
        named = {name: getattr(self, name) for name in fields if name not in ("step", "time")}
        return {name: v for name, v in named.items() if isinstance(v, (int, float))}

    def to_json(self) -> str:
        """One line of JSON; numbers that are not finite are the strings "nan", "inf", "-inf"."""
        return format_json(dataclasses.asdict(self))
