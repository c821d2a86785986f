"""Regions of a forward graph that run in another mode: under ``torch.no_grad``, under autocast.

An exported graph has them as one operator over a graph of its own, which hides what is random, what
is written and what is a view of what.  Regions without gradients are inlined, their arguments
detached; those of autocast stay, as work with effects.

    n = no_grad_region(x)    ->    d = detach(x); n = randn_like(d)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled


def is_region(node: fx.Node) -> bool:
    """Whether the node runs a graph of its own."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def has_effect(node: fx.Node) -> bool:
    """Whether a node without users must run."""
    return node.is_impure() or is_region(node)


def inline_grad_regions(module: fx.GraphModule) -> None:
    """Puts what regions with or without gradients do in their places, nested ones too."""
    while regions := [node for node in module.graph.nodes if node.target is _GRAD_REGION]:
        _inline(module, regions[0])
    module.graph.lint()
    module.recompile()


def _inline(module: fx.GraphModule, region: fx.Node) -> None:
    enabled, body, *arguments = region.args
    assert isinstance(body, fx.Node)
    inner: Any = module.get_submodule(str(body.target))
    graph = module.graph
    with graph.inserting_before(region):
        given = [
            argument if enabled or not isinstance(argument, fx.Node) else _detached(argument)
            for argument in arguments
        ]
        places = iter(given)
        copies: dict[fx.Node, Any] = {}
        results: Any = None
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(places)
            elif node.op == "output":
                results = fx.map_arg(node.args[0], copies.__getitem__)
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                if node.op == "get_attr":
                    name = f"{body.name}_{node.name}"
                    setattr(module, name, getattr(inner, str(node.target)))
                    copies[node].target = name
    for user in list(region.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(region)
    if not body.users:
        graph.erase_node(body)


def _detached(node: fx.Node) -> fx.Node:
    """The value without gradients; weights may be read by other operators with them."""
    made = node.graph.call_function(torch.ops.aten.detach.default, (node,))
    made.meta = dict(node.meta)
    return made
