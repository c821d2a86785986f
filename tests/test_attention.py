"""Attention of models of transformers, as plans for CUDA devices see it."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fxzero.attention import unmasked
from fxzero.capture import capture
from fxzero.sources import load_model

transformers = pytest.importorskip("transformers")


def small(kind: str = "Llama", **given: object) -> torch.nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, **given)
    return getattr(transformers, f"{kind}ForCausalLM")(config).train()


def attention_of(model: torch.nn.Module, **given: torch.Tensor) -> fx.Node:
    ids = torch.zeros(2, 32, dtype=torch.int64)
    inputs = {"input_ids": ids, "labels": ids, **given}
    with unmasked(model, inputs):
        nodes = capture(model, (), inputs).graph.graph.nodes
    return next(node for node in nodes if "scaled_dot_product" in str(node.target))


def has_mask(attention: fx.Node) -> bool:
    return attention.kwargs.get("attn_mask") is not None


def is_causal(attention: fx.Node) -> bool:
    return True in attention.args


def test_causal_attention_needs_no_mask_and_keys_are_not_repeated() -> None:
    attention = attention_of(small())
    assert is_causal(attention)
    assert not has_mask(attention)
    assert attention.args[1].meta["val"].shape[1] == 2


def test_what_is_padded_has_a_mask() -> None:
    mask = torch.ones(2, 32, dtype=torch.int64)
    assert has_mask(attention_of(small(), attention_mask=mask))


def test_positions_may_say_that_sequences_are_packed() -> None:
    positions = torch.arange(16).repeat(2)[None].expand(2, -1)
    assert has_mask(attention_of(small(), position_ids=positions))


@pytest.mark.parametrize(("window", "masked"), [(8, True), (64, False)])
def test_a_sliding_window_shorter_than_the_sequence_takes_a_mask(window: int, masked: bool) -> None:
    assert has_mask(attention_of(small("Mistral", sliding_window=window))) == masked


def test_models_are_left_as_they_were() -> None:
    model = load_model("llama-3-8b", seq=8).model
    with unmasked(model, {}):
        assert model.config._attn_implementation != "sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_other_modules_are_left_alone() -> None:
    with unmasked(torch.nn.Linear(2, 2), {}):
        pass
