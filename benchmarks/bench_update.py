"""Peak and time of a whole training step: the optimizer in its step, in the backward, and with its
states in host memory.

    python benchmarks/bench_update.py [--rounds 5]

Models with few activations beside their weights, as when a large model is fine-tuned with a small
batch, float32 AdamW.  To compare with, eager PyTorch with an optimizer for each parameter in a hook
on its gradient (PyTorch's tutorial on optimizer steps in the backward).  All variants of a model
start from the same weights; after the rounds those of fxzero are compared bit for bit.  A CPU's
host memory is its own, and states are copied to a stage and back all the same.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fxzero

_RESULTS = Path(__file__).resolve().parent / "results"
_VOCAB, _WIDTH, _LAYERS, _BATCH, _SEQ = 4096, 512, 6, 1, 64
_MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=_VOCAB, n_embd=_WIDTH, n_layer=_LAYERS, n_head=8, use_cache=False)
    ),
    "Llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCAB,
            hidden_size=_WIDTH,
            intermediate_size=4 * _WIDTH,
            num_hidden_layers=_LAYERS,
            num_attention_heads=8,
            use_cache=False,
        )
    ),
    "BERT": lambda: BertForMaskedLM(
        BertConfig(
            vocab_size=_VOCAB,
            hidden_size=_WIDTH,
            intermediate_size=4 * _WIDTH,
            num_hidden_layers=_LAYERS,
            num_attention_heads=8,
        )
    ),
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=_VOCAB,
            d_model=_WIDTH,
            d_ff=4 * _WIDTH,
            num_layers=_LAYERS // 2,
            num_heads=8,
            use_cache=False,
            decoder_start_token_id=0,
        )
    ),
}


class Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    heads = (
        "model", "variant", "planned MiB", "measured MiB", "of eager", "host MiB", "time of eager",
        "bits",
    )  # fmt: skip
    cells, facts = [heads], []
    for name, make in _MODELS.items():
        for row in _measured(make, options.rounds):
            facts.append({"model": name, **row})
            cells.append((name, *_texts(row)))
    harness.show(cells)
    path = options.output / f"{datetime.date.today()}-update.json"
    head = {"versions": harness.versions(), "machine": harness.machine("cpu")}
    path.write_text(json.dumps(head | {"rows": facts}, indent=1) + "\n")
    path.with_suffix(".md").write_text(harness.markdown(cells))


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    planned = "" if row["planned"] is None else f"{row['planned'] / 2**20:.1f}"
    same = {None: "", True: "equal", False: "DIFFER"}[row["same"]]
    measured, of_eager = f"{row['measured'] / 2**20:.1f}", f"{row['of_eager']:.2f}"
    host = f"{row['host'] / 2**20:.1f}" if row["host"] else ""
    return row["variant"], planned, measured, of_eager, host, f"{row['time_of_eager']:.2f}", same


def _measured(make: Callable[[], nn.Module], rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model, tokens = Loss(make()), torch.randint(0, _VOCAB, (_BATCH, _SEQ))
    variants = {
        "eager": _eager(copy.deepcopy(model)),
        "eager, a hook for each gradient": _hooks(copy.deepcopy(model)),
        "fxzero": _ours(copy.deepcopy(model), tokens, "step"),
        "fxzero, update in the backward": _ours(copy.deepcopy(model), tokens, "backward"),
        "fxzero, states in host memory": _ours(copy.deepcopy(model), tokens, "step", True),
        "fxzero, both": _ours(copy.deepcopy(model), tokens, "backward", True),
    }
    steps = {name: _seeded(step, tokens) for name, (_, step) in variants.items()}
    for step in steps.values():
        step()
    measured = {name: fxzero.measure(step) for name, step in steps.items()}
    peaks = {name: each.tensor_bytes for name, each in measured.items()}
    times = harness.seconds_in_turn(steps, rounds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    base: Any = variants["fxzero"][0]
    rows = []
    for name, (trained, _) in variants.items():
        ours = name.startswith("fxzero")
        pairs = zip(trained.parameters(), base.parameters(), strict=True)
        row = {
            "variant": name,
            "planned": trained.plan.peak_bytes if ours else None,
            "measured": peaks[name],
            "of_eager": peaks[name] / peaks["eager"],
            "host": measured[name].host_bytes,
            "seconds": medians[name],
            "time_of_eager": medians[name] / medians["eager"],
            "same": all(torch.equal(a, b) for a, b in pairs) if ours else None,
        }
        rows.append(row)
    return rows


def _seeded(step: Callable[[Tensor], None], tokens: Tensor) -> Callable[[], None]:
    def run() -> None:
        torch.manual_seed(0)
        step(tokens)

    return run


def _eager(model: nn.Module) -> tuple[Any, Callable[[Tensor], None]]:
    return model, _loop(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))


def _ours(
    model: Any, tokens: Tensor, update: str, offload: bool = False
) -> tuple[Any, Callable[[Tensor], None]]:
    kind = functools.partial(fxzero.optim.AdamW, offload=offload)
    model = fxzero.compile(model, (tokens,), inner="eager", optimizer=kind, update=update)
    optimizer = kind(model.parameters(), lr=1e-4)
    if update == "backward":
        model.update_with(optimizer)
    return model, _loop(model, optimizer)


def _loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def step(tokens: Tensor) -> None:
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _hooks(model: nn.Module) -> tuple[Any, Callable[[Tensor], None]]:
    optimizers = {
        p: torch.optim.AdamW([p], lr=1e-4, fused=True)
        for p in model.parameters()
        if p.requires_grad
    }

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)
    return model, lambda tokens: model(tokens).backward()


if __name__ == "__main__":
    main()
