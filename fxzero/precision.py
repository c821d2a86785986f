"""The dtypes of a training step: what it computes, reduces and keeps parameters in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxzero.errors import UsageError, unknown_option
from fxzero.quantization import KINDS
from fxzero.structure import flatten


@dataclass(frozen=True)
class Precision:
    """Mixed precision, and what ranks send one another.

    Attributes:
        param: what parameters and floating-point inputs are computed in; None: as they are.
        reduce: what gradients are averaged over ranks in; None: as they are computed.
        master: what parameters, and so gradients and optimizer state, are kept in; None: as they
            are.
        send_weights: "int8", "int4" or "fp8": what a gather of weights moves; None: the weights.
        send_gradients: the same for reduce-scatters of gradients, in stages 1 to 3.
    """

    param: torch.dtype | None = None
    reduce: torch.dtype | None = None
    master: torch.dtype | None = None
    send_weights: str | None = None
    send_gradients: str | None = None

    def __post_init__(self) -> None:
        for name in ("param", "reduce", "master"):
            dtype = getattr(self, name)
            if dtype is not None and not _is_floating(dtype):
                raise UsageError(f"Precision({name}={dtype!r}) must be a floating torch.dtype")
        for name in ("send_weights", "send_gradients"):
            kind = getattr(self, name)
            if kind is not None and kind not in KINDS:
                raise unknown_option(str(kind), KINDS, where=name)

    def computed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter or input in the dtype that it is computed in."""
        return _cast(tensor, self.param)

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the model with its parameters in the dtype that they are computed in."""
        if self.param is None:
            return model(*args, **kwargs)
        computed = {name: self.computed(p) for name, p in model.named_parameters()}
        return torch.func.functional_call(model, computed, args, kwargs)

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the model with parameters and inputs in the dtype that they are computed in."""
        leaves, structure = flatten((args, kwargs))
        args, kwargs = structure.fill([self.computed(leaf) for leaf in leaves])
        return self.call(model, args, kwargs)

    def keep(self, model: nn.Module) -> None:
        """Turns the model's floating-point parameters into the dtype that they are kept in."""
        if self.master is not None:
            for parameter in model.parameters():
                if parameter.is_floating_point() and parameter.dtype != self.master:
                    parameter.data = parameter.data.to(self.master)


def check_precision(precision: object) -> Precision:
    """The precision that a user gave; raises UsageError for anything else."""
    if precision is None:
        return Precision()
    if not isinstance(precision, Precision):
        raise UsageError(
            f"precision={precision!r} must be a fxzero.Precision\n"
            "  such as fxzero.Precision(param=torch.bfloat16, reduce=torch.float32)"
        )
    return precision


def _is_floating(dtype: object) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def autocast_state() -> tuple[Any, ...]:
    """What autocast is set to, for CPU and CUDA."""
    return tuple(
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    )
