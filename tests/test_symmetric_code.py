"""Kernels over memory that all ranks see as machine code: traffic, spills, and memory orders."""

from __future__ import annotations

import re
from typing import Any

import pytest
import triton.language as tl
from codegen import MachineCode, compile_for
from helpers import tiers

from fxzero.kernels import symmetric, symmetric_step

_TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16}
_SIZE = {"fp32": 4, "bf16": 2}
_TABLES = {"table": "*i64", "epochs": "*i32", "rank": "i32"}
_THREADS = 32 * symmetric.WARPS
_DEVICES = pytest.mark.parametrize(
    "capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100))]
)


def _reduce(ranks: int, dtype: str, out: str, capability: int = 90) -> MachineCode:
    arguments = {"place": "i32", "out": f"*{out}", "first": "i32", "elements": "i32"}
    return _compiled(symmetric.reduce_kernel, arguments, ranks, capability, DTYPE=_TYPES[dtype])


def _gather(ranks: int, dtype: str, capability: int = 90) -> MachineCode:
    arguments = {"place": "i32", "part": f"*{dtype}", "elements": "i32"}
    return _compiled(symmetric.gather_kernel, arguments, ranks, capability, DTYPE=_TYPES[dtype])


def _step(ranks: int, dtype: str, capability: int = 90) -> MachineCode:
    low = "i16" if dtype == "bf16" else dtype
    states = {"lows": f"*{low}", "firsts": f"*{dtype}", "seconds": f"*{dtype}"}
    arguments = {"gradients": "i32", "weights": "i32", **states}
    arguments |= {"scalars": "*fp32", "control": "*fp32", "elements": "i32"}
    constants = {"PARAMETER": _TYPES[dtype], "GRADIENT": _TYPES[dtype]}
    constants |= {"LOW_BITS": 16 if dtype == "bf16" else 0}
    return _compiled(symmetric_step.step_kernel, arguments, ranks, capability, **constants)


def _compiled(
    kernel: Any, arguments: dict[str, str], ranks: int, capability: int, **constants: Any
) -> MachineCode:
    return compile_for(
        kernel,
        _TABLES | arguments,
        {"RANKS": ranks, "BLOCK": symmetric.BLOCK, **constants},
        capability=capability,
        warps=symmetric.WARPS,
        multiples=("place", "first", "elements", "gradients", "weights"),
    )


def _check(code: MachineCode, read: int, written: int) -> None:
    """All bytes of elements move at full width, and barriers have the right memory orders."""
    assert code.stack == 0, "nothing is spilled"
    elements = symmetric.BLOCK // _THREADS
    assert code.accesses("LDG")[128] * 16 == read * elements
    assert code.accesses("STG")[128] * 16 == written * elements
    # Beside the elements: addresses, scalars and epochs, one access for all threads.
    assert code.accesses("LDG")[8] == code.accesses("LDG")[16] == 0
    assert code.accesses("STG").total() - code.accesses("STG")[128] == 1, "the epoch"
    _check_barriers(code)


def _check_barriers(code: MachineCode) -> None:
    """Two of them: what came before is told to the whole system, and seen behind them."""
    found = re.findall(r"\batom\.([\w.]+)", code.ptx)
    orders = sorted(sorted({"release", "acquire", "sys"} & set(name.split("."))) for name in found)
    assert orders == [["acquire", "sys"]] * 2 + [["release", "sys"]] * 2
    kinds = [name for name in code.instructions if name.startswith("ATOM")]
    assert sorted(kinds) == ["ATOMG.E.ADD.STRONG.SYS", "ATOMG.E.EXCH.STRONG.SYS"]
    assert code.instructions["MEMBAR.ALL.SYS"] == 2
    assert code.instructions["CCTL.IVALL"] == 2, "old values leave the cache"
    # All threads wait before a release and behind an acquire.
    order = re.findall(r"\bbar\.sync|\batom[\w.]+(?:release|acquire)", code.ptx)
    steps = [name.rpartition(".")[2] for name in order]
    for i, name in enumerate(steps):
        assert name != "release" or steps[i - 1] == "sync"
        assert name != "acquire" or steps[i + 1] == "sync"


@_DEVICES
@pytest.mark.parametrize("dtype", tiers(("fp32", "bf16"), quick=("bf16",)))
def test_a_pull_reads_each_rank_once_at_full_width(dtype: str, capability: int) -> None:
    for ranks in (2, 8):
        code = _reduce(ranks, dtype, dtype, capability)
        _check(code, ranks * _SIZE[dtype], _SIZE[dtype])


@pytest.mark.slow
def test_pulls_of_many_ranks_spill_nothing() -> None:
    for ranks in (3, 12, 72):
        code = _reduce(ranks, "bf16", "bf16")
        assert code.stack == 0
        assert code.registers <= 64
        assert set(code.accesses("LDG")) == {32, 64, 128}
        _check_barriers(code)


@_DEVICES
@pytest.mark.parametrize("dtype", tiers(("fp32", "bf16"), quick=("bf16",)))
def test_a_push_writes_to_each_rank_once_at_full_width(dtype: str, capability: int) -> None:
    for ranks in (2, 8):
        code = _gather(ranks, dtype, capability)
        _check(code, _SIZE[dtype], ranks * _SIZE[dtype])


@_DEVICES
@pytest.mark.parametrize("dtype", tiers(("fp32", "bf16"), quick=("bf16",)))
def test_a_fused_step_moves_states_once_and_no_mean(dtype: str, capability: int) -> None:
    states = {"fp32": 8, "bf16": 6}[dtype]
    for ranks in (2, 8):
        code = _step(ranks, dtype, capability)
        read = ranks * _SIZE[dtype] + _SIZE[dtype] + states
        _check(code, read, states + ranks * _SIZE[dtype])
        assert code.registers <= 96
