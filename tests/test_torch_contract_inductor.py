"""What ``fxzero/_inductor.py`` says, and ``_torch.py`` of the profiler, holds on this torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

from fxzero import _inductor, _torch

aten = torch.ops.aten
X = torch.ones(2, 4)


def test_has_compiler_looks_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(_inductor.has_compiler("cuda"), bool)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name if name == "cc1" else None)
    monkeypatch.setenv("CXX", "none")
    assert not _inductor.has_compiler("cpu")
    monkeypatch.setenv("CXX", "cc1")
    assert _inductor.has_compiler("cpu")


@pytest.mark.slow
def test_inductors_decompositions_can_be_traced_in_a_process_that_compiled_nothing_before() -> None:
    script = (
        "import torch; from fxzero import _inductor\n"
        "pool = _inductor.inductor_decompositions()[torch.ops.aten.max_pool2d.default]\n"
        "pool(torch.rand(1, 1, 8, 8), [2, 2])"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_inductors_decompositions_leave_random_operators_whole() -> None:
    table = _inductor.inductor_decompositions()
    assert aten.native_layer_norm.default in table
    assert aten.native_dropout.default not in table
    assert aten.bernoulli.p not in table


@pytest.mark.slow
@pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler")
def test_inductor_compiles_a_graph_to_a_boxed_function_that_keeps_strides() -> None:
    module = make_fx(lambda x: [x.tanh().permute(1, 0).exp()], tracing_mode="fake")(X)
    run = _inductor.compile_with_inductor(module, lambda target: target, backward=False)
    arguments = [X.clone()]
    (found,) = run(arguments)
    assert arguments == []
    torch.testing.assert_close(found, X.tanh().t().exp())
    assert found.stride() == X.tanh().t().exp().stride()


@pytest.mark.slow
@pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler")
def test_results_without_strides_to_keep_have_those_that_code_likes_and_other_code_takes() -> None:
    image, weight = torch.rand(2, 8, 16, 16), torch.rand(8, 8, 3, 3)
    convolve = make_fx(
        lambda x, w: [aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)],
        tracing_mode="fake",
    )(image, weight)
    free, all_kept = (
        _inductor.compile_with_inductor(convolve, lambda t: t, backward=False, kept=kept)
        for kept in (0, None)
    )
    (found,), (plain,) = (code([image, weight]) for code in (free, all_kept))
    (strides,) = _inductor.strides_of_results(free)
    assert found.stride() == strides == found.contiguous(memory_format=torch.channels_last).stride()
    assert plain.is_contiguous()
    torch.testing.assert_close(found, plain)
    double = make_fx(lambda x: [x.view(2, -1) * 2], tracing_mode="fake")(plain)
    run = _inductor.compile_with_inductor(double, lambda t: t, backward=True, given=[strides])
    assert torch.equal(run([found])[0], 2 * found.reshape(2, -1))
    assert _inductor.strides_of_results(lambda arguments: arguments) == []


def test_the_random_operators_for_inductor_draw_the_same_numbers_again() -> None:
    torch.manual_seed(0)
    state, drawn = _torch.run_and_save_rng_state(aten.bernoulli.p, X, 0.5)
    after = torch.get_rng_state()
    again = _torch.run_with_rng_state(state, aten.bernoulli.p, X, 0.5)
    assert torch.equal(drawn, again)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.slow
@pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler")
def test_generated_code_can_be_read() -> None:
    module = make_fx(lambda x: [torch.mm(x, x.permute(1, 0)).exp()], tracing_mode="fake")(X)
    run = _inductor.compile_with_inductor(module, lambda target: target, backward=False)
    code = _inductor.generated_code(run)
    assert code is not None
    assert "extern_kernels.mm(" in code[0]
    assert code[1] == {}
    out = torch.empty(2, 2)
    _inductor.extern_kernels().mm(X, X.t(), out=out)
    assert torch.equal(out, X @ X.t())


def test_functions_that_nobody_generated_have_no_generated_code() -> None:
    assert _inductor.generated_code(lambda arguments: arguments) is None


def test_a_memory_profile_has_allocations_and_operators_in_the_order_of_time() -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        X.exp()
    allocations, operators = _torch.profiled_memory(record)
    made, freed, *_ = [change for _, change in allocations]
    assert 1000 <= made == -freed < 1000 + 256
    assert sorted(allocations, key=lambda item: item[0]) == allocations
    assert sorted(operators) == operators
    assert all(start <= end for start, end in operators)
    assert allocations[0][0] >= operators[0][0]
