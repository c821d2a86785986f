"""What a user asks of a pipeline: ``fxzero.Pipeline``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxzero.errors import UsageError, unknown_option
from fxzero.microbatches import Batch
from fxzero.pipelining.schedules import NAMES, make_schedule

# Micro-batches for each stage, where nobody gives their number.
_MICROBATCHES = 4


@dataclass(frozen=True)
class Pipeline:
    """A model cut into stages that train side by side on different micro-batches.

    Attributes:
        stages: how many; None: as many as the schedule takes on the ranks of the mesh's "pp".
        schedule: one of "gpipe", "1f1b", "zb1p", "interleaved1f1b", "interleavedzb", "zbv",
            "dualpipev".
        microbatches: into how many parts a batch is cut; None: ``compile``'s own option, or four a
            stage, if the batch has as many.
        cuts: names of the submodules that begin a stage, one fewer than stages; none: where the
            step takes the least time.

    Raises:
        UsageError: an option that cannot be right.
    """

    stages: int | None = None
    schedule: str = "1f1b"
    microbatches: int | None = None
    cuts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.schedule not in NAMES:
            raise unknown_option(str(self.schedule), NAMES, where="schedule")
        for name in ("stages", "microbatches"):
            value = getattr(self, name)
            if value is not None and (not _is_count(value)):
                raise UsageError(f"Pipeline: {name}={value!r} must be a number, at least 1")
        object.__setattr__(self, "cuts", tuple(self.cuts))
        if self.cuts and self.stages not in (None, len(self.cuts) + 1):
            raise UsageError(
                f"Pipeline: {len(self.cuts)} cuts make {len(self.cuts) + 1} stages, not "
                f"{self.stages}\n  leave stages out"
            )

    @property
    def known_stages(self) -> int | None:
        """The number of stages, if it does not depend on the number of ranks."""
        return len(self.cuts) + 1 if self.cuts else self.stages

    def ranks(self, processes: int | None) -> int:
        """Over how many of some processes to spread it, one or two stages on each.

        Args:
            processes: None: as many as it takes.

        Raises:
            UsageError: neither the processes' number nor the stages' is known.
        """
        if self.known_stages is None:
            if processes is None:
                raise UsageError(
                    "a pipeline of how many ranks?\n"
                    '  give devices=, mesh={"pp": 4}, or the number of stages'
                )
            return processes
        wanted = max(self.known_stages // make_schedule(self.schedule, 1, 1).stages, 1)
        return wanted if processes is None else min(wanted, processes)

    def stages_on(self, ranks: int) -> int:
        """Into how many stages the model is cut for so many ranks."""
        return self.known_stages or make_schedule(self.schedule, ranks, 1).stages

    def microbatches_of(self, batch: Batch, ranks: int, given: int | str) -> int:
        """Into how many micro-batches a batch is cut.

        Args:
            given: ``compile``'s own option.
        """
        if self.microbatches is not None:
            return self.microbatches
        if isinstance(given, int) and given > 1:
            return given
        wanted = _MICROBATCHES * self.stages_on(ranks)
        return max(count for count in batch.counts() if count <= wanted)


AUTO = "auto"


def check_pipeline(pipeline: Any) -> Pipeline | str | None:
    """What the option means; None for no pipeline, ``AUTO`` for whatever is fastest.

    Raises:
        UsageError: neither of these, nor a number of stages, nor a ``Pipeline``.
    """
    if pipeline is None or isinstance(pipeline, Pipeline):
        return pipeline
    if pipeline == AUTO:
        return AUTO
    if _is_count(pipeline):
        return Pipeline(stages=pipeline) if pipeline > 1 else None
    raise UsageError(
        f'pipeline={pipeline!r} must be a number of stages, a fxzero.Pipeline or "auto"\n'
        '  such as fxzero.Pipeline(stages=4, schedule="1f1b", microbatches=8)'
    )


def ranks_along(request: Pipeline | str | None) -> Callable[[int | None], int] | None:
    """Over how many of some ranks a pipeline goes, if there may be one; at first, one for AUTO."""
    if request is None:
        return None
    return request.ranks if isinstance(request, Pipeline) else lambda ranks: 1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
