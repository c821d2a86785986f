"""Train a small GPT on Python's own source code under a memory budget, on one device or many.

    pip install fxzero[examples]
    python train_gpt.py --memory-budget 200MiB
    python train_gpt.py                             # no budget: nothing is recomputed
    torchrun --nproc_per_node 2 train_gpt.py --zero 3 --checkpoints runs/gpt
    torchrun --nproc_per_node 4 train_gpt.py --stages 2 --zero 2         # 2 pipelines of 2 stages

Everything here is plain PyTorch and transformers except what begins with ``fxzero``.  Run again
with the same ``--checkpoints``, on as many processes as you like, it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
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
    parser.add_argument("--zero", default="auto", help="0, 1, 2, 3 or auto: what ranks share")
    parser.add_argument("--stages", type=int, default=1, help="of a pipeline; 1: there is none")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="save here, and go on")
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--plan-out", type=Path, metavar="FILE", help="write the plan to this file")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the plan's page, HTML")
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


def batches(text: Tensor, batch: int, seq: int, copy: int, first: int) -> Iterator[Tensor]:
    """Batches of one copy of the model from step ``first`` on."""
    for step in range(first, 2**30):
        generator = torch.Generator().manual_seed(2**31 * copy + step)
        starts = torch.randint(len(text) - seq, (batch, 1), generator=generator)
        yield text[starts + torch.arange(seq)].long()


def train(args: argparse.Namespace) -> None:
    rank, ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    copies = ranks // args.stages  # of the model, each with data of its own
    torch.manual_seed(rank)
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    model = build_model(args.layers, args.width, args.seq).to(device).train()

    model = fxzero.compile(
        model,
        memory_budget=args.memory_budget,
        zero=args.zero,
        pipeline=args.stages if args.stages > 1 else None,
        inner=args.inner,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    done = 0
    if args.checkpoints and fxzero.checkpoint.latest(args.checkpoints):
        done = fxzero.checkpoint.load(args.checkpoints, model, optimizer).step
    data = batches(load_text(), args.batch, args.seq, rank % copies, first=done)

    for step in range(done + 1, args.steps + 1):
        start = time.perf_counter()
        tokens = next(data).to(device)
        optimizer.zero_grad()
        loss = model.step(input_ids=tokens, labels=tokens)  # forward and backward
        fxzero.clip_grad_norm_(model, 1.0)
        optimizer.step()
        seconds = time.perf_counter() - start
        if rank == 0:
            print(f"step {step:4}  loss {loss.item():.3f}  {seconds:.2f} s", flush=True)
        if args.checkpoints and step % args.every == 0:
            fxzero.checkpoint.save(args.checkpoints, model, optimizer, step=step, keep=2)

    if rank == 0:
        print(model.plan)
        if args.plan_out:
            model.plan.save(args.plan_out)
        if args.report:
            model.plan.to_html(args.report)


def main() -> None:
    args = parse_args()
    try:
        train(args)
    except fxzero.BudgetError as error:  # says which budget would do
        raise SystemExit(f"train_gpt: {error}") from None


if __name__ == "__main__":
    main()
