"""The models that are measured: small, but with far more activations than parameters.

Every model returns its loss and nothing else, so that no variant pays for logits that the training
step drops.  Families, their repeated blocks and the U-Net are those of ``tests/zoo.py``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
zoo = importlib.import_module("zoo")

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """``length`` is tokens in a sequence or pixels along a side, ``vocab`` tokens or classes."""

    layers: int
    width: int
    batch: int
    length: int
    vocab: int


@dataclass(frozen=True)
class Case:
    """A model with its inputs; equal arguments of ``build`` make equal weights and inputs."""

    module: nn.Module
    inputs: Inputs
    blocks: Callable[[nn.Module], list[nn.Module]]
    dropout: float


class Loss(nn.Module):
    """A model reduced to its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        output = self.model(**inputs)
        return output if isinstance(output, Tensor) else output.loss


def build(name: str, *, quick: bool, dropout: float, dtype: torch.dtype, device: str) -> Case:
    """The model in training mode, and its inputs, on ``device``."""
    family, full, small = MODELS[name]
    torch.manual_seed(0)
    model, inputs = family(small if quick else full, dropout)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    blocks = zoo.BLOCKS[name.split("-")[0]]
    return Case(
        module=Loss(model).to(device, dtype).train(),
        inputs={k: v.to(device) for k, v in inputs.items()},
        blocks=lambda module: blocks(module.model),
        dropout=dropout,
    )


def _library(name: str, **config: Any) -> nn.Module:
    """A model of transformers with random weights; the library is imported when it is built."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind = getattr(transformers, name)
    return kind(kind.config_class(**config))


def _text(size: Size) -> Inputs:
    ids = torch.randint(size.vocab, (size.batch, size.length))
    return {"input_ids": ids, "labels": ids}


def _images(size: Size) -> Inputs:
    return {
        "pixel_values": torch.randn(size.batch, 3, size.length, size.length),
        "labels": torch.randint(size.vocab, (size.batch,)),
    }


def _gpt2(size: Size, dropout: float) -> tuple[nn.Module, Inputs]:
    model = _library(
        "GPT2LMHeadModel",
        vocab_size=size.vocab,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.width // 64,
        n_positions=size.length,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return model, _text(size)


def _llama(size: Size, dropout: float) -> tuple[nn.Module, Inputs]:
    model = _library(
        "LlamaForCausalLM",
        vocab_size=size.vocab,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 32,
        num_key_value_heads=size.width // 64,
        intermediate_size=size.width * 8 // 3,
        max_position_embeddings=size.length,
        attention_dropout=dropout,
        use_cache=False,
    )
    return model, _text(size)


def _bert(size: Size, dropout: float) -> tuple[nn.Module, Inputs]:
    model = _library(
        "BertForMaskedLM",
        vocab_size=size.vocab,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 32,
        intermediate_size=size.width * 4,
        max_position_embeddings=size.length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return model, _text(size)


def _t5(size: Size, dropout: float) -> tuple[nn.Module, Inputs]:
    model = _library(
        "T5ForConditionalGeneration",
        vocab_size=size.vocab,
        d_model=size.width,
        d_kv=32,
        d_ff=size.width * 4,
        num_layers=size.layers,
        num_heads=size.width // 32,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return model, _text(size)


def _vit(size: Size, dropout: float) -> tuple[nn.Module, Inputs]:
    model = _library(
        "ViTForImageClassification",
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 32,
        intermediate_size=size.width * 4,
        image_size=size.length,
        patch_size=4,
        num_labels=size.vocab,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return model, _images(size)


def _resnet(size: Size, dropout: float) -> tuple[nn.Module, Inputs]:
    model = _library(
        "ResNetForImageClassification",
        embedding_size=size.width,
        hidden_sizes=[size.width, size.width * 2, size.width * 4],
        depths=[size.layers] * 3,
        layer_type="basic",
        num_labels=size.vocab,
    )
    return model, _images(size)


def _unet(size: Size, dropout: float) -> tuple[nn.Module, Inputs]:
    model = zoo.UNet(tuple(size.width * (i + 1) for i in range(size.layers)))
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = dropout
    image = torch.randn(size.batch, 3, size.length, size.length)
    return model, {"image": image, "target": image.flip(-1)}


Family = Callable[[Size, float], tuple[nn.Module, Inputs]]

# name: family, full size, quick size
MODELS: dict[str, tuple[Family, Size, Size]] = {
    "gpt2": (_gpt2, Size(6, 384, 4, 512, 8192), Size(4, 128, 4, 128, 512)),
    "gpt2-24": (_gpt2, Size(24, 384, 2, 512, 8192), Size(8, 128, 4, 128, 512)),
    "llama": (_llama, Size(8, 384, 4, 512, 4096), Size(4, 128, 4, 128, 512)),
    "bert": (_bert, Size(8, 384, 8, 256, 4096), Size(4, 128, 4, 128, 512)),
    "vit": (_vit, Size(8, 384, 8, 64, 100), Size(4, 128, 4, 48, 10)),
    "resnet": (_resnet, Size(2, 48, 16, 128, 100), Size(1, 16, 8, 64, 10)),
    "t5": (_t5, Size(4, 384, 4, 256, 4096), Size(2, 128, 4, 96, 512)),
    "unet": (_unet, Size(5, 24, 8, 96, 0), Size(4, 8, 4, 64, 0)),
}
