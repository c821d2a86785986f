"""A stage that no gradient comes to: layers before the first one that is trained.

It has no backward and no plan; its operators run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fxzero.execution import compile_to_python
from fxzero.pipelining.cutting import Stage
from fxzero.sharding import Shards, is_spread


class FrozenStage:
    """Runs a stage's forward with the weights that the model has when it runs.

    Attributes:
        bytes: what its weights take.
    """

    def __init__(self, stage: Stage) -> None:
        module = stage.module
        parameters = dict(module.named_parameters(remove_duplicate=False))
        self.weights: list[str] = []
        self.bytes = 0
        for node in list(module.graph.find_nodes(op="get_attr")):
            name = str(node.target)
            if name not in parameters:
                continue
            with module.graph.inserting_before(next(iter(module.graph.nodes))):
                given = module.graph.placeholder(node.name)
            given.meta = dict(node.meta)
            node.replace_all_uses_with(given)
            module.graph.erase_node(node)
            self.weights.insert(0, name.removeprefix("model."))
            self.bytes += parameters[name].nbytes
        module.recompile()
        self.function = compile_to_python(module)

    def run(
        self, model: nn.Module, given: Sequence[torch.Tensor], shards: Shards | None
    ) -> list[torch.Tensor]:
        """The stage's results, none of which has a gradient."""
        weights: list[Any] = [model.get_parameter(name) for name in self.weights]
        if shards is not None:
            weights = [shards.gather(w) if is_spread(w) else w for w in weights]
        with torch.no_grad():
            return self.function([*weights, *given])
