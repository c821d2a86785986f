"""What raises an alarm, and what may be done about it.

    not_finite        a loss or a gradient norm is NaN or infinite
    loss_spike        a loss lies far above those before it
    loss_decay        losses of the last 128 steps lie above the best 128 before them
    gradient_spike    a gradient norm lies far above those before it
    wrong_gradient    a micro-batch, run once more without any pass, has another loss or gradients
    weights_differ    ranks that should have equal weights have not
    stale_rank        weights of a rank did not change while those of others did
    broken_tie        weights that were one tensor under several names are two
    input_drift       inputs are distributed otherwise than the reference's
    peak              a step took more memory than was planned

Each kind has actions: "warn" raises an ``AlarmWarning``; "checkpoint" saves the state as it is
beside the checkpoints, in ``alarms/``; "rollback" loads the newest whole checkpoint from before;
"stop" raises an ``AlarmError`` on all ranks.  With none, ``()``, it only stands in the record.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxzero.errors import UsageError, unknown_option
from fxzero.monitor.record import Alarm
from fxzero.monitor.statistics import DecayScore, SpikeScore

KINDS = (
    "not_finite", "loss_spike", "loss_decay", "gradient_spike", "wrong_gradient", "weights_differ",
    "stale_rank", "broken_tie", "input_drift", "peak",
)  # fmt: skip
# In the order in which they are carried out.
ACTIONS = ("warn", "checkpoint", "rollback", "stop")


@dataclass(frozen=True)
class Thresholds:
    """Where alarms begin.

    Attributes:
        loss_spike: robust z-score of a loss against the 128 before it.  Normal noise passes 6
            about once in 6 million steps.
        loss_decay: z-score of the mean of 128 losses against the least one before.
        gradient_spike: robust z-score of the norm's logarithm.
        input_drift: population stability index, to which what chance explains is added.
        peak: measured by planned bytes.
    """

    loss_spike: float = 6.0
    loss_decay: float = 6.0
    gradient_spike: float = 6.0
    input_drift: float = 0.25
    peak: float = 1.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise UsageError(f"the threshold {field.name}={value!r} must be a positive number")


def check_actions(asked: Mapping[str, str | Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """For each kind of alarm its actions, in their order.

    Raises:
        UsageError: an alarm or an action that nobody knows.
    """
    found: dict[str, tuple[str, ...]] = dict.fromkeys(KINDS, ("warn",))
    for kind, given in (asked or {}).items():
        if kind not in KINDS:
            raise unknown_option(kind, KINDS, where="actions of a monitor")
        names = (given,) if isinstance(given, str) else tuple(given)
        for name in names:
            if name not in ACTIONS:
                raise unknown_option(name, ACTIONS, where=f"the action of {kind}")
        found[kind] = tuple(name for name in ACTIONS if name in names)
    return found


class SeriesWatch:
    """Looks at every step's loss, and at the gradient norms that are known."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.losses, self.stretches, self.norms = SpikeScore(), DecayScore(), SpikeScore()

    def look(
        self, steps: Sequence[int], losses: Sequence[float], norms: Sequence[float | None]
    ) -> list[Alarm]:
        """The alarms of some steps, of each kind the worst; the first step for ``not_finite``.

        Args:
            losses, norms: of these steps; None: not known.
        """
        found: list[Alarm] = []
        limits = self.thresholds
        for step, loss, norm in zip(steps, losses, norms, strict=True):
            # A checkpoint of step k is in order if the loss of step k + 1 was.
            if not math.isfinite(loss):
                found.append(not_finite("the loss", loss, step, step - 2))
            elif norm is not None and not math.isfinite(norm):
                found.append(not_finite("the gradient norm", norm, step, step - 1))
            spike = self.losses.score(loss)
            if spike > limits.loss_spike:
                text = f"the loss of step {step} is {loss:.6g}"
                found.append(_above("loss_spike", text, step, spike, limits.loss_spike, step - 2))
            decay = self.stretches.score(loss)
            if decay > limits.loss_decay:
                stretch = self.stretches.stretch
                text = f"the mean loss of {stretch} steps up to {step} is above the best before it"
                known = step - stretch - 1
                found.append(_above("loss_decay", text, step, decay, limits.loss_decay, known))
            if norm is not None and norm > 0 and math.isfinite(norm):
                score = self.norms.score(math.log(norm))
                if score > limits.gradient_spike:
                    text = f"the gradient norm of step {step} is {norm:.6g}"
                    limit = limits.gradient_spike
                    found.append(_above("gradient_spike", text, step, score, limit, step - 1))
        return worst_of_each(found)


def worst_of_each(alarms: Sequence[Alarm]) -> list[Alarm]:
    """One alarm of each kind: that with the largest number, or the first of those that are none."""
    found: dict[str, Alarm] = {}
    for alarm in alarms:
        known = found.setdefault(alarm.kind, alarm)
        if alarm.observed > known.observed:
            good = min(alarm.last_good, known.last_good)
            found[alarm.kind] = dataclasses.replace(alarm, last_good=good)
    return list(found.values())


def not_finite(what: str, value: float, step: int, last_good: int) -> Alarm:
    """The alarm of a number that is none."""
    text = f"{what} of step {step} is {value}"
    return Alarm("not_finite", step, value, math.inf, max(last_good, 0), text)


def _above(
    kind: str, text: str, step: int, score: float, threshold: float, last_good: int
) -> Alarm:
    message = f"{text}: z-score {score:.3g}, threshold {threshold:g}"
    return Alarm(kind, step, score, threshold, max(last_good, 0), message)
