"""fxzero: a query planner for training.  Give it a module and a number of bytes.

    model = fxzero.compile(model, memory_budget="22GiB")

Names are imported when they are first used, so that ``fxzero --help`` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "compile": "fxzero.compiler",
    "plan": "fxzero.forecast",
    "search": "fxzero.cluster.search",
    "measure": "fxzero.measurement",
    "explain": "fxzero.explanation",
    "name": "fxzero.naming",
    "Measurement": "fxzero.measurement",
    "Plan": "fxzero.plans",
    "clip_grad_norm_": "fxzero.clipping",
    "Pipeline": "fxzero.pipelining.request",
    "Precision": "fxzero.precision",
    "BudgetError": "fxzero.errors",
    "CheckpointError": "fxzero.errors",
    "CaptureError": "fxzero.errors",
    "FxzeroError": "fxzero.errors",
    "PeerError": "fxzero.errors",
    "UsageError": "fxzero.errors",
    "AlarmError": "fxzero.errors",
    "AlarmWarning": "fxzero.errors",
}

_MODULES = ("checkpoint", "integrations", "monitor", "optim")

if TYPE_CHECKING:
    from fxzero import checkpoint, integrations, monitor, optim
    from fxzero.clipping import clip_grad_norm_
    from fxzero.cluster.search import search
    from fxzero.compiler import compile
    from fxzero.errors import (
        AlarmError,
        AlarmWarning,
        BudgetError,
        CaptureError,
        CheckpointError,
        FxzeroError,
        PeerError,
        UsageError,
    )
    from fxzero.explanation import explain
    from fxzero.forecast import plan
    from fxzero.measurement import Measurement, measure
    from fxzero.naming import name
    from fxzero.pipelining.request import Pipeline
    from fxzero.plans import Plan
    from fxzero.precision import Precision

__all__ = [
    "AlarmError",
    "AlarmWarning",
    "BudgetError",
    "CaptureError",
    "CheckpointError",
    "FxzeroError",
    "Measurement",
    "PeerError",
    "Pipeline",
    "Plan",
    "Precision",
    "UsageError",
    "__version__",
    "checkpoint",
    "clip_grad_norm_",
    "compile",
    "explain",
    "integrations",
    "measure",
    "monitor",
    "name",
    "optim",
    "plan",
    "search",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fxzero.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fxzero' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
