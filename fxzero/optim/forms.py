"""How an optimizer keeps a parameter and its moments: dtypes, and what is beside them.

A form follows from the parameter's whole shape and dtype and from what was asked, never from how
the parameter is cut over ranks: so results do not, either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fxzero.errors import UsageError

# Neighbours that share a scale of 8-bit moments: the most that a row is a multiple of.
_QUANTA = (128, 64, 32)
_MASTER_BITS = (16, 24, 32)
_MOMENTS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Form:
    """How one parameter is kept.

    Attributes:
        weight: dtype of the parameter.
        low: dtype of what bfloat16 weights have lost, or None.
        stochastic: weights are rounded up or down at random, right on average.
        moments: dtype of moments; int8: codes with scales.
        quantum: elements that share a scale of codes, or 0.
    """

    weight: torch.dtype
    low: torch.dtype | None
    stochastic: bool
    moments: torch.dtype
    quantum: int

    @property
    def plain(self) -> bool:
        """Whether torch's own kernels for one dtype do all of it.

        Not for 16 bits: there its fused SGD reads behind the end of a tensor (torch 2.13).
        """
        wide = self.weight.itemsize >= 4
        return wide and self.moments == self.weight

    def state_bytes(self, elements: int, moments: int) -> int:
        """Bytes of the state of a parameter of so many elements, with 1 or 2 moments."""
        low = self.low.itemsize if self.low is not None else 0
        scales = 4 * elements // self.quantum if self.quantum else 0
        return elements * low + moments * (elements * self.moments.itemsize + scales)


@dataclass(frozen=True)
class Numerics:
    """What was asked of an optimizer.

    Attributes:
        master_bits: of a bfloat16 weight that are kept: 16, as the model sees it; 24 or 32 with the
            lost ones in the optimizer's state.
        stochastic: round bfloat16 weights stochastically; needs ``master_bits`` of 16.
        moments: "float32", "bfloat16", "int8", or None: the parameter's dtype.
    """

    master_bits: int
    stochastic: bool
    moments: str | None

    @classmethod
    def of(cls, master_bits: int | None, stochastic_rounding: bool, moments: object) -> Numerics:
        """Checked options.

        Raises:
            UsageError: an option that is none, or two that exclude each other.
        """
        bits = (16 if stochastic_rounding else 32) if master_bits is None else master_bits
        if bits not in _MASTER_BITS:
            raise UsageError(f"master_bits={master_bits} must be 16, 24 or 32")
        if stochastic_rounding and bits != 16:
            raise UsageError(
                f"master_bits={bits} keeps the bits that stochastic_rounding=True would round away"
                "\n  leave one of them out"
            )
        name = str(moments).removeprefix("torch.") if moments is not None else None
        if name is not None and name not in _MOMENTS:
            raise UsageError(f"moments={moments!r} must be one of {', '.join(_MOMENTS)}, or None")
        return cls(bits, stochastic_rounding, name)

    def form(self, parameter: torch.Tensor) -> Form:
        """How ``parameter`` is kept.

        8-bit moments need rows that are multiples of 32 elements; parameters with others, such as
        biases and the weights of norms, have moments in float32.
        """
        narrow = parameter.dtype == torch.bfloat16
        low = {24: torch.int8, 32: torch.int16}.get(self.master_bits) if narrow else None
        moments, quantum = parameter.dtype, 0
        if self.moments == "int8":
            row = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 1
            quantum = next((q for q in _QUANTA if row and row % q == 0), 0)
            moments = torch.int8 if quantum else torch.float32
        elif self.moments is not None:
            moments = getattr(torch, self.moments)
        return Form(parameter.dtype, low, narrow and self.stochastic, moments, quantum)
