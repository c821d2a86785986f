"""A batch is cut along its first dimension into micro-batches, whose gradients are added up.

    step(x [8, 3])   ->   forward and backward of x[0:2], then of x[2:4], x[4:6] and x[6:8]

Loss and gradients are the mean over micro-batches.  Each needs the memory of a batch of its size,
and all but the first find gradients to add to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fxzero.errors import BudgetError, UsageError
from fxzero.graph import describe
from fxzero.plans import Plan
from fxzero.structure import Structure, flatten

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Batch:
    """The arguments of one step.

    Attributes:
        leaves: their tensors.  Those whose first dimension is the batch's are cut; scalars, and
            tensors whose first dimension is 1, go to each micro-batch.
        size: how many examples there are: the largest first dimension.
    """

    leaves: tuple[torch.Tensor, ...]
    structure: Structure
    size: int

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """The batch in a model's arguments.

        Raises:
            UsageError: a tensor whose first dimension is neither the batch's nor 1.
        """
        leaves, structure = flatten((args, kwargs))
        sizes = [leaf.shape[0] for leaf in leaves if leaf.ndim > 0]
        size = max(sizes, default=0)
        if size == 0:
            raise UsageError("step() has nothing to cut: no argument is a tensor with examples")
        for leaf, path in zip(leaves, structure.paths, strict=True):
            if leaf.ndim > 0 and leaf.shape[0] not in (size, 1):
                argument = path[len("[0]") :]  # positional and keyword arguments are a pair
                raise UsageError(
                    f"step() cannot cut a batch of {size}: argument {argument} is "
                    f"{describe(leaf)}\n"
                    "  give every tensor the batch's size, or 1, as its first dimension"
                )
        for name, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, list) and len(value) == size > 1 and not flatten(value)[0]:
                raise UsageError(
                    f"step() cannot cut a list: argument [{name!r}] has {size} items\n"
                    "  give a tensor, or a tuple if it belongs to every micro-batch"
                )
        return cls(tuple(leaves), structure, size)

    def cut(self, count: int) -> Iterator[Call]:
        """The arguments of each micro-batch.

        Raises:
            UsageError: the batch has no ``count`` equal parts.
        """
        if self.size % count:
            near = min(self.counts(), key=lambda other: (abs(other - count), other))
            raise UsageError(
                f"a batch of {self.size} has no {count} micro-batches of one size\n"
                f"  ask for {near}, or change the batch"
            )
        rows = self.size // count
        for start in range(0, self.size, rows):
            part: Call = self.structure.fill(
                [
                    leaf[start : start + rows] if leaf.ndim and len(leaf) == self.size else leaf
                    for leaf in self.leaves
                ]
            )
            yield part

    def times(self, count: int) -> Batch:
        """The batch of as many examples ``count`` times over, for plans; once: as it lies."""
        if count == 1:
            return self
        return self.joined(lambda leaf: leaf.repeat(count, *(1 for _ in leaf.shape[1:])), count)

    def joined(self, join: Callable[[torch.Tensor], torch.Tensor], count: int) -> Batch:
        """The batch of ``count`` batches.

        Args:
            join: from a tensor with a row for each example to the one of all batches.
        """
        leaves = tuple(
            join(leaf) if leaf.ndim and len(leaf) == self.size else leaf for leaf in self.leaves
        )
        return Batch(leaves, self.structure, count * self.size)

    def counts(self) -> list[int]:
        """Into how many micro-batches of one size the batch can be cut."""
        return [count for count in range(1, self.size + 1) if self.size % count == 0]


def choose_count(batch: Batch, plan: Callable[[Call, bool], Plan]) -> int:
    """The number of micro-batches whose step is the fastest that fits.

    More of them are asked for only while that recomputes less and so takes less time.

    Args:
        plan: the plan of a micro-batch that finds gradients or does not.

    Raises:
        BudgetError: not even single examples fit.
    """
    best: tuple[float, int] | None = None
    for count in batch.counts():
        try:
            found = plan(next(batch.cut(count)), count > 1)
        except BudgetError:
            if count == batch.size:
                raise
            continue
        seconds = count * found.step_seconds
        if best is not None and seconds >= best[0]:
            break
        best = seconds, count
        if not found.recomputed and not found.offloaded:
            break
    assert best is not None, "single examples were planned"
    return best[1]


def loss_of(output: Any, loss_fn: Any) -> torch.Tensor:
    """The scalar that a step trains, in what a model returned.

    Args:
        loss_fn: from that to the scalar; None: it is the scalar, or has it as ``loss``, or first.

    Raises:
        UsageError: there is none.
    """
    loss = loss_fn(output) if loss_fn is not None else output
    if not isinstance(loss, torch.Tensor):
        loss = loss["loss"] if isinstance(loss, dict) else getattr(loss, "loss", loss)
    if isinstance(loss, (tuple, list)) and loss:
        loss = loss[0]
    if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
        is_tensor = isinstance(output, torch.Tensor)
        found = f"a tensor {list(output.shape)}" if is_tensor else type(output).__name__
        raise UsageError(
            f"step() needs a scalar loss, but the model returned {found}\n"
            "  give a loss_fn from the model's output to a scalar"
        )
    return loss
