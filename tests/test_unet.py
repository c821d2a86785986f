"""The U-Net that fxzero ships: its configuration, and a step of it, planned and run."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import fxzero
from fxzero.capture import is_user_file
from fxzero.errors import UsageError
from fxzero.unet import UNet, UNetConfig, inputs

SMALL = {
    "model_type": "fxzero-unet",
    "image_size": 16,
    "image_channels": 3,
    "channels": [32, 64],
    "blocks": 1,
    "attention_sizes": [8],
    "dropout": 0.1,
}


def test_it_learns_the_noise_of_an_image() -> None:
    torch.manual_seed(0)
    config = UNetConfig.read(SMALL, "here")
    model, shapes = UNet(config), inputs(config, 2, torch.float32)
    batch = {
        "noisy": torch.randn_like(shapes["noisy"]),
        "times": torch.tensor([3, 700]),
        "noise": torch.randn_like(shapes["noise"]),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.slow
def test_a_compiled_step_equals_eager_within_its_planned_peak() -> None:
    config = UNetConfig.read(SMALL, "here")
    model, batch = UNet(config), inputs(config, 2, torch.float32)
    compiled: Any = fxzero.compile(model, batch, inner="eager")
    result = compiled.verify(**batch)
    assert result.ok, str(result)


def test_its_lines_stand_in_reports() -> None:
    here = Path(inspect.getfile(UNet)).resolve()
    assert is_user_file(str(here))
    assert not is_user_file(str(here.with_name("plans.py")))


def test_every_level_is_there_and_attends_where_asked() -> None:
    model = UNet(UNetConfig.read(SMALL | {"channels": [32, 64, 96]}, "here"))
    names = [name for name, part in model.named_modules() if type(part).__name__ == "Attention"]
    assert names == ["down.2.attention", "middle.0.attention", "up.3.attention", "up.4.attention"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": []}, "here: sizes must be positive"),
        ({"blocks": 0}, "here: sizes must be positive"),
        ({"dropout": 1.0}, "dropout at least 0 and below 1"),
        ({"channels": [48]}, "here: 48 channels are not a multiple of 32"),
        ({"image_size": 7}, "here: image_size=7 cannot be halved 1 times"),
        ({"channels": "32"}, "here.channels must be a list, not str"),
        ({"colour": 1}, "here: missing .*, unknown .*colour"),
    ],
)
def test_a_wrong_configuration_is_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        UNetConfig.read(SMALL | changes, "here")
