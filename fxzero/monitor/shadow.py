"""One micro-batch of training, run once more without any pass: the graphs still compute the model.

Loss, gradients, buffers and the random stream are compared as ``model.verify`` does, and all is
left as it was: weights, gradients, buffers, random streams, and what the compiled model remembers.
It costs about two steps, and the memory of an eager one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxzero.agreement import Agreement
from fxzero.microbatches import Call
from fxzero.plans import Plan
from fxzero.sharding import is_spread
from fxzero.units import format_bytes
from fxzero.verification import compare as compare_steps
from fxzero.verification import verify
from fxzero.verification.comparison import first_microbatch

EVERY = 1000


@dataclass(frozen=True)
class Shadow:
    """What the comparison came to.

    Attributes:
        difference: the larger of those of the loss, and of gradients relative to their largest
            entries; infinite where a gradient is missing, or the random stream differs.
        where: what differs most, with the rank.
        guilt: what makes the two differ, such as "pass shard"; "" if that is not known.
    """

    difference: float
    tolerance: float
    where: str
    guilt: str = ""


def obstacle(model: nn.Module) -> str:
    """Why no micro-batch of this model can run eagerly beside its graphs; "" if one can."""
    state = vars(model).get("_fxzero")
    if state is None:
        return "the model is not compiled"
    if state.pipeline is not None:
        return "no rank of a pipeline has the whole model"
    return ""


def lack_of_memory(model: nn.Module) -> str:
    """By how much an eager micro-batch is beyond the memory that there is; "" if it fits."""
    state = vars(model)["_fxzero"]
    plan: Plan = state.latest.plan
    summary = plan.model
    whole = summary.parameter_bytes if any(map(is_spread, model.parameters())) else 0
    needed = plan.unplanned_peak_bytes + 2 * summary.trainable_bytes + whole
    limit = state.options.memory_budget
    if limit is None and torch.cuda.is_available() and torch.cuda.is_initialized():
        limit = torch.cuda.mem_get_info()[1]
    if limit is None or needed <= limit:
        return ""
    return f"an eager micro-batch takes {format_bytes(needed)} of {format_bytes(limit)}"


def has_trained(model: Any, call: Call) -> bool:
    """Whether a graph has trained the first micro-batch of a step's inputs."""
    state = vars(model)["_fxzero"]
    return bool(state.has_trained(model, *first_microbatch(model, *call)))


def is_due(model: nn.Module) -> bool:
    """Whether no accumulation is under way, whose gradients are not reduced yet."""
    ranks = vars(model)["_fxzero"].ranks
    return ranks is None or not ranks.any_pending(model.parameters())


def compare(model: Any, call: Call, agreement: Agreement | None, when: str) -> Shadow:
    """Runs the first micro-batch by the graphs and without them; the same answer on all ranks."""
    found = compare_steps(model, *call)
    gradient = found.gradient_difference if found.random_stream_equal else float("inf")
    names = ["", *(name for name, _ in model.named_parameters())]
    place = float(names.index(found.worst_gradient))
    mine = torch.tensor([found.loss_difference, gradient, place], dtype=torch.float64)
    told = mine[None] if agreement is None else agreement.numbers(mine, when)
    worst = int(told[:, :2].nan_to_num(nan=float("inf")).amax(1).argmax())
    loss, gradient, place = told[worst].tolist()
    name = names[int(place)]
    where = f"the gradient of {name}" if name and not gradient < loss else "the loss"
    if agreement is not None:
        where += f" on rank {agreement.ranks[worst]}"
    difference = max(float("inf") if value != value else value for value in (loss, gradient))
    if difference <= found.tolerance:
        return Shadow(difference, found.tolerance, where)
    guilt = verify(model, *call).guilt
    named = "" if guilt is None else f"{guilt.kind} {guilt.name}".rstrip()
    return Shadow(difference, found.tolerance, where, named)
