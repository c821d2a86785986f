"""Faults under torchrun itself: it starts ranks again, and passes signals on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pool import Pool

from fxzero import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]
_HERE = Path(__file__).resolve().parent


def start(root, what):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = (_HERE.parent, os.environ.get("PYTHONPATH", ""))
    return subprocess.Popen(
        [*command, "--max-restarts=1", str(_HERE / "script.py"), str(root), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "FXZERO_SPEC": "0",
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        },
    )


def losses(root, rank):
    """By step, the last that were noted."""
    path = root / f"losses {rank}"
    return dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}


@pytest.fixture(scope="module")
def undisturbed():
    with Pool(2) as pool:
        return pool.run("faults.training:run", setup="zero 3", steps=12)


@pytest.mark.exhaustive
def test_a_killed_rank_costs_the_steps_behind_the_last_checkpoint(tmp_path, undisturbed):
    """F5: killed in step 7 of 12, with a checkpoint every three."""
    with start(tmp_path, "kill") as launcher:
        said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, said
    assert re.search(r"restart|exitcode\s*: -9", said), said
    for rank, (expected, _) in enumerate(undisturbed):
        assert losses(tmp_path, rank) == expected
    steps = [json.loads(line)[0] for line in (tmp_path / "losses 0").read_text().splitlines()]
    assert steps in ([*range(1, 7), *range(7, 13)], [*range(1, 8), *range(7, 13)])
    assert checkpoint.verify(tmp_path).step == 12


@pytest.mark.exhaustive
def test_a_launcher_that_is_ended_leaves_one_whole_checkpoint(tmp_path, undisturbed):
    """F8: torchrun passes SIGTERM on, and waits for its processes."""
    with start(tmp_path, "terminate") as launcher:
        end = time.monotonic() + 90
        while len(losses(tmp_path, 0)) < 4 and time.monotonic() < end:
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        said, _ = launcher.communicate(timeout=60)
    done = len(losses(tmp_path, 0))
    assert 4 <= done < 12, said
    assert checkpoint.verify(tmp_path).step == done
    for rank, (expected, _) in enumerate(undisturbed):
        assert losses(tmp_path, rank) == {number: expected[number] for number in range(1, done + 1)}
