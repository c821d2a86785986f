"""Kernels on a CUDA device: as numpy and the CPU's twins have them, and steps in CUDA graphs.

Where a kernel is exact, bits are those of the reference.  Where optimizers round at random, they
compute fast, and a step must be near to the reference's from the same state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optimizer_cases as cases
import pytest
import torch
from torch import Tensor, nn

from fxzero import UsageError
from fxzero.kernels import eager_pack, eager_quantize
from fxzero.optim import AdamW
from fxzero.quantization import KINDS, dequantize_blockwise, dequantize_reduce, quantize_blockwise

pytest.importorskip("triton")
pytestmark = pytest.mark.cuda

_FLOATS = (torch.float32, torch.bfloat16)
_FORMS = (
    "float32",
    "bfloat16 with a whole master",
    "bfloat16 rounded stochastically with int8 moments",
)


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_a_step_is_that_of_numpy(name: str, form: str) -> None:
    make, options, rule = cases.OPTIMIZERS[name]
    cases.check_against_numpy(make, options, form, rule, device="cuda")


@pytest.mark.parametrize("form", _FORMS)
def test_a_step_without_finite_gradients_changes_nothing(form: str) -> None:
    owned, optimizer = _trained(form, 1)
    before = [_bits_of(optimizer, p) for p in owned]
    owned[0].grad[0] = float("inf")
    optimizer.found_inf = torch.ones((), device="cuda")
    optimizer.step()
    for p, kept in zip(owned, before, strict=True):
        assert all(map(torch.equal, _bits_of(optimizer, p), kept))
    optimizer.found_inf.zero_()
    cases.give_gradients(owned, 2)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 for p in owned)


def test_a_gradient_scaler_is_served_by_the_kernel() -> None:
    plain, scaled = (cases.parameters(torch.float32, device="cuda") for _ in range(2))
    optimizers = AdamW(plain), AdamW(scaled)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.ones((), device="cuda"))  # makes the scale
    for step in range(4):
        for owned in (plain, scaled):
            cases.give_gradients(owned, step)
        for p in scaled:
            p.grad.mul_(scaler.get_scale())  # a power of two
        if step == 2:
            scaled[0].grad[0, 0] = float("nan")
        else:
            optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
    assert all(map(torch.equal, plain, scaled))
    assert scaler.get_scale() == 512
    assert all(optimizers[1].state[p]["step"] == 3 for p in scaled)


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    make, options, _ = cases.OPTIMIZERS[name]
    owned = cases.parameters(torch.bfloat16, device="cuda")
    optimizer = make(owned, moments="int8", **options)
    cases.give_gradients(owned, 0)
    owned[1].grad = None
    optimizer.step()
    for p in owned:
        if p.grad is not None:
            p.grad = p.grad.clone()  # somewhere else
    optimizer.grad_scale = torch.ones(1, device="cuda")
    optimizer.found_inf = torch.zeros((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_growing_step_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxzero.kernels import update

    owned, optimizer = _trained("bfloat16 with a whole master", 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(update.update, "compile", refuse)
    for step in range(2, 20):
        cases.give_gradients(owned, step)
        optimizer.step()


@pytest.mark.parametrize("form", _FORMS)
def test_a_captured_step_replays_with_other_gradients_and_learning_rates(form: str) -> None:
    dtype, options = cases.FORMS[form]
    ours, twins = (cases.parameters(dtype, device="cuda") for _ in range(2))
    rates = [torch.tensor(1e-2, device="cuda") for _ in range(2)]
    pairs = list(zip((ours, twins), rates, strict=True))
    optimizers = [AdamW(owned, rate, **options) for owned, rate in pairs]
    for owned, optimizer in zip((ours, twins), optimizers, strict=True):
        cases.give_gradients(owned, 0)
        _beside(optimizer.step)
    gradients = [p.grad for p in ours]
    graph = _captured(optimizers[0].step)
    for step in range(1, 6):
        for owned, rate in pairs:
            rate.fill_(1e-2 / step)
            cases.give_gradients(owned, step)
        optimizers[1].step()
        if step == 3:  # one outside of the graph, at other addresses
            optimizers[0].step()
            continue
        for p, gradient in zip(ours, gradients, strict=True):
            gradient.copy_(p.grad)
        graph.replay()
    torch.cuda.synchronize()
    for p, twin in zip(ours, twins, strict=True):
        found, expected = _bits_of(optimizers[0], p), _bits_of(optimizers[1], twin)
        assert all(map(torch.equal, found, expected))
        assert optimizers[0].state[p]["step"] == 6


def test_a_captured_backward_and_step_replay() -> None:
    results = []
    for captures in (False, True):
        (weight,) = cases.parameters(torch.float32, ((64, 256),), "cuda")
        x = torch.ones(64, 256, device="cuda")
        optimizer = AdamW([weight], torch.tensor(1e-2, device="cuda"))

        def train(weight: Any = weight, x: Tensor = x, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            (weight * x).tanh().sum().backward()
            optimizer.step()

        _beside(train)
        run: Callable[[], Any] = train
        if captures:
            optimizer.zero_grad()
            run = _captured(train).replay
        for step in range(1, 5):
            x.fill_(step / 4)
            run()
        torch.cuda.synchronize()
        results.append(_bits_of(optimizer, weight))
    assert all(map(torch.equal, *results))


def test_a_capture_without_a_step_before_is_refused() -> None:
    owned = cases.parameters(torch.float32, device="cuda")
    cases.give_gradients(owned, 0)
    optimizer = AdamW(owned)
    with pytest.raises(UsageError, match="run one step before the capture"):
        _captured(optimizer.step)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_parameters_are_updated_on_their_device() -> None:
    first, second = (cases.parameters(torch.float32, device=f"cuda:{i}") for i in range(2))
    for owned in (first, second):
        optimizer = AdamW(owned)
        cases.give_gradients(owned, 0)
        optimizer.step()
    assert all(torch.equal(p.cpu(), q.cpu()) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_numbers_are_those_of_the_cpu(
    kind: str, dtype: torch.dtype, stochastic: bool
) -> None:
    x = torch.randn(65 * 8192 + 5 * 256) * torch.randn(65 * 8192 + 5 * 256).exp()
    x[256:512], x[512:768] = 0.0, x[512:768] * 1e-38
    x[1000], x[70000] = float("nan"), float("inf")
    x = x.to(dtype)
    for quantum in (32, 256):
        key = torch.tensor([7, 3, 2**33 + 8]) if stochastic else None
        codes, scales = quantize_blockwise(x, kind, quantum, key)
        on_device = None if key is None else key.cuda()
        found, found_scales = quantize_blockwise(x.cuda(), kind, quantum, on_device)
        _same(found_scales, scales)
        numbers = scales.isfinite()
        rows = [each.cpu().view(len(scales), -1)[numbers] for each in (found, codes)]
        assert torch.equal(*rows)
        for out in _FLOATS:
            expected = dequantize_blockwise(codes, scales, kind, quantum, out)
            _same(dequantize_blockwise(found, found_scales, kind, quantum, out), expected)


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("ranks", [2, 8, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_means_of_pieces_are_those_of_the_cpu(kind: str, ranks: int, dtype: torch.dtype) -> None:
    codes, scales = quantize_blockwise(torch.randn(ranks * 21 * 256), kind)
    expected, squares = dequantize_reduce(codes, scales, kind, 256, ranks, dtype, True)
    on_device = codes.cuda(), scales.cuda()
    found, sums = dequantize_reduce(*on_device, kind, 256, ranks, dtype, True)
    _same(found, expected)
    torch.testing.assert_close(sums.cpu(), squares)
    assert len(sums) == -(-21 * 256 // eager_quantize.SQUARES_BLOCK)


@pytest.mark.parametrize("inside", _FLOATS)
@pytest.mark.parametrize("outside", _FLOATS)
def test_buckets_are_those_of_the_cpu(outside: torch.dtype, inside: torch.dtype) -> None:
    from fxzero.kernels import pack

    tensors = [torch.randn(size).to(outside) for size in (1, 7, 2048, 4096, 4099, 65537)]
    places, end = [], 3  # some are aligned, and some are not
    for number, tensor in enumerate(tensors):
        places.append(end)
        end = -(-(end + tensor.numel()) // 16) * 16 + number % 2
    factor = torch.tensor([0.37])
    expected, bucket = (torch.full((end + 16,), 85.0, dtype=inside) for _ in range(2))
    eager_pack.pack(tensors, places, expected, factor)
    bucket, there = bucket.cuda(), [tensor.cuda() for tensor in tensors]
    pack.pack(pack.blocks_of(there, places), bucket, factor.cuda())
    _same(bucket, expected)
    back, copies = [torch.empty_like(t) for t in tensors], [torch.empty_like(t) for t in there]
    eager_pack.unpack(back, places, expected, factor)
    pack.unpack(pack.blocks_of(copies, places), bucket, factor.cuda())
    for copy, tensor in zip(copies, back, strict=True):
        _same(copy, tensor)


def _trained(form: str, steps: int) -> tuple[list[Any], AdamW]:
    """Parameters, and their optimizer after some steps."""
    dtype, options = cases.FORMS[form]
    owned = cases.parameters(dtype, device="cuda")
    optimizer = AdamW(owned, **options)
    for step in range(1, steps + 1):
        cases.give_gradients(owned, step)
        optimizer.step()
    return owned, optimizer


def _beside(run: Callable[[], Any]) -> None:
    """Runs on another stream, as what is captured later should."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


def _captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _bits_of(optimizer: Any, parameter: nn.Parameter) -> list[Tensor]:
    """Copies of the bits of a weight and of its state."""
    tensors = [parameter, *optimizer.state[parameter].values()]
    return [cases.bits(tensor.flatten()).cpu().clone() for tensor in tensors]


def _same(found: Tensor, expected: Tensor) -> None:
    """Equal to the bit, but for those of NaNs."""
    found = found.cpu()
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(cases.bits(found)[numbers], cases.bits(expected)[numbers])
