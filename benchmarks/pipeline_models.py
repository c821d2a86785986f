"""Models that pipelines are checked with, whole and as torch's pipelines take them apart.

They are those of ``tests/pipeline_cases.py``: without dropout, four layers or as many blocks.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxzero.microbatches import Batch

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
pipeline_cases = importlib.import_module("pipeline_cases")


@dataclass(frozen=True)
class Recipe:
    """How a model is taken apart, as torch's schedules compute the loss from the last output.

    Attributes:
        source: its name in the tests.
        inputs: what the layers read, and the target, in the arguments of the model.
        predict: the output that the loss is computed from.
        loss: of output and target.
        layers: names of its layers, and of their second halves.
    """

    source: str
    inputs: Callable[[nn.Module, Any], tuple[tuple[Tensor, ...], Tensor]]
    predict: Callable[..., Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    layers: tuple[str, ...]


def _next_token(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _each_token(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def _halves(path: str, second: str, count: int = 4) -> tuple[str, ...]:
    return tuple(name for i in range(count) for name in (f"{path}.{i}", f"{path}.{i}.{second}"))


def _causal(source: str, path: str, second: str) -> Recipe:
    return Recipe(
        source,
        lambda model, batch: ((batch["input_ids"],), batch["labels"]),
        lambda model, ids: model(input_ids=ids, use_cache=False).logits,
        _next_token,
        _halves(path, second),
    )


LIBRARY = tuple(f"transformers.models.{m}.modeling_{m}" for m in ("gpt2", "llama", "t5", "vit"))
_GPT2 = _causal("gpt2", "transformer.h", "ln_2")
MODELS = {
    "gpt2": _GPT2,
    "gpt2-tied": _GPT2,
    "llama": _causal("llama", "model.layers", "post_attention_layernorm"),
    "unet": Recipe(
        "unet",
        lambda model, batch: ((batch[0],), batch[1]),
        lambda model, image: model.predict(image),
        F.mse_loss,
        ("stem", "down.0", "down.1", "down.2", "middle", "up.0", "up.1", "up.2", "head"),
    ),
    "t5": Recipe(
        "t5",
        lambda model, batch: (
            (batch["input_ids"], model._shift_right(batch["labels"])),
            batch["labels"],
        ),
        lambda model, ids, answer: (
            model(input_ids=ids, decoder_input_ids=answer, use_cache=False).logits
        ),
        _each_token,
        _halves("encoder.block", "layer.1", 2) + _halves("decoder.block", "layer.1", 2),
    ),
    "vit": Recipe(
        "vit",
        lambda model, batch: ((batch["pixel_values"],), batch["labels"]),
        lambda model, image: model(pixel_values=image).logits,
        F.cross_entropy,
        _halves("vit.layers", "layernorm_after"),
    ),
    "mlp": Recipe(
        "mlp",
        lambda model, batch: ((batch[0],), batch[1]),
        lambda model, x: model.layers(x),
        F.cross_entropy,
        tuple(f"layers.{i}" for i in range(9)),
    ),
}


class Output(nn.Module):
    """A model reduced to its output, for torch's tracer."""

    def __init__(self, model: nn.Module, predict: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.predict = model, predict

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.predict(self.model, *inputs)


def build(name: str, microbatches: int) -> tuple[nn.Module, Any, Any, Callable[[Any], Tensor]]:
    """(model, args, kwargs, loss of its output), with two examples in a micro-batch at least."""
    model, args, kwargs, loss = pipeline_cases.build(MODELS[name].source)
    if name == "gpt2":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))
    while Batch.of(args, kwargs).size < 2 * microbatches:
        args = tuple(map(_doubled, args))
        kwargs = {key: _doubled(value) for key, value in kwargs.items()}
    return model, args, kwargs, loss


def _doubled(examples: Tensor) -> Tensor:
    return torch.cat([examples, examples.roll(1, -1)])
