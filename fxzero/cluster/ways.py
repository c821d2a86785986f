"""The ways to train with a number of devices and a global batch.

    512 devices, 1024 examples:   pp 8 x dp_replicate 8 x dp_shard 8, ZeRO 2, 1f1b, 16 micro-batches
                                  dp 512, ZeRO 3, 2 micro-batches
                                  ...

Every way uses all devices, and trains the same examples a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fxzero.mesh import Mesh

SCHEDULES = ("1f1b", "zb1p", "interleaved1f1b")
# Stages of a rank in interleaved schedules.
_INTERLEAVED = 2


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        pipeline: ranks of a pipeline, 1 without.
        replicate: copies of every shard.
        shard: ranks that parameters are cut over.
        zero: the ZeRO stage; 0 where ``shard`` is 1.
        microbatch: times the smallest micro-batch, on each pipeline.
        microbatches: a step of each pipeline, or of each rank without.
        schedule: of the pipeline, "" without.
        optimizer: which of those that may hold states.
        sends: kinds of codes that gathers and reductions move; None: numbers.
    """

    pipeline: int
    replicate: int
    shard: int
    zero: int
    microbatch: int
    microbatches: int
    schedule: str = ""
    optimizer: int = 0
    sends: tuple[str | None, str | None] = (None, None)

    @property
    def stages(self) -> int:
        """Into how many the model is cut."""
        return self.pipeline * (_INTERLEAVED if "interleaved" in self.schedule else 1)

    @property
    def mesh(self) -> Mesh:
        """The ranks, as a plan takes them."""
        sizes = {"pp": self.pipeline}
        if self.shard > 1 and self.replicate > 1:
            sizes |= {"dp_replicate": self.replicate, "dp_shard": self.shard}
        else:
            sizes["dp"] = self.replicate * self.shard
        return Mesh({name: size for name, size in sizes.items() if size > 1})

    @property
    def sharded_over(self) -> str:
        """The mesh's dimension that parameters are cut over."""
        return "dp_shard" if self.replicate > 1 else "dp"

    @property
    def replicated_over(self) -> str:
        """The mesh's dimension that has copies of every shard."""
        return "dp_replicate" if self.shard > 1 else "dp"

    def __str__(self) -> str:
        ranks = " x ".join(f"{name} {size}" for name, size in self.mesh.sizes.items())
        parts = [ranks or "1 device", f"ZeRO {self.zero}"]
        if self.schedule:
            parts.append(self.schedule)
        parts.append(f"{self.microbatches} x {self.microbatch}")
        if self.sends != (None, None):
            parts.append("sends " + "/".join(kind or "numbers" for kind in self.sends))
        return ", ".join(parts)


def ways(
    devices: int,
    batch: int,
    *,
    units: int,
    node: int,
    zero: Sequence[int] = (0, 1, 2, 3),
    optimizers: int = 1,
    sends: Sequence[tuple[str | None, str | None]] = ((None, None),),
) -> Iterator[Way]:
    """All ways.

    Args:
        batch: times the smallest micro-batch, of a step of all devices.
        units: into how many stages the model can be cut at most.
        node: devices of a node.
        zero: stages that may be taken.
        optimizers: how many may hold states.
        sends: kinds of codes that may be moved.
    """
    for pipeline in _divisors(devices):
        data = devices // pipeline
        if pipeline > units or batch % data:
            continue
        for shard in _shards(data, node):
            cut = [stage for stage in zero if stage] if shard > 1 else []
            whole = [0] if shard == 1 and (data == 1 or 0 in zero) else []
            for stage in cut or whole:
                for microbatch in _divisors(batch // data):
                    count = batch // data // microbatch
                    for schedule in _schedules(pipeline, count, units):
                        for codes in sends if stage in (1, 2, 3) else ((None, None),):
                            for optimizer in range(optimizers):
                                yield Way(
                                    pipeline,
                                    data // shard,
                                    shard,
                                    stage,
                                    microbatch,
                                    count,
                                    schedule,
                                    optimizer,
                                    codes,
                                )


def _schedules(pipeline: int, count: int, units: int) -> Sequence[str]:
    if pipeline == 1:
        return ("",)
    if count < pipeline:  # most ranks would wait most of the time
        return ()
    divides = count % pipeline == 0 and _INTERLEAVED * pipeline <= units
    return [name for name in SCHEDULES if divides or "interleaved" not in name]


def _shards(data: int, node: int) -> list[int]:
    """Whole copies, all ranks, and hybrids whose shards are a node's ranks or several nodes'."""
    return [n for n in _divisors(data) if n in (1, data) or n % node == 0 or node % n == 0]


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
