"""Step time of pipelines: where the model is cut, which schedule, and what was expected.

    python benchmarks/bench_pipeline.py [--ranks 2] [--microbatches 8] [--rounds 7]

A GPT-2 whose head costs as much as several layers, each rank on a core of its own.  "uniform" has
as many layers in each stage; "fxzero" is cut where the step takes the least time by measured times
of its operators.  All variants live in the same processes and are timed in turn, round after round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

import fxzero
from fxzero.capture import capture
from fxzero.model_calibration import calibrate

_RESULTS = Path(__file__).resolve().parent / "results"
_WARMUP = 2
_LAYERS, _WIDTH, _VOCAB, _LENGTH, _ROWS = 8, 256, 16384, 256, 2
_VARIANTS = (
    ("uniform", "1f1b"),
    ("fxzero", "1f1b"),
    ("fxzero", "gpipe"),
    ("fxzero", "zb1p"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        processes.start_processes(
            _rank, args=(options, directory), nprocs=options.ranks, start_method="spawn"
        )
        found = json.loads((Path(directory) / "0.json").read_text())
    _write(options, found)


def _rank(rank: int, options: argparse.Namespace, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ["FXZERO_CACHE"] = f"{directory}/cache-{rank}"
    store = dist.FileStore(f"{directory}/store", options.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
    found = _compare(options)
    (Path(directory) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def _compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    batch = {"input_ids": torch.randint(_VOCAB, (_ROWS * options.microbatches, _LENGTH))}
    batch["labels"] = batch["input_ids"]
    part = {name: value[:_ROWS] for name, value in batch.items()}
    captured = capture(_model(), (), part)
    dist.barrier()  # all measure at once, as all compute at once: they share the machine's memory
    calibrate(captured.graph, "cpu")
    dist.barrier()
    steps: dict[str, Callable[[], torch.Tensor]] = {}
    found = []
    for kind, schedule in _VARIANTS:
        model = _compiled(kind, schedule, options, batch)
        name = f"{kind} {schedule}"

        def step(model: Any = model) -> torch.Tensor:
            model.zero_grad()
            loss: torch.Tensor = model.step(**batch)
            return loss

        losses = [step().item() for _ in range(_WARMUP)]
        trained = model._fxzero.pipeline
        choice = next(iter(trained.prepared.values())).choice
        plan = model.plan
        expected = {"modelled": plan.step_seconds, "bubble": plan.pipeline.bubble}
        cuts = {"cuts": choice.cuts, "peak": plan.peak_bytes}
        found.append({"name": name, "losses": losses, **expected, **cuts})
        steps[name] = step
    times = harness.seconds_in_turn(steps, options.rounds)
    return [{**row, "seconds": times[row["name"]]} for row in found]


def _model() -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=_VOCAB,
        n_embd=_WIDTH,
        n_layer=_LAYERS,
        n_head=4,
        n_positions=_LENGTH,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


def _compiled(
    kind: str, schedule: str, options: argparse.Namespace, batch: dict[str, torch.Tensor]
) -> Any:
    cuts: tuple[str, ...] = ()
    if kind == "uniform":
        each = _LAYERS // options.ranks
        cuts = tuple(f"transformer.h.{each * i}" for i in range(1, options.ranks))
    pipeline = fxzero.Pipeline(
        stages=options.ranks, schedule=schedule, microbatches=options.microbatches, cuts=cuts
    )
    return fxzero.compile(_model(), batch, pipeline=pipeline, inner="eager", recompute="none")


def _write(options: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    base = statistics.median(found[0]["seconds"])
    cells: list[tuple[str, ...]] = [
        ("variant", "step ms", "uniform / it", "modelled ms", "modelled / measured", "bubble",
         "rank 0 peak MiB", "cut before operator")
    ]  # fmt: skip
    for row in found:
        seconds = statistics.median(row["seconds"])
        cells.append(
            (
                row["name"],
                f"{1e3 * seconds:.0f}",
                f"{base / seconds:.2f}",
                f"{1e3 * row['modelled']:.0f}",
                f"{row['modelled'] / seconds:.2f}",
                f"{row['bubble']:.1%}",
                f"{row['peak'] / 2**20:.1f}",
                " ".join(map(str, row["cuts"])),
            )
        )
    harness.show(cells)
    data = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "versions": harness.versions(),
        "machine": harness.machine("cpu"),
        "rows": found,
    }
    path = options.output / f"{datetime.date.today()}-pipeline-gpt2-{options.ranks}-ranks.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    path.with_suffix(".md").write_text(harness.markdown(cells))


if __name__ == "__main__":
    main()
