"""Small models of many families, for tests of capture, passes and memory budgets.

A case is a module factory, its inputs and a scalar loss. `build(name)` is deterministic: weights
and inputs depend on the name only, and the caller's random stream is left alone. Every model is in
training mode, with dropout on where its architecture has any, runs forward and backward in well
under a second on one core, and saves at least three times its parameter bytes for backward, so
that a memory budget has something to decide.

`BLOCKS` lists the repeated parts of a model, in order and without duplicates, as units for
activation checkpointing.
"""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 256
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
LossFn = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    loss: LossFn
    notes: str = ""


# Inputs and losses

BATCH, SEQ = 8, 64


def _tokens(salt: int = 0, seq: int = SEQ) -> Tensor:
    generator = torch.Generator().manual_seed(100 + salt)
    return torch.randint(3, VOCAB, (BATCH, seq), generator=generator)


def _image(size: int) -> Tensor:
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(7))


def _lm_inputs() -> Inputs:
    return (_tokens(), _tokens(1)), {}


def _hf_lm_inputs(label_seq: int = SEQ) -> Inputs:
    return (), {"input_ids": _tokens(), "labels": _tokens(1, label_seq)}


def _bert_inputs() -> Inputs:
    ids, where, lengths = _tokens(), torch.arange(SEQ), torch.arange(BATCH)[:, None] * 4 + 36
    mask = where < lengths
    labels = torch.where(mask & (_tokens(1) % 4 == 0), ids, -100)
    segments = mask & (where >= lengths // 2)
    return (ids,), {
        "attention_mask": mask.long(),
        "token_type_ids": segments.long(),
        "labels": labels,
    }


def _image_inputs(size: int) -> Inputs:
    return (), {"pixel_values": _image(size), "labels": torch.arange(BATCH) % 10}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


def _itself(output: Any) -> Tensor:
    return output


# A U-Net: the first tensors of the forward pass are the last ones read by it


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs)
        self.drop = nn.Dropout2d(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.silu(self.norm1(self.conv1(x))))
        return F.silu(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (8, 16, 32, 48)) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList([ConvBlock(a, b) for a, b in pairs])
        self.middle = ConvBlock(widths[-1], widths[-1])
        self.up = nn.ModuleList([ConvBlock(2 * b, a) for a, b in reversed(pairs)])
        self.head = nn.Conv2d(widths[0], 3, 1)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.predict(image), target)

    def predict(self, image: Tensor) -> Tensor:
        x, skips = self.stem(image), []
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], dim=1))
        return self.head(x)


# A small causal language model, and variations of it that each stress one thing


class Block(nn.Module):
    """Pre-norm causal transformer block; computes in the dtype of its weights."""

    def __init__(self, dim: int, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(self.norm1.weight.dtype)
        x = x + F.dropout(self.attend(self.norm1(x)), self.dropout, self.training)
        x = x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)
        return x.to(dtype)


class LM(nn.Module):
    """Returns the loss. Subclasses change the constructor or `forward`."""

    def __init__(self, dim: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCAB, dim), nn.Embedding(SEQ, dim)
        self.blocks = nn.ModuleList([Block(dim) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, VOCAB, bias=False)

    def encode(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        return _cross_entropy(self.head(self.encode(ids)), labels)


class DictOutput(LM):
    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Any]:
        hidden = self.encode(ids)
        logits = self.head(hidden)
        aux = {"accuracy": (logits.argmax(-1) == labels).float().mean(), "hidden": hidden}
        return {"logits": logits, "loss": _cross_entropy(logits, labels), "aux": aux, "none": None}


@dataclass
class LMOutput:
    loss: Tensor
    logits: Tensor


class DataclassOutput(LM):
    def forward(self, ids: Tensor, labels: Tensor) -> LMOutput:
        logits = self.head(self.encode(ids))
        return LMOutput(_cross_entropy(logits, labels), logits)


class KwargsOnly(LM):
    def forward(self, *, labels: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore
        return scale * _cross_entropy(self.head(self.encode(ids)), labels)


class Tied(LM):
    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.embed.weight, std=0.1)
        self.head.weight = self.embed.weight


class LoRALinear(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.b = nn.Parameter(torch.randn(base.out_features, rank) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(F.dropout(x, 0.1, self.training), self.a), self.b)


class Frozen(LM):
    """Linear layers of all blocks are frozen; embedding, norms, head and adapters train."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.out.requires_grad_(False)
            block.qkv, block.up, block.down = map(LoRALinear, (block.qkv, block.up, block.down))


class Buffers(LM):
    """A step counter and a moving average: one forward pass updates both, then reads them."""

    steps: Tensor
    mean: Tensor

    def __init__(self, dim: int = 64) -> None:
        super().__init__(dim)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(dim))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.encode(ids)
        self.steps += 1
        self.mean.mul_(0.9).add_(hidden.detach().square().mean((0, 1)), alpha=0.1)
        corrected = self.mean / (1 - 0.9**self.steps)
        return _cross_entropy(self.head(hidden / (corrected + 1e-5).sqrt()), labels)


class MixedDtype(LM):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks[::2]:
            block.to(torch.bfloat16)


logger = logging.getLogger(__name__)


@functools.lru_cache(None)
def _info_once(message: str) -> None:
    logger.info(message)


class Logging(LM):
    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logger.info("input shape %s", tuple(ids.shape))
        _info_once("forward was called")
        warnings.warn("the zoo warns at every call", UserWarning, stacklevel=2)
        print("zoo: forward")
        return super().forward(ids, labels)


class NoLoss(LM):
    def forward(self, ids: Tensor) -> Tensor:  # type: ignore
        return self.head(self.encode(ids))


class RandomInner(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (torch.rand_like(x) > 0.1) / 0.9)


class RandomOuter(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner, self.gate = RandomInner(dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(self.inner(x), 0.1, self.training)
        keep = torch.bernoulli(torch.sigmoid(self.gate(x)).detach())
        return x + torch.where(keep.bool(), inner, torch.tanh(self.gate(inner)))


class RandOps(LM):
    def __init__(self, dim: int = 64) -> None:
        super().__init__(dim)
        self.blocks = nn.ModuleList([RandomOuter(dim) for _ in range(2)])


class ModuleTwice(LM):
    def __init__(self) -> None:
        super().__init__()
        first, shared, last = self.blocks[0], self.blocks[1], self.blocks[2]
        self.blocks = nn.ModuleList([first, shared, shared, last])


class UnusedParameter(LM):
    def __init__(self, dim: int = 64) -> None:
        super().__init__(dim)
        self.scale, self.spare = nn.Parameter(torch.ones(dim)), nn.Linear(dim, dim)


_LOSS = operator.attrgetter("loss")


def _library(
    name: str,
    model: str,
    config: dict[str, Any],
    notes: str = "",
    inputs: Callable[[], Inputs] = _hf_lm_inputs,
    dtype: torch.dtype | None = None,
) -> Case:
    """A model of transformers with random weights; the library is imported when it is built."""

    def make() -> nn.Module:
        import transformers

        kind = getattr(transformers, model)
        return kind._from_config(kind.config_class(**config), dtype=dtype)

    return Case(name, make, inputs, _LOSS, notes)


# fmt: off
_SIZE = {"vocab_size": VOCAB, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6}
_LONG = _SIZE | {"max_position_embeddings": SEQ}
_LLAMA = _LONG | {"num_key_value_heads": 2, "intermediate_size": 192, "attention_dropout": 0.1,
                  "use_cache": False}
_MIXTRAL = _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96,
                     "output_router_logits": True}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 96, "n_layer": 4, "n_head": 4, "n_positions": SEQ,
         "bos_token_id": 0, "eos_token_id": 0}
_T5 = {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2,
       "num_heads": 4, "decoder_start_token_id": 0}
_VIT = _SIZE | {"intermediate_size": 192, "image_size": 32, "patch_size": 4, "num_labels": 10,
                "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_RESNET = {"embedding_size": 16, "hidden_sizes": [32, 64, 64], "depths": [2, 2, 2],
           "layer_type": "basic", "num_labels": 10}
_LIBRARY = [
    _library("gpt2", "GPT2LMHeadModel", _GPT2, "tied weights; the output holds a DynamicCache"),
    _library("llama", "LlamaForCausalLM", _LLAMA,
             "grouped queries; when exported it makes a mask and repeats keys and values instead"),
    _library("llama_bf16", "LlamaForCausalLM", _LLAMA, dtype=torch.bfloat16, notes=
             "as llama, but gradients round differently unless TRANSFORMERS_SDPA_FORCE_GQA=1"),
    _library("bert", "BertForMaskedLM", _LONG | {"intermediate_size": 384}, inputs=_bert_inputs,
             notes="padded; rows have unequal numbers of labels: not a mean over micro-batches"),
    _library("t5", "T5ForConditionalGeneration", _T5, inputs=lambda: _hf_lm_inputs(48), notes=
             "encoder and decoder, shared embedding; the output holds an EncoderDecoderCache"),
    _library("vit", "ViTForImageClassification", _VIT, inputs=lambda: _image_inputs(32)),
    _library("mixtral", "MixtralForCausalLM", _MIXTRAL,
             "default experts, grouped_mm, export as transformers::grouped_mm_fallback; "
             "batched_mm exports as bmm; eager is data dependent and does not export"),
    _library("resnet", "ResNetForImageClassification", _RESNET, inputs=lambda: _image_inputs(64),
             notes="BatchNorm updates running statistics; no dropout"),
]
# fmt: on


def _lm(name: str, model: Callable[[], nn.Module], notes: str = "", **changes: Any) -> Case:
    fields: dict[str, Any] = {"inputs": _lm_inputs, "loss": _itself} | changes
    return Case(name, model, notes=notes, **fields)


_PLAIN = [
    _lm("dict_output", DictOutput, "nested, with None", loss=operator.itemgetter("loss")),
    _lm("dataclass_output", DataclassOutput, "the class is not a pytree node", loss=_LOSS),
    _lm(
        "kwargs_only",
        KwargsOnly,
        "given in another order than declared; one is a float",
        inputs=lambda: ((), {"ids": _tokens(), "scale": 0.5, "labels": _tokens(1)}),
    ),
    _lm("tied", Tied),
    _lm("frozen", Frozen, "gradients only for embeddings, norms, head and adapters"),
    _lm("buffers", Buffers, "the loss depends on the number of earlier calls"),
    _lm("mixed_dtype", MixedDtype, "every second block is bfloat16"),
    _lm("logging", Logging, "logs, warns and prints in forward"),
    _lm(
        "no_loss",
        NoLoss,
        inputs=lambda: ((_tokens(),), {}),
        loss=lambda logits: _cross_entropy(logits, _tokens(1)),
    ),
    _lm("rand_ops", RandOps, "four kinds of random op, in nested modules"),
    _lm("module_twice", ModuleTwice, "blocks 1 and 2 are one module"),
    _lm("unused_parameter", UnusedParameter, "three parameters get no gradient"),
]
_UNET = Case("unet", UNet, lambda: ((_image(32), _image(32).flip(-1)), {}), _itself, "long skips")
CASES: dict[str, Case] = {case.name: case for case in [*_LIBRARY, _UNET, *_PLAIN]}


_FEW = " of 2 layers"


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], LossFn]:
    """The model in training mode, its args and kwargs, and the loss of its output.

    "tied of 2 layers" is the same without its later blocks, for tests on many ranks.
    """
    family = name.removesuffix(_FEW)
    case = CASES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(family.encode()))
        model = case.build().train()
        args, kwargs = case.inputs()
    if family != name:
        del model.get_submodule({"gpt2": "transformer.h"}.get(family, "blocks"))[2:]  # type: ignore
    return model, args, kwargs, case.loss


def _listed(*paths: str) -> Callable[[nn.Module], list[nn.Module]]:
    """Children of the containers at `paths`, each once."""

    def blocks(model: nn.Module) -> list[nn.Module]:
        found = (child for path in paths for child in model.get_submodule(path))  # type: ignore
        return list(dict.fromkeys(found))

    return blocks


BLOCKS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "gpt2": _listed("transformer.h"),
    "llama": _listed("model.layers"),
    "llama_bf16": _listed("model.layers"),
    "bert": _listed("bert.encoder.layer"),
    "t5": _listed("encoder.block", "decoder.block"),
    "vit": _listed("vit.layers"),
    "mixtral": _listed("model.layers"),
    "unet": lambda model: [*_listed("down")(model), model.middle, *_listed("up")(model)],
    "resnet": lambda model: [b for stage in model.resnet.encoder.stages for b in stage.layers],
} | {case.name: _listed("blocks") for case in _PLAIN}
