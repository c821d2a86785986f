"""Checkpoints that are whole or absent, checked byte by byte, and load at any number of ranks.

    fxzero.checkpoint.save("runs/a", model, optimizer, step=100)
    step = fxzero.checkpoint.load("runs/a", model, optimizer).step

Tensors are written by torch.distributed.checkpoint as safetensors, each rank its own shards; all
else is JSON.  Nothing that is loaded can run code.
"""

from fxzero.checkpoint.directories import Manifest, latest, rollback, verify
from fxzero.checkpoint.exchange import export_safetensors, load_safetensors
from fxzero.checkpoint.saving import Loaded, Saving, load, save, save_async
from fxzero.checkpoint.signals import Leaving, leaving

__all__ = [
    "Leaving",
    "Loaded",
    "Manifest",
    "Saving",
    "export_safetensors",
    "latest",
    "leaving",
    "load",
    "load_safetensors",
    "rollback",
    "save",
    "save_async",
    "verify",
]
