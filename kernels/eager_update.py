"""What ``update`` does in kernels, for tensors: one step of AdamW, SGD or Lion, equal to the bit.

The function is written to become one loop over memory when a compiler turns it into code; it runs
operator by operator, too.  Compilers have no vectors of 16-bit integers, so where all tensors have
16 bits they are taken as int32, two elements at a time:

    int32 word     [ element 1 | element 0 ]
    element 0      word << 16              as float32
    element 1      word & 0xFFFF0000
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxzero.kernels import eager_moments

_UPPER, _LOWER = -0x10000, 0xFFFF
_NAN = 0x7FC00000
Values = tuple[Tensor, ...]
Root = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """What is known of a step before it runs.

    Attributes:
        rule: "adamw", "sgd" or "lion".
        low_bits: 0, 8 or 16.
        stochastic: whether weights are rounded stochastically.
        quantum: elements of a scale, or 0.
        pairs: whether all tensors are int32 with two elements in each.
    """

    rule: str
    low_bits: int
    stochastic: bool
    quantum: int
    pairs: bool

    @property
    def random(self) -> bool:
        return self.stochastic or self.quantum > 0


def update(
    kind: Kind,
    weight: Tensor,
    low: Tensor | None,
    gradient: Tensor,
    moments: Sequence[Tensor],
    scales: Sequence[Tensor],
    scalars: Tensor,
    random: Tensor | None,
    root: Root = torch.sqrt,
) -> None:
    """Updates weights, low bits, moments and scales in place; all are one-dimensional.

    Args:
        low: int8; int32 for 16 low bits, of which the lower half is what counts on return.
        scales: of 8-bit moments.
        scalars: float32 [16], as ``update.update`` reads a row of them.
        random: 16 random bits of each element as int32, where weights or moments need them.
        root: the square root; ``exact_root`` where no code is generated.
    """
    values = scalars.unbind()
    if kind.pairs:
        assert low is not None
        _update_pairs(kind, weight, low, gradient, moments, values, root)
        return
    master = weight.float()
    if low is not None:
        lost = low.to(torch.int32) << 8 if kind.low_bits == 8 else low
        master = (master.view(torch.int32) + lost).view(torch.float32)
    loaded = [_load(kind, m, scales[i : i + 1]) for i, m in enumerate(moments)]
    master, *kept = RULES[kind.rule](master, gradient.float() * values[-2], *loaded, values, root)
    bits = master.view(torch.int32)
    if low is not None:
        rounded = (bits + 0x80) & -0x100 if kind.low_bits == 8 else bits
        weight.copy_(_upper(rounded + 0x8000, master))
        low.copy_((rounded << 16) >> 24 if kind.low_bits == 8 else bits)
    elif kind.stochastic:
        assert random is not None
        weight.copy_(_upper(bits + random, master))
    else:
        weight.copy_(master)
    for i, (stored, new) in enumerate(zip(moments, kept, strict=True)):
        if kind.quantum:
            assert random is not None
            chosen = random >> 8 if i else random & 0xFF
            codes, scale = eager_moments.encoded(new, chosen, kind.quantum, root if i else None)
            stored.copy_(codes)
            scales[i].copy_(scale)
        else:
            stored.copy_(new)


def _load(kind: Kind, moment: Tensor, scale: Sequence[Tensor]) -> Tensor:
    if not kind.quantum:
        return moment.float()
    return eager_moments.decoded(moment, scale[0], kind.quantum)


def _upper(bits: Tensor, master: Tensor) -> Tensor:
    """The upper half of the bits as float32, a NaN where ``master`` is one."""
    upper = torch.where(master != master, _NAN, bits & _UPPER)
    return upper.view(torch.float32)


def _update_pairs(
    kind: Kind,
    weight: Tensor,
    low: Tensor,
    gradient: Tensor,
    moments: Sequence[Tensor],
    values: Values,
    root: Root,
) -> None:
    """The same for words of two elements, with 16 low bits and moments in bfloat16.

    Nothing looks for NaNs: those that arithmetic makes, or hands on from bfloat16, have no low
    bits, and what is added to round them cannot carry into the upper half.
    """
    highs, lows = _apart(weight), ((low << 16) >> 16, low >> 16)
    masters = [
        (high.view(torch.int32) + rest).view(torch.float32)
        for high, rest in zip(highs, lows, strict=True)
    ]
    gradients = [g * values[-2] for g in _apart(gradient)]
    loaded = [_apart(moment) for moment in moments]
    rule = RULES[kind.rule]
    results = [
        rule(masters[i], gradients[i], *(m[i] for m in loaded), values, root) for i in (0, 1)
    ]
    new = [result[0] for result in results]
    bits = [x.view(torch.int32) for x in new]
    weight.copy_(_together(bits[0] + 0x8000, bits[1] + 0x8000))
    low.copy_((bits[0] & _LOWER) | (bits[1] << 16))
    for number, moment in enumerate(moments, 1):
        moment.copy_(_together(*(_nearest(result[number]) for result in results)))


def _apart(words: Tensor) -> tuple[Tensor, Tensor]:
    """Both bfloat16 of each word as float32."""
    return (words << 16).view(torch.float32), (words & _UPPER).view(torch.float32)


def _together(first: Tensor, second: Tensor) -> Tensor:
    """Words of the upper halves of the bits of two float32."""
    return ((first >> 16) & _LOWER) | (second & _UPPER)


def _nearest(x: Tensor) -> Tensor:
    """Bits whose upper half is the nearest bfloat16."""
    bits = x.view(torch.int32)
    return bits + 0x7FFF + ((bits >> 16) & 1)


def exact_root(x: Tensor) -> Tensor:
    """The root in float32; torch's own on a CPU is off by one bit in a sixth of all values."""
    return x.double().sqrt().float()


def adamw(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, s: Values, root: Root
) -> Values:
    """As ``update.adamw``."""
    first = first + (gradient - first) * s[1]
    second = second * s[2] + s[3] * gradient * gradient
    return weight * s[0] - s[4] * first / (root(second) * s[5] + s[6]), first, second


def lion(weight: Tensor, gradient: Tensor, first: Tensor, s: Values, _: Root) -> Values:
    """As ``update.lion``."""
    sign = (first * s[1] + gradient * s[2]).sign()
    return weight * s[0] - sign * s[5], first * s[3] + gradient * s[4]


def sgd(weight: Tensor, gradient: Tensor, first: Tensor, s: Values, _: Root) -> Values:
    """As ``update.sgd``."""
    gradient = gradient + weight * s[0]
    first = first * s[1] + gradient * s[2]
    step = torch.where(s[4] != 0, gradient + first * s[1], first)
    return weight - step * s[3], first


RULES: dict[str, Callable[..., Values]] = {"adamw": adamw, "lion": lion, "sgd": sgd}
