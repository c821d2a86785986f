"""A LightningModule under a memory budget, on one device or many.

pip install fxzero[integrations]
python lightning_module.py --memory-budget 1MiB
python lightning_module.py --devices 2 --zero 3
"""

import argparse
from typing import Any

import lightning
import torch
from torch import nn

import fxzero


class Directions(lightning.LightningModule):
    """Says which of eight directions a noisy vector points in."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers = [nn.Linear(8, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width)]
        self.layers = nn.Sequential(*layers, nn.GELU(), nn.Linear(width, 8))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layers(x), y)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self(*batch)  # forward is what is planned
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small network with Lightning.")
    parser.add_argument("--memory-budget", metavar="SIZE", help='such as "1MiB"; default: none')
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--zero", type=int, default=2, help="0, 1, 2 or 3: what ranks share")
    parser.add_argument("--inner", choices=["inductor", "eager"], help="default: what is present")
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()

    lightning.seed_everything(0)
    y = torch.arange(8).repeat(64)
    x = nn.functional.one_hot(y, 8) + 0.3 * torch.randn(512, 8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 32, shuffle=True)
    strategy = fxzero.integrations.LightningStrategy(
        memory_budget=given.memory_budget, zero=given.zero, inner=given.inner
    )
    trainer = lightning.Trainer(
        strategy=strategy,
        devices=given.devices,
        max_epochs=given.epochs,
        gradient_clip_val=1.0,
        default_root_dir="runs/lightning",
        logger=False,
        enable_progress_bar=False,
    )
    module = Directions()
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        print(f"loss {trainer.callback_metrics['loss'].item():.3f}")
        print(module.plan)


if __name__ == "__main__":
    main()
