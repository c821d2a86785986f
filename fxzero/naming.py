"""``fxzero.name``: lets a model name a tensor so that policies and reports can speak of it."""

from __future__ import annotations

import torch

from fxzero import _torch


def name(tensor: torch.Tensor, label: str) -> torch.Tensor:
    """The same values under a name; an alias of ``tensor``, free of cost.

    The tensor's node carries the label in captured graphs: reports print it, and a ``recompute``
    function can read it with ``fxzero.policies.name_of(node)``.
    """
    with _torch.annotate(fxzero_name=label):
        named: torch.Tensor = torch.ops.aten.alias.default(tensor)
    return named
