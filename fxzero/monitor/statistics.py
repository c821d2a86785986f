"""Running statistics of a noisy series, for alarms that noise alone does not raise.

    spike   one value far above the median of those before it, in units of their spread
    decay   the mean of a stretch of values far above the least mean of the stretches before it

Both follow a series that falls, as losses do: only what lies too high is remarkable.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

# The standard deviation of normal values is so many times their median absolute deviation.
_NORMAL = 1.4826
# A spread smaller than this share of the median counts as this much: series may be constant.
_LEAST_SPREAD = 1e-3


class SpikeScore:
    """How far a value lies above those before it: (value - median) / (1.4826 MAD).

    Args:
        window: how many values before it are looked at.
        least: how many there must be.
    """

    def __init__(self, window: int = 128, least: int = 32) -> None:
        self.least = least
        self.values: deque[float] = deque(maxlen=window)

    def score(self, value: float) -> float:
        """The score of the next value, which then belongs to the series; 0 while that is short.

        A value that is not finite is left out.
        """
        if not math.isfinite(value):
            return 0.0
        found = 0.0
        if len(self.values) >= self.least:
            middle = statistics.median(self.values)
            deviation = statistics.median([abs(v - middle) for v in self.values])
            least = max(_LEAST_SPREAD * abs(middle), math.ulp(1.0))
            found = (value - middle) / max(_NORMAL * deviation, least)
        self.values.append(value)
        return found


class DecayScore:
    """How far the mean of a stretch lies above the least mean of the stretches before it.

    In units of the standard error of such a difference, which values of the two stretches give.
    """

    def __init__(self, stretch: int = 128) -> None:
        self.stretch = stretch
        self.values: list[float] = []
        self.best: tuple[float, float] | None = None

    def score(self, value: float) -> float:
        """The score of the stretch that this value ends; 0 for all other values."""
        if not math.isfinite(value):
            return 0.0
        self.values.append(value)
        if len(self.values) < self.stretch:
            return 0.0
        mean = statistics.fmean(self.values)
        error = statistics.variance(self.values, mean) / self.stretch
        self.values.clear()
        best = self.best
        if best is None or mean < best[0]:
            self.best = mean, error
        if best is None:
            return 0.0
        least = max(_LEAST_SPREAD * abs(best[0]), math.ulp(1.0))
        return (mean - best[0]) / max(math.sqrt(error + best[1]), least)
