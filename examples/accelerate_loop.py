"""A loop of Accelerate under a memory budget, on one device or many.

pip install fxzero[integrations]
python accelerate_loop.py --memory-budget 1MiB
accelerate launch --num_processes 2 accelerate_loop.py --zero 3
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn

import fxzero


class Regression(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers = [nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)]
        self.layers = nn.Sequential(*layers, *layers, nn.Linear(width, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.layers(x).squeeze(-1), y)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small network with Accelerate.")
    parser.add_argument("--memory-budget", metavar="SIZE", help='such as "1MiB"; default: none')
    parser.add_argument("--zero", type=int, default=2, help="0, 1, 2 or 3: what ranks share")
    parser.add_argument("--inner", choices=["inductor", "eager"], help="default: what is present")
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    x = torch.randn(512, 64)
    data = torch.utils.data.TensorDataset(x, x[:, :8].sum(1).tanh())
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)

    options = {"memory_budget": given.memory_budget, "zero": given.zero, "inner": given.inner}
    model = fxzero.integrations.compile_for(accelerator, Regression(), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after the model is sharded
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(given.epochs):
        for inputs, target in loader:
            with accelerator.accumulate(model):
                loss = model(inputs, target)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    fxzero.clip_grad_norm_(model, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        loss = accelerator.reduce(loss.detach(), "mean")
        accelerator.print(f"epoch {epoch}  loss {loss.item():.3f}")
    accelerator.print(model.plan)
    fxzero.checkpoint.save("runs/accelerate", model, optimizer, step=given.epochs)
    accelerator.end_training()


if __name__ == "__main__":
    main()
