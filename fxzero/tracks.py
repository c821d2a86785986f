"""The tracks of a Plan: what a rank holds over modelled seconds, thinned to a few hundred instants.

Instants that stay are the highest of their stretch, of stretches of equal time and of stretches of
equally many operators: what takes long and what takes no time are both seen, and a peak is exact.

    seconds   0    1    2    3    4    5          0    2    5
    bytes     5    4    7    6    8    2    ->    5    7    8
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxzero.plans import Track

# Of a plan without a pipeline, the optimizer's step not counted.
MOST_INSTANTS = 400
# Of all ranks of a pipeline together, and of any one of them.
_MOST_OF_PIPELINE, _LEAST_OF_RANK = 1600, 48


def of_each_rank(ranks: int) -> int:
    """How many instants each rank of a pipeline may have."""
    return min(MOST_INSTANTS, max(_LEAST_OF_RANK, _MOST_OF_PIPELINE // ranks))


def kept(seconds: Sequence[float], totals: Sequence[int], most: int = MOST_INSTANTS) -> list[int]:
    """Which instants stay: at most ``most``, in order."""
    count = len(totals)
    if count <= most:
        return list(range(count))
    start, length = seconds[0], (seconds[-1] - seconds[0]) or 1.0
    stretches = most // 2
    highest: dict[tuple[str, int], int] = {}
    for index, total in enumerate(totals):
        by_time = min(int(stretches * (seconds[index] - start) / length), stretches - 1)
        for stretch in (("time", by_time), ("order", stretches * index // count)):
            if stretch not in highest or total > totals[highest[stretch]]:
                highest[stretch] = index
    return sorted(set(highest.values()))


def track(rank: int, seconds: Sequence[float], roles: Sequence[Mapping[str, int]]) -> Track:
    """Of instants that are kept, given the bytes by role at each."""
    names = dict.fromkeys(role for each in roles for role, size in each.items() if size)
    sizes = {}
    for name in names:
        found = tuple(each.get(name, 0) for each in roles)
        sizes[name] = found[:1] if len(set(found)) == 1 else found
    return Track(rank, tuple(map(rounded, seconds)), sizes)


def rounded(seconds: float) -> float:
    """To seven digits: a plan file is short, and instants keep their order."""
    return float(f"{seconds:.7g}")
