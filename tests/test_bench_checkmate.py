"""Checkmate's own networks: where the optimum is proven, the solver's answer is not above it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_COMMAND = Path(__file__).resolve().parent.parent / "benchmarks" / "bench_checkmate.py"


def _cells(networks: str, directory: Path) -> list[dict[str, Any]]:
    subprocess.run(
        [sys.executable, _COMMAND, "--networks", networks, "--output", directory],
        check=True,
        capture_output=True,
        timeout=100,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
    )
    (path,) = directory.glob("*-checkmate.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_the_optimum_is_met_on_checkmates_networks(tmp_path: Path) -> None:
    cells = _cells("vgg16,mobilenet,unet", tmp_path)
    assert [cell for cell in cells if cell["optimum"] is None] == []
    assert [cell for cell in cells if cell["ours"] > cell["optimum"] + 1e-4] == []
    assert all(cell["bound"] <= cell["ours"] + 1e-4 for cell in cells)


@pytest.mark.slow
def test_several_recomputes_traded_at_once_lead_out_of_what_single_trades_end_in(
    tmp_path: Path,
) -> None:
    """At ResNet-50's smallest peak single trades end at 24.1 % of the step."""
    tightest = _cells("resnet50", tmp_path)[0]
    assert tightest["bound"] <= tightest["ours"] < 0.2
