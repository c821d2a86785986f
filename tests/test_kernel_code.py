"""Machine code of the optimizers' kernel, without a device: traffic, spills, instructions."""

from __future__ import annotations

from typing import Any

import codegen
import pytest
from helpers import tiers

pytest.importorskip("triton")

import triton.language as tl

from fxzero.kernels import update

_F32, _BF16 = "*fp32", "*bf16"


def _arguments(low: str = "*i16", first: str = _F32, second: str = _F32) -> dict[str, str]:
    scales = {"first_scales": _F32, "second_scales": _F32}
    states = {"lows": low, "firsts": first, "seconds": second}
    return {"blocks": "*i64", "scalars": _F32, "control": _F32, "seed": "*i64"} | states | scales


def _constants(**options: Any) -> dict[str, Any]:
    quantized = bool(options.get("QUANTUM"))
    return {
        "RULE": "adamw",
        "PARAMETER": tl.float32,
        "GRADIENT": tl.float32,
        "LOW_BITS": 0,
        "STOCHASTIC": False,
        "QUANTUM": 0,
        "EXACT": not quantized and not options.get("STOCHASTIC"),
        "TAILS": False,
        "BLOCK": update.QUANTIZED_BLOCK if quantized else update.BLOCK,
    } | options


_NARROW: dict[str, Any] = {"PARAMETER": tl.bfloat16, "GRADIENT": tl.bfloat16}
# Arguments, constants, bytes of an element, and the share of the instructions that the device can
# issue while it moves them.
_KERNELS: dict[str, tuple[dict[str, str], dict[str, Any], float, float]] = {
    "float32": (_arguments(), _constants(), 28, 0.3),
    "bfloat16 with a whole master": (
        _arguments(first=_BF16, second=_BF16),
        _constants(LOW_BITS=16, **_NARROW),
        18,
        0.72,
    ),
    "bfloat16 with a whole master and float32 moments": (
        _arguments(),
        _constants(LOW_BITS=16, **_NARROW),
        26,
        0.72,
    ),
    "bfloat16 rounded stochastically": (
        _arguments(first=_BF16, second=_BF16),
        _constants(STOCHASTIC=True, **_NARROW),
        14,
        0.72,
    ),
    "bfloat16 with 24 bits and int8 moments": (
        _arguments("*i8", "*i8", "*u8"),
        _constants(LOW_BITS=8, QUANTUM=128, **_NARROW),
        12,
        0.73,
    ),
    "bfloat16 rounded stochastically with int8 moments": (
        _arguments(first="*i8", second="*u8"),
        _constants(STOCHASTIC=True, QUANTUM=128, **_NARROW),
        10,
        0.8,
    ),
    "lion": (
        _arguments(first=_BF16),
        _constants(RULE="lion", LOW_BITS=16, **_NARROW),
        14,
        0.72,
    ),
    "sgd": (_arguments(), _constants(RULE="sgd"), 20, 0.3),
}


def _compiled(name: str, capability: int, **changes: Any) -> codegen.MachineCode:
    arguments, constants, _, _ = _KERNELS[name]
    chosen = constants | changes
    fusion = not chosen["EXACT"]
    return codegen.compile_for(
        update.update, arguments, chosen, capability=capability, fusion=fusion
    )


@pytest.mark.parametrize(
    "capability",
    [90, *(pytest.param(other, marks=pytest.mark.exhaustive) for other in (80, 100))],
)
@pytest.mark.parametrize("name", tiers(_KERNELS, quick=("bfloat16 with 24 bits and int8 moments",)))
def test_a_step_moves_what_it_must_in_wide_accesses(name: str, capability: int) -> None:
    _, constants, size, share = _KERNELS[name]
    code = _compiled(name, capability)
    assert code.stack == 0, "nothing is spilled"
    assert code.bytes_moved(128) == size * constants["BLOCK"]
    # Beside the elements: the row of the table, scalars, and scales, one access for all threads.
    assert code.accesses("LDG")[8] == code.accesses("LDG")[16] == 0
    assert code.accesses("LDG")[32] + code.accesses("LDG")[64] <= 20
    scales = 2 if constants["QUANTUM"] else 0
    assert code.accesses("STG").total() - code.accesses("STG")[128] == scales
    if capability == 90:
        elements = constants["BLOCK"] / 128
        assert code.count / elements <= share * codegen.INSTRUCTIONS_PER_BYTE * size


@pytest.mark.parametrize("name", ["float32", "bfloat16 with 24 bits and int8 moments"])
def test_tails_leave_whole_blocks_as_they_are(name: str) -> None:
    plain, tailed = _compiled(name, 90), _compiled(name, 90, TAILS=True)
    assert tailed.stack == 0
    for kind in ("LDG", "STG"):
        assert tailed.accesses(kind)[128] >= plain.accesses(kind)[128]
