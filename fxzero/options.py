"""What a user asked for, checked once and then passed around as data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxzero import _inductor
from fxzero.errors import UsageError, unknown_option
from fxzero.hardware import Hardware
from fxzero.mesh import Mesh, Sharding, check_zero
from fxzero.optimizers import profile_optimizer, updates_one_by_one
from fxzero.passes.pipeline import PassList
from fxzero.policies import check_recompute_option
from fxzero.precision import Precision, check_precision
from fxzero.units import parse_budget

OBJECTIVES = ("time", "flops")
INNERS = ("eager", "inductor")
UPDATES = ("step", "backward")


@dataclass(frozen=True)
class Options:
    """Options of a compilation.

    Attributes:
        memory_budget: bytes, or None for no limit.
        optimizer: name, torch.optim class or bytes per parameter.
        recompute: "auto", "none", "full" or a function of nodes.
        objective: what recompute is minimised in, "time" or "flops".
        inner: "eager" or "inductor".
        strict: whether what cannot be applied is an error instead of a note in the plan.
        offload: whether saved values may wait for the backward in host memory.
        offload_states: whether states of the optimizer may wait for its step there.
        precision: what is computed, reduced and kept in which dtype.
        sharding: how parameters and gradients are spread over ranks.
        microbatches: into how many parts ``step`` cuts a batch, or "auto".
        update: where the optimizer updates weights: in its "step" or in the "backward".
        ranks: of all dimensions of the mesh, in its order.
        hardware: what is planned for; None: the device that the model is on.
        passes: what is done to graphs.
    """

    memory_budget: int | None = None
    optimizer: object = "adamw"
    recompute: Any = "auto"
    objective: str = "time"
    inner: str = "eager"
    strict: bool = False
    offload: bool = False
    offload_states: bool = False
    precision: Precision = field(default_factory=Precision)
    sharding: Sharding = field(default_factory=Sharding)
    microbatches: int | str = 1
    update: str = "step"
    ranks: Mapping[str, int] = field(default_factory=dict)
    hardware: Hardware | None = None
    passes: PassList = field(default_factory=PassList)

    @property
    def updates(self) -> bool:
        """Whether the optimizer updates weights in the backward."""
        return self.update == "backward"

    def on(self, mesh: Mesh) -> Options:
        """The same on other ranks."""
        sharding = mesh.sharding(self.sharding.zero, self.precision)
        return dataclasses.replace(self, sharding=sharding, ranks=mesh.sizes)


def check_options(
    *,
    device: str,
    memory_budget: object = None,
    optimizer: object = "adamw",
    recompute: Any = "auto",
    objective: str = "time",
    inner: str | None = None,
    strict: bool = False,
    offload: bool = False,
    precision: object = None,
    zero: object = "auto",
    mesh: Mesh | None = None,
    microbatches: object = 1,
    update: object = "step",
    pipeline: object = None,
    hardware: Hardware | None = None,
) -> Options:
    """Options from user input; raises UsageError for the first that cannot be right.

    Args:
        pipeline: the one that is asked for, or None.
        device: "cpu" or "cuda", that of ``hardware`` where there is one.
    """
    check_recompute_option(recompute)
    if objective not in OBJECTIVES:
        raise unknown_option(str(objective), OBJECTIVES, where="objective")
    if not isinstance(offload, bool):
        raise UsageError(f"offload={offload!r} must be True or False")
    profile_optimizer(optimizer, [], device)
    stage, dtypes = check_zero(zero), check_precision(precision)
    parts = check_microbatches(microbatches)
    memory = device_memory(device) if hardware is None else hardware.memory
    if memory_budget is None and hardware is not None:
        memory_budget = hardware.usable
    ranks = mesh or Mesh({})
    return Options(
        memory_budget=parse_budget(memory_budget, memory),
        optimizer=optimizer,
        recompute=recompute,
        objective=objective,
        inner=choose_inner(inner, device, present=hardware is not None),
        strict=strict,
        offload=offload,
        offload_states=offload and pipeline is None,
        precision=dtypes,
        sharding=ranks.sharding(stage, dtypes),
        microbatches=parts,
        update=_check_update(update, optimizer, parts, pipeline),
        ranks=ranks.sizes,
        hardware=hardware,
    )


def _check_update(
    update: object, optimizer: object, microbatches: int | str, pipeline: object
) -> str:
    """Where weights are updated."""
    if update not in UPDATES:
        raise unknown_option(str(update), UPDATES, where="update")
    if update == "backward" and not updates_one_by_one(optimizer):
        raise UsageError(
            f'update="backward" needs an optimizer that updates parameters one by one, not '
            f"optimizer={optimizer!r}\n  optimizer=fxzero.optim.AdamW, SGD or Lion"
        )
    if update == "backward" and microbatches != 1:
        raise UsageError(
            f'update="backward" keeps no gradients, and microbatches={microbatches!r} adds them up'
            '\n  leave microbatches out, or give update="step"'
        )
    if update == "backward" and pipeline is not None:
        raise UsageError(
            'update="backward" keeps no gradients, and a pipeline adds up those of micro-batches'
            '\n  leave pipeline out, or give update="step"'
        )
    return str(update)


def check_microbatches(count: object) -> int | str:
    """The number of micro-batches, or "auto"."""
    if isinstance(count, int) and not isinstance(count, bool) and count > 0:
        return count
    if count != "auto":
        raise UsageError(f'microbatches={count!r} must be a positive number or "auto"')
    return "auto"


def choose_inner(inner: str | None, device: str, present: bool = False) -> str:
    """The inner compiler: as asked, else "inductor" where a compiler for ``device`` is present.

    Args:
        present: it is, as far as anybody knows: the device is elsewhere.

    Raises:
        UsageError: an unknown name, or "inductor" without a compiler.
    """
    if inner is not None and inner not in INNERS:
        raise unknown_option(str(inner), INNERS, where="inner")
    present = present or _inductor.has_compiler(device)
    if inner == "inductor" and not present:
        needed = "triton" if device == "cuda" else "a C++ compiler (set CXX)"
        raise UsageError(f'inner="inductor" needs {needed}, which was not found; use inner="eager"')
    return inner or ("inductor" if present else "eager")


def call_arguments(
    example_inputs: Any, kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from the forms in which examples are given."""
    keywords = dict(kwargs or {})
    if isinstance(example_inputs, dict):
        return (), {**example_inputs, **keywords}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), keywords
    return (example_inputs,), keywords


def device_of(tensors: Sequence[torch.Tensor]) -> str:
    """ "cuda" or "cpu": where the first tensor lies; meta and no tensors count as "cpu"."""
    return "cuda" if tensors and tensors[0].is_cuda else "cpu"


def model_device(model: nn.Module) -> str:
    """``device_of`` the model's parameters and buffers."""
    return device_of([*model.parameters(), *model.buffers()])


def device_memory(device: str) -> int | None:
    """Bytes of memory of the device; None when it cannot be found out."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
