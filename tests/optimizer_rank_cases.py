"""What each rank of a pool runs with an optimizer of fxzero over a sharded model."""

from __future__ import annotations

import functools
from typing import Any

import optimizer_cases as cases
import pipeline_cases
import torch
import torch.distributed as dist
from rank_cases import MeanSquare, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fxzero
from fxzero.optim import SGD, AdamW, Lion
from fxzero.optimizers import profile_optimizer

KINDS: dict[str, Any] = {"adamw": AdamW, "sgd": SGD, "lion": Lion}
NARROW = "bfloat16 with 24 bits and int8 moments"
RANDOM = "bfloat16 rounded stochastically with int8 moments"


class Rows(nn.Module):
    """Rows that no number of ranks divides, fewer rows than ranks, a scalar, a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(nn.Linear(128, 33), nn.Tanh(), nn.Linear(33, 64), nn.Tanh())
        self.last = nn.Linear(64, 3)
        self.frozen = nn.Linear(3, 3)
        self.frozen.weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = (self.frozen(self.last(self.stack(x))) * self.scale).square().mean()
        return loss


def made(form: str, kind: str = "adamw", zero: int = 3, **options: Any) -> tuple[Any, Any]:
    """A sharded model and its optimizer."""
    dtype, numerics = cases.FORMS[form]
    torch.manual_seed(0)
    model = fxzero.compile(Rows().to(dtype), zero=zero, inner="eager")
    defaults = {"lr": 0.01, "seed": 11, **numerics}
    return model, KINDS[kind](model.parameters(), **{**defaults, **options})


def batch(model: nn.Module, step: int) -> Tensor:
    """The same on all ranks."""
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(step))
    return x.to(next(model.parameters()).dtype)


def few_steps(model: Any, optimizer: Any, steps: Any, clip: str = "") -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(batch(model, step))
        loss.backward()
        if clip:
            given = {"optimizer": optimizer} if clip == "in the step" else {}
            fxzero.clip_grad_norm_(model, 0.05, **given)
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Whole weights and states by name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = whole(value)
    return found


def trained(form: str, kind: str = "adamw", zero: int = 3, clip: str = "", **options: Any) -> Any:
    """Losses, and whole weights and states, of a few steps over the same batches on all ranks."""
    model, optimizer = made(form, kind, zero, **options)
    return few_steps(model, optimizer, range(4), clip), state_of(model, optimizer)


def differing_from_torch(zero: int) -> list[str]:
    """What differs from torch's fused AdamW after steps with gradients set by hand."""
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = fxzero.compile(Rows(), zero=zero, inner="eager")
        fused = {"fused": True} if kind is torch.optim.AdamW else {}
        optimizer: Any = kind(model.parameters(), lr=0.1, weight_decay=0.1, **fused)
        for step in range(4):
            give_gradients(model, step)
            optimizer.step()
        results.append(state_of(model, optimizer))
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    return [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


def give_gradients(model: nn.Module, step: int) -> None:
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        generator = torch.Generator().manual_seed(100 * step + number)
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            gradient = distribute_tensor(gradient, mesh, placements, src_data_rank=None)
        parameter.grad = gradient


def train_and_save(root: str, form: str) -> Any:
    """Saves after three steps; what two more come to."""
    model, optimizer = made(form)
    few_steps(model, optimizer, range(3))
    fxzero.checkpoint.save(root, model, optimizer, step=3)
    saved = state_of(model, optimizer)
    return saved, few_steps(model, optimizer, range(3, 5)), state_of(model, optimizer)


def load_and_train(root: str, form: str, zero: int = 3) -> Any:
    """What was loaded, and what two steps come to."""
    model, optimizer = made(form, zero=zero, lr=1.0)
    fxzero.checkpoint.load(root, model, optimizer)
    loaded = state_of(model, optimizer)
    return loaded, few_steps(model, optimizer, range(3, 5)), state_of(model, optimizer)


def through_torchs_state_dicts(form: str, full: bool) -> bool:
    """Whether an optimizer goes on bit for bit from what torch's functions get and set."""
    model, optimizer = made(form)
    few_steps(model, optimizer, range(2))
    options = StateDictOptions(full_state_dict=full)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    weights = [whole(p) for p in model.parameters()]
    other, others = made(form, lr=1.0)
    set_optimizer_state_dict(other, others, state, options=options)
    with torch.no_grad():
        for parameter, weight in zip(other.parameters(), weights, strict=True):
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                weight = distribute_tensor(weight, mesh, placements, src_data_rank=None)
            parameter.copy_(weight)
    few_steps(model, optimizer, range(2, 4))
    few_steps(other, others, range(2, 4))
    one, two = state_of(model, optimizer), state_of(other, others)
    return one.keys() == two.keys() and all(
        torch.equal(cases.bits(one[name]), cases.bits(two[name])) for name in one
    )


def differing_under_fsdp(form: str) -> list[str]:
    """What differs between shards of FSDP2 and whole parameters, gradients set by hand."""
    from torch.distributed.fsdp import fully_shard

    dtype, numerics = cases.FORMS[form]
    results = []
    for sharded in (True, False):
        torch.manual_seed(0)
        model: Any = Rows().stack.to(dtype)
        if sharded:
            fully_shard(model)
        optimizer = AdamW(model.parameters(), lr=0.1, seed=3, **numerics)
        for step in range(3):
            give_gradients(model, step)
            optimizer.step()
        results.append(state_of(model, optimizer))
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    return [n for n, v in ours.items() if not torch.equal(cases.bits(v), cases.bits(theirs[n]))]


def measured_and_planned(form: str, zero: int) -> tuple[int, int, int]:
    """Peaks of a step, the optimizer's in it, and what of the planned one is scratch."""
    dtype, numerics = cases.FORMS[form]
    chosen = functools.partial(AdamW, **numerics)
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(6))
    model = fxzero.compile(
        MeanSquare(nn.Sequential(*layers).to(dtype)), zero=zero, inner="eager", optimizer=chosen
    )
    optimizer = chosen(model.parameters())
    x = torch.randn(64, 512).to(dtype)

    def step() -> None:
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    # Threads of gloo may let go of what a collective read a moment after it has ended.
    measured = min(fxzero.measure(step).tensor_bytes for _ in range(3))
    scratch = profile_optimizer(chosen, list(model.parameters()), "cpu").scratch_bytes
    return measured, model.plan.peak_bytes, scratch


def with_states_away(zero: int) -> tuple[Any, ...]:
    """Losses with states on the device, and in host memory under the smallest budget.

    Besides, of the latter: the largest measured peak and the planned one; planned and measured
    bytes of the host.
    """
    expected, _, _ = _few_measured_steps(zero)
    try:
        _few_measured_steps(zero, offload=True, memory_budget=1)
    except fxzero.BudgetError as error:
        budget = error.required_bytes
    losses, measured, plan = _few_measured_steps(zero, offload=True, memory_budget=budget)
    peak, host = (max(getattr(m, n) for m in measured) for n in ("tensor_bytes", "host_bytes"))
    return (expected, losses), (peak, plan.peak_bytes), (plan.host_bytes, host)


def _few_measured_steps(zero: int, **options: Any) -> tuple[list[float], list[Any], fxzero.Plan]:
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(4))
    stack = MeanSquare(nn.Sequential(*layers))
    model = fxzero.compile(stack, zero=zero, inner="eager", optimizer=AdamW, **options)
    optimizer = AdamW(model.parameters(), lr=0.01)
    if options:
        model.update_with(optimizer)
    losses: list[float] = []

    def step() -> None:
        loss = model(torch.randn(8, 256))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))

    torch.manual_seed(1)
    return losses, [fxzero.measure(step) for _ in range(3)], model.plan


def cut_along_columns(columns: int) -> Any:
    """The weight after steps of an optimizer with 8-bit moments, or the error."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    results = []
    for placement in (Shard(1), Replicate()):
        parameter = nn.Parameter(distribute_tensor(weight, mesh, [placement], src_data_rank=None))
        layer = nn.ParameterList([parameter])
        optimizer = AdamW(layer.parameters(), moments="int8", backend="torch")
        give_gradients(layer, 0)
        try:
            optimizer.step()
        except fxzero.UsageError as error:
            return str(error)
        results.append(list(optimizer.state[parameter]["exp_avg_scale"].shape))
    return results


def differing_in_a_pipeline(name: str, stages: int) -> list[str]:
    """What of this rank's stages differs between torch's AdamW and ours, with clipped gradients."""
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model, args, kwargs, loss = pipeline_cases.build(name)
        pipeline = fxzero.Pipeline(stages, microbatches=2)
        model = fxzero.compile(model, pipeline=pipeline, loss_fn=loss, inner="eager")
        ours = kind is AdamW
        optimizer: Any = kind(model.parameters(), lr=0.01, **({} if ours else {"fused": True}))
        for _ in range(3):
            optimizer.zero_grad()
            model.step(*args, **kwargs)
            given = {"optimizer": optimizer} if ours else {}
            fxzero.clip_grad_norm_(model, 0.05, **given)
            optimizer.step()
        results.append({n: whole(p) for n, p in model.named_parameters() if not p.is_meta})
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    return [n for n, value in ours.items() if not torch.equal(value, theirs[n])]


def in_backward(zero: int) -> Any:
    """Weights and states after updates in steps, and in backwards; peaks, measured and planned."""
    results = []
    for update in ("step", "backward"):
        torch.manual_seed(0)
        given = {"optimizer": AdamW, "inner": "eager", "zero": zero, "update": update}
        stack = [layer for _ in range(6) for layer in (nn.Linear(128, 128), nn.Tanh())]
        model: Any = MeanSquare(nn.Sequential(*stack))
        x = torch.randn(4, 128, generator=torch.Generator().manual_seed(dist.get_rank()))
        if update == "backward":  # so little that gradients are reduced one by one
            plan = fxzero.plan(model, x, devices=dist.get_world_size(), **given)
            given["memory_budget"] = plan.minimum_budget
        model = fxzero.compile(model, (x,), **given)
        optimizer = AdamW(model.parameters(), lr=0.01)
        if update == "backward":
            model.update_with(optimizer)

        def step(model: Any = model, optimizer: Any = optimizer, x: Tensor = x) -> None:
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()

        peak = min(fxzero.measure(step).tensor_bytes for _ in range(5))
        found = state_of(model, optimizer)
        results.append((found, peak, model.plan.peak_bytes))
    return results
