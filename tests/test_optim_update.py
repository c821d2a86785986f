"""Optimizers' steps on a CPU, by operators and by generated code, equal to numpy to the bit."""

from __future__ import annotations

import optimizer_cases as cases
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fxzero import _inductor
from fxzero.kernels import eager_numerics
from fxzero.optim import AdamW, chunks

# The others go through torch's own kernels, whose sums are fused.
_FORMS = [
    name
    for name, (dtype, options) in cases.FORMS.items()
    if (dtype == torch.bfloat16 and options != {"master_bits": 16}) or options.get("moments")
]


_CASES = [(name, form) for name in cases.OPTIMIZERS for form in _FORMS] + [("lion", "float32")]
_COMPILED = [
    case if case[0] == "adamw" else pytest.param(*case, marks=pytest.mark.exhaustive)
    for case in _CASES
]


@pytest.mark.parametrize(("name", "form"), _CASES)
def test_a_step_by_operators_is_that_of_numpy_to_the_bit(name: str, form: str) -> None:
    make, options, rule = cases.OPTIMIZERS[name]
    cases.check_against_numpy(make, options, form, rule)


def _compile_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_WORTH_COMPILING", 0)
    monkeypatch.setattr(chunks, "_LEAST_LOOPED", 2048)
    monkeypatch.setattr(chunks, "_MOST_LOOPED", 2048)


@pytest.mark.slow
@pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="generates code with a C++ compiler")
@pytest.mark.parametrize(("name", "form"), _COMPILED)
def test_a_step_by_generated_code_is_that_of_numpy_to_the_bit(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compile_small_chunks(monkeypatch)
    make, options, rule = cases.OPTIMIZERS[name]
    cases.check_against_numpy(make, options, form, rule)


def test_random_bits_are_the_same_by_runs_and_by_elements() -> None:
    cpu, seed, step = torch.device("cpu"), torch.tensor(2**40 + 7), torch.tensor(3)
    for first in (0, 8, 13, 2**35 + 5):
        index = torch.arange(first, first + 133)
        by_element = eager_numerics.random_bits_of(seed, step, index)
        assert torch.equal(eager_numerics.random_bits(int(seed), 3, first, 133, cpu), by_element)


@pytest.mark.parametrize("form", cases.FORMS)
def test_autograd_notices_weights_that_a_step_has_written(form: str) -> None:
    dtype, options = cases.FORMS[form]
    (weight,) = cases.parameters(dtype, ((64, 64),))
    cases.check_stale_weights(weight, AdamW([weight], **options))
    together = cases.parameters(dtype, ((64, 64), (3, 64)))  # a chunk of two
    cases.give_gradients(together, 0)
    cases.check_stale_weights(together[0], AdamW(together, **options))


@pytest.mark.slow
@pytest.mark.skipif(not _inductor.has_compiler("cpu"), reason="generates code with a C++ compiler")
@pytest.mark.parametrize(
    "form", ["bfloat16 with a whole master", "bfloat16 with 24 bits and int8 moments"]
)
def test_autograd_notices_weights_that_generated_code_has_written(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compile_small_chunks(monkeypatch)
    dtype, options = cases.FORMS[form]
    (weight,) = cases.parameters(dtype, ((64, 64),))  # whole chunks, written where they are
    cases.check_stale_weights(weight, AdamW([weight], **options))


def test_autograd_notices_shards_that_a_step_has_written() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        (whole,) = cases.parameters(torch.float32, ((64, 64),))
        weight = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
        optimizer = AdamW([weight])
        weight.grad = torch.ones_like(weight)
        before = weight._version, weight.to_local()._version
        optimizer.step()
        assert weight._version > before[0]
        assert weight.to_local()._version > before[1]
    finally:
        dist.destroy_process_group()
