"""Training of a small GPT-2 with each form of each optimizer: does it get as far as in float32?

    python benchmarks/bench_training.py [--steps 300] [--only Adafactor]

Text is this project's own source, a byte a token.  Every variant starts from the same weights and
sees the same batches; the final loss is the mean of the last twenty.  Weights in bfloat16 are used
by a model in bfloat16.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import torch
from torch import Tensor

from fxzero import optim

_HERE = Path(__file__).resolve().parent
_LENGTH, ROWS, _LAST = 64, 8, 20
_ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
_VARIANTS: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "torch AdamW, float32": (torch.optim.AdamW, torch.float32, _ADAMW),
    "AdamW, float32": (optim.AdamW, torch.float32, _ADAMW),
    "AdamW, float32, int8 moments": (optim.AdamW, torch.float32, _ADAMW | {"moments": "int8"}),
    "AdamW, split master": (optim.AdamW, torch.bfloat16, _ADAMW),
    "AdamW, split master, float32 moments": (
        optim.AdamW,
        torch.bfloat16,
        _ADAMW | {"moments": "float32"},
    ),
    "AdamW, 24 bits, int8 moments": (
        optim.AdamW,
        torch.bfloat16,
        _ADAMW | {"master_bits": 24, "moments": "int8"},
    ),
    "AdamW, stochastic rounding": (
        optim.AdamW,
        torch.bfloat16,
        _ADAMW | {"stochastic_rounding": True},
    ),
    "AdamW, stochastic rounding, int8 moments": (
        optim.AdamW,
        torch.bfloat16,
        _ADAMW | {"stochastic_rounding": True, "moments": "int8"},
    ),
    "torch AdamW, bfloat16": (torch.optim.AdamW, torch.bfloat16, _ADAMW),
    "Lion, float32": (optim.Lion, torch.float32, {"lr": 2e-4, "weight_decay": 0.05}),
    "Lion, split master": (optim.Lion, torch.bfloat16, {"lr": 2e-4, "weight_decay": 0.05}),
    "SGD, float32": (optim.SGD, torch.float32, {"lr": 0.05}),
    "SGD, split master": (optim.SGD, torch.bfloat16, {"lr": 0.05}),
    "torch Adafactor, float32": (torch.optim.Adafactor, torch.float32, {"lr": 1e-2}),
    "Adafactor, float32": (optim.Adafactor, torch.float32, {"lr": 1e-2}),
    "Adafactor, bfloat16": (optim.Adafactor, torch.bfloat16, {"lr": 1e-2}),
    "Adafactor, stochastic rounding": (
        optim.Adafactor,
        torch.bfloat16,
        {"lr": 1e-2, "stochastic_rounding": True},
    ),
    "torch Adafactor, bfloat16": (torch.optim.Adafactor, torch.bfloat16, {"lr": 1e-2}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", default="", help="part of the names of what is run")
    parser.add_argument("--output", type=Path, default=_HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    text = text_of()
    found: dict[str, float] = {}
    cells: list[tuple[str, ...]] = [("optimizer", "final loss", "of float32's")]
    chosen = {name: variant for name, variant in _VARIANTS.items() if options.only in name}
    for name, (make, dtype, given) in chosen.items():
        found[name] = _final_loss(text, make, dtype, given, options.steps)
        base = found.get(f"{name.partition(',')[0]}, float32", found[name])
        cells.append((name, f"{found[name]:.4f}", f"{found[name] / base:.4f}"))
        print(*cells[-1], flush=True)
    harness.show(cells)
    part = f"-{options.only.lower()}" if options.only else ""
    path = options.output / f"{datetime.date.today()}-training-parity{part}.json"
    facts = {"versions": harness.versions(), "machine": harness.machine("cpu")}
    path.write_text(json.dumps(facts | {"steps": options.steps, "loss": found}, indent=1) + "\n")
    path.with_suffix(".md").write_text(harness.markdown(cells))


def text_of() -> Tensor:
    """The text, int64 [bytes]."""
    files = sorted((_HERE.parent / "fxzero").glob("*.py"))
    data = b"".join(path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def rows_of(text: Tensor, generator: torch.Generator) -> Tensor:
    """Pieces of the text, int64 [rows, length]."""
    starts = torch.randint(len(text) - _LENGTH, (ROWS,), generator=generator)
    return torch.stack([text[start : start + _LENGTH] for start in starts.tolist()])


def model_of(dtype: torch.dtype) -> Any:
    """A small GPT-2 without dropout, the same weights each time."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=256,
        n_embd=128,
        n_layer=3,
        n_head=4,
        n_positions=_LENGTH,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        **dropout,
    )
    return transformers.GPT2LMHeadModel(config).to(dtype).train()


def schedule_of(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """A short warm-up, and down to a tenth."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
    )


def _final_loss(
    text: Tensor, make: Any, dtype: torch.dtype, given: dict[str, Any], steps: int
) -> float:
    model = model_of(dtype)
    optimizer = make(model.parameters(), **given)
    schedule = schedule_of(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        rows = rows_of(text, generator)
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-_LAST:]) / _LAST


if __name__ == "__main__":
    main()
