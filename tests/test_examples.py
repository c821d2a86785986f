"""The examples do what their first lines say, on one process and as two pipelines of two stages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launched import launched

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def run(*arguments: str, ranks: int = 1, folder: Path) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*(launcher if ranks > 1 else []), EXAMPLES / arguments[0], *arguments[1:]]
    done = launched(*command, "--inner", "eager", "--out", folder / "out", timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(said: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([0-9.]+)", said)]


def test_the_classifier_recognises_digits_within_its_budget(tmp_path: Path) -> None:
    report = tmp_path / "plan.html"
    said = run(
        "classify_digits.py", "--memory-budget", "10MiB", "--report", str(report), folder=tmp_path
    )
    assert float(re.search(r"never seen: ([0-9.]+)%", said)[1]) > 75
    assert "10.0 MiB" in report.read_text()


@pytest.mark.exhaustive  # five processes that import everything
def test_the_diffusion_model_learns_as_two_pipelines_of_two_stages(tmp_path: Path) -> None:
    steps = ("--steps", "40")
    alone = run("diffuse_digits.py", *steps, folder=tmp_path)
    together = run("diffuse_digits.py", *steps, "--stages", "2", ranks=4, folder=tmp_path)
    first, last = losses(alone)
    assert last < first
    assert losses(together) == pytest.approx([first, last], rel=0.3)  # of half of the batch each
    assert len(alone.splitlines()) == len(together.splitlines()) == 2 + 8  # eight rows of pixels
