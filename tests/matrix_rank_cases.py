"""What each rank of a pool runs with an optimizer that needs whole matrices."""

from __future__ import annotations

import copy
import unittest.mock
from typing import Any

import torch
import torch.distributed as dist
from optimizer_rank_cases import give_gradients, state_of
from rank_cases import MeanSquare
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fxzero
from fxzero.errors import DivergenceError
from fxzero.optim import AdamW, Muon, homes


class Layers(nn.Module):
    """Rows that no number of ranks divides, fewer rows than ranks, a frozen matrix, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(nn.Linear(24, 33), nn.Tanh(), nn.Linear(33, 40), nn.Tanh())
        self.last = nn.Linear(40, 3)
        self.frozen = nn.Linear(3, 3)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.frozen(self.last(self.stack(x))).square().mean()
        return loss


def made(zero: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """A model, cut over ranks, and the optimizer of its matrices; another one has the rest."""
    torch.manual_seed(0)
    model = fxzero.compile(Layers().to(dtype), zero=zero, inner="eager")
    return model, Muon(matrices_of(model), **{"lr": 0.02, **options})


def matrices_of(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if p.ndim == 2]


def train(model: Any, optimizer: Any, steps: Any) -> list[float]:
    """Losses of steps over batches that are the same on all ranks."""
    rest = AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.0)
    dtype, losses = next(model.parameters()).dtype, []
    for step in steps:
        model.zero_grad()
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step)).to(dtype)
        loss = model(x)
        loss.backward()
        optimizer.step()
        rest.step()
        losses.append(loss.item())
    return losses


def trained(zero: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Losses, and whole weights and states."""
    model, optimizer = made(zero, dtype, **options)
    return train(model, optimizer, range(4)), state_of(model, optimizer)


def trained_in_small_turns() -> Any:
    """The same, where a home takes one matrix in a turn."""
    with unittest.mock.patch.object(homes, "TURN_ELEMENTS", 1):
        return trained(zero=3)


def trained_with_replicas() -> Any:
    """The same, where two groups of ranks each have all rows."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    model = fxzero.compile(Layers(), zero=3, inner="eager", mesh=mesh)
    optimizer = Muon(matrices_of(model), lr=0.02)
    return train(model, optimizer, range(4)), state_of(model, optimizer)


def elements_kept(zero: int) -> tuple[int, int]:
    """Elements of momenta on this rank, and of the matrices that are trained."""
    model, optimizer = made(zero)
    train(model, optimizer, range(1))
    trainable = [p for p in matrices_of(model) if p.requires_grad]
    momenta = [optimizer.state[p]["momentum_buffer"] for p in trainable]
    kept = sum(m.to_local().numel() if isinstance(m, DTensor) else m.numel() for m in momenta)
    return kept, sum(p.numel() for p in trainable)


def train_and_save(root: str) -> Any:
    """Saves after three steps; what two more come to."""
    model, optimizer = made(zero=3)
    train(model, optimizer, range(3))
    fxzero.checkpoint.save(root, model, optimizer, step=3)
    return train(model, optimizer, range(3, 5)), state_of(model, optimizer)


def load_and_train(root: str, zero: int) -> Any:
    """What two steps from a checkpoint come to."""
    model, optimizer = made(zero=zero, lr=1.0)
    fxzero.checkpoint.load(root, model, optimizer)
    return train(model, optimizer, range(3, 5)), state_of(model, optimizer)


def two_matrices(is_cut: bool = True) -> Any:
    """A model of matrices alone, cut over ranks or whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 33, bias=False), nn.Linear(33, 5, bias=False))
    return fxzero.compile(model, zero=3, inner="eager") if is_cut else model


def take_steps(model: Any, optimizer: Any, steps: Any) -> Any:
    """Whole weights and states after steps with gradients set by hand."""
    for step in steps:
        give_gradients(model, step)
        optimizer.step()
    return state_of(model, optimizer)


def copy_weights(model: Any, weights: dict[str, Tensor]) -> None:
    """Gives a model whole weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = weights[name]
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                weight = distribute_tensor(weight, mesh, placements, src_data_rank=None)
            parameter.copy_(weight)


def is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def through_torchs_state_dicts(full: bool) -> bool:
    """Whether an optimizer goes on bit for bit from what torch's functions get and set."""
    options = StateDictOptions(full_state_dict=full)
    model, other = two_matrices(), two_matrices()
    one, two = Muon(model.parameters(), lr=0.02), Muon(other.parameters(), lr=1.0)
    copy_weights(other, take_steps(model, one, range(2)))
    state = copy.deepcopy(get_optimizer_state_dict(model, one, options=options))
    set_optimizer_state_dict(other, two, state, options=options)
    return is_same(take_steps(model, one, (2, 3)), take_steps(other, two, (2, 3)))


def from_a_whole_state() -> bool:
    """Whether an optimizer of rows goes on from the state of torch's, of whole matrices."""
    model, other = two_matrices(is_cut=False), two_matrices()
    one, two = torch.optim.Muon(model.parameters(), lr=0.02), Muon(other.parameters(), lr=1.0)
    copy_weights(other, take_steps(model, one, range(2)))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    return is_same(take_steps(model, one, (2, 3)), take_steps(other, two, (2, 3)))


def under_fsdp() -> bool:
    """Whether shards of FSDP2 are updated as the whole is."""
    from torch.distributed.fsdp import fully_shard

    whole, sharded = two_matrices(is_cut=False), two_matrices(is_cut=False)
    fully_shard(sharded)
    results = [take_steps(m, Muon(m.parameters(), lr=0.1), range(3)) for m in (whole, sharded)]
    return is_same(*results)


def some_without_gradients(missing: dict[int, list[int]]) -> Any:
    """The error, and whether weights stayed, where ranks lack gradients; or which were changed.

    Args:
        missing: by rank, the numbers of matrices.
    """
    model, optimizer = made(zero=3)
    give_gradients(model, 0)
    matrices = [p for p in matrices_of(model) if p.requires_grad]
    for number in missing.get(dist.get_rank(), []):
        matrices[number].grad = None
    before = [p.full_tensor().clone() for p in matrices]
    text = ""
    try:
        optimizer.step()
    except DivergenceError as error:
        text = str(error)
    after = [p.full_tensor() for p in matrices]
    return text, [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]


def cut_along_columns() -> str:
    """The error of a matrix that has no whole rows on any rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    spread = distribute_tensor(torch.ones(6, 8), mesh, [Shard(1)], src_data_rank=None)
    parameter = nn.Parameter(spread)
    parameter.grad = torch.ones_like(parameter)
    try:
        Muon([parameter]).step()
    except fxzero.UsageError as error:
        return str(error)
    return ""


def measured_and_planned(zero: int) -> tuple[int, int]:
    """Peaks of a step."""
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(512, 512, bias=False), nn.Tanh()) for _ in range(6))
    model = fxzero.compile(
        MeanSquare(nn.Sequential(*layers)), zero=zero, inner="eager", optimizer=Muon
    )
    optimizer = Muon(model.parameters())
    x = torch.randn(64, 512)

    def step() -> None:
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    # Threads of gloo may let go of what a collective read a moment after it has ended.
    measured = min(fxzero.measure(step).tensor_bytes for _ in range(3))
    return measured, model.plan.peak_bytes
