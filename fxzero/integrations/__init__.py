"""Training loops of other libraries: Hugging Face's Trainer and Accelerate, and Lightning.

    trainer = fxzero.integrations.Trainer(model=model, args=args, memory_budget="6GiB", ...)
    model = fxzero.integrations.compile_for(accelerator, model, memory_budget="6GiB")
    trainer = lightning.Trainer(strategy=fxzero.integrations.LightningStrategy(...))

A library is imported when a name that needs it is first used.  What it would do to a model by
itself (autocast, copies in DistributedDataParallel, FSDP, torch.compile) is refused.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Trainer": "fxzero.integrations.huggingface",
    "compile_for": "fxzero.integrations.accelerate",
    "LightningStrategy": "fxzero.integrations.lightning",
}

if TYPE_CHECKING:
    from fxzero.integrations.accelerate import compile_for
    from fxzero.integrations.huggingface import Trainer
    from fxzero.integrations.lightning import LightningStrategy

__all__ = ["LightningStrategy", "Trainer", "compile_for"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fxzero.integrations' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
