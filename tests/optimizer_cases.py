"""Parameters, forms and an independent reference for tests of optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxzero import optim
from fxzero.kernels import eager_moments, eager_numerics, eager_update
from fxzero.optim.forms import Form, Numerics

SHAPES = ((33, 128), (7,), (64, 256), (1,), (9, 33), (1023,), (16, 64))
# Options of an optimizer by name, with the dtype of the parameters.
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32 with bfloat16 moments": (torch.float32, {"moments": "bfloat16"}),
    "bfloat16 with a whole master": (torch.bfloat16, {}),
    "bfloat16 with a whole master and float32 moments": (
        torch.bfloat16,
        {"moments": "float32"},
    ),
    "bfloat16 with 24 bits and int8 moments": (
        torch.bfloat16,
        {"master_bits": 24, "moments": "int8"},
    ),
    "bfloat16 rounded to nearest": (torch.bfloat16, {"master_bits": 16}),
    "bfloat16 rounded stochastically": (torch.bfloat16, {"stochastic_rounding": True}),
    "bfloat16 rounded stochastically with int8 moments": (
        torch.bfloat16,
        {"stochastic_rounding": True, "moments": "int8"},
    ),
    "float16": (torch.float16, {}),
}


def kept(form: str) -> tuple[torch.dtype, Numerics]:
    """The dtype of parameters, and the numerics, of a form by name."""
    dtype, options = FORMS[form]
    stochastic = options.get("stochastic_rounding", False)
    return dtype, Numerics.of(options.get("master_bits"), stochastic, options.get("moments"))


def parameters(
    dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES, device: str = "cpu"
) -> list[Any]:
    """The same numbers on any device."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers: NaNs, too, can be equal."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(kind)


def give_gradients(owned: list[Any], step: int) -> None:
    """Other gradients in each step, some of them zero, of one scale in each row."""
    generator = torch.Generator().manual_seed(step)
    for parameter in owned:
        values = torch.randn(parameter.shape, generator=generator)
        values = torch.where(values.abs() < 0.05, 0.0, values * 0.1)
        parameter.grad = values.to(parameter.device, parameter.dtype)


def text_of(caught: Any) -> str:
    """The message of an error, without its code."""
    return str(caught.value).removeprefix("[FXZ101] ")


def owned(optimizer: Any) -> list[Any]:
    """All parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_equal(one: Any, other: Any) -> None:
    """Weights and states of two optimizers are the same to the bit."""
    for a, b in zip(owned(one), owned(other), strict=True):
        assert torch.equal(bits(a), bits(b))
        assert one.state[a].keys() == other.state[b].keys()
        for key, value in one.state[a].items():
            assert torch.equal(bits(value), bits(other.state[b][key]))


def train(optimizer: Any, steps: Any) -> None:
    """Steps with gradients that are set by hand."""
    for step in steps:
        give_gradients(owned(optimizer), step)
        optimizer.step()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Tensors by name are the same to the bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(bits(value), bits(other[name])), name


@dataclass
class Reference:
    """One parameter that is updated in numpy's float32, one operation after the other."""

    form: Form
    index: int
    seed: int
    weight: Tensor
    state: dict[str, Tensor]

    @classmethod
    def of(cls, weight: Tensor, form: Form, index: int, seed: int, moments: Any) -> Reference:
        size, state = weight.numel(), {}
        if form.low is not None:
            state["low_bits"] = torch.zeros(size, dtype=form.low)
        for number, name in enumerate(moments):
            dtype = form.moments
            if form.quantum:
                dtype = torch.uint8 if number else torch.int8
                state[name + "_scale"] = torch.zeros(size // form.quantum)
            state[name] = torch.zeros(size, dtype=dtype)
        return cls(form, index, seed, weight.detach().flatten().clone(), state)

    def step(self, gradient: Tensor, number: int, moments: Any, rule: Any) -> None:
        form, size = self.form, self.weight.numel()
        weight = torch.empty(size)
        if form.low is None:
            weight.copy_(self.weight)
        else:
            eager_numerics.join(self.weight, self.state["low_bits"], weight)
        cpu = torch.device("cpu")
        random = eager_numerics.random_bits(self.seed, number, self.index, size, cpu)
        loaded = [self._load(name) for name in moments]
        new, *kept = rule(weight.numpy(), gradient.float().numpy(), *loaded)
        result = torch.from_numpy(new)
        if form.low is not None:
            eager_numerics.split(result, self.weight, self.state["low_bits"])
        elif form.stochastic:
            eager_numerics.stochastic_bfloat16(result, random, self.weight)
        else:
            self.weight.copy_(result)
        for turn, (name, moment) in enumerate(zip(moments, kept, strict=True)):
            if form.quantum:
                bits = random >> 8 if turn else random & 0xFF
                scales = self.state[name + "_scale"]
                x, root = torch.from_numpy(moment), eager_update.exact_root if turn else None
                codes, scale = eager_moments.encoded(x, bits, form.quantum, root)
                self.state[name].copy_(codes)
                scales.copy_(scale)
            else:
                self.state[name].copy_(torch.from_numpy(moment))

    def take(self, weight: Tensor, state: Any) -> None:
        """Goes on from an optimizer's weight and state."""
        self.weight.copy_(weight.detach().flatten())
        for name, value in self.state.items():
            value.view(-1).copy_(state[name].flatten().view(value.dtype))

    def _load(self, name: str) -> Any:
        stored = self.state[name]
        if not self.form.quantum:
            return stored.float().numpy()
        scales = self.state[name + "_scale"]
        return eager_moments.decoded(stored, scales, self.form.quantum).numpy()


def check_against_numpy(
    make: Any, options: dict[str, Any], form: str, rule: Any, device: str = "cpu"
) -> None:
    """Four steps whose weights and states must have the bits of the reference.

    On another device what is rounded at random is computed fast: each step must be near to that of
    the reference from the same state.
    """
    dtype, numerics = kept(form)
    owned = parameters(dtype, device=device)
    optimizer = make(owned, seed=3, **options, **FORMS[form][1])
    moments = optimizer.rule.moments
    expected, index = [], 0
    for p in owned:
        expected.append(Reference.of(p.cpu(), numerics.form(p), index, 3, moments))
        index += -(-p.numel() // 8) * 8
    for step in range(1, 5):
        give_gradients(owned, step)
        optimizer.step()
        columns = optimizer.rule.scalars(optimizer.param_groups[0], torch.tensor([step]).double())
        scalars = [float(column) for column in columns]
        for p, reference in zip(owned, expected, strict=True):
            reference.step(p.grad.flatten().cpu(), step, moments, rule(scalars))
            where, state = f"{list(p.shape)} in step {step}", optimizer.state[p]
            kind = reference.form
            if device != "cpu" and (kind.stochastic or kind.quantum):
                jump = 3 * options["lr"] if optimizer.rule.name == "lion" else 0.0
                near(p, state, reference, jump)
                reference.take(p, state)
                continue
            same(p, reference.weight, f"weight of {where}")
            for key, value in reference.state.items():
                same(state[key], value, f"{key} of {where}")


def near(weight: Tensor, state: Any, expected: Reference, jump: float) -> None:
    """What a step has made is that of the reference but for what its last bits decide.

    Few numbers are rounded to the other side, by one: a code, or a bit of bfloat16.

    Args:
        jump: how far a weight may be from where it should be, where its step has the other sign.
    """
    ours, theirs = weight.detach().cpu().flatten(), expected.weight
    if expected.form.low is not None:
        low = state["low_bits"].cpu().flatten().view(expected.form.low)
        wholes = torch.empty(2, len(ours))
        eager_numerics.join(ours, low, wholes[0])
        eager_numerics.join(theirs, expected.state["low_bits"], wholes[1])
        ours, theirs = wholes
    pairs = {"weight": (ours, theirs)}
    for name in expected.state:
        if name != "low_bits":
            pairs[name] = state[name].cpu().flatten(), expected.state[name]
    for name, (found, wanted) in pairs.items():
        distance = (found.double() - wanted.double()).abs()
        one = 2.0**-7 * wanted.double().abs() + 1e-7
        if not wanted.is_floating_point():
            one = torch.ones(())
        elif name.endswith("_scale"):
            one = 1e-5 * wanted.double()
        far = distance > (one + jump if name == "weight" else one)
        assert not far.any(), f"{name}: {distance.max()}"
        if not name.endswith("_scale"):
            other = (distance > (1e-5 * wanted.double().abs() + 1e-7)).sum()
            assert other <= 2 + len(wanted) // 100, f"{name}: {other} of {len(wanted)}"


def same(ours: Tensor, expected: Tensor, what: str) -> None:
    """Equal to the bit."""
    # States show 16 low bits as a bfloat16.
    assert ours.dtype == (torch.bfloat16 if expected.dtype == torch.int16 else expected.dtype), what
    assert torch.equal(bits(ours.flatten()).cpu(), bits(expected)), what


def check_stale_weights(weight: Any, optimizer: Any) -> None:
    """A backward that has saved weights of before a step must raise."""
    x = torch.randn(2, weight.shape[1], dtype=weight.dtype, requires_grad=True)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    loss = (x @ weight.t()).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def adamw(scalars: Any) -> Any:
    keep, toward1, beta2, toward2, size, root, eps = (np.float32(x) for x in scalars)

    def rule(w: Any, g: Any, m: Any, v: Any) -> Any:
        m = m + (g - m) * toward1
        v = v * beta2 + toward2 * g * g
        return w * keep - size * m / (np.sqrt(v) * root + eps), m, v

    return rule


def lion(scalars: Any) -> Any:
    keep, beta1, toward1, beta2, toward2, lr = (np.float32(x) for x in scalars)

    def rule(w: Any, g: Any, m: Any) -> Any:
        sign = np.sign(m * beta1 + g * toward1)
        return w * keep - sign * lr, m * beta2 + g * toward2

    return rule


def sgd(scalars: Any) -> Any:
    decay, momentum, taken, lr, nesterov = (np.float32(x) for x in scalars)

    def rule(w: Any, g: Any, m: Any) -> Any:
        g = g + w * decay
        m = m * momentum + g * taken
        return w - (g + m * momentum if nesterov else m) * lr, m

    return rule


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "adamw": (optim.AdamW, {"lr": 1e-2}, adamw),
    "lion": (optim.Lion, {"lr": 1e-3, "weight_decay": 0.1}, lion),
    "sgd": (optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "nesterov": True}, sgd),
}
