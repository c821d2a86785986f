"""Training with weights and gradients that travel as codes: loss and bytes on the wire.

    python benchmarks/bench_messages.py [--ranks 2 4] [--steps 300]

A small GPT-2 on this project's own source, a byte a token, ZeRO 3, AdamW.  Each variant starts
from the same weights and sees the same batches; the final loss is the mean of the last twenty.
Bytes are those that a rank sends in a step, by the collectives in the graphs that run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from bench_training import ROWS, model_of, rows_of, schedule_of, text_of

import fxzero
from fxzero.capture import capture
from fxzero.collectives import is_collective, is_gather
from fxzero.mesh import Mesh
from fxzero.options import Options
from fxzero.planner import Planner

_RESULTS = Path(__file__).resolve().parent / "results"
_LAST = 20
_VARIANTS: dict[str, dict[str, str]] = {
    "as they are": {},
    "weights int8": {"send_weights": "int8"},
    "weights int8, gradients int8": {"send_weights": "int8", "send_gradients": "int8"},
    "weights int8, gradients int4": {"send_weights": "int8", "send_gradients": "int4"},
    "weights fp8, gradients fp8": {"send_weights": "fp8", "send_gradients": "fp8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=(2, 4))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    cells: list[tuple[str, ...]] = [("ranks", "messages", "bytes", "fewer", "loss", "of plain")]
    for ranks in options.ranks:
        for name, given in _VARIANTS.items():
            losses = _train(ranks, given, options.steps)
            row = {"bytes": sent_bytes(ranks, given), "loss": sum(losses[-_LAST:]) / _LAST}
            found[f"{ranks} {name}"] = row
            base = found[f"{ranks} as they are"]
            cells.append(
                (
                    str(ranks),
                    name,
                    f"{row['bytes']}",
                    f"{base['bytes'] / row['bytes']:.2f}",
                    f"{row['loss']:.4f}",
                    f"{row['loss'] / base['loss']:.4f}",
                )
            )
            print(*cells[-1], flush=True)
    harness.show(cells)
    path = options.output / f"{datetime.date.today()}-messages.json"
    facts = {"versions": harness.versions(), "machine": harness.machine("cpu")}
    path.write_text(json.dumps(facts | {"steps": options.steps, "found": found}, indent=1) + "\n")
    path.with_suffix(".md").write_text(harness.markdown(cells))


def sent_bytes(ranks: int, given: dict[str, str]) -> int:
    """What a rank sends in a step: its part to all others for a gather, theirs for the rest."""
    rows = torch.zeros(ROWS // ranks, 64, dtype=torch.long)
    captured = capture(model_of(torch.float32), (), {"input_ids": rows, "labels": rows})
    sharding = Mesh({"dp": ranks}).sharding(3, fxzero.Precision(**given))
    decided = Planner(captured.graph, Options(sharding=sharding), "gpt2").decide()
    split, total = decided.emitted.split, 0
    for node in (*split.forward.graph.nodes, *split.backward.graph.nodes):
        if is_collective(node):
            (source,) = node.all_input_nodes
            size = source.meta["val"].nbytes
            total += size * (ranks - 1) if is_gather(node) else size * (ranks - 1) // ranks
    return total


def _train(ranks: int, given: dict[str, str], steps: int) -> list[float]:
    with tempfile.TemporaryDirectory() as directory:
        processes.start_processes(
            _rank, args=(ranks, given, steps, directory), nprocs=ranks, start_method="spawn"
        )
        losses: list[float] = json.loads((Path(directory) / "losses.json").read_text())
    return losses


def _rank(rank: int, ranks: int, given: dict[str, str], steps: int, directory: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    precision = fxzero.Precision(**given)
    model = fxzero.compile(model_of(torch.float32), zero=3, precision=precision, inner="eager")
    optimizer = fxzero.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = schedule_of(optimizer, steps)
    text, generator = text_of(), torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        rows = rows_of(text, generator).chunk(ranks)[rank]
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / ranks)
    if rank == 0:
        (Path(directory) / "losses.json").write_text(json.dumps(losses))
    dist.barrier()


if __name__ == "__main__":
    main()
