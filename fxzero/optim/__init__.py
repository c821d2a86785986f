"""Optimizers: fxzero.optim.AdamW, SGD and Lion, of one launch a step, and Muon for matrices.

    optimizer = fxzero.optim.AdamW(model.parameters(), lr=3e-4, moments="int8")

Each is a ``torch.optim.Optimizer``: closures, groups, schedulers, ``state_dict`` and ``GradScaler``
work as they do with torch's, with parameters sharded by fxzero or FSDP2, too.  Muon takes matrices
whole or in rows, in steps that all ranks make together.
"""

from fxzero.optim.adamw import AdamW
from fxzero.optim.lion import Lion
from fxzero.optim.muon import Muon
from fxzero.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "Lion", "Muon"]
