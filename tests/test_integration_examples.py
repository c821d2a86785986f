"""The examples of other libraries' loops, by their command lines, on one process and on two."""

import os
import re
from pathlib import Path

import pytest
from launched import launched

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SMALL = ["--inner", "eager"]


def run(directory, *arguments):
    environment = {"OMP_NUM_THREADS": "1", "FXZERO_SPEC": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = launched(*arguments, timeout=140, cwd=directory, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.exhaustive
def test_the_trainer_goes_on_alone_from_what_two_processes_saved(tmp_path):
    script = EXAMPLES / "trainer.py"
    first = run(tmp_path, *TORCHRUN, script, *SMALL, "--zero", 3, "--steps", 4)
    assert "mesh    dp 2, zero 3" in first
    rest = run(tmp_path, script, *SMALL, "--steps", 6, "--resume", "--memory-budget", "60MiB")
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", first + rest)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert "budget 60.0 MiB" in rest
    assert "FITS" in rest


def test_the_loop_of_accelerate(tmp_path):
    given = [EXAMPLES / "accelerate_loop.py", *SMALL, "--memory-budget", "1MiB"]
    printed = run(tmp_path, *TORCHRUN, *given, "--zero", 3)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert "mesh    dp 2, zero 3" in printed


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_the_lightning_module(tmp_path, devices):
    script = EXAMPLES / "lightning_module.py"
    printed = run(tmp_path, script, *SMALL, "--devices", devices, "--memory-budget", "1MiB")
    (loss,) = (float(loss) for loss in re.findall(r"loss ([\d.]+)", printed))
    assert loss < 2
    assert ("mesh    dp 2" in printed) == (devices == 2)
