"""Optimizers: fxzero.optim.AdamW, SGD and Lion, of one launch a step, Adafactor and Muon.

    optimizer = fxzero.optim.AdamW(model.parameters(), lr=3e-4, moments="int8")

Each is a ``torch.optim.Optimizer``: closures, groups, schedulers, ``state_dict`` and ``GradScaler``
work as they do with torch's, with parameters sharded by fxzero or FSDP2, too.  Adafactor and
Muon take tensors whole or in rows, in steps that all ranks make together.
"""

from fxzero.optim.adafactor import Adafactor
from fxzero.optim.adamw import AdamW
from fxzero.optim.lion import Lion
from fxzero.optim.muon import Muon
from fxzero.optim.sgd import SGD

__all__ = ["SGD", "Adafactor", "AdamW", "Lion", "Muon"]
