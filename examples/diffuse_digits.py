"""Train a small diffusion model on scikit-learn's handwritten digits, and draw some.

    pip install fxzero[examples]
    python diffuse_digits.py --steps 400
    python diffuse_digits.py --memory-budget 40MiB
    torchrun --nproc_per_node 2 diffuse_digits.py --zero 3
    torchrun --nproc_per_node 4 diffuse_digits.py --stages 2       # 2 pipelines of 2 stages

The U-Net's skips, which lead over stages of a pipeline, need no rewriting.  Noise is predicted as
in Ho et al., "Denoising Diffusion Probabilistic Models" (2020), and digits are drawn in a few steps
as in Song et al., "Denoising Diffusion Implicit Models" (2021).
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxzero

TIMES = 200  # of adding noise


class Block(nn.Module):
    """A residual block that is told the time."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.time = nn.Linear(time, outputs)
        self.second = nn.Sequential(
            nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.across = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(x) + self.time(time)[:, :, None, None]
        return self.across(x) + self.second(h)


class UNet(nn.Module):
    """Noisy images [batch, 1, 8, 8] and their times [batch] to the noise, or to the loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        time = 4 * width
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.ModuleList([Block(width, width, time), Block(width, 2 * width, time)])
        self.middle = Block(2 * width, 2 * width, time)
        self.up = nn.ModuleList([Block(4 * width, width, time), Block(2 * width, width, time)])
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, noisy: Tensor, times: Tensor, noise: Tensor | None = None) -> Tensor:
        time = self.embed(self._waves(times))
        h = self.first(noisy)
        skips = []
        for block in self.down:
            h = block(h, time)
            skips.append(h)
            h = F.avg_pool2d(h, 2)
        h = self.middle(h, time)
        for block in self.up:
            h = F.interpolate(h, scale_factor=2.0)
            h = block(torch.cat([h, skips.pop()], dim=1), time)
        predicted = self.last(h)
        return predicted if noise is None else F.mse_loss(predicted, noise)

    def _waves(self, times: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(TIMES) * torch.arange(half) / half)
        angles = times[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a diffusion model of handwritten digits.")
    parser.add_argument("--memory-budget", metavar="SIZE", help='such as "40MiB"; default: none')
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    parser.add_argument("--width", type=int, default=32, help="a multiple of 8")
    parser.add_argument("--inner", choices=["inductor", "eager"], help="default: what is present")
    parser.add_argument("--zero", default="auto", help="0, 1, 2, 3 or auto: what ranks share")
    parser.add_argument("--stages", type=int, default=1, help="of a pipeline; 1: there is none")
    parser.add_argument("--out", type=Path, default=Path("runs/diffusion"), metavar="DIR")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the plan's page, HTML")
    return parser.parse_args()


def left(times: Tensor) -> Tensor:
    """How much of an image is left at each time: from nearly 1 to nearly 0."""
    return torch.cos(0.5 * math.pi * (times + 1) / (TIMES + 1)) ** 2


@torch.no_grad()
def draw(model: nn.Module, count: int, steps: int = 25) -> Tensor:
    """Images [count, 8, 8] from noise, without any more noise on the way."""
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    path = torch.linspace(TIMES - 1, 0, steps).long()
    for now, after in zip(path, [*path[1:], None], strict=True):
        noise = model(x, now.expand(count).float())
        image = ((x - (1 - left(now)).sqrt() * noise) / left(now).sqrt()).clamp(-1, 1)
        remains = left(after) if after is not None else torch.tensor(1.0)
        x = remains.sqrt() * image + (1 - remains).sqrt() * noise
    return x[:, 0]


def show(images: Tensor) -> str:
    """Images side by side in characters."""
    shades = ((images + 1) / 2 * 4).round().clamp(0, 4).long()
    rows = (["".join(" .:*#"[shade] * 2 for shade in row) for row in i] for i in shades.tolist())
    return "\n".join("  ".join(parts) for parts in zip(*rows, strict=True))


def main() -> None:
    args = parse_args()
    rank, ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    copies = ranks // args.stages  # of the model, each with data of its own
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    chance = torch.Generator().manual_seed(0)  # the same on all processes

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.randint(len(images), (args.batch,), generator=chance)
        times = torch.randint(TIMES, (args.batch,), generator=chance).float()
        noise = torch.randn(args.batch, 1, 8, 8, generator=chance)
        kept = left(times)[:, None, None, None]
        noisy = kept.sqrt() * images[chosen] + (1 - kept).sqrt() * noise
        mine = slice(rank % copies, None, copies)
        return noisy[mine], times[mine], noise[mine]

    model = fxzero.compile(
        UNet(args.width).train(),
        batch(),
        memory_budget=args.memory_budget,
        zero=args.zero,
        pipeline=args.stages if args.stages > 1 else None,
        inner=args.inner,
    )
    optimizer = fxzero.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, args.steps + 1):
        optimizer.zero_grad()
        loss = model.step(*batch())
        fxzero.clip_grad_norm_(model, 1.0)
        optimizer.step()
        if rank == 0 and step % 20 == 0:
            print(f"step {step:4}  loss {loss.item():.3f}", flush=True)

    fxzero.checkpoint.save(args.out, model, step=args.steps)
    trained = UNet(args.width)
    fxzero.checkpoint.load(args.out, trained)  # by all processes, each the whole
    if rank == 0:
        print(show(draw(trained.eval(), 4)))
    if rank == 0 and args.report:
        model.plan.to_html(args.report)


if __name__ == "__main__":
    main()
