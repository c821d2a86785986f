"""Kernels of buckets as machine code: what they read, write, keep and compute."""

from __future__ import annotations

import pytest
import triton.language as tl
from codegen import INSTRUCTIONS_PER_BYTE, MachineCode, compile_for
from helpers import tiers

from fxzero.kernels import pack

_TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16}
_SIZE = {"fp32": 4, "bf16": 2}
_SHARE = 0.72


def _compiled(
    tensors: str, bucket: str, unpacks: bool, tails: bool, capability: int = 90
) -> MachineCode:
    return compile_for(
        pack.pack_kernel,
        {"blocks": "*i64", "bucket": f"*{bucket}", "factor": "*fp32"},
        {"DTYPE": _TYPES[tensors], "UNPACKS": unpacks, "TAILS": tails, "BLOCK": pack.BLOCK},
        capability=capability,
        warps=pack.WARPS,
    )


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100))]
)
@pytest.mark.parametrize("unpacks", [False, True])
@pytest.mark.parametrize("bucket", tiers(("fp32", "bf16"), quick=("bf16",)))
@pytest.mark.parametrize("tensors", tiers(("fp32", "bf16"), quick=("fp32",)))
def test_whole_blocks_move_each_byte_once(
    tensors: str, bucket: str, unpacks: bool, capability: int
) -> None:
    code = _compiled(tensors, bucket, unpacks, False, capability)
    threads, moved = 32 * pack.WARPS, _SIZE[tensors] + _SIZE[bucket]
    assert code.stack == 0
    assert code.bytes_moved(threads) == moved * pack.BLOCK
    assert set(code.accesses("STG")) == {128}
    narrow = code.accesses("LDG")
    assert narrow[64] + narrow[32] <= 4, "a row of the table and the factor"
    assert set(narrow) <= {32, 64, 128}
    assert code.count * threads / pack.BLOCK <= _SHARE * INSTRUCTIONS_PER_BYTE * moved


@pytest.mark.parametrize("unpacks", [False, True])
@pytest.mark.parametrize("bucket", tiers(("fp32", "bf16"), quick=("bf16",)))
@pytest.mark.parametrize("tensors", tiers(("fp32", "bf16"), quick=("fp32",)))
def test_tails_leave_whole_blocks_as_they_are(tensors: str, bucket: str, unpacks: bool) -> None:
    code = _compiled(tensors, bucket, unpacks, True)
    assert code.stack == 0
    assert code.registers <= 64
    assert code.bytes_moved(32 * pack.WARPS) == (_SIZE[tensors] + _SIZE[bucket]) * pack.BLOCK
