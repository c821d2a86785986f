"""What the gradients of a rank's stages take over a step.

    first backward of a stage    its gradients are made
    the ones between             add to them in place
    the last one                 under ZeRO 1 averages what was added up whole, and leaves a part of
                                 each

A rehearsal plays micro-batches between the first and the last, and has all gradients throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxzero.collectives import REDUCE_SCATTER, workspace_bytes
from fxzero.passes.partition import Split
from fxzero.pipelining.rehearsal import Step
from fxzero.pipelining.schedules import Action, Kind

# What ends the backward of a micro-batch, and so has made all gradients of the stage.
ENDS = (Kind.WEIGHT_GRADIENT, Kind.BACKWARD)


@dataclass(frozen=True)
class Gradients:
    """Bytes of a stage's gradients.

    Attributes:
        made: all of them, as they are added up.
        whole: of these what is added up whole and kept in parts.
        part: of the parts.
        beside: what a collective that makes a part allocates for itself, at most.
    """

    made: int = 0
    whole: int = 0
    part: int = 0
    beside: int = 0


def gradients_of(splits: Mapping[int, Split], order: Sequence[Action]) -> dict[int, Gradients]:
    """By stage; what stages of the rank share belongs to the one with the first backward."""
    first = _places(order[::-1])
    found, known = {}, set[str]()
    for stage in sorted(splits, key=lambda stage: -first[stage]):
        split = splits[stage]
        nodes = split.forward.graph.find_nodes(op="placeholder")
        pairs = zip(split.inputs, nodes, strict=True)
        parts = {role.name: node for role, node in pairs if role.kind == "parameter"}
        own = [(node, parts[name]) for name, node in existing(split) if name not in known]
        cut = [(whole, part) for whole, part in own if nbytes(part) < nbytes(whole)]
        values = [(whole.meta["val"], part.meta["val"]) for whole, part in cut]
        found[stage] = Gradients(
            sum(nbytes(gradient) for gradient, _ in own),
            sum(nbytes(whole) for whole, _ in cut),
            sum(nbytes(part) for _, part in cut),
            max((workspace_bytes(REDUCE_SCATTER, [w], [p]) for w, p in values), default=0),
        )
        known |= {name for name, _ in existing(split)}
    return found


def over_step(
    order: Sequence[Action],
    steps: Sequence[Step],
    gradients: Mapping[int, Gradients],
    *,
    finds: bool,
) -> list[Step]:
    """What a rank holds, gradients made and averaged in their time.

    Args:
        steps: with all gradients throughout.
        finds: whether those of an earlier step are there, too; ``steps`` have them.
    """
    last, first = _places(order), _places(order[::-1])
    missing = {stage: each.whole if finds else each.made for stage, each in gradients.items()}
    found = []
    beyond = -sum(missing.values())
    for at, (action, step) in enumerate(zip(order, steps, strict=True)):
        stage = action.stage
        each = gradients.get(stage, Gradients())
        if first.get(stage) == len(order) - 1 - at:
            beyond += missing.get(stage, 0)
        during, after = step.during + beyond, step.after + beyond
        if last.get(stage) == at:
            during = max(during, after + each.part + each.beside)
            beyond += each.part - each.whole
            after += each.part - each.whole
        found.append(Step(during, after))
    return found


def _places(order: Sequence[Action]) -> dict[int, int]:
    """Where the last backward of each stage ends."""
    return {action.stage: at for at, action in enumerate(order) if action.kind in ENDS}


def existing(split: Split) -> Iterator[tuple[str, fx.Node]]:
    """The gradients that a backward adds to, by the parameter's name."""
    _, gradients, _ = split.backward_inputs()
    for position, node in zip(split.accumulated, gradients, strict=True):
        yield split.inputs[position].name, node


def nbytes(node: fx.Node) -> int:
    """Bytes of the storage of a node's value."""
    size: int = node.meta["val"].untyped_storage().nbytes()
    return size
