"""Kernels of quantized numbers as machine code: what they read, write, keep and compute."""

from __future__ import annotations

import pytest
from codegen import INSTRUCTIONS_PER_BYTE, MachineCode, compile_for
from helpers import tiers

from fxzero.kernels import quantize
from fxzero.kernels.eager_quantize import CODE_TYPE

_SIZE = {"fp32": 4, "bf16": 2}
_CODE_BYTES = {"int8": 1, "int4": 0.5, "fp8": 1}
_QUANTUM = 256
# Of the instructions that a device has time for while it moves the bytes.
_SHARE = 0.72


def _cases(*variants: object) -> list[object]:
    """All kinds and variants for sm_90, and of sm_80 and sm_100 a corner."""

    def marks(kind: str, variant: object, capability: int) -> list[pytest.MarkDecorator]:
        if kind != "int8" and variant == variants[-1] and capability == 90:
            return []
        corner = capability == 90 or (kind == "fp8" and variant == variants[-1])
        return [pytest.mark.slow if corner else pytest.mark.exhaustive]

    return [
        pytest.param(kind, variant, capability, marks=marks(kind, variant, capability))
        for capability in (80, 90, 100)
        for variant in variants
        for kind in ("int8", "int4", "fp8")
    ]


def _codes(kind: str) -> str:
    return {"torch.int8": "*i8", "torch.uint8": "*u8"}[str(CODE_TYPE[kind])]


def _quantize(kind: str, dtype: str, capability: int, stochastic: bool = False) -> MachineCode:
    arguments = {"x": f"*{dtype}", "codes": _codes(kind), "scales": "*fp32", "key": "*i64"}
    constants = {
        "KIND": kind,
        "STOCHASTIC": stochastic,
        "QUANTUM": _QUANTUM,
        "BLOCK": quantize.SMALL_BLOCK if stochastic else quantize.BLOCK,
    }
    return compile_for(
        quantize.quantize_kernel,
        {**arguments, "elements": "i64"},
        constants,
        capability=capability,
        warps=quantize.WARPS,
    )


def _dequantize(
    kind: str, dtype: str, capability: int, pieces: int = 1, squares: bool = False
) -> MachineCode:
    arguments = {"codes": _codes(kind), "scales": "*fp32", "out": f"*{dtype}", "squares": "*fp32"}
    constants = {
        "KIND": kind,
        "PIECES": pieces,
        "SQUARES": squares,
        "QUANTUM": _QUANTUM,
        "BLOCK": quantize.SMALL_BLOCK if pieces > 1 or squares else quantize.BLOCK,
    }
    return compile_for(
        quantize.dequantize_kernel,
        {**arguments, "elements": "i64"},
        constants,
        capability=capability,
        warps=quantize.WARPS,
    )


def _check(
    code: MachineCode,
    block: int,
    moved: float,
    narrow: tuple[int, int],
    share: float = _SHARE,
) -> None:
    """Nothing spilled, all data in accesses of 128 bits, instructions within the budget.

    Args:
        moved: bytes of data for each element.
        narrow: how many rows of scales one thread reads at most, and how many floats it writes.
        share: of the instructions there is time for.
    """
    threads = 32 * quantize.WARPS
    assert code.stack == 0
    for kind, most in zip(("LDG", "STG"), narrow, strict=True):
        widths = code.accesses(kind)
        assert set(widths) <= {32, 128}
        assert widths[32] <= most
    assert code.bytes_moved(threads) == moved * block
    assert code.count * threads / block <= share * INSTRUCTIONS_PER_BYTE * moved


@pytest.mark.parametrize(("kind", "dtype", "capability"), _cases("fp32", "bf16"))
def test_quantizing_moves_each_byte_once(kind: str, dtype: str, capability: int) -> None:
    code = _quantize(kind, dtype, capability)
    _check(code, quantize.BLOCK, _SIZE[dtype] + _CODE_BYTES[kind], (0, 1))
    assert code.registers <= 128


@pytest.mark.parametrize(("kind", "dtype", "capability"), _cases("fp32", "bf16"))
def test_dequantizing_moves_each_byte_once(kind: str, dtype: str, capability: int) -> None:
    code = _dequantize(kind, dtype, capability)
    _check(code, quantize.BLOCK, _SIZE[dtype] + _CODE_BYTES[kind], (16, 0))
    assert code.registers <= 128


@pytest.mark.parametrize(("kind", "squares", "capability"), _cases(False, True))
def test_pieces_of_eight_ranks_are_read_once(kind: str, squares: bool, capability: int) -> None:
    code = _dequantize(kind, "fp32", capability, 8, squares)
    _check(code, quantize.SMALL_BLOCK, 4 + 8 * _CODE_BYTES[kind], (16, 1))


@pytest.mark.parametrize("kind", tiers(("int8", "int4", "fp8"), quick=("int4",)))
def test_a_mean_in_bfloat16_leaves_less_room(kind: str) -> None:
    """Rounding comes on top of eight pieces, and fewer bytes are written."""
    code = _dequantize(kind, "bf16", 90, 8)
    _check(code, quantize.SMALL_BLOCK, 2 + 8 * _CODE_BYTES[kind], (16, 0), 0.8)


@pytest.mark.parametrize("kind", tiers(("int8", "int4", "fp8"), quick=("int4",)))
def test_pieces_of_many_ranks_are_read_in_a_loop(kind: str) -> None:
    code = _dequantize(kind, "fp32", 90, 64, True)
    assert code.stack == 0
    assert set(code.accesses("LDG")) == {32, 128}
    assert code.registers <= 128


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", tiers(("int8", "int4", "fp8"), quick=("int4",)))
def test_random_bits_spill_nothing(kind: str, dtype: str) -> None:
    """They take more instructions than the bytes of bfloat16 have time for: 27 of 23."""
    code = _quantize(kind, dtype, 90, stochastic=True)
    assert code.stack == 0
    block, threads = quantize.SMALL_BLOCK, 32 * quantize.WARPS
    assert code.bytes_moved(threads) == block * (_SIZE[dtype] + _CODE_BYTES[kind])
    assert code.count * threads / block <= 28
