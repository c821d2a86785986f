"""What an optimizer will keep on the device, from its name or class.

The state of torch's optimizers has the parameters' dtype and, but for Adafactor's, their shape; the
counts are those of the classes with their default arguments.  Those of fxzero.optim say themselves
what they keep, with options too: ``functools.partial(fxzero.optim.AdamW, moments="int8")``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxzero import optim
from fxzero.errors import UsageError, unknown_option
from fxzero.optim.base import Optimizer
from fxzero.optim.factored import moment_shapes
from fxzero.optim.footprint import adafactor_footprint, footprint, hostable, muon_footprint
from fxzero.optim.whole import WholeOptimizer

# States per parameter element, in the parameter's dtype.
_STATES = {
    "adadelta": 2,
    "adagrad": 1,
    "adam": 2,
    "adamax": 2,
    "adamw": 2,
    "asgd": 1,
    "lion": 1,
    "nadam": 2,
    "none": 0,
    "radam": 2,
    "rmsprop": 1,
    "rprop": 2,
    "sgd": 0,
    "sgd-momentum": 1,
}
# Temporaries of one parameter's update in torch's single-tensor loop, in copies of the parameter.
_TEMPORARIES = {"adam": 2, "adamw": 2, "nadam": 2, "radam": 2, "rmsprop": 1, "adagrad": 2}
_STEP_COUNTER_BYTES = 4
_FACTORED = "adafactor"
_Ours = type[Optimizer] | type[WholeOptimizer]
_KINDS: tuple[_Ours, ...] = (optim.Adafactor, optim.AdamW, optim.Lion, optim.Muon, optim.SGD)
_OURS: dict[str, _Ours] = {f"fxzero.optim.{kind.__name__}": kind for kind in _KINDS}
_NAMED = ("master_bits", "stochastic_rounding", "moments", "offload")


@dataclass(frozen=True)
class OptimizerProfile:
    """Memory of an optimizer.

    Attributes:
        state_bytes: what it keeps between steps.
        transient_bytes: what it needs besides while it steps.
        scratch_bytes: what of the state does not grow with the parameters.
        host_bytes: what it keeps in host memory.
    """

    name: str
    bytes_per_parameter: float
    state_bytes: int
    transient_bytes: int
    scratch_bytes: int = 0
    host_bytes: int = 0

    @property
    def whole_bytes(self) -> int:
        """On the device while it steps."""
        return self.state_bytes + self.transient_bytes


def profile_optimizer(
    optimizer: object,
    parameters: Sequence[torch.Tensor],
    device: str,
    shards: int = 1,
    hosted: Collection[int] = (),
) -> OptimizerProfile:
    """The memory of ``optimizer`` over trainable ``parameters`` on "cpu" or "cuda".

    Args:
        optimizer: a name such as "adamw" (torch's) or "fxzero.optim.AdamW", a class of
            ``torch.optim`` or ``fxzero.optim``, the latter in a ``functools.partial`` with options
            too, or a number of bytes per parameter.
        shards: ranks that each have rows of every parameter, as many as are in ``parameters``.
        hosted: which of the parameters have their states in host memory.

    Raises:
        UsageError: a name nobody knows, or a number that is negative or not finite.
    """
    elements = sum(p.numel() for p in parameters)
    if isinstance(optimizer, (int, float)) and not isinstance(optimizer, bool):
        if not math.isfinite(optimizer) or optimizer < 0:
            raise UsageError(f"optimizer={optimizer} must be a finite number of bytes, at least 0")
        text = f"{optimizer:g} bytes per parameter"
        return OptimizerProfile(text, float(optimizer), int(elements * optimizer), 0)
    ours = _ours(optimizer)
    if ours is not None:
        return _profile_ours(*ours, parameters, device, shards, hosted)
    name = _name_of(optimizer)
    if name == _FACTORED:
        return _profile_factored(parameters, device, shards)
    states = _STATES[name]
    sizes = [p.numel() * p.element_size() for p in parameters]
    counters = _STEP_COUNTER_BYTES * len(sizes) if states and device == "cpu" else 0
    state_bytes = states * sum(sizes) + counters
    # On CUDA torch updates all parameters at once, so a temporary has the size of all of them.
    extent = max(sizes, default=0) if device == "cpu" else sum(sizes)
    copies = _TEMPORARIES.get(name, 0) if device == "cpu" else min(_TEMPORARIES.get(name, 0), 1)
    return OptimizerProfile(
        name, state_bytes / elements if elements else 0.0, state_bytes, copies * extent
    )


def updates_one_by_one(optimizer: object) -> bool:
    """Whether it is a class of fxzero.optim that can update a parameter without the others."""
    ours = _ours(optimizer)
    return ours is not None and issubclass(ours[0], Optimizer)


def hostable_bytes(optimizer: object, parameters: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Bytes that each parameter's state would take in host memory; 0: it may not, or is there.

    None of torch's optimizers can keep them there.
    """
    ours = _ours(optimizer)
    kind, options = ours or (None, {})
    if kind is None or not issubclass(kind, Optimizer):
        return (0,) * len(parameters)
    return hostable(kind, options, parameters)


def _profile_factored(
    parameters: Sequence[torch.Tensor], device: str, shards: int
) -> OptimizerProfile:
    """Torch's Adafactor, one parameter after the other on any device."""
    if shards > 1:
        raise UsageError(
            "torch.optim.Adafactor cannot update matrices that are cut over ranks\n"
            '  use "fxzero.optim.Adafactor", or zero=0'
        )
    elements, state, sizes, squares = 0, 0, [0], 0
    for p in parameters:
        kept = p.element_size() * sum(math.prod(s) for s in moment_shapes(p.shape).values())
        elements += p.numel()
        state += kept + (_STEP_COUNTER_BYTES if device == "cpu" else 0)
        sizes.append(p.nbytes)
        means = math.prod(p.shape[:-2]) * p.element_size() if p.ndim > 1 else 0
        squares = max(squares, kept + means)
    # An update, and squares or their means, are there until the next have been made.
    transient = squares + max(a + b for a, b in zip(sizes, [*sizes[1:], 0], strict=True))
    each = state / elements if elements else 0.0
    return OptimizerProfile(_FACTORED, each, state, transient)


def _ours(optimizer: object) -> tuple[_Ours, Mapping[str, Any]] | None:
    """A class of fxzero.optim and its options, or None: it is something else."""
    options: Mapping[str, Any] = {}
    if isinstance(optimizer, functools.partial):
        options, optimizer = optimizer.keywords, optimizer.func
    if isinstance(optimizer, str):
        optimizer = _OURS.get(optimizer)
    if isinstance(optimizer, type) and issubclass(optimizer, (Optimizer, WholeOptimizer)):
        return optimizer, options
    return None


def _profile_ours(
    kind: _Ours,
    options: Mapping[str, Any],
    parameters: Sequence[torch.Tensor],
    device: str,
    shards: int,
    hosted: Collection[int],
) -> OptimizerProfile:
    elements = sum(p.numel() for p in parameters)
    if issubclass(kind, Optimizer):
        found = footprint(kind, options, parameters, device, hosted)
    elif issubclass(kind, optim.Muon):
        found = muon_footprint(parameters, shards)
    else:
        found = adafactor_footprint(options, parameters, shards)
    written = ", ".join(f"{name}={options[name]!r}" for name in _NAMED if name in options)
    name = f"fxzero.optim.{kind.__name__}" + (f"({written})" if written else "")
    each = (found.state + found.host) / elements if elements else 0.0
    kept = found.state + found.scratch
    return OptimizerProfile(name, each, kept, found.transient, found.scratch, found.host)


def _name_of(optimizer: object) -> str:
    name = optimizer.__name__ if isinstance(optimizer, type) else optimizer
    if not isinstance(name, str):
        raise UsageError(
            f"optimizer={optimizer!r} must be a name, a torch.optim class, or bytes per parameter, "
            "or a class of fxzero.optim, alone or in a functools.partial"
        )
    if name.lower() not in (_FACTORED, *_STATES):
        raise unknown_option(name.lower(), [_FACTORED, *_STATES, *_OURS], where="optimizer")
    return name.lower()
