"""What an optimizer will keep on the device, from its name.

The state of torch's optimizers has the parameters' dtype and shape; the counts are those of the
classes with their default arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxzero.errors import UsageError, unknown_option

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


@dataclass(frozen=True)
class OptimizerProfile:
    """Memory of an optimizer.

    Attributes:
        state_bytes: what it keeps between steps.
        transient_bytes: what it needs besides while it steps.
    """

    name: str
    bytes_per_parameter: float
    state_bytes: int
    transient_bytes: int


def profile_optimizer(
    optimizer: object, parameters: Sequence[torch.Tensor], device: str
) -> OptimizerProfile:
    """The memory of ``optimizer`` over trainable ``parameters`` on "cpu" or "cuda".

    Args:
        optimizer: a name, a ``torch.optim`` class, or a number of bytes per parameter.

    Raises:
        UsageError: a name nobody knows, or a number that is negative or not finite.
    """
    elements = sum(p.numel() for p in parameters)
    if isinstance(optimizer, (int, float)) and not isinstance(optimizer, bool):
        if not math.isfinite(optimizer) or optimizer < 0:
            raise UsageError(f"optimizer={optimizer} must be a finite number of bytes, at least 0")
        text = f"{optimizer:g} bytes per parameter"
        return OptimizerProfile(text, float(optimizer), int(elements * optimizer), 0)
    name = _name_of(optimizer)
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


def _name_of(optimizer: object) -> str:
    name = optimizer.__name__ if isinstance(optimizer, type) else optimizer
    if not isinstance(name, str):
        raise UsageError(
            f"optimizer={optimizer!r} must be a name, a torch.optim class, or bytes per parameter"
        )
    if name.lower() not in _STATES:
        raise unknown_option(name.lower(), _STATES, where="optimizer")
    return name.lower()
