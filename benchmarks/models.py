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


Family = Callable[[Size, float], tuple[nn.Module, Inputs]]


class Loss(nn.Module):
    """A model reduced to its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        output = self.model(**inputs)
        return output if isinstance(output, Tensor) else output.loss


def build(
    name: str,
    *,
    quick: bool,
    dropout: float,
    dtype: torch.dtype,
    device: str,
    size: Size | None = None,
) -> Case:
    """The model in training mode, and its inputs, on ``device``; ``size``: instead of the two."""
    family, full, small = MODELS[name]
    torch.manual_seed(0)
    model, inputs = family(size or (small if quick else full), dropout)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    blocks = zoo.BLOCKS[name.split("-")[0]]
    return Case(
        module=Loss(model).to(device, dtype).train(),
        inputs={k: v.to(device) for k, v in inputs.items()},
        blocks=lambda module: blocks(module.model),
        dropout=dropout,
    )


def _library(
    name: str, inputs: Callable[[Size], Inputs], config: Callable[[Size, float], dict[str, Any]]
) -> Family:
    """A model of transformers with random weights; the library is imported when it is built."""

    def family(size: Size, dropout: float) -> tuple[nn.Module, Inputs]:
        import transformers

        transformers.logging.set_verbosity_error()
        kind = getattr(transformers, name)
        return kind(kind.config_class(**config(size, dropout))), inputs(size)

    return family


def _text(size: Size) -> Inputs:
    ids = torch.randint(size.vocab, (size.batch, size.length))
    return {"input_ids": ids, "labels": ids}


def _images(size: Size) -> Inputs:
    return {
        "pixel_values": torch.randn(size.batch, 3, size.length, size.length),
        "labels": torch.randint(size.vocab, (size.batch,)),
    }


def _gpt2(size: Size, dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab,
        "n_embd": size.width,
        "n_layer": size.layers,
        "n_head": size.width // 64,
        "n_positions": size.length,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
    }


def _transformer(size: Size) -> dict[str, Any]:
    """What the configurations of BERT, ViT and Llama have in common."""
    return {
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 32,
    }


def _llama(size: Size, dropout: float) -> dict[str, Any]:
    return _transformer(size) | {
        "vocab_size": size.vocab,
        "num_key_value_heads": size.width // 64,
        "intermediate_size": size.width * 8 // 3,
        "max_position_embeddings": size.length,
        "attention_dropout": dropout,
        "use_cache": False,
    }


def _encoder(size: Size, dropout: float) -> dict[str, Any]:
    return _transformer(size) | {
        "intermediate_size": size.width * 4,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


def _bert(size: Size, dropout: float) -> dict[str, Any]:
    return _encoder(size, dropout) | {
        "vocab_size": size.vocab,
        "max_position_embeddings": size.length,
    }


def _vit(size: Size, dropout: float) -> dict[str, Any]:
    return _encoder(size, dropout) | {
        "image_size": size.length,
        "patch_size": 4,
        "num_labels": size.vocab,
    }


def _t5(size: Size, dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab,
        "d_model": size.width,
        "d_kv": 32,
        "d_ff": size.width * 4,
        "num_layers": size.layers,
        "num_heads": size.width // 32,
        "dropout_rate": dropout,
        "decoder_start_token_id": 0,
        "use_cache": False,
    }


def _resnet(size: Size, dropout: float) -> dict[str, Any]:
    """ResNet-50 by its 50 layers (three a bottleneck, a stem, a head), or a shorter one like it."""
    depths = {14: [1, 1, 1, 1], 26: [2, 2, 2, 2], 50: [3, 4, 6, 3]}[size.layers]
    return {
        "embedding_size": size.width,
        "hidden_sizes": [size.width * 4 * 2**stage for stage in range(4)],
        "depths": depths,
        "layer_type": "bottleneck",
        "num_labels": size.vocab,
    }


def _unet(size: Size, dropout: float) -> tuple[nn.Module, Inputs]:
    model = zoo.UNet(tuple(size.width * (i + 1) for i in range(size.layers)))
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = dropout
    image = torch.randn(size.batch, 3, size.length, size.length)
    return model, {"image": image, "target": image.flip(-1)}


GPT2 = _library("GPT2LMHeadModel", _text, _gpt2)
LLAMA = _library("LlamaForCausalLM", _text, _llama)
BERT = _library("BertForMaskedLM", _text, _bert)
T5 = _library("T5ForConditionalGeneration", _text, _t5)
VIT = _library("ViTForImageClassification", _images, _vit)
RESNET = _library("ResNetForImageClassification", _images, _resnet)

# name: family, full size, quick size
MODELS: dict[str, tuple[Family, Size, Size]] = {
    "gpt2": (GPT2, Size(6, 384, 4, 512, 8192), Size(4, 128, 4, 128, 512)),
    "gpt2-24": (GPT2, Size(24, 384, 2, 512, 8192), Size(8, 128, 4, 128, 512)),
    "llama": (LLAMA, Size(8, 384, 4, 512, 4096), Size(4, 128, 4, 128, 512)),
    "bert": (BERT, Size(8, 384, 8, 256, 4096), Size(4, 128, 4, 128, 512)),
    "vit": (VIT, Size(8, 384, 8, 64, 100), Size(4, 128, 4, 48, 10)),
    "resnet": (RESNET, Size(50, 64, 8, 128, 1000), Size(26, 16, 16, 64, 10)),
    "t5": (T5, Size(4, 384, 4, 256, 4096), Size(2, 128, 4, 96, 512)),
    "unet": (_unet, Size(5, 24, 8, 96, 0), Size(4, 8, 4, 64, 0)),
}
