"""Quantized numbers in Triton's interpreter: as in numpy, as in their twins, in their memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from guarded import at_both_ends, exit_code
from torch import Tensor

from fxzero.kernels import eager_numerics, eager_quantize, quantize

_KINDS = ("int8", "int4", "fp8")
_FLOATS = (torch.float32, torch.bfloat16)
_SIZES = (1, 7, 1023, 1024, 65537)
_KEY = torch.tensor([7, 3, 2**33 + 8 * 5])
_POISON = 85
_MARGIN = 64


def _values(count: int, dtype: torch.dtype, quantum: int = 256) -> Tensor:
    """So many numbers of all sizes and zeros behind them, up to a multiple of the quantum.

    Blocks of them are tied between codes, subnormal, zero or not finite.
    """
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, generator=generator) * torch.randn(count, generator=generator).exp()
    padded = torch.zeros(-(-count // quantum) * quantum)
    padded[:count] = x
    blocks = padded.view(-1, quantum)
    if len(blocks) > 3:
        blocks[0, :255] = (torch.arange(255) - 127.0)[: blocks[0, :255].numel()] / 2
        blocks[0, 1], blocks[1] = 127.0, 0.0
        blocks[2] *= 1e-38
        blocks[3] *= 1e-44
    if len(blocks) > 8:
        blocks[4, 3], blocks[5, 0], blocks[6, -1] = float("nan"), float("inf"), -float("inf")
        blocks[7] *= 3e38 / blocks[7].abs().max()
    return padded.to(dtype)


def _poisoned(count: int, dtype: torch.dtype) -> Tensor:
    return torch.full((count + 2 * _MARGIN,), _POISON, dtype=dtype)


def _middle(buffer: Tensor) -> Tensor:
    return buffer[_MARGIN:-_MARGIN]


def _untouched(*buffers: Tensor) -> bool:
    return all(
        bool((edge == _POISON).all()) for b in buffers for edge in (b[:_MARGIN], b[-_MARGIN:])
    )


def _quantized(
    x: Tensor, kind: str, quantum: int = 256, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the kernel makes of it; the twin makes the same of it."""
    count = eager_quantize.codes_of(x.numel(), kind)
    codes = _poisoned(count, eager_quantize.CODE_TYPE[kind])
    scales = _poisoned(x.numel() // quantum, torch.float32)
    quantize.quantize(x, _middle(codes), _middle(scales), kind, key)
    assert _untouched(codes, scales)
    ours, our_scales = torch.empty_like(_middle(codes)), torch.empty_like(_middle(scales))
    eager_quantize.quantize(x, ours, our_scales, kind, key)
    _same(our_scales, _middle(scales))
    finite = our_scales.isfinite()
    rows = (each.view(len(our_scales), -1)[finite] for each in (ours, _middle(codes)))
    assert torch.equal(*rows)
    return _middle(codes).clone(), _middle(scales).clone()


def _same(ours: Tensor, expected: Tensor) -> None:
    assert ours.dtype == expected.dtype
    assert torch.equal(ours.isnan(), expected.isnan())
    kind = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    numbers = ~expected.isnan()
    assert torch.equal(ours.view(kind)[numbers], expected.view(kind)[numbers])


def _float8_values() -> np.ndarray:
    """The numbers from 0 that e4m3 has, which are 127: by their codes."""
    codes = torch.arange(127, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).double().numpy()


def _reference(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows of float32, in numpy."""
    largest_code = {"int8": 127, "int4": 7, "fp8": 448}[kind]
    with np.errstate(all="ignore"):
        largest = np.abs(x).max(1)
        scale = np.maximum(largest * np.float32(1 / largest_code), np.float32(2.0**-122))
        scale[~np.isfinite(largest)] = np.nan
        scaled = np.nan_to_num(x * (np.float32(1) / scale)[:, None])
    if kind == "fp8":
        scaled = (scaled * np.float32(2.0**-120)).astype(np.float64) * 2.0**120
        found = _nearest(np.abs(scaled), _float8_values()) | np.where(np.signbit(scaled), 0x80, 0)
        return found.astype(np.uint8), scale
    found = np.rint(scaled).astype(np.int64)
    if kind == "int4":
        low, high = np.split(found % 16, 2, axis=1)
        return (low + 16 * high).astype(np.uint8), scale
    return found.astype(np.int8), scale


def _nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the nearest of sorted values, of two the even one."""
    above = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    down, up = x - values[above - 1], values[above] - x
    return np.where((down < up) | ((down == up) & (above % 2 == 1)), above - 1, above)


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("count", _SIZES)
def test_codes_are_those_of_numpy(count: int, kind: str, dtype: torch.dtype) -> None:
    x = _values(count, dtype)
    codes, scales = _quantized(x, kind)
    expected, expected_scales = _reference(x.float().view(-1, 256).numpy(), kind)
    _same(scales, torch.from_numpy(expected_scales))
    rows = torch.from_numpy(expected)[scales.isfinite()]
    assert torch.equal(codes.view(len(scales), -1)[scales.isfinite()], rows)


@pytest.mark.parametrize("quantum", [32, 128, 2048])
@pytest.mark.parametrize("kind", _KINDS)
def test_other_quanta_do_as_well(kind: str, quantum: int) -> None:
    x = _values(20_000, torch.float32, quantum)
    codes, scales = _quantized(x, kind, quantum)
    expected, expected_scales = _reference(x.view(-1, quantum).numpy(), kind)
    _same(scales, torch.from_numpy(expected_scales))
    rows = torch.from_numpy(expected)[scales.isfinite()]
    assert torch.equal(codes.view(len(scales), -1)[scales.isfinite()], rows)


def _floats(codes: np.ndarray, scales: np.ndarray, kind: str) -> np.ndarray:
    """What codes stand for, as rows of float32."""
    rows = codes.reshape(len(scales), -1)
    if kind == "int4":
        rows = np.concatenate([rows % 16, rows // 16], axis=1).astype(np.int64)
        rows = np.where(rows < 8, rows, rows - 16)
    elif kind == "fp8":
        signs = np.where(rows & 0x80, -1.0, 1.0)
        rows = signs * np.append(_float8_values(), 480.0)[rows & 0x7F]
    return rows.astype(np.float32) * scales[:, None]


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("count", _SIZES)
def test_floats_come_back_as_in_numpy(count: int, kind: str, dtype: torch.dtype) -> None:
    codes, scales = _quantized(_values(count, torch.float32), kind)
    out = _poisoned(scales.numel() * 256, dtype)
    quantize.dequantize(codes, scales, _middle(out), kind)
    assert _untouched(out)
    expected = torch.from_numpy(_floats(codes.numpy(), scales.numpy(), kind)).flatten()
    _same(_middle(out).clone(), expected.to(dtype))
    ours = torch.empty_like(_middle(out))
    eager_quantize.dequantize(codes, scales, ours, kind)
    _same(ours, _middle(out).clone())


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -0x400000])
@pytest.mark.parametrize("kind", _KINDS)
def test_no_carry_makes_a_number_of_a_block_that_is_none(kind: str, bits: int) -> None:
    """0x7FFFFFFF is the NaN of a device's arithmetic; rounded in integers it would be -0.0."""
    codes, scales = _quantized(_values(1024, torch.float32), kind)
    scales[1] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for pieces in (1, 2):
        out = torch.empty(1024, dtype=torch.bfloat16)
        quantize.dequantize_reduce(codes.repeat(pieces), scales.repeat(pieces), out, kind)
        assert out[256:512].isnan().all()
        assert not out[:256].isnan().any()


@pytest.mark.parametrize("pieces", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("kind", _KINDS)
def test_pieces_are_added_in_their_order_as_float32(kind: str, pieces: int) -> None:
    rows = 33
    x = torch.cat([_values(rows * 256, torch.float32) * (i + 1) for i in range(pieces)])
    codes, scales = _quantized(x, kind)
    each = _floats(codes.numpy(), scales.numpy(), kind).reshape(pieces, -1)
    with np.errstate(all="ignore"):
        expected = each[0].copy()
        for piece in each[1:]:
            expected += piece
        expected *= np.float32(1 / pieces)
    for dtype in _FLOATS:
        out = _poisoned(rows * 256, dtype)
        squares = _poisoned(3, torch.float32)
        quantize.dequantize_reduce(codes, scales, _middle(out), kind, _middle(squares))
        assert _untouched(out, squares)
        _same(_middle(out).clone(), torch.from_numpy(expected).to(dtype))
        ours, our_squares = torch.empty(rows * 256, dtype=dtype), torch.empty(3)
        eager_quantize.dequantize_reduce(codes, scales, ours, kind, our_squares)
        _same(ours, _middle(out).clone())
        assert torch.equal(our_squares.isnan(), _middle(squares).isnan())
        with np.errstate(all="ignore"):
            blocks = np.pad(expected.astype(np.float64), (0, 3 * 4096 - rows * 256))
            sums = torch.from_numpy((blocks**2).reshape(3, -1).sum(1).astype(np.float32))
        torch.testing.assert_close(_middle(squares), sums, rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(our_squares, sums, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", _KINDS)
def test_stochastic_codes_are_neighbours_and_right_on_average(kind: str) -> None:
    for dtype in _FLOATS:
        x = _values(65537, dtype)
        codes, scales = _quantized(x, kind, key=_KEY)
        floats = torch.from_numpy(_floats(codes.numpy(), scales.numpy(), kind))
        rows, ulp = x.float().view(-1, 256), scales[:, None]
        if kind == "fp8":
            ulp = torch.maximum(rows.abs() / 8, ulp / 512)
        error = (floats - rows).abs()[scales.isfinite()]
        assert (error <= (ulp * (1 + 2.0**-15)).expand_as(rows)[scales.isfinite()]).all()
        assert torch.equal(floats.isnan().any(1), ~scales.isfinite())
    value = torch.full((65536,), 0.3)
    value[::256] = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}[kind]
    step = 1.0 if kind != "fp8" else 2.0**-5
    codes, scales = _quantized(value, kind, key=_KEY)
    floats = torch.from_numpy(_floats(codes.numpy(), scales.numpy(), kind))[:, 1:]
    assert len(floats.unique()) == 2
    assert abs(floats.double().mean().item() - 0.3) < 4 * step / 2 / 65280**0.5


@pytest.mark.parametrize("kind", _KINDS)
def test_random_bits_belong_to_the_element_wherever_it_is_cut(kind: str) -> None:
    x = _values(65536, torch.float32)
    whole, scales = _quantized(x, kind, key=_KEY)
    for ranks in (2, 4):
        for rank, part in enumerate(x.chunk(ranks)):
            key = _KEY + torch.tensor([0, 0, rank * part.numel()])
            codes, _ = _quantized(part, kind, key=key)
            finite = scales.chunk(ranks)[rank].isfinite()
            rows = (c.view(len(finite), -1)[finite] for c in (codes, whole.chunk(ranks)[rank]))
            assert torch.equal(*rows)
    other, _ = _quantized(x, kind, key=_KEY + torch.tensor([0, 1, 0]))
    assert not torch.equal(other, whole)


def test_random_bits_of_int8_are_those_of_numerics() -> None:
    x = torch.rand(8192, generator=torch.Generator().manual_seed(0)) * 127
    x[::256] = 127.0
    codes, _ = _quantized(x, "int8", key=_KEY)
    random = eager_numerics.random_bits(*_KEY.tolist(), 8192, torch.device("cpu")).double()
    shifted = x.double() + (random + 0.5) / 65536
    sure = (shifted - shifted.round()).abs() > 1e-4
    assert torch.equal(codes[sure], shifted.floor().to(torch.int8)[sure])


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("count", [1, 1025, 9000])
def test_kernels_stay_in_their_memory(kind: str, count: int) -> None:
    def run() -> None:
        for dtype in _FLOATS:
            x = _values(count, dtype)
            codes = torch.zeros(
                eager_quantize.codes_of(x.numel(), kind), dtype=eager_quantize.CODE_TYPE[kind]
            )
            scales = torch.zeros(x.numel() // 256)
            for buffers in at_both_ends(x, codes, scales, _KEY):
                quantize.quantize(*buffers[:3], kind, None)
                quantize.quantize(*buffers[:3], kind, buffers[3])
            pieces = torch.cat([codes] * 3), torch.cat([scales] * 3)
            out, squares = torch.zeros_like(x), torch.zeros(-(-x.numel() // 4096))
            for buffers in at_both_ends(*pieces, out, squares):
                quantize.dequantize_reduce(*buffers[:3], kind, buffers[3])
            for buffers in at_both_ends(codes, scales, out):
                quantize.dequantize(*buffers, kind)

    assert exit_code(run) == 0
