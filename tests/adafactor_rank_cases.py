"""What each rank of a pool runs with Adafactor over a sharded model."""

from __future__ import annotations

import copy
import unittest.mock
from typing import Any

import torch
from matrix_rank_cases import copy_weights, is_same, take_steps
from optimizer_rank_cases import give_gradients, state_of
from rank_cases import MeanSquare
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero.optim import Adafactor, homes
from fxzero.sharding import is_cut


class Shapes(nn.Module):
    """Rows that no number of ranks divides, fewer rows than ranks, a convolution, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 7, 3)
        self.stack = nn.Sequential(nn.Flatten(), nn.Linear(7 * 16, 33), nn.Tanh())
        self.last = nn.Linear(33, 3)
        self.frozen = nn.Linear(3, 3)
        self.frozen.weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(self.last(self.stack(self.convolution(x)))) * self.scale
        loss: Tensor = y.square().mean()
        return loss


def made(zero: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """A model, cut over ranks, and its optimizer."""
    torch.manual_seed(0)
    model = fxzero.compile(Shapes().to(dtype), zero=zero, inner="eager")
    return model, Adafactor(model.parameters(), **{"lr": 0.05, "weight_decay": 0.1, **options})


def train(model: Any, optimizer: Any, steps: Any) -> list[float]:
    """Losses of steps over batches that are the same on all ranks."""
    dtype, losses = next(model.parameters()).dtype, []
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        loss = model(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(zero: int, **options: Any) -> Any:
    """Losses, and whole weights and states."""
    model, optimizer = made(zero, **options)
    return train(model, optimizer, range(4)), state_of(model, optimizer)


def trained_in_small_turns() -> Any:
    """The same, where a home takes one parameter in a turn."""
    with unittest.mock.patch.object(homes, "TURN_ELEMENTS", 1):
        return trained(zero=3)


def trained_with_replicas() -> Any:
    """The same, where two groups of ranks each have all rows."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    model = fxzero.compile(Shapes(), zero=3, inner="eager", mesh=mesh)
    optimizer = Adafactor(model.parameters(), lr=0.05, weight_decay=0.1)
    return train(model, optimizer, range(4)), state_of(model, optimizer)


def differing_from_torch(zero: int) -> list[str]:
    """What differs from torch's on whole parameters after steps with gradients set by hand."""
    results = []
    for kind in (Adafactor, torch.optim.Adafactor):
        torch.manual_seed(0)
        model: Any = Shapes()
        if kind is Adafactor:
            model = fxzero.compile(model, zero=zero, inner="eager")
        optimizer = kind(model.parameters(), lr=0.05, weight_decay=0.1)
        results.append(take_steps(model, optimizer, range(6)))
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    return [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


def elements_kept() -> tuple[int, int]:
    """Elements of moments on this rank, and of the whole ones of what is cut."""
    model, optimizer = made(zero=3)
    train(model, optimizer, range(1))
    moments: Any = [m for s in optimizer.state.values() for m in s.values() if is_cut(m)]
    return sum(m.to_local().numel() for m in moments), sum(m.numel() for m in moments)


def train_and_save(root: str, dtype: torch.dtype) -> Any:
    """Saves after three steps; what two more come to."""
    model, optimizer = made(zero=3, dtype=dtype)
    train(model, optimizer, range(3))
    fxzero.checkpoint.save(root, model, optimizer, step=3)
    return train(model, optimizer, range(3, 5)), state_of(model, optimizer)


def load_and_train(root: str, zero: int, dtype: torch.dtype) -> Any:
    """What two steps from a checkpoint come to."""
    model, optimizer = made(zero=zero, dtype=dtype, lr=1.0)
    fxzero.checkpoint.load(root, model, optimizer)
    return train(model, optimizer, range(3, 5)), state_of(model, optimizer)


def through_torchs_state_dicts(full: bool) -> bool:
    """Whether an optimizer goes on bit for bit from what torch's functions get and set."""
    options = StateDictOptions(full_state_dict=full)
    (model, one), (other, two) = made(zero=3), made(zero=3, lr=1.0)
    copy_weights(other, take_steps(model, one, range(2)))
    state = copy.deepcopy(get_optimizer_state_dict(model, one, options=options))
    set_optimizer_state_dict(other, two, state, options=options)
    return is_same(take_steps(model, one, (2, 3)), take_steps(other, two, (2, 3)))


def under_fsdp() -> bool:
    """Whether shards of FSDP2 are updated as the whole is."""
    from torch.distributed.fsdp import fully_shard

    results = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(24, 33), nn.Linear(33, 5))
        if sharded:
            fully_shard(model)
        results.append(take_steps(model, Adafactor(model.parameters(), lr=0.1), range(3)))
    return is_same(*results)


def without_some_gradients() -> list[bool]:
    """Which parameters a step changes where all ranks lack the gradients of two."""
    model, optimizer = made(zero=3)
    give_gradients(model, 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[0].grad = trained[3].grad = None
    before = state_of(model, optimizer)
    optimizer.step()
    after = state_of(model, optimizer)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return [not torch.equal(before[name], after[name]) for name in names]


def measured_and_planned(zero: int, dtype: torch.dtype) -> tuple[int, int]:
    """Peaks of the optimizer's step."""
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(6))
    model = MeanSquare(nn.Sequential(*layers).to(dtype))
    model = fxzero.compile(model, zero=zero, inner="eager", optimizer=Adafactor)
    optimizer = Adafactor(model.parameters())
    x, measured = torch.randn(64, 512).to(dtype), []
    for _ in range(4):
        model(x).backward()
        # Threads of gloo may let go of what a collective read a moment after it has ended.
        measured.append(fxzero.measure(optimizer.step).tensor_bytes)
        optimizer.zero_grad()
    phases = {phase.name: phase.peak_bytes for phase in model.plan.phases}
    return min(measured[1:]), phases["optimizer step"]
