"""What tests of pipelines run, on ranks and for comparison on one device."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import zoo
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import fxzero
from fxzero import rehearsal
from fxzero.agreement import Agreement
from fxzero.mesh import Mesh
from fxzero.microbatches import Batch
from fxzero.pipelining import gradients
from fxzero.pipelining.line import Line

STEPS = 3


class Mlp(nn.Module):
    """Layers of one kind, and a norm."""

    def __init__(self, width: int = 24, count: int = 8) -> None:
        super().__init__()
        layers = [
            nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())
            for _ in range(count)
        ]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 10))

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.layers(x), labels)


def build(name):
    """(model without dropout, args, kwargs, loss): of the zoo, or an MLP."""
    if name in ("mlp", "wide"):
        width, rows, count = (24, 16, 8) if name == "mlp" else (256, 256, 6)
        generator = torch.Generator().manual_seed(3)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Mlp(width, count)
        inputs = (torch.randn(rows, width, generator=generator), torch.arange(rows) % 10)
        return model, inputs, {}, lambda output: output
    model, args, kwargs, loss = zoo.build(name)
    for module in model.modules():
        for attribute in ("p", "dropout", "attention_dropout", "dropout_rate"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model, args, kwargs, loss


def by_accumulation(name, microbatches, clip=None, steps=STEPS):
    """(losses, norms, parameters and buffers) of eager torch on one device."""
    model, args, kwargs, loss = build(name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        parts = []
        for part, keywords in Batch.of(args, kwargs).cut(microbatches):
            share = loss(model(*part, **keywords)) / microbatches
            share.backward()
            parts.append(share.detach())
        losses.append(torch.stack(parts).sum().item())
        if clip is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
    return losses, norms, {n: t.detach().clone() for n, t in model.state_dict().items()}


def by_pipeline(name, clip=None, steps=STEPS, sizes=None, options=None, first=False, **pipeline):
    """(losses, norms, what this rank keeps, in-flight counts: seen and scheduled) of fxzero.

    Args:
        sizes: of the mesh, by dimension.
        first: whether the model is cut when it is compiled; inputs are all of one kind then.
    """
    model, args, kwargs, loss = build(name)
    mesh = sizes and init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    given = {"inner": "eager", "recompute": "none", "mesh": mesh, **(options or {})}
    if first:
        given["example_inputs"] = args or kwargs
    model = fxzero.compile(model, pipeline=fxzero.Pipeline(**pipeline), loss_fn=loss, **given)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(model.step(*args, **kwargs).item())
        if clip is not None:
            norms.append(fxzero.clip_grad_norm_(model, clip).item())
        optimizer.step()
    kept = {n: whole(t) for n, t in model.state_dict().items() if not t.is_meta}
    trained = model._fxzero.pipeline
    (prepared,) = trained.prepared.values()
    scheduled = {stage: prepared.schedule.in_flight(stage) for stage in trained.in_flight}
    return losses, norms, kept, trained.in_flight, scheduled


def refused_budget(budget, sizes=None, first=True, **options):
    """What a rank is told of a budget that not all of them can meet, and how much it needs."""
    model, args, _, _ = build("mlp")
    mesh = sizes and init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    given = {"pipeline": fxzero.Pipeline(microbatches=4), "inner": "eager", "mesh": mesh, **options}
    given |= {"memory_budget": budget, "example_inputs": args if first else None}
    try:
        fxzero.compile(model, **given).step(*args)
    except fxzero.FxzeroError as error:
        return type(error).__name__, str(error), getattr(error, "required_bytes", None)
    return "trained", "", None


def pieces_that_run(name, **pipeline):
    """How often each piece of each stage of this rank runs in a step; the stages' weights."""
    model, args, kwargs, loss = build(name)
    options = {"inner": "eager", "recompute": "none", "loss_fn": loss}
    model = fxzero.compile(model, args or kwargs, pipeline=fxzero.Pipeline(**pipeline), **options)
    model.step(*args, **kwargs)
    (prepared,) = model._fxzero.pipeline.prepared.values()
    runs = Counter()

    def counted(stage, piece, function):
        def run(arguments):
            runs[stage, piece] += 1
            return function(arguments)

        return run

    for (stage, *_), step in prepared.steps.items():
        whole = step._executable
        first = counted(stage, "input gradients", whole.halves.first)
        second = counted(stage, "weight gradients", whole.halves.second)
        halves = replace(whole.halves, first=first, second=second)
        forward = counted(stage, "forward", whole.forward)
        step._executable = replace(whole, forward=forward, halves=halves)
    model.step(*args, **kwargs)
    mine = prepared.schedule.stages_of(model._fxzero.pipeline.line.rank)
    return dict(runs), {stage: prepared.routes.weight_bytes[stage] for stage in mine}


def by_choice(name, budget, steps=STEPS):
    """(losses, norms, what this rank keeps, the pipeline) of ranks with rows of their own."""
    model, args, kwargs, loss = build(name)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine, named = list(Batch.of(args, kwargs).cut(world))[rank]
    options = {"inner": "eager", "zero": 0, "memory_budget": budget, "loss_fn": loss}
    model = fxzero.compile(model, mine or named, pipeline="auto", optimizer="sgd", **options)
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_meta]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(model.step(*mine, **named).item())
        optimizer.step()
    kept = {n: whole(t) for n, t in model.state_dict().items() if not t.is_meta}
    return losses, [], kept, model.plan.pipeline


def whole(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def differences(answers, expected):
    """Largest differences of losses, norms and kept tensors; all tensors must be kept somewhere."""
    losses, norms, tensors = expected
    largest = [0.0]
    kept = set()
    for ours, our_norms, mine, *_ in answers:
        largest += [abs(a - b) for a, b in zip(ours, losses, strict=True)]
        largest += [abs(a - b) for a, b in zip(our_norms, norms, strict=True)]
        kept |= mine.keys()
        for name, tensor in mine.items():
            if tensor.numel():
                largest.append(float((tensor.double() - tensors[name].double()).abs().max()))
    assert kept == tensors.keys()
    return max(largest)


def measured_without_workspaces(**given):
    """``measured_peak`` of plans without the buffers of gloo, which are no tensors."""
    counted, nothing = rehearsal.workspace_bytes, lambda *_: 0
    rehearsal.workspace_bytes = gradients.workspace_bytes = nothing
    try:
        return measured_peak(**given)
    finally:
        rehearsal.workspace_bytes = gradients.workspace_bytes = counted


def measured_peak(name, budget=None, sizes=None, zero="auto", zeroes=True, **pipeline):
    """(measured, planned) peak of a step of this rank, and its loss."""
    model, args, kwargs, loss = build(name)
    mesh = sizes and init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    model = fxzero.compile(
        model,
        args or kwargs,
        pipeline=fxzero.Pipeline(**pipeline),
        loss_fn=loss,
        inner="eager",
        memory_budget=budget,
        mesh=mesh,
        zero=zero,
    )
    mine = [p for p in model.parameters() if p.requires_grad and not p.is_meta]
    optimizer = torch.optim.AdamW(mine, lr=1e-3)
    losses = []

    def step():
        if zeroes:
            optimizer.zero_grad()
        losses.append(model.step(*args, **kwargs).item())
        optimizer.step()

    step()
    peaks = [fxzero.measure(step).tensor_bytes for _ in range(2)]
    return min(peaks), model.plan.peak_bytes, losses


def saved_and_loaded(root, name, load, sizes=None, **pipeline):
    """(what the rank has after a step or a load, losses of two steps behind it)."""
    model, args, kwargs, loss = build(name)
    if load:  # other values than those that were saved
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    mesh = sizes and init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    asked = fxzero.Pipeline(**pipeline) if pipeline else None
    given = {"loss_fn": loss, "inner": "eager", "recompute": "none", "mesh": mesh}
    given |= {} if asked else {"microbatches": 4}
    model = fxzero.compile(model, args or kwargs, pipeline=asked, **given)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)

    def step():
        optimizer.zero_grad()
        found = model.step(*args, **kwargs).item()
        optimizer.step()
        return found

    if load:
        assert fxzero.checkpoint.load(root, model, optimizer).step == 1
    else:
        step()
        fxzero.checkpoint.save(root, model, optimizer, step=1)
    have = {n: whole(t) for n, t in model.state_dict().items() if not t.is_meta}
    return have, [step(), step()]


def killed_in_a_step(directory):
    """The second rank dies in the second step; the first writes down what it is told."""
    model, args, _, _ = build("mlp")
    model = fxzero.compile(model, args, pipeline=fxzero.Pipeline(2, microbatches=4), inner="eager")
    model.step(*args)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        model.step(*args)
    except fxzero.PeerError as error:
        Path(directory, "told").write_text(str(error))


class HalfLoss(nn.Module):
    """A loss in bfloat16, from a layer that reads the batch and one that does not."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.b(self.a(x).relu()).mean().bfloat16()


def loss_of_another_dtype():
    torch.manual_seed(0)
    model, x = HalfLoss(), torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    expected = model(x[:2]).item() / 2 + model(x[2:]).item() / 2
    model = fxzero.compile(model, pipeline=fxzero.Pipeline(2, microbatches=2), inner="eager")
    loss = model.step(x)
    return str(loss.dtype), loss.item(), expected


def sums_over_some(ranks, groups):
    """What the numbers of a rank's place come to in each group of places that it belongs to."""
    dist.new_group([0])  # of a user's own
    mesh = Mesh({"pp": ranks}, init_device_mesh("cpu", (ranks,), mesh_dim_names=("pp",)))
    assert Agreement(mesh).on_step("the same", [True], "step 1") == [[1] * ranks]
    line = Line.of(mesh)
    for places in groups:
        line.connect(places)
    sums = {}
    for places in groups:
        if line.rank in places:
            number = torch.tensor(10**line.rank)
            line.add_up(number, places)
            sums[places] = number.item()
    return sums


def different_batches(sizes=None):
    """What a rank is told whose batch is its own."""
    model, (x, labels), _, _ = build("mlp")
    mesh = sizes and init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    asked = fxzero.Pipeline(2, microbatches=2)
    model = fxzero.compile(model, pipeline=asked, inner="eager", mesh=mesh)
    try:
        model.step(x + dist.get_rank(), labels)
    except fxzero.FxzeroError as error:
        return str(error)
    return "trained"


RUNS_LEFT = {}  # by "forward" and "backward": how often the operator still runs in this process


@torch.library.custom_op("fxzero_tests::fragile", mutates_args=())
def fragile(x: torch.Tensor, pass_: str) -> torch.Tensor:
    """A copy, unless this process has run it as often as it may."""
    if pass_ in RUNS_LEFT:
        RUNS_LEFT[pass_] -= 1
        if RUNS_LEFT[pass_] < 0:
            raise ValueError(f"the {pass_} met a value it cannot take")
    return x.clone()


fragile.register_fake(lambda x, pass_: torch.empty_like(x))
fragile.register_autograd(lambda context, gradient: (fragile(gradient, "backward"), None))


class Fragile(Mlp):
    """Its operator stands before or behind the layers."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, x, labels):
        x = x if self.last else fragile(self.layers[0](x), "forward")
        x = self.layers(x) if self.last else self.layers[1:](x)
        x = fragile(x, "forward") if self.last else x
        return nn.functional.cross_entropy(x, labels)


def other_shapes():
    """Weights after steps of other shapes, and what a rank is told that has a shape of its own."""
    model, (x, labels), _, _ = build("mlp")
    asked = fxzero.Pipeline(2, "1f1b", microbatches=2)
    model = fxzero.compile(model, (x, labels), pipeline=asked, inner="eager")
    for rows in (16, 8, 16):
        model.step(x[:rows], labels[:rows])
    kept = {n: whole(p.grad) for n, p in model.named_parameters() if not p.is_meta}
    rank, told = dist.get_rank(), []
    for given in (
        (x[: 8 + 4 * rank], labels[: 8 + 4 * rank]),
        (x.requires_grad_(rank == 1), labels),
    ):
        try:
            model.step(*given)
        except fxzero.FxzeroError as error:
            told.append(str(error))
    model.step(x.detach(), labels)  # nothing is broken
    return kept, told


def one_rank_raises(failing, last, pass_, runs, sizes=None, zero="auto", **pipeline):
    """What a rank is told of an error in its second step and in its third, and after how long.

    Args:
        failing: the rank that raises.
        last: whether it does so in the last layer, or in the first.
        pass_: "forward" or "backward".
        runs: how often the operator runs before.
    """
    _, args, _, _ = build("mlp")
    torch.manual_seed(0)
    mesh = sizes and init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    options = {"inner": "eager", "recompute": "none", "mesh": mesh, "zero": zero}
    asked = fxzero.Pipeline(microbatches=4, **pipeline)
    model = fxzero.compile(Fragile(last), args, pipeline=asked, **options)
    model.step(*args)
    if dist.get_rank() == failing:
        RUNS_LEFT[pass_] = runs
    told, start = [], time.monotonic()
    for _ in range(2):
        try:
            model.step(*args)
            fxzero.clip_grad_norm_(model, 1.0)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
            told += getattr(error, "__notes__", ())
    RUNS_LEFT.clear()
    return told, time.monotonic() - start
