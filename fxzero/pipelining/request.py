"""What a user asks of a pipeline: ``fxzero.Pipeline``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxzero.errors import UsageError, unknown_option
from fxzero.pipelining.schedules import NAMES, make_schedule


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

    def ranks(self, processes: int) -> int:
        """Over how many of some processes to spread it, one or two stages on each."""
        if self.known_stages is None:
            return processes
        wanted = self.known_stages // make_schedule(self.schedule, 1, 1).stages
        return min(max(wanted, 1), processes)


def check_pipeline(pipeline: Any) -> Pipeline | None:
    """What ``compile``'s option means; None for no pipeline.

    Raises:
        UsageError: neither None, nor a number of stages, nor a ``Pipeline``.
    """
    if pipeline is None or isinstance(pipeline, Pipeline):
        return pipeline
    if _is_count(pipeline):
        return Pipeline(stages=pipeline) if pipeline > 1 else None
    raise UsageError(
        f"pipeline={pipeline!r} must be a number of stages or a fxzero.Pipeline\n"
        '  such as fxzero.Pipeline(stages=4, schedule="1f1b", microbatches=8)'
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
