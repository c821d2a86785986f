"""The kernels' benchmark: its table of bytes, sizes that fit, and what it says without a device."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optimizer_cases as cases
import pytest
import torch

_BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
_COMMAND = _BENCHMARKS / "bench_kernels.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    import bench_kernels

    return bench_kernels


def _run(*arguments: object, timeout: int = 100) -> subprocess.CompletedProcess[str]:
    # A benchmark imports what lies beside it, and finds no device even where there is one.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(_COMMAND), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


@pytest.mark.parametrize(
    ("form", "moments", "expected"),
    [
        ("float32", 2, 28),
        ("float32", 1, 20),
        ("bfloat16 with a whole master", 2, 18),
        ("bfloat16 with a whole master", 1, 14),
        ("bfloat16 with a whole master and float32 moments", 2, 26),
        ("bfloat16 rounded stochastically", 2, 14),
        ("bfloat16 with 24 bits and int8 moments", 2, 12 + 4 * 4 / 128),
        ("bfloat16 rounded stochastically with int8 moments", 2, 10 + 4 * 4 / 128),
    ],
)
def test_a_step_is_charged_the_bytes_that_it_must_move(
    bench: Any, form: str, moments: int, expected: float
) -> None:
    dtype, numerics = cases.kept(form)
    kind = numerics.form(torch.empty(256, 4096, dtype=dtype, device="meta"))
    assert bench.step_bytes(kind, moments, dtype) == expected


def test_quantized_numbers_are_charged_with_their_scales(bench: Any) -> None:
    assert bench.code_bytes("int8", 256) == bench.code_bytes("fp8", 256) == 1 + 1 / 64
    assert bench.code_bytes("int4", 256) == 1 / 2 + 1 / 64
    assert bench.reduce_bytes("int8", 256, 8, torch.float32) == 8 * (1 + 1 / 64) + 4


@pytest.mark.parametrize("gigabytes", [15, 22, 79, 139])
def test_sizes_fit_the_device(bench: Any, gigabytes: int) -> None:
    memory, optimizers = gigabytes * 10**9, 15
    # The widest step and the copy beside it.
    assert (16 + 8) * bench.elements_for(memory) <= 0.6 * memory
    assert bench.elements_for(memory) >= 2**28
    for shapes in bench.shapes_for(memory, optimizers).values():
        elements = sum(map(math.prod, shapes))
        assert 16 * elements * optimizers <= 0.6 * memory
        assert elements >= 10**7


@pytest.mark.slow
def test_without_a_device_it_ends_with_one_line() -> None:
    ended = _run()
    assert ended.returncode != 0
    assert ended.stderr == "bench_kernels needs a CUDA device, and torch finds none here\n"
    assert not ended.stdout


@pytest.mark.slow
def test_every_kernel_and_optimizer_has_a_row(bench: Any, tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--small", "--rounds", 1, "--output", tmp_path)
    assert _run(*arguments).returncode == 0
    (path,) = tmp_path.glob("*-kernels-small-cpu.json")
    report = json.loads(path.read_text())
    assert list(report["kernels"]) == [case.name for case in bench.cases()]
    for row in report["kernels"].values():
        assert row["share"] > 0
        assert row["bytes"] / row["elements"] <= 28
    for each in report["steps"].values():
        assert len(each["seconds"]) == 15
        assert min(each["seconds"].values()) > 0
    tables = path.with_suffix(".md").read_text()
    assert tables.startswith("| optimizer | many small: ms")
    assert "| mean of 8 pieces of int4, float32 |" in tables
