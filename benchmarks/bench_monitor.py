"""What a monitor costs at its default settings: step times with it and without it, interleaved.

    python benchmarks/bench_monitor.py [--pairs 100]

GPT-2's shapes with fewer layers, forward, backward and AdamW on one thread.  Two copies train side
by side, a step of one and then a step of the other, and each step of the monitored one is compared
with the bare one beside it.  Steps are of three kinds:

    plain       most of them: the loss is kept, inputs are counted
    recorded    every 50th: the norm is computed, a record written to a file
    measured    every 500th: as recorded, and the peak is measured
    shadowed    every 1,000th: as recorded, and the batch runs once more, compiled and eagerly

The cost at default settings is the mean of their costs, as often as each occurs.  So few are not
plain that these get rounds of their own, in which every second step is recorded.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fxzero
from fxzero.monitor import JsonLines, Monitor

_RESULTS = Path(__file__).resolve().parent / "results"
_VOCAB, _WIDTH, _LAYERS, _SEQ = 8192, 768, 3, 128
_EVERY, _MEASURED, _SHADOW = 50, 500, 1000


class Loop:
    """A model that trains, one step a call."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = fxzero.compile(copy.deepcopy(model), inner="eager")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def __call__(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model.step(input_ids=ids, labels=ids)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def watched(self, monitor: Monitor, ids: Tensor) -> None:
        with monitor.step(input_ids=ids, labels=ids) as step:
            step.loss(self(ids))


def batch(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(_VOCAB, (1, _SEQ), generator=generator)


def compared(bare: Loop, watched: Loop, pairs: int, **settings: Any) -> dict[str, list[float]]:
    """Seconds of bare and of monitored steps, by kind."""
    found: dict[str, list[float]] = {"bare": [], "plain": [], "recorded": [], "measured": []}
    recorded = 0
    with tempfile.TemporaryDirectory() as directory:
        sinks = [JsonLines(Path(directory) / "run.jsonl")]
        monitor = Monitor(watched.model, optimizer=watched.optimizer, sinks=sinks, **settings)
        watched.watched(monitor, batch(0))  # the first step makes a record
        for number in range(1, pairs + 1):
            ids, turns = batch(number), ["bare", "watched"]
            for turn in turns if number % 2 else reversed(turns):
                start = time.perf_counter()
                if turn == "bare":
                    bare(ids)
                    kind = "bare"
                else:
                    watched.watched(monitor, ids)
                    kind = "plain"
                    if monitor.steps % monitor.every == 0:
                        kind = "recorded" if recorded % 10 else "measured"
                        recorded += 1
                found[kind].append(time.perf_counter() - start)
        monitor.close()
    return found


def own_seconds(watched: Loop, count: int = 2000) -> float:
    """What a plain step costs without any training in it."""
    ids, loss = batch(0), torch.zeros(())
    monitor = Monitor(watched.model, every=10_000)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        with monitor.step(input_ids=ids, labels=ids) as step:
            step.loss(loss)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--results", type=Path, help="a file to add the figures to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=_VOCAB, n_embd=_WIDTH, n_layer=_LAYERS, n_head=12, n_positions=_SEQ,
            use_cache=False, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    bare, watched = Loop(model), Loop(model)
    for loop in (bare, watched):
        for number in range(3):
            loop(batch(number))
    default = compared(bare, watched, given.pairs)
    often = compared(bare, watched, given.pairs, every=2, shadow_every=0)
    shadowed = compared(bare, watched, max(given.pairs // 10, 6), every=2, shadow_every=2)
    text = report(default, often, shadowed, own_seconds(watched))
    print(text)
    if given.results is not None:
        with given.results.open("a") as file:
            file.write(text)


def report(
    default: dict[str, list[float]],
    often: dict[str, list[float]],
    shadowed: dict[str, list[float]],
    own: float,
) -> str:
    bare = statistics.median(default["bare"])
    plain = statistics.median(default["plain"]) / bare
    recorded, measured = (
        statistics.median(often[kind]) / statistics.median(often["bare"])
        for kind in ("recorded", "measured")
    )
    shadow = statistics.median(shadowed["recorded"]) / statistics.median(shadowed["bare"])
    rare = (
        (recorded - 1) / _EVERY + (measured - recorded) / _MEASURED + (shadow - recorded) / _SHADOW
    )
    machine, versions = harness.machine("cpu"), harness.versions()
    rows = [
        f"{datetime.date.today()}  {machine}  {versions}",
        f"bare step                       {bare * 1e3:9.2f} ms, median of {len(default['bare'])}",
        f"plain / bare                    {plain:9.4f}",
        f"plain, without training in it   {own * 1e6:9.1f} us, {own / bare:.6f} of a step",
        f"recorded / bare                 {recorded:9.4f}, median of {len(often['recorded'])}",
        f"measured / bare                 {measured:9.4f}, median of {len(often['measured'])}",
        f"shadowed / bare                 {shadow:9.4f}, median of {len(shadowed['recorded'])}",
        f"default settings / bare         {plain + rare:9.4f}  by these ratios",
        f"                                {1 + own / bare + rare:9.4f}  with a plain step's own time",
    ]
    return "\n".join(rows) + "\n\n"


if __name__ == "__main__":
    main()
