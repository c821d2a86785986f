"""The optimizers' kernel and memory that is not its own: guard pages, and poison in gaps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import optimizer_cases as cases
import pytest
import torch
from guarded import at_both_ends, exit_code
from torch import Tensor, nn

from fxzero.optim.arenas import SCALE, Arena, build
from fxzero.optim.launch import LaunchedUpdate
from fxzero.optim.rule import Control

_NOTHING = Control(None, None, None)
_POISON = 85
# Of one row's length each, as moments of 8 bits need it: less than a block, one, and one and a bit.
_SHAPES = ((1, 32), (3, 96), (16, 128), (17, 128))
_ODD_SHAPES = ((1,), (7,), (1023,), (1024,), (1025,), (2049,))
_FORMS = [(name, form) for name in cases.OPTIMIZERS for form in cases.FORMS]


def _arena(optimizer: Any, parameters: list[Any]) -> Arena:
    index, first = {}, 0
    for parameter in parameters:
        index[id(parameter)] = first
        first += -(-parameter.numel() // 8) * 8
    form = optimizer._numerics.form(parameters[0])
    pairs = [(0, parameter) for parameter in parameters]
    return build(form, optimizer.rule.moments, pairs, index, 256)


def _step(optimizer: Any, arena: Arena, gradients: list[Tensor]) -> None:
    update = LaunchedUpdate(arena, optimizer.rule, 3)
    update(arena.members, gradients, _NOTHING, optimizer.param_groups)


def _make(name: str, form: str, parameters: list[Any]) -> Any:
    make, options, _ = cases.OPTIMIZERS[name]
    options = {**options, "lr": 0.1}  # enough to be seen in 16 bits
    return make(parameters, backend="triton", **options, **cases.FORMS[form][1])


@pytest.mark.parametrize(("name", "form"), _FORMS)
def test_a_step_stays_in_its_memory(name: str, form: str) -> None:
    dtype = cases.FORMS[form][0]

    def run() -> None:
        for shape in _SHAPES if "int8" in form else (*_SHAPES, *_ODD_SHAPES):
            values = torch.ones(shape, dtype=dtype)
            for kinds in {(dtype,), (dtype, torch.float32)}:
                for weight, gradient in at_both_ends(values, values.to(kinds[-1])):
                    parameter = nn.Parameter(weight)
                    optimizer = _make(name, form, [parameter])
                    arena = _arena(optimizer, [parameter])
                    names = list(arena.tensors)
                    for states in at_both_ends(*arena.tensors.values()):
                        tensors = dict(zip(names, states, strict=True))
                        _step(optimizer, replace(arena, tensors=tensors), [gradient.flatten()])
                    assert (weight < 1).all()

    assert exit_code(run) == 0


@pytest.mark.parametrize(("name", "form"), _FORMS)
def test_a_step_writes_nothing_between_what_is_its_own(name: str, form: str) -> None:
    dtype = cases.FORMS[form][0]
    row = (128,) if "int8" in form else ()
    shapes = [(count, *row) for count in (1, 3, 16, 17, 33)] if row else list(_ODD_SHAPES)
    memory, parameters = _poisoned(shapes, dtype)
    optimizer = _make(name, form, parameters)
    arena = _arena(optimizer, parameters)
    gaps = {}
    for key, tensor in arena.tensors.items():
        gap = torch.ones(len(tensor), dtype=torch.bool)
        quantum = arena.form.quantum if key.endswith(SCALE) else 1
        for member in arena.members:
            gap[member.place // quantum : (member.place + member.elements) // quantum] = False
        tensor[gap] = _POISON
        assert gap.any()
        gaps[key] = gap
    gradients = [torch.full_like(p.detach(), 0.5).flatten() for p in parameters]
    _step(optimizer, arena, gradients)
    assert all((arena.tensors[key][gap] == _POISON).all() for key, gap in gaps.items())
    assert all((moment[~gaps[key]] != _POISON).all() for key, moment in arena.tensors.items())
    assert all((piece == _POISON).all() for piece in _between(memory, parameters))
    assert all((gradient == 0.5).all() for gradient in gradients)
    assert all((parameter < 1).all() for parameter in parameters)


def _poisoned(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[Tensor, list[Any]]:
    """Memory, and parameters of ones in it, some of which begin at a multiple of 16 bytes."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    memory = torch.full((sum(sizes) + 40 * len(sizes),), _POISON, dtype=dtype)
    parameters, start = [], 16
    for number, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        memory[start : start + size] = 1
        parameters.append(nn.Parameter(memory[start : start + size].view(shape)))
        start += -(-size // 16) * 16 + 16 + number % 2
    return memory, parameters


def _between(memory: Tensor, parameters: list[Any]) -> Iterator[Tensor]:
    end = 0
    for parameter in parameters:
        start = parameter.storage_offset()
        yield memory[end:start]
        end = start + parameter.numel()
    yield memory[end:]
