"""Kernels' arithmetic in Triton's interpreter against torch's casts and its twins in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fxzero.kernels import eager_numerics, numerics

_SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-40, 3.4e38, -3.4e38]
_CPU = torch.device("cpu")


def _floats(count: int = 1 << 16) -> torch.Tensor:
    """Bits at random, so every exponent; ties; what is special; NaNs that a carry would wrap."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    bits[: count // 8] = bits[: count // 8] & -0x10000 | 0x8000  # ties of bfloat16
    values = bits.view(torch.float32)
    values[-len(_SPECIAL) :] = torch.tensor(_SPECIAL)
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FFF8000], dtype=torch.int32)
    values[-20:-16] = nan.view(torch.float32)
    return values


def _same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == expected.dtype
    assert torch.equal(ours.isnan(), expected.isnan())
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    numbers = ~expected.isnan()
    assert torch.equal(ours.view(kind)[numbers], expected.view(kind)[numbers])


@triton.jit
def _nearest(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, numerics.nearest_bfloat16(tl.load(x + i)))


def test_nearest_bfloat16_is_that_of_torch() -> None:
    x = _floats()
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    _nearest[(1,)](x, out, x.numel())
    _same(out, x.to(torch.bfloat16))


@triton.jit
def _widened(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, numerics.to_float32(tl.load(x + i)))


def test_every_bfloat16_is_the_same_float32() -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.empty(x.shape)
    _widened[(1,)](x, out, x.numel())
    _same(out, x.float())


@triton.jit
def _there_and_back(x, high, low, back, BITS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    upper, lower = numerics.split(tl.load(x + i), BITS)
    tl.store(high + i, upper)
    tl.store(low + i, lower)
    tl.store(back + i, numerics.join(upper, lower, BITS))


@pytest.mark.parametrize(("bits", "dtype"), [(16, torch.int16), (8, torch.int8)])
def test_a_master_comes_back_from_its_halves(bits: int, dtype: torch.dtype) -> None:
    x = _floats()
    high, low = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(x.shape, dtype=dtype)
    back = torch.empty_like(x)
    _there_and_back[(1,)](x, high, low, back, bits, x.numel())
    assert torch.equal(high.isnan(), x.isnan()), "a NaN is seen by the model"
    numbers = x[~x.isnan()]
    if bits == 16:
        _same(back[~x.isnan()], numbers)
    else:
        finite = x.isfinite() & (x.abs() > 1e-30) & (x.abs() < 3e38)
        assert ((back - x).abs() <= x.abs() * 2.0**-16)[finite].all()
    tied = (x.view(torch.int32) & 0xFFFF) == 0x8000
    rounded = x.to(torch.bfloat16)
    plain = ~tied & ~x.isnan()
    if bits == 16:
        _same(high[plain], rounded[plain])
    ours_high, ours_low, ours_back = torch.empty_like(high), torch.empty_like(low), torch.empty(0)
    eager_numerics.split(x, ours_high, ours_low)
    assert torch.equal(ours_high.view(torch.int16), high.view(torch.int16))
    assert torch.equal(ours_low, low)
    ours_back = torch.empty_like(x)
    eager_numerics.join(ours_high, ours_low, ours_back)
    _same(ours_back, back)


@triton.jit
def _random(out, first, seed, step, ANYWHERE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    start, key, turn = tl.load(first), tl.load(seed), tl.load(step)
    if ANYWHERE:
        bits = numerics.random_bits_anywhere(key, turn, start, BLOCK)
    else:
        bits = numerics.random_bits(key, turn, start, BLOCK)
    tl.store(out + i, bits.to(tl.int32))


def _drawn(first: int, seed: int, step: int, anywhere: bool, count: int) -> torch.Tensor:
    out = torch.empty(count, dtype=torch.int32)
    start, key = torch.tensor([first]), torch.tensor([seed])
    _random[(1,)](out, start, key, torch.tensor([step], dtype=torch.int32), anywhere, count)
    return out


@pytest.mark.parametrize("first", [0, 8, 2**35 + 64])
def test_random_bits_belong_to_the_element_and_the_step(first: int) -> None:
    bits = _drawn(first, 7, 3, False, 1024)
    assert torch.equal(bits, _drawn(first, 7, 3, True, 1024))
    assert torch.equal(bits[5:133], _drawn(first + 5, 7, 3, True, 128)), "cut anywhere"
    assert torch.equal(bits, eager_numerics.random_bits(7, 3, first, 1024, _CPU))
    assert torch.equal(bits[5:138], eager_numerics.random_bits(7, 3, first + 5, 133, _CPU))
    assert not torch.equal(bits, _drawn(first, 7, 4, False, 1024))
    assert not torch.equal(bits, _drawn(first, 8, 3, False, 1024))


def test_the_generator_is_philox() -> None:
    """The vector for zeros that its authors publish (Random123, kat_vectors)."""
    zero = torch.tensor(0)
    words = eager_numerics._philox(zero, zero, torch.tensor([0]))
    assert [f"{word.item():08x}" for word in words] == [
        "5f6fb709", "0d893f64", "4f121f81", "4f730a48",
    ]  # fmt: skip


@triton.jit
def _stochastic(x, random, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    bits = tl.load(random + i).to(tl.uint32)
    tl.store(out + i, numerics.stochastic_bfloat16(tl.load(x + i), bits))


def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    x = _floats()
    random = eager_numerics.random_bits(1, 1, 0, x.numel(), _CPU)
    out, ours = (torch.empty(x.shape, dtype=torch.bfloat16) for _ in range(2))
    _stochastic[(1,)](x, random, out, x.numel())
    eager_numerics.stochastic_bfloat16(x, random, ours)
    assert torch.equal(out.view(torch.int16), ours.view(torch.int16))
    assert torch.equal(out.isnan(), x.isnan())
    exact = (x.view(torch.int32) & 0xFFFF) == 0
    _same(out[exact].float(), x[exact])
    value = torch.full((1 << 16,), 1 + 2.0**-9)  # a quarter of the way to the next bfloat16
    _stochastic[(1,)](value, random, out, value.numel())
    assert set(out.float().unique().tolist()) == {1.0, 1 + 2.0**-7}
    share = (out.float() > 1).double().mean().item()
    assert share == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / out.numel()))


@triton.jit
def _float8(x, out, MANTISSA: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, numerics.float8_bits(tl.load(x + i), MANTISSA))


@pytest.mark.parametrize(
    ("mantissa", "dtype", "largest"),
    [(3, torch.float8_e4m3fn, 448.0), (2, torch.float8_e5m2, 57344.0)],
)
def test_float8_is_that_of_torch_and_saturates(
    mantissa: int, dtype: torch.dtype, largest: float
) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    every = every[every.isfinite()].sort().values
    ties = (every[1:] + every[:-1]) / 2
    near = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0)) * largest / 8
    values = torch.cat([_floats(), every, ties, near, near * 1e-5])
    x = torch.zeros(1 << 18)
    x[: values.numel()] = values
    out = torch.empty(x.shape, dtype=torch.uint8)
    _float8[(1,)](x, out, mantissa, x.numel())
    _same(out.view(dtype), x.clamp(-largest, largest).to(dtype))


@triton.jit
def _integer(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, numerics.nearest_integer(tl.load(x + i)))


def test_nearest_integer_is_that_of_torch() -> None:
    x = torch.randn(1 << 12) * 1000
    x[:256] = torch.arange(-128, 128) + 0.5
    out = torch.empty_like(x)
    _integer[(1,)](x, out, x.numel())
    assert torch.equal(out, x.round())
