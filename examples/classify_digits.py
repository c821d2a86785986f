"""Train a small residual network on scikit-learn's handwritten digits, and test it.

    pip install fxzero[examples]
    python classify_digits.py
    python classify_digits.py --memory-budget 20MiB
    torchrun --nproc_per_node 2 classify_digits.py --zero 2
    torchrun --nproc_per_node 4 classify_digits.py --stages 2      # 2 pipelines of 2 stages

However many processes train, the checkpoint that they write loads into the plain model, with which
one process tests what was learned.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxzero


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Classifier(nn.Module):
    """Images [batch, 1, 8, 8] to scores [batch, 10], or to the loss if labels are given."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        scores = self.head(self.blocks(self.first(images)).mean((2, 3)))
        return scores if labels is None else F.cross_entropy(scores, labels)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a classifier of handwritten digits.")
    parser.add_argument("--memory-budget", metavar="SIZE", help='such as "20MiB"; default: none')
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128, help="of all processes together")
    parser.add_argument("--width", type=int, default=32, help="a multiple of 8")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--inner", choices=["inductor", "eager"], help="default: what is present")
    parser.add_argument("--zero", default="auto", help="0, 1, 2, 3 or auto: what ranks share")
    parser.add_argument("--stages", type=int, default=1, help="of a pipeline; 1: there is none")
    parser.add_argument("--out", type=Path, default=Path("runs/classifier"), metavar="DIR")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the plan's page, HTML")
    return parser.parse_args()


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels to train with, and the last 297 of the 1,797 to test with."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    args = parse_args()
    rank, ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    copies = ranks // args.stages  # of the model, each with data of its own
    torch.manual_seed(rank)
    (images, labels), test = digits()
    shuffle = torch.Generator().manual_seed(0)  # the same on all processes

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(images), generator=shuffle)[: args.batch]
        mine = chosen[rank % copies :: copies]
        return images[mine], labels[mine]

    model = fxzero.compile(
        Classifier(args.width, args.blocks).train(),
        batch(),
        memory_budget=args.memory_budget,
        zero=args.zero,
        pipeline=args.stages if args.stages > 1 else None,
        inner=args.inner,
    )
    optimizer = fxzero.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, args.steps + 1):
        optimizer.zero_grad()
        loss = model.step(*batch())
        fxzero.clip_grad_norm_(model, 1.0)
        optimizer.step()
        if rank == 0 and step % 10 == 0:
            print(f"step {step:4}  loss {loss.item():.3f}", flush=True)

    fxzero.checkpoint.save(args.out, model, step=args.steps)
    trained = Classifier(args.width, args.blocks)
    fxzero.checkpoint.load(args.out, trained)  # by all processes, each the whole
    if rank == 0:
        print(f"accuracy on images never seen: {accuracy(trained, *test):.1%}")
    if rank == 0 and args.report:
        model.plan.to_html(args.report)


if __name__ == "__main__":
    main()
