"""The U-Net of a diffusion model (Ho et al., "Denoising Diffusion Probabilistic Models", 2020).

transformers has no such model, so its presets are built here: residual blocks that are told the
time, attention where images are small, and everything made on the way down read once more on the
way up.

    noisy -> [block x 2, halve] ... -> block, attention, block -> [block x 3, double] ... -> noise

A call is a training step: it returns the mean square of the error of the predicted noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxzero.errors import PlanError, UsageError
from fxzero.typed_data import read_value

MODEL_TYPE = "fxzero-unet"
_GROUPS = 32


@dataclass(frozen=True)
class UNetConfig:
    """What a config.json of a U-Net says.

    Attributes:
        image_size: height and width of the images.
        image_channels: of the images and of the noise.
        channels: of each level, largest images first; each level's have half the size of the last.
        blocks: residual blocks of a level on the way down; on the way up there is one more.
        attention_sizes: the heights of images at which attention follows a block.
        dropout: in residual blocks.
    """

    image_size: int
    image_channels: int
    channels: tuple[int, ...]
    blocks: int
    attention_sizes: tuple[int, ...]
    dropout: float

    @classmethod
    def read(cls, data: dict[str, Any], where: str) -> UNetConfig:
        """The configuration that a file holds; raises UsageError if it is none."""
        values = {name: value for name, value in data.items() if name != "model_type"}
        try:
            config = read_value(cls, values, where)
        except PlanError as error:
            raise UsageError(error.text) from None
        assert isinstance(config, UNetConfig)
        sizes = (config.image_size, config.image_channels, config.blocks, *config.channels)
        if not config.channels or min(sizes) < 1 or not 0 <= config.dropout < 1:
            raise UsageError(f"{where}: sizes must be positive, dropout at least 0 and below 1")
        for channels in config.channels:
            if channels % _GROUPS:
                raise UsageError(f"{where}: {channels} channels are not a multiple of {_GROUPS}")
        halvings = len(config.channels) - 1
        if config.image_size % 2**halvings:
            raise UsageError(
                f"{where}: image_size={config.image_size} cannot be halved {halvings} times"
            )
        return config


def inputs(config: UNetConfig, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Arguments of a call: noisy images, when in the diffusion they are, and their noise."""
    shape = (batch, config.image_channels, config.image_size, config.image_size)
    return {
        "noisy": torch.zeros(shape, dtype=dtype),
        "times": torch.zeros(batch, dtype=torch.int64),
        "noise": torch.zeros(shape, dtype=dtype),
    }


class UNet(nn.Module):
    """Predicts the noise in images."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        self.enter = nn.Conv2d(config.image_channels, first, 3, padding=1)
        self.time = TimeEmbedding(first)
        size, held, skips = config.image_size, first, [first]
        self.down = nn.ModuleList()
        for level, channels in enumerate(config.channels):
            for _ in range(config.blocks):
                self.down.append(Block(held, channels, 4 * first, config, size))
                skips.append(held := channels)
            if level < len(config.channels) - 1:
                self.down.append(Halve(held))
                skips.append(held)
                size //= 2
        self.middle = nn.ModuleList(
            [
                Block(last, last, 4 * first, config, size, attends=True),
                Block(last, last, 4 * first, config, size, attends=False),
            ]
        )
        self.up = nn.ModuleList()
        for level, channels in reversed(list(enumerate(config.channels))):
            for _ in range(config.blocks + 1):
                self.up.append(Block(held + skips.pop(), channels, 4 * first, config, size))
                held = channels
            if level:
                self.up.append(Double(held))
                size *= 2
        self.norm = nn.GroupNorm(_GROUPS, first)
        self.leave = nn.Conv2d(first, config.image_channels, 3, padding=1)

    def forward(
        self, noisy: torch.Tensor, times: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        time = self.time(times, noisy.dtype)
        skips = [x := self.enter(noisy)]
        for part in self.down:
            skips.append(x := part(x, time))
        for part in self.middle:
            x = part(x, time)
        for part in self.up:
            x = part(torch.cat([x, skips.pop()], 1) if isinstance(part, Block) else x, time)
        return F.mse_loss(self.leave(F.silu(self.norm(x))), noise)


class TimeEmbedding(nn.Module):
    """When in the diffusion images are, as waves of many lengths and two layers over them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.waves = channels // 2
        self.first = nn.Linear(channels, 4 * channels)
        self.second = nn.Linear(4 * channels, 4 * channels)

    def forward(self, times: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        steps = torch.arange(self.waves, device=times.device) / (self.waves - 1)
        angles = times[:, None] * torch.exp(-math.log(10_000) * steps)
        waves = torch.cat([angles.sin(), angles.cos()], 1).to(dtype)
        result: torch.Tensor = self.second(F.silu(self.first(waves)))
        return result


class Block(nn.Module):
    """Two convolutions, the time added between them; then attention, if images are small."""

    def __init__(
        self,
        before: int,
        after: int,
        time: int,
        config: UNetConfig,
        size: int,
        attends: bool | None = None,
    ) -> None:
        super().__init__()
        self.first_norm = nn.GroupNorm(_GROUPS, before)
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.time = nn.Linear(time, after)
        self.second_norm = nn.GroupNorm(_GROUPS, after)
        self.dropout = nn.Dropout(config.dropout)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.around = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        attends = size in config.attention_sizes if attends is None else attends
        self.attention = Attention(after) if attends else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        inner = self.first(F.silu(self.first_norm(x)))
        inner = inner + self.time(F.silu(time))[:, :, None, None]
        inner = self.second(self.dropout(F.silu(self.second_norm(inner))))
        result: torch.Tensor = self.attention(self.around(x) + inner)
        return result


class Attention(nn.Module):
    """Each pixel reads all others; one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.reads = nn.Linear(channels, 3 * channels)
        self.result = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = self.reads(pixels)[:, None].chunk(3, -1)
        read = F.scaled_dot_product_attention(query, key, value)[:, 0]
        result: torch.Tensor = x + self.result(read).transpose(1, 2).reshape(x.shape)
        return result


class Halve(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.convolution(x)
        return result


class Double(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.convolution(F.interpolate(x, scale_factor=2.0))
        return result
