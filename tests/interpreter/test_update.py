"""The optimizers' kernel in Triton's interpreter: equal to numpy's float32 to the bit.

What a CUDA graph would capture of a step is tested here without one: a step is told that it is
being captured, and must do what may be recorded only.
"""

from __future__ import annotations

from typing import Any

import optimizer_cases as cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxzero import UsageError, _torch
from fxzero.optim import AdamW
from fxzero.optim.arenas import build
from fxzero.optim.launch import LaunchedUpdate
from fxzero.optim.rule import Control

_NOTHING = Control(None, None, None)


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_a_step_is_that_of_numpy_to_the_bit(name: str, form: str) -> None:
    make, options, rule = cases.OPTIMIZERS[name]
    cases.check_against_numpy(make, {"backend": "triton", **options}, form, rule)


@pytest.mark.parametrize("form", [f for f in cases.FORMS if "nearest" not in f])
def test_shards_are_updated_as_the_whole_is(form: str) -> None:
    dtype, kept = cases.kept(form)
    group = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
    (whole,) = cases.parameters(dtype, ((37, 128),))
    kind = kept.form(whole)
    results = []
    for count in (1, 2, 4):
        rows = -(-37 // count)
        parts = [part.detach().clone() for part in whole.detach().split(rows)]
        for rank, part in enumerate(parts):
            part.requires_grad_()
            index = {id(part): 40 + rank * rows * 128}
            arena = build(kind, AdamW.rule.moments, [(0, part)], index, 256)
            update = LaunchedUpdate(arena, AdamW.rule, 5)
            for step in range(3):
                cases.give_gradients([whole], step)
                gradient = whole.grad.split(rows)[rank].flatten()
                update(arena.members, [gradient], _NOTHING, [group])
        results.append(torch.cat([part.detach() for part in parts]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_step_without_finite_gradients_changes_nothing() -> None:
    owned = cases.parameters(torch.bfloat16)
    optimizer = AdamW(owned, backend="triton", moments="int8", master_bits=24)
    cases.give_gradients(owned, 1)
    optimizer.step()
    before = [p.detach().clone() for p in owned]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in owned]
    owned[0].grad[0] = float("inf")
    for number in (1.0, 2.0):  # one of each device
        optimizer.found_inf = torch.tensor(number)
        optimizer.step()
    for p, weight, state in zip(owned, before, states, strict=True):
        assert torch.equal(p, weight)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())
    optimizer.found_inf = torch.tensor(0.0)
    cases.give_gradients(owned, 2)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 for p in owned)


def test_a_gradient_that_is_not_a_number_is_seen_in_bfloat16() -> None:
    owned = cases.parameters(torch.bfloat16, ((64, 64),))
    optimizer = AdamW(owned, backend="triton", moments="float32")
    owned[0].grad_dtype = torch.float32
    owned[0].grad = torch.zeros(64, 64)
    owned[0].grad.view(torch.int32)[3, 4] = 0x7FFFFFFF
    optimizer.step()
    assert owned[0][3, 4].isnan()
    assert owned[0].isnan().sum() == 1


def test_scales_of_gradients_are_read_by_the_kernel() -> None:
    plain, scaled = cases.parameters(torch.float32), cases.parameters(torch.float32)
    for owned, scale in ((plain, 1.0), (scaled, 8.0)):
        optimizer = AdamW(owned, backend="triton")
        for step in range(2):
            cases.give_gradients(owned, step)
            for p in owned:
                p.grad *= scale
            if scale != 1:
                optimizer.grad_scale = torch.tensor([16.0])
                optimizer.scale_next_step(torch.tensor(2.0))
            optimizer.step()
    assert all(map(torch.equal, plain, scaled))


def test_nothing_is_compiled_or_built_again_while_memory_stays() -> None:
    owned = cases.parameters(torch.float32)
    optimizer = AdamW(owned, backend="triton")
    cases.give_gradients(owned, 0)
    tables = []
    for _ in range(3):
        optimizer.step()
        (update,) = optimizer._updates
        ((_, table, _),) = update._tables.values()
        tables.append(table)
    assert tables[0] is tables[1]
    assert tables[1] is tables[2]
    owned[0].grad = owned[0].grad.clone()
    optimizer.step()
    ((_, table, _),) = update._tables.values()
    assert table is not tables[0]


def test_parameters_without_elements_are_counted_only() -> None:
    for shapes in (((0, 64),), ((0, 64), (3, 64), (0,))):
        owned = cases.parameters(torch.float32, shapes)
        optimizer = AdamW(owned, backend="triton", moments="int8")
        cases.give_gradients(owned, 0)
        optimizer.step()
        assert all(optimizer.state[p]["step"] == 1 for p in owned)


class _Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_a_step_neither_waits_for_the_device_nor_reads_the_host(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, options, _ = cases.OPTIMIZERS[name]
    owned = cases.parameters(torch.bfloat16)
    optimizer = make(owned, backend="triton", moments="int8", **options)
    for step in range(2):
        cases.give_gradients(owned, step)
        owned[1].grad = None
        optimizer.grad_scale, optimizer.found_inf = torch.tensor([2.0]), torch.tensor([0.0])
        if step:
            monkeypatch.setattr("fxzero.kernels.update.update", _NoKernel())
            with _Operators() as operators:
                optimizer.step()
            # What torch.tensor, .item and masks are made of.
            assert not operators.names & {"lift_fresh", "_local_scalar_dense", "nonzero"}
            assert "_foreach_add_" in operators.names, "addresses are written"
            steps = [float(optimizer.state[p].get("step", 0)) for p in owned]
            assert steps == [2, 0, 2, 2, 2, 2, 2]
        else:
            optimizer.step()


class _NoKernel:
    """Stands for a kernel where the interpreter's own operators would be in the way."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("form", ["float32", "bfloat16 rounded stochastically with int8 moments"])
def test_a_captured_step_is_one_with_tables_of_its_own(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, options = cases.FORMS[form]
    results = []
    for captured in ((), (2, 4)):
        owned = cases.parameters(dtype)
        rate = torch.tensor(1e-2)
        optimizer = AdamW(owned, rate, backend="triton", **options)
        for step in range(1, 6):
            rate.fill_(1e-2 / step)
            cases.give_gradients(owned, step)
            before = [dict(update._tables) for update in optimizer._updates]
            monkeypatch.setattr(_torch, "is_capturing", lambda now=step in captured: now)
            optimizer.step()
            if step in captured:
                assert before == [update._tables for update in optimizer._updates]
        results.append(owned)
    assert all(map(torch.equal, *results))


def test_a_capture_without_a_step_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    owned = cases.parameters(torch.float32)
    cases.give_gradients(owned, 0)
    optimizer = AdamW(owned, backend="triton")
    monkeypatch.setattr(_torch, "is_capturing", lambda: True)
    with pytest.raises(UsageError, match="run one step before the capture"):
        optimizer.step()
    monkeypatch.setattr(_torch, "is_capturing", lambda: False)
    owned[2].grad = None
    optimizer.step()
    cases.give_gradients(owned, 1)
    for other in (*owned[:2], *owned[3:]):
        other.grad = None
    optimizer.step()  # now all have states, and no step had gradients for all
    cases.give_gradients(owned, 1)
    monkeypatch.setattr(_torch, "is_capturing", lambda: True)
    with pytest.raises(UsageError, match=r"for the same 7 parameters\n"):
        optimizer.step()


def test_a_capture_reads_no_tensor_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    owned = cases.parameters(torch.float32)
    cases.give_gradients(owned, 0)
    optimizer = AdamW(owned, backend="triton")
    optimizer.step()
    monkeypatch.setattr(_torch, "is_capturing", lambda: True)
    optimizer.found_inf = torch.empty((), device="meta")
    with pytest.raises(UsageError, match="found_inf is a tensor on meta"):
        optimizer.step()
    del optimizer.found_inf
    optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")
    with pytest.raises(UsageError, match="lr is a tensor on meta"):
        optimizer.step()


def test_autograd_notices_weights_that_a_kernel_has_written() -> None:
    (weight,) = cases.parameters(torch.float32, ((64, 64),))
    cases.check_stale_weights(weight, AdamW([weight], backend="triton"))
