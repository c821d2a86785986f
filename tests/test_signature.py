"""What graphs depend on: found in one walk, equal for equal models, different for every trait."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

import fxzero
from fxzero.signature import Signature
from fxzero.structure import flatten


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net


def _key(model: nn.Module) -> object:
    return Signature.of(model).key(*flatten(((torch.ones(2, 4),), {})))


def _freeze(net: nn.Sequential) -> None:
    net[3].bias.requires_grad_(False)


def _set_weight(index: int, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def change(net: nn.Sequential) -> None:
        net[index].weight = nn.Parameter(make(net[index].weight.detach()))

    return change


def _tie(net: nn.Sequential) -> None:
    net[3].weight = net[0].weight


def _drop_bias(net: nn.Sequential) -> None:
    net[3].bias = None


_CHANGES = {
    "one module in evaluation": lambda net: net[1].eval(),
    "one parameter frozen": _freeze,
    "another dtype": _set_weight(3, torch.Tensor.double),
    "another shape": _set_weight(3, lambda w: w[:2].clone()),
    "another device": _set_weight(3, lambda w: w.to("meta")),
    "a tie broken": _set_weight(2, torch.clone),
    "a new tie": _tie,
    "a parameter less": _drop_bias,
    "a module more": lambda net: net.append(nn.ReLU()),
}


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
def test_every_trait_that_a_graph_depends_on_changes_the_key(change):
    net = _net()
    before = _key(net)
    change(net)
    assert _key(net) != before


def test_values_gradients_and_new_tensors_of_the_same_kind_do_not_change_it():
    net = _net()
    before = _key(net)
    net(torch.ones(2, 4)).sum().backward()
    with torch.no_grad():
        net[3].weight.add_(1)
    net[3].weight = nn.Parameter(torch.zeros(4, 4))
    assert _key(net) == before == _key(_net())
    assert hash(_key(net)) == hash(before)


def test_it_counts_the_parameters_that_torch_counts():
    model = BertForMaskedLM(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    model.bert.embeddings.requires_grad_(False)
    found = Signature.of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert set(map(id, found.trained)) == set(map(id, trained))
    assert len(found.trained) == len(trained)  # the tied embedding once
    assert found.frozen == sum(not p.requires_grad for p in model.parameters())


def test_a_module_that_holds_itself_is_walked_once():
    net = _net()
    net[0].parent = net
    assert Signature.of(net).frozen == 0


def test_a_step_does_not_walk_by_names():
    """Six walks by ``named_modules`` took a quarter of a small GPT-2's step."""
    model, batch = fxzero.compile(_net(), inner="eager"), torch.ones(2, 4)
    for _ in range(2):
        model(batch).sum().backward()
        model.zero_grad()
    walks: list[str] = []

    def watch(frame, event, argument):
        if event == "call" and frame.f_code.co_name in ("named_modules", "_named_members"):
            walks.append(frame.f_back.f_code.co_name)

    sys.setprofile(watch)
    try:
        model(batch).sum().backward()
    finally:
        sys.setprofile(None)
    assert walks == []
