"""What products by groups cost: each row meets the matrix of its own group only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fxzero.capture import capture
from fxzero.cost import count_flops
from fxzero.sources import load_model

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP = 64, 32, 48, 8, 2
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 128,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_experts_are_counted_as_they_run(tmp_path: Path, dtype: str) -> None:
    """Two of eight a token: three products forward, each with two of its size backward."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MIXTRAL))
    source = load_model(str(path), seq=TOKENS, dtype=dtype)
    graph = capture(source.model, source.args, source.kwargs).graph
    products = [node for node in graph.graph.nodes if "grouped_mm" in str(node.target)]
    products = [node for node in products if "getitem" not in str(node.target)]
    assert sum(map(count_flops, products)) == 3 * 3 * 2 * TOP * TOKENS * WIDTH * HIDDEN
    activations = [node.meta["val"] for node in products]
    rows = {t.shape[0] for t in activations if isinstance(t, torch.Tensor) and t.ndim == 2}
    assert rows == {TOP * TOKENS}  # not those of all experts


@pytest.mark.parametrize(
    ("left", "right", "flops"),
    [
        ((6, 4), (3, 4, 5), 6 * 4 * 5),
        ((4, 6), (6, 5), 4 * 6 * 5),
        ((3, 4, 6), (6, 5), 4 * 6 * 5),
        ((3, 4, 6), (3, 6, 5), 3 * 4 * 6 * 5),
    ],
)
def test_the_four_kinds_of_grouped_products(left: Any, right: Any, flops: int) -> None:
    from fxzero.cost import _grouped_product_flops

    assert _grouped_product_flops(torch.empty(left), torch.empty(right)) == 2 * flops
