"""Operators of quantized numbers: their bounds, their place in graphs, what they refuse."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxzero import quantization
from fxzero.errors import UsageError
from fxzero.quantization import dequantize_blockwise, dequantize_reduce, quantize_blockwise

_KINDS = quantization.KINDS
_KEY = torch.tensor([1, 2, 8])


def _bound(x: Tensor, scales: Tensor, kind: str, quantum: int, stochastic: bool) -> Tensor:
    """What the module promises that no element differs by."""
    scale = scales.double().repeat_interleave(quantum)
    size = x.double().abs()
    if kind == "fp8":
        nearest = torch.maximum(size / 16, scale / 1024)
        return nearest * (1 + stochastic) + scale * 2.0**-15 + size * 2.0**-20
    return scale / 2 * (1 + stochastic) + scale * 2.0**-15


def _check(x: Tensor, kind: str, quantum: int, key: Tensor | None) -> None:
    codes, scales = quantize_blockwise(x, kind, quantum, key)
    assert codes.nbytes + scales.nbytes == quantization.wire_bytes(x.numel(), kind, quantum)
    back = dequantize_blockwise(codes, scales, kind, quantum, torch.float32)
    bound = _bound(x, scales, kind, quantum, key is not None)
    assert ((back.double() - x.double()).abs() <= bound).all()
    short = dequantize_blockwise(codes, scales, kind, quantum, torch.bfloat16)
    assert torch.equal(short, back.to(torch.bfloat16))


@pytest.mark.parametrize("kind", _KINDS)
@given(
    x=arrays.arrays(
        np.float32, 64, elements=st.floats(allow_nan=False, allow_infinity=False, width=32)
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    stochastic=st.booleans(),
)
def test_no_number_differs_by_more_than_its_bound(
    kind: str, x: np.ndarray, dtype: torch.dtype, stochastic: bool
) -> None:
    numbers = torch.from_numpy(x).to(dtype).nan_to_num()  # the largest become infinite bfloat16
    _check(numbers, kind, 32, _KEY if stochastic else None)


@pytest.mark.parametrize("key", [None, _KEY])
@pytest.mark.parametrize("quantum", [32, 256, 2048])
@pytest.mark.parametrize("kind", _KINDS)
def test_bounds_hold_for_sizes_of_all_orders(kind: str, quantum: int, key: Tensor | None) -> None:
    for exponent in range(-140, 120, 10):
        x = torch.randn(8192) * torch.randn(8192).exp() * 2.0**exponent
        for dtype in (torch.float32, torch.bfloat16):
            _check(x.to(dtype), kind, quantum, key)


@pytest.mark.parametrize("kind", _KINDS)
def test_what_has_a_code_comes_back_exactly(kind: str) -> None:
    if kind == "fp8":
        x = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(448.0)
    else:
        largest = 127 if kind == "int8" else 7
        x = (torch.arange(256) % (2 * largest + 1) - largest).float()
    for factor in (2.0**-100, 1.0, 2.0**100):
        codes, scales = quantize_blockwise(x * factor, kind)
        back = dequantize_blockwise(codes, scales, kind, 256, torch.float32)
        assert torch.equal(back, x * factor)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", _KINDS)
def test_a_block_that_is_not_finite_is_seen(kind: str, value: float) -> None:
    for key in (None, _KEY):
        x = torch.randn(1024)
        x[300] = value
        codes, scales = quantize_blockwise(x, kind, 256, key)
        back = dequantize_blockwise(codes, scales, kind, 256, torch.bfloat16)
        assert back[256:512].isnan().all()
        assert back[:256].isfinite().all()
        assert back[512:].isfinite().all()
        mean, squares = dequantize_reduce(
            codes.repeat(2), scales.repeat(2), kind, 256, 2, torch.float32, True
        )
        assert mean[256:512].isnan().all()
        assert squares.isnan().all()


def _scattered(gradients: list[Tensor], ranks: int, kind: str) -> Tensor:
    """Each rank's mean of the pieces that all send it, one rank's behind the other's."""
    sent = [
        [quantize_blockwise(piece, kind) for piece in gradient.chunk(ranks)]
        for gradient in gradients
    ]
    means = []
    for rank in range(ranks):
        codes, scales = zip(*(pieces[rank] for pieces in sent), strict=True)
        joined = torch.cat(codes), torch.cat(scales)
        means.append(dequantize_reduce(*joined, kind, 256, len(sent), torch.float32)[0])
    return torch.cat(means)


@pytest.mark.parametrize("kind", _KINDS)
def test_results_do_not_depend_on_how_a_tensor_is_cut(kind: str) -> None:
    gradients = [torch.randn(8192) for _ in range(4)]
    whole = _scattered(gradients, 1, kind)
    for ranks in (2, 4, 8):
        assert torch.equal(_scattered(gradients, ranks, kind), whole)
    x = gradients[0]
    together = quantize_blockwise(x, kind, 256, _KEY)
    for ranks in (2, 4):
        keys = [_KEY + torch.tensor([0, 0, i * 8192 // ranks]) for i in range(ranks)]
        parts = [
            quantize_blockwise(part, kind, 256, key)
            for part, key in zip(x.chunk(ranks), keys, strict=True)
        ]
        for cut, uncut in zip(zip(*parts, strict=True), together, strict=True):
            assert torch.equal(torch.cat(cut), uncut)


@pytest.mark.parametrize("kind", _KINDS)
def test_a_mean_is_within_the_mean_of_the_bounds(kind: str) -> None:
    pieces = [torch.randn(5120) for _ in range(3)]
    codes, scales = zip(*(quantize_blockwise(piece, kind) for piece in pieces), strict=True)
    mean, squares = dequantize_reduce(
        torch.cat(codes), torch.cat(scales), kind, 256, 3, torch.float32, True
    )
    bounds = [_bound(x, s, kind, 256, False) for x, s in zip(pieces, scales, strict=True)]
    error = (mean.double() - torch.stack(pieces).double().mean(0)).abs()
    assert (error <= torch.stack(bounds).mean(0) + 1e-6).all()
    assert squares.shape == (2,)
    torch.testing.assert_close(squares.sum(), mean.square().sum())
    _, none = dequantize_reduce(torch.cat(codes), torch.cat(scales), kind, 256, 3, torch.float32)
    assert none.numel() == 0


def _arguments(kind: str) -> dict[str, tuple[object, ...]]:
    codes, scales = quantize_blockwise(torch.randn(8192), kind)
    return {
        "QUANTIZE": (torch.randn(8192), kind, 256, _KEY),
        "DEQUANTIZE": (codes, scales, kind, 256, torch.bfloat16),
        "DEQUANTIZE_REDUCE": (codes, scales, kind, 256, 4, torch.float32, True),
    }


@pytest.mark.parametrize("name", ["QUANTIZE", "DEQUANTIZE", "DEQUANTIZE_REDUCE"])
@pytest.mark.parametrize("kind", _KINDS)
def test_operators_are_what_torch_asks_of_one(kind: str, name: str) -> None:
    torch.library.opcheck(getattr(quantization, name), _arguments(kind)[name])


@pytest.mark.parametrize("kind", _KINDS)
def test_operators_stand_in_graphs(kind: str) -> None:
    def there_and_back(x: Tensor) -> Tensor:
        codes, scales = quantize_blockwise(x, kind)
        return dequantize_reduce(codes, scales, kind, 256, 2, torch.float32)[0]

    x = torch.randn(8192)
    for traced in (make_fx(there_and_back)(x), make_fx(there_and_back, tracing_mode="fake")(x)):
        assert isinstance(traced, fx.GraphModule)
        called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
        assert {quantization.QUANTIZE, quantization.DEQUANTIZE_REDUCE} <= called
        assert torch.equal(traced(x), there_and_back(x))


def test_fake_tensors_of_any_length_pass_through() -> None:
    with FakeTensorMode():
        codes, scales = quantize_blockwise(torch.empty(2**40, dtype=torch.bfloat16), "int4")
        assert (codes.shape, codes.dtype) == ((2**39,), torch.uint8)
        assert (scales.shape, scales.dtype) == ((2**32,), torch.float32)
        mean, _ = dequantize_reduce(codes, scales, "int4", 256, 8, torch.bfloat16)
        assert (mean.shape, mean.dtype) == ((2**37,), torch.bfloat16)


def test_nothing_is_quantized_to_nothing() -> None:
    for kind in _KINDS:
        codes, scales = quantize_blockwise(torch.empty(0), kind)
        assert codes.numel() == scales.numel() == 0
        assert dequantize_blockwise(codes, scales, kind, 256, torch.float32).numel() == 0


def test_views_that_are_not_contiguous_or_aligned_are_read_right() -> None:
    x = torch.randn(513, 2)
    for view in (x[:512, 0], x.flatten()[1:513]):
        codes, scales = quantize_blockwise(view, "int4")
        expected = quantize_blockwise(view.clone(), "int4")
        assert torch.equal(codes, expected[0])
        buffer = torch.cat([torch.zeros(1, dtype=torch.uint8), codes])
        back = dequantize_blockwise(buffer[1:], scales, "int4", 256, torch.float32)
        assert torch.equal(back, dequantize_blockwise(codes, scales, "int4", 256, torch.float32))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(256), "int5"), "int8, int4, fp8, not to 'int5'"),
        ((torch.zeros(256), "int8", 100), "quantum=100"),
        ((torch.zeros(300), "int8"), "[300] cannot be quantized in blocks of 256"),
        ((torch.zeros(2, 256), "int8"), "flatten it"),
        ((torch.zeros(256, dtype=torch.float16), "int8"), "torch.float16"),
        ((torch.zeros(256), "int8", 256, torch.zeros(3)), "torch.float32 [3]"),
    ],
)
def test_what_cannot_be_quantized_is_refused(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        quantization.QUANTIZE(*arguments)
    assert words in str(caught.value)


def test_codes_that_do_not_fit_their_scales_are_refused() -> None:
    codes, scales = quantize_blockwise(torch.zeros(1024), "int8")
    with pytest.raises(UsageError, match="1024 int8 codes and 3 scales"):
        dequantize_blockwise(codes, scales[:3], "int8", 256, torch.float32)
    with pytest.raises(UsageError, match="of 3 pieces"):
        dequantize_reduce(codes, scales, "int8", 256, 3, torch.float32)
    with pytest.raises(UsageError, match=r"torch\.int32 cannot"):
        dequantize_blockwise(codes, scales, "int8", 256, torch.int32)


@pytest.mark.slow
def test_operators_work_where_triton_is_not_installed() -> None:
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from fxzero.quantization import quantize_blockwise\n"
        "codes, scales = quantize_blockwise(torch.full((256,), 127.0), 'int8')\n"
        "print(codes.sum().item(), scales.item())"
    )
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.split() == [str(256 * 127), "1.0"]
