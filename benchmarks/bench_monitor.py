"""What a monitor costs at its default settings: step times with it and without it, interleaved.

    python benchmarks/bench_monitor.py [--pairs 100]

GPT-2's shapes with fewer layers, forward, backward and AdamW on one thread.  Two copies train side
by side, a step of one and then a step of the other, and each step of the monitored one is compared
with the bare one beside it: on the wall, and in time of the processor, which others disturb less.
Steps are of four kinds:

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
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Pair:
    """A monitored step and the bare one beside it.

    Attributes:
        kind: "plain", "recorded" or "measured".
        wall, processor: seconds of the bare and of the monitored one, by two clocks.
    """

    kind: str
    wall: tuple[float, float]
    processor: tuple[float, float]


def compared(bare: Loop, watched: Loop, pairs: int, **settings: Any) -> list[Pair]:
    """Steps of both, one after the other; who is first changes."""
    found, recorded = [], 0
    with tempfile.TemporaryDirectory() as directory:
        sinks = [JsonLines(Path(directory) / "run.jsonl")]
        monitor = Monitor(watched.model, optimizer=watched.optimizer, sinks=sinks, **settings)
        watched.watched(monitor, batch(0))  # the first step makes a record
        for number in range(1, pairs + 1):
            ids = batch(number)
            steps = {0: lambda ids=ids: bare(ids), 1: lambda ids=ids: watched.watched(monitor, ids)}
            times = {which: timed(steps[which]) for which in ((0, 1) if number % 2 else (1, 0))}
            kind = "plain"
            if monitor.steps % monitor.every == 0:
                kind = "recorded" if recorded % 10 else "measured"
                recorded += 1
            (bare_wall, bare_processor), (wall, processor) = times[0], times[1]
            found.append(Pair(kind, (bare_wall, wall), (bare_processor, processor)))
        monitor.close()
    return found


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the wall, and of this process's threads."""
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - processor


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


def report(default: list[Pair], often: list[Pair], shadowed: list[Pair], own: float) -> str:
    """The figures by both clocks, as lines of text."""
    kinds = {
        "plain": [pair for pair in default if pair.kind == "plain"],
        "recorded": [pair for pair in often if pair.kind == "recorded"],
        "measured": [pair for pair in often if pair.kind == "measured"],
        "shadowed": [pair for pair in shadowed if pair.kind == "recorded"],
    }
    bare = statistics.median(pair.wall[0] for pair in default)
    lines = [
        f"{datetime.date.today()}  {harness.machine('cpu')}  {harness.versions()}",
        f"a bare step takes {bare * 1e3:.1f} ms; a plain step's monitor alone {own * 1e6:.1f} us, "
        f"{own / bare:.6f} of it",
        "step / bare step beside it, median    wall  processor    pairs",
    ]
    ratios = {}
    for kind, pairs in kinds.items():
        ratios[kind] = [
            statistics.median(pair.wall[1] / pair.wall[0] for pair in pairs),
            statistics.median(pair.processor[1] / pair.processor[0] for pair in pairs),
        ]
        wall, processor = ratios[kind]
        lines.append(f"{kind:34s} {wall:8.4f}   {processor:8.4f} {len(pairs):8d}")
    for text, plain in (
        ("default settings", ratios["plain"]),
        ("with the monitor's own plain time", [1 + own / bare] * 2),
    ):
        found = [
            plain[clock]
            + (ratios["recorded"][clock] - 1) / _EVERY
            + (ratios["measured"][clock] - ratios["recorded"][clock]) / _MEASURED
            + (ratios["shadowed"][clock] - ratios["recorded"][clock]) / _SHADOW
            for clock in (0, 1)
        ]
        lines.append(f"{text:34s} {found[0]:8.4f}   {found[1]:8.4f}")
    return "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    main()
