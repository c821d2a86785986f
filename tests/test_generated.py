"""Generated code on tensors without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxzero import _inductor, _torch
from fxzero.generated import without_kernels


@pytest.mark.slow
@pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="needs a C++ compiler")
def test_generated_code_without_kernels_allocates_and_frees_the_same_storages() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [torch.mm(x.tanh(), x.permute(1, 0)).exp()]

    x = torch.randn(4, 4)
    module = make_fx(function, tracing_mode="fake")(x)
    run = _inductor.compile_with_inductor(
        module, lambda target: target, backward=False, side_by_side=False
    )
    rehearsal = without_kernels(run)
    with _torch.FakeTensorMode(allow_non_fake_inputs=True):
        arguments = [torch.empty(x.shape)]
        (found,) = rehearsal(arguments)
        assert arguments == []
    (expected,) = run([x])
    assert (found.shape, found.stride()) == (expected.shape, expected.stride())
    assert found.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


def test_a_function_without_kernels_of_its_own_is_rehearsed_as_it_is() -> None:
    def run(arguments: list[Any]) -> list[Any]:
        return arguments

    assert without_kernels(run) is run
