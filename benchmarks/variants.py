"""The rows of the table: ways of training one model with less memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import Inputs
from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

import fxzero


@dataclass(frozen=True)
class Setting:
    """What a variant is built from.

    Attributes:
        module: a copy of the model that belongs to the variant alone.
        blocks: the repeated parts of such a copy.
        peaks: measured peaks, in bytes, of the rows before this one.
    """

    module: nn.Module
    inputs: Inputs
    blocks: Callable[[nn.Module], list[nn.Module]]
    peaks: dict[str, int]


@dataclass(frozen=True)
class Variant:
    """A row: its name, and what makes a module to call from the model."""

    name: str
    build: Callable[[Setting], nn.Module]


# The bytes that fxzero may use in a row, for an inner compiler; None: no limit.
Budget = Callable[[Setting, str], int | None]


def _eager(setting: Setting) -> nn.Module:
    return setting.module


def _checkpointed(setting: Setting) -> nn.Module:
    for block in setting.blocks(setting.module):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return setting.module


def _torch_compile(backend: str, budget: float, setting: Setting) -> nn.Module:
    # Dynamo shares compiled code between copies of a model that have the same backend, whatever the
    # memory budget was; a backend object of its own keeps each row's code apart.
    inner: Any = lookup_backend(backend)

    def compile_graph(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        with functorch_config.patch(activation_memory_budget=budget):
            return inner(graph, inputs)

    return torch.compile(setting.module, backend=compile_graph, dynamic=False)  # type: ignore


def _fxzero(inner: str, budget: Budget, setting: Setting) -> nn.Module:
    # The benchmark runs no optimizer, so the budget need not cover one.
    return fxzero.compile(
        setting.module, memory_budget=budget(setting, inner), optimizer="none", inner=inner
    )


def _no_budget(setting: Setting, inner: str) -> None:
    return None


def _checkpoint_peak(setting: Setting, inner: str) -> int:
    return setting.peaks[CHECKPOINT]


def _half_of_eager(setting: Setting, inner: str) -> int:
    return setting.peaks[EAGER] // 2


def _torch_peak(fraction: float, setting: Setting, inner: str) -> int:
    return setting.peaks[_torch_name(_BACKENDS[inner], fraction)]


def _smallest(setting: Setting, inner: str) -> int:
    """The smallest budget for which there is a plan, as the error about a smaller one says."""
    try:
        fxzero.compile(
            setting.module, dict(setting.inputs), memory_budget=1, optimizer="none", inner=inner
        )
    except fxzero.BudgetError as error:
        return error.required_bytes
    raise AssertionError("a budget of one byte was accepted")


EAGER, CHECKPOINT = "eager", "eager, checkpoint per block"
_FRACTIONS = (1.0, 0.5, 0.2, 0.1, 0.0)
# aot_eager runs the min-cut partitioner, and with it the memory budget, on the operators that eager
# runs; aot_eager_decomp_partition does so on decomposed ones, 10 to 20 % slower.
_BACKENDS = {"eager": "aot_eager", "inductor": "inductor"}
_BUDGETS: dict[str, Budget] = {
    "no budget": _no_budget,
    "half of eager's peak": _half_of_eager,
    "peak of torch's budget 0.5": functools.partial(_torch_peak, 0.5),
    "peak of torch's budget 0.2": functools.partial(_torch_peak, 0.2),
    "checkpoint's peak": _checkpoint_peak,
    "smallest": _smallest,
}


def _torch_name(backend: str, fraction: float) -> str:
    return f"torch.compile {backend}" + ("" if fraction == 1.0 else f", budget {fraction}")


def _rows(inner: str) -> list[Variant]:
    """torch.compile and fxzero over the same kind of inner compiler."""
    build, backend = functools.partial, _BACKENDS[inner]
    return [
        *(Variant(_torch_name(backend, f), build(_torch_compile, backend, f)) for f in _FRACTIONS),
        *(
            Variant(f"fxzero {inner}, {name}", build(_fxzero, inner, budget))
            for name, budget in _BUDGETS.items()
        ),
    ]


REFERENCES = [Variant(EAGER, _eager), Variant(CHECKPOINT, _checkpointed)]
VARIANTS = [*REFERENCES, *_rows("eager"), *_rows("inductor")]
