"""The passes in the order in which they run: a list that prints and that names switch off.

    FXZERO_SKIP=name,name    run without these passes; the Plan notes it

shard, quantize, deduplicate, accumulate and update run before the plan is made: quantize changes
what the collectives of shard move, and what those reduce is added to the gradients that exist, or
handed to the optimizer.

The others carry the plan out.  Of these offload runs first: rematerialize lets the backward read
what was fetched.  It also rebuilds views in the backward, so that write_back sees which buffers the
backward still reads.  replay_randomness needs the clones that rematerialize makes, bucket the
places where gathers are done again, and overlap the buckets.  postpone_updates comes last: what
runs before it moves readers of weights.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from fxzero.errors import UsageError, unknown_option
from fxzero.graph import TrainGraph
from fxzero.passes.accumulate import accumulate_pass
from fxzero.passes.bucket import bucket_pass
from fxzero.passes.context import PassContext
from fxzero.passes.deduplicate import deduplicate_pass
from fxzero.passes.offload import offload_pass
from fxzero.passes.overlap import overlap_pass
from fxzero.passes.postpone_updates import postpone_updates_pass
from fxzero.passes.quantize import quantize_pass
from fxzero.passes.rematerialize import rematerialize_pass
from fxzero.passes.replay_randomness import replay_randomness_pass
from fxzero.passes.shard import shard_pass
from fxzero.passes.update import update_pass
from fxzero.passes.write_back import write_back_pass

PassFunction = Callable[[TrainGraph, PassContext], TrainGraph]


@dataclass(frozen=True)
class Pass:
    """A pass as the runner, the command line and error messages know it.

    Attributes:
        numerics: "exact" if every result stays bitwise the same, "changes" if not.
        summary: the first line of the docstring of the module that defines the pass.
        completes: what would be wrong without this pass: "capture", or the pass whose work it
            finishes; "" if it may be left out.
    """

    name: str
    function: PassFunction
    numerics: Literal["exact", "changes"]
    summary: str
    completes: str = ""


def make_pass(
    name: str,
    function: PassFunction,
    *,
    numerics: Literal["exact", "changes"] = "exact",
    completes: str = "",
) -> Pass:
    """A pass, with the summary that its own module gives."""
    docstring = sys.modules[function.__module__].__doc__ or ""
    return Pass(name, function, numerics, docstring.strip().partition("\n")[0], completes)


# Before the plan is made: what it is made for.
PREPARATION: tuple[Pass, ...] = (
    make_pass("shard", shard_pass, completes="capture"),
    make_pass("quantize", quantize_pass, numerics="changes"),
    make_pass("deduplicate", deduplicate_pass),
    make_pass("accumulate", accumulate_pass),
    make_pass("update", update_pass),
)

# After it: what carries it out.
PASSES: tuple[Pass, ...] = (
    make_pass("offload", offload_pass),
    make_pass("rematerialize", rematerialize_pass),
    make_pass("write_back", write_back_pass, completes="capture"),
    make_pass("replay_randomness", replay_randomness_pass, completes="rematerialize"),
    make_pass("bucket", bucket_pass),
    make_pass("overlap", overlap_pass),
    make_pass("postpone_updates", postpone_updates_pass, completes="update"),
)


@dataclass(frozen=True)
class PassList:
    """The passes of a compilation, in the order in which they run.

    Attributes:
        preparation: those before the plan is made.
        execution: those that carry it out.
    """

    preparation: tuple[Pass, ...] = PREPARATION
    execution: tuple[Pass, ...] = PASSES


def skipped_passes() -> tuple[str, ...]:
    """Names in the environment's FXZERO_SKIP.

    Raises:
        UsageError: a pass that is needed by what still runs, or that nobody knows.
    """
    names = tuple(name for name in os.environ.get("FXZERO_SKIP", "").split(",") if name)
    every = (*PREPARATION, *PASSES)
    skipped = set(every) - set(select(names, every))
    for item in PASSES:
        if item in skipped and item.completes and item.completes not in names:
            raise UsageError(
                f"FXZERO_SKIP={','.join(names)}: pass {item.name} completes {item.completes}; "
                "results would be wrong without it"
            )
    return names


def select(disabled: Collection[str], passes: tuple[Pass, ...] = PASSES) -> tuple[Pass, ...]:
    """All passes but those named.

    Raises:
        UsageError: a name that no pass has.
    """
    known = [item.name for item in (*PREPARATION, *PASSES)]
    for name in disabled:
        if name not in known:
            raise unknown_option(name, known, where="passes to switch off")
    return tuple(item for item in passes if item.name not in disabled)


def describe() -> str:
    """One line a pass: name, numerics, summary."""
    every = (*PREPARATION, *PASSES)
    width = max(len(item.name) for item in every)
    return "\n".join(f"{p.name:<{width}}  {p.numerics:<7}  {p.summary}" for p in every)
