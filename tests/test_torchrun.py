"""The example under torchrun: one script from one process to many, and back after a crash."""

import os
import re
from pathlib import Path

import pytest
from launched import launched

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "train_gpt.py"
SMALL = ["--layers", "2", "--width", "32", "--batch", "2", "--seq", "32", "--inner", "eager"]
_LOSS = re.compile(r"^step +(\d+)  loss ([\d.]+)", re.MULTILINE)


def torchrun(*arguments, ranks=2, script=EXAMPLE, restarts=0, timeout=150):
    command = ["-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", f"--max-restarts={restarts}", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FXZERO_SPEC": "0"}
    return launched(*command, *arguments, timeout=timeout, env=environment)


def losses(text):
    return dict(_LOSS.findall(text))


# The second rank kills itself before its fifth step, the first time.
_FRAGILE = """
import os, runpy, signal, sys
from pathlib import Path
import torch

marker = Path(sys.argv.pop())
if os.environ["RANK"] == "1" and not marker.exists():
    step, count = torch.optim.AdamW.step, [0]

    def fragile(self, *args, **kwargs):
        count[0] += 1
        if count[0] == 5:
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = fragile
sys.argv[0] = {example!r}
runpy.run_path({example!r}, run_name="__main__")
"""


# The launcher ends the others as soon as one is dead, often before they notice: what they say then
# is tested in test_distributed.py.
def test_after_a_killed_rank_training_resumes_bit_for_bit(tmp_path):
    script = tmp_path / "fragile.py"
    script.write_text(_FRAGILE.format(example=str(EXAMPLE)))
    given = (*SMALL, "--zero", 3, "--steps", 8, "--every", 2, "--checkpoints")
    whole = torchrun(*given, tmp_path / "whole")
    broken = torchrun(*given, tmp_path / "broken", tmp_path / "killed", script=script, restarts=1)
    assert broken.returncode == 0, broken.stderr
    assert (tmp_path / "killed").exists()
    assert losses(broken.stdout) == losses(whole.stdout)
    assert "mesh    dp 2, zero 3" in whole.stdout
    # The same checkpoints in one process, without a launcher.
    alone = launched(
        EXAMPLE, *SMALL, "--steps", 9, "--checkpoints", tmp_path / "whole", timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FXZERO_SPEC": "0"},
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert list(losses(alone.stdout)) == ["9"]
