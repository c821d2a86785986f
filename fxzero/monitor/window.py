"""What is collected between two records, and how ranks tell each other of it.

Numbers stay on the device until a record is due, so that no step waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_HEAD = 10


@dataclass(frozen=True)
class Told:
    """What all ranks said of the same steps.

    Attributes:
        steps: the numbers of these steps.
        losses, norms: of each step, the mean over the ranks that know it; None: nobody does.
        odd: places of ranks, in the mesh's order, whose own loss or norm is not finite.
        samples, tokens, flops: of all steps and ranks; flops of one step; 0: nobody knows.
        seconds, loading: of the slowest rank, by step.
        peak_bytes: of the fullest rank; None: not measured.
        excess: the largest measured by planned peak of a rank; 0: nobody knows.
        changed: for each rank whether its weights have changed; None: not known.
    """

    steps: tuple[int, ...]
    losses: tuple[float | None, ...]
    norms: tuple[float | None, ...]
    odd: tuple[int, ...]
    samples: float
    tokens: float
    flops: float
    seconds: float
    loading: float
    peak_bytes: int | None
    excess: float
    changed: tuple[bool | None, ...]


class Window:
    """The steps since the last record, on this rank.

    Args:
        size: how many they are at most.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self.losses: list[list[torch.Tensor]] = []
        self.norms: list[torch.Tensor | None] = []
        self.samples = 0
        self.tokens = 0

    def add(self, losses: list[torch.Tensor], norm: torch.Tensor | None) -> None:
        """What one step came to."""
        self.losses.append(losses)
        self.norms.append(norm)

    def numbers(
        self,
        step: int,
        *,
        seconds: float,
        loading: float,
        flops: float | None,
        peak_bytes: int | None,
        excess: float,
        changed: bool | None,
    ) -> torch.Tensor:
        """All of it, float64 on the CPU, of one length on all ranks."""
        losses = _padded([_mean(values) for values in self.losses], self.size)
        norms = _padded(self.norms, self.size)
        head = [
            step, len(self.losses), self.samples, self.tokens, flops or 0.0, seconds, loading,
            -1 if peak_bytes is None else peak_bytes, excess,
            -1 if changed is None else int(changed),
        ]  # fmt: skip
        return torch.cat([torch.tensor(head, dtype=torch.float64), losses, norms])


def told(every: torch.Tensor, size: int) -> Told:
    """What ranks said, from all their numbers, [ranks, numbers]: the same on all of them."""
    head, losses, known_losses, norms, known_norms = every.split([_HEAD, size, size, size, size], 1)
    last, count = (int(n) for n in head[0, :2].tolist())
    strange = torch.stack([losses, norms]).isfinite().logical_not().any(0).any(1)
    peak = int(head[:, 7].max())
    return Told(
        steps=tuple(range(last - count + 1, last + 1)),
        losses=tuple(_means(losses, known_losses, count)),
        norms=tuple(_means(norms, known_norms, count)),
        odd=tuple(strange.nonzero().flatten().tolist()),
        samples=float(head[:, 2].sum()),
        tokens=float(head[:, 3].sum()),
        flops=float(head[:, 4].sum()),
        seconds=float(head[:, 5].max()),
        loading=float(head[:, 6].max()),
        peak_bytes=peak if peak >= 0 else None,
        excess=float(head[:, 8].max()),
        changed=tuple(None if n < 0 else bool(n) for n in head[:, 9].tolist()),
    )


def _mean(values: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack([value.double() for value in values]).mean() if values else None


def _padded(values: Sequence[torch.Tensor | None], size: int) -> torch.Tensor:
    """The values, 0 where there is none, and behind them where there is one."""
    known = torch.tensor([float(value is not None) for value in values], dtype=torch.float64)
    found = [value.double() for value in values if value is not None]
    result = torch.zeros(2, size, dtype=torch.float64)
    if found:
        result[0, : len(values)][known > 0] = torch.stack(found).cpu()
    result[1, : len(values)] = known
    return result.flatten()


def _means(values: torch.Tensor, known: torch.Tensor, count: int) -> list[float | None]:
    """For each step the mean over the ranks that know it; None: nobody does."""
    number = known[:, :count].sum(0)
    means = values[:, :count].sum(0) / number
    pairs = zip(means.tolist(), number.tolist(), strict=True)
    return [mean if ranks else None for mean, ranks in pairs]
