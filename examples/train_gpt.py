"""Train a small GPT on Python's own source code under a memory budget.

    pip install fxzero[examples]
    python train_gpt.py --memory-budget 200MiB
    python train_gpt.py                             # no budget: nothing is recomputed

Everything here is plain PyTorch and transformers except the line with ``fxzero.compile``.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import fxzero


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT under a memory budget.")
    parser.add_argument("--memory-budget", metavar="SIZE", help='such as "200MiB"; default: none')
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--inner", choices=["inductor", "eager"], help="default: what is present")
    parser.add_argument("--plan-out", type=Path, metavar="FILE", help="write the plan to this file")
    return parser.parse_args()


def build_model(layers: int, width: int, seq: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=256,  # one token a byte
        n_positions=seq,
        n_embd=width,
        n_layer=layers,
        n_head=width // 32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def load_text() -> Tensor:
    """The top-level modules of the standard library, as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray().join(f.read_bytes() for f in files), dtype=torch.uint8)


def batches(text: Tensor, batch: int, seq: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(text) - seq, (batch, 1), generator=generator)
        yield text[starts + torch.arange(seq)].long()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(args.layers, args.width, args.seq).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    data = batches(load_text(), args.batch, args.seq)

    model = fxzero.compile(model, memory_budget=args.memory_budget, inner=args.inner)

    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        tokens = next(data).to(device)
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - start
        print(f"step {step:4}  loss {loss.item():.3f}  {seconds:.2f} s", flush=True)

    print(model.plan)
    if args.plan_out:
        model.plan.save(args.plan_out)


def main() -> None:
    args = parse_args()
    try:
        train(args)
    except fxzero.BudgetError as error:  # says which budget would do
        raise SystemExit(f"train_gpt: {error}") from None


if __name__ == "__main__":
    main()
