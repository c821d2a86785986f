"""Checkmate's own networks: where the optimum is proven, the solver's answer is not above it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_COMMAND = Path(__file__).resolve().parent.parent / "benchmarks" / "bench_checkmate.py"


@pytest.mark.slow
def test_the_optimum_is_met_on_checkmates_networks(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, _COMMAND, "--networks", "vgg16,mobilenet,unet", "--output", tmp_path],
        check=True,
        capture_output=True,
        timeout=100,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
    )
    (path,) = tmp_path.glob("*-checkmate.json")
    cells = json.loads(path.read_text())
    assert [cell for cell in cells if cell["optimum"] is None] == []
    assert [cell for cell in cells if cell["ours"] > cell["optimum"] + 1e-4] == []
    assert all(cell["bound"] <= cell["ours"] + 1e-4 for cell in cells)
