"""Tells optimizers that loops of other libraries make what the plan has them do."""

from __future__ import annotations

from typing import Any

import torch

from fxzero.compiler import CompiledModule
from fxzero.optim.base import Optimizer


def name_optimizer(model: Any, optimizer: torch.optim.Optimizer | None) -> None:
    """``model.update_with(optimizer)``, where the model was compiled for that and it can."""
    if not isinstance(model, CompiledModule) or not isinstance(optimizer, Optimizer):
        return
    if model._fxzero.options.offload_states:
        model.update_with(optimizer)
