"""Small monitored trainings, for tests on one process and on many."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero.monitor import Monitor


class Net(nn.Module):
    """Two layers with dropout and a loss; ``tied``: one weight is used twice."""

    def __init__(self, tied=False):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.twin = nn.Linear(8, 32)
        if tied:
            self.twin.weight = self.up.weight

    def forward(self, x, scale=None):
        hidden = nn.functional.dropout(torch.relu(self.up(x)), 0.1, self.training)
        loss = (self.down(hidden) - x).square().mean() + 0.1 * self.twin(x).square().mean()
        return loss if scale is None else loss * scale


def batch(step, rows=16):
    """The inputs of a step: other ones on every rank and in every step."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1000 * rank + step))


def plain():
    """(model that is not compiled, its optimizer)."""
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def build(tied=False, **options):
    """(compiled model, its optimizer)."""
    torch.manual_seed(0)
    model = fxzero.compile(Net(tied), **{"inner": "eager", **options})
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, steps, monitor=None, before=None, scale=None):
    """The losses of some steps; ``before(step)`` runs first in each."""
    losses = []
    for number in range(1, steps + 1):
        if before is not None:
            before(number)
        inputs = (batch(number),) if scale is None else (batch(number), scale(number))
        if monitor is None:
            losses.append(one_step(model, optimizer, inputs))
            continue
        with monitor.step(*inputs) as step:
            losses.append(one_step(model, optimizer, inputs))
            step.loss(losses[-1])
    return losses


def one_step(model, optimizer, inputs):
    if hasattr(model, "step"):
        loss = model.step(*inputs)
    else:
        loss = model(*inputs)
        loss.backward()
        loss = loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def alarms_of(records):
    return [alarm for record in records for alarm in record.alarms]


def sabotaged(model, wrong):
    """From now on the backward's results go through ``wrong``, a function of a list."""
    step = vars(model)["_fxzero"].latest
    right = step._executable.backward
    step._executable = dataclasses.replace(
        step._executable, backward=lambda arguments: wrong(right(arguments))
    )


# What ranks of a pool run


def caught(run):
    """The text of the error that a function raises, with its class."""
    try:
        run()
    except fxzero.FxzeroError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def monitored(steps, zero=0, before=None, scale=None, mesh=None, **options):
    """(error, records of this rank's sinks, monitor, model) of some monitored steps."""
    records = []
    if mesh is not None:
        mesh = init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))
    model, optimizer = build(zero=zero, mesh=mesh)
    actions = dict.fromkeys(fxzero.monitor.KINDS, ()) | options.pop("actions", {})
    monitor = Monitor(
        model, optimizer=optimizer, sinks=[records.append], actions=actions, **options
    )
    change = None if before is None else lambda number: before(number, model, optimizer)
    error = caught(lambda: train(model, optimizer, steps, monitor, change, scale))
    return error, records, monitor, model


def not_a_number(zero, bad_rank, step):
    """What a rank is told when the loss of another one is NaN."""

    def scale(number):
        bad = number == step and dist.get_rank() == bad_rank
        return torch.tensor(math.nan if bad else 1.0)

    error, records, monitor, *_ = monitored(
        8, zero, scale=scale, every=4, actions={"not_finite": "stop"}
    )
    return error, monitor.steps, [alarm.message for alarm in alarms_of(records)]


def stale_rank(zero, rank, step):
    """Alarms where a rank stops to update its weights."""

    def before(number, model, optimizer):
        if number == step and dist.get_rank() == rank:
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    error, records, *_ = monitored(12, zero, before=before, every=3)
    return error, [(a.kind, a.step, a.last_good, a.message) for a in alarms_of(records)]


def changed_weight(mesh, rank, name):
    """Alarms where one weight of a rank is changed behind everybody's back."""

    def before(number, model, optimizer):
        if number == 5 and dist.get_rank() == rank:
            parameter = dict(model.named_parameters())[name].data
            local = getattr(parameter, "_local_tensor", parameter)
            local[0] += 1e-6

    error, records, *_ = monitored(9, 3 if len(mesh) > 1 else 0, before, mesh=mesh, every=3)
    return error, [(a.kind, a.step, a.last_good, a.message) for a in alarms_of(records)]


def wrong_gradient(zero, rank):
    """Alarms where the graphs of one rank go wrong."""

    def before(number, model, optimizer):
        if number == 5 and dist.get_rank() == rank:
            sabotaged(model, lambda results: [results[0] * 1.1, *results[1:]])

    error, records, *_ = monitored(8, zero, before, every=4, shadow_every=4)
    return error, [(a.kind, a.step, a.last_good, a.message) for a in alarms_of(records)]


def rolled_back(zero, root):
    """(steps, weights as saved, weights as rolled back) where rank 1 sees a loss that is NaN."""
    kept = []

    def before(number, model, optimizer):
        if number == 4:
            fxzero.checkpoint.save(root, model, optimizer, step=3)
            kept.extend(local(p).clone() for p in model.parameters())

    def scale(number):
        return torch.tensor(math.nan if number == 6 and dist.get_rank() == 1 else 1.0)

    error, _, monitor, model = monitored(
        8,
        zero,
        before,
        scale,
        every=4,
        actions={"not_finite": "rollback"},
        checkpoints=root,
    )
    found = [local(p) for p in model.parameters()]
    return error, monitor.steps, all(map(torch.equal, found, kept))


def local(tensor):
    return getattr(tensor.detach(), "_local_tensor", tensor.detach())


def undisturbed(zero, **options):
    """Whether a monitored training leaves the weights and losses of an unmonitored one."""
    model, optimizer = build(zero=zero, **options)
    losses = train(model, optimizer, 7)
    again, other = build(zero=zero, **options)
    monitor = Monitor(again, optimizer=other, every=3, shadow_every=3)
    same = all(map(torch.equal, train(again, other, 7, monitor), losses))
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    return same and all(torch.equal(local(a), local(b)) for a, b in pairs)


def means(zero):
    """(losses told here, losses and norms and samples in the records, of the first rank)."""
    model, optimizer = build(zero=zero)
    records = []
    monitor = Monitor(model, optimizer=optimizer, every=2, sinks=[records.append])
    losses = train(model, optimizer, 2, monitor)
    found = [(r.loss, r.gradient_norm, r.samples_per_second * r.step_seconds) for r in records]
    return [loss.item() for loss in losses], found


def different_settings():
    model, optimizer = build()
    return caught(lambda: Monitor(model, optimizer=optimizer, every=5 + dist.get_rank()))


def different_steps():
    model, optimizer = build()
    monitor = Monitor(model, optimizer=optimizer, every=3)
    monitor.steps = 10 + dist.get_rank()
    return caught(lambda: train(model, optimizer, 6, monitor))


def sink_of_the_first(path):
    """The error where the first rank's sink cannot be opened."""
    model, optimizer = build()
    sink = fxzero.monitor.JsonLines(path)
    return caught(lambda: Monitor(model, optimizer=optimizer, sinks=[sink]))


def of_torch():
    """Alarms of a model of DistributedDataParallel, one of whose weights is changed."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    records = []
    actions = dict.fromkeys(fxzero.monitor.KINDS, ())
    monitor = Monitor(model, optimizer=optimizer, every=2, sinks=[records.append], actions=actions)
    for number in range(1, 5):
        if number == 3 and dist.get_rank() == 1:
            model.module.up.bias.data += 1
        with monitor.step(batch(number)) as step:
            loss = model(batch(number))
            loss.backward()
            step.loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    return [(a.kind, a.message) for a in alarms_of(records)]


class Stack(nn.Module):
    """Layers for two stages; the last one has the first one's weight once more."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(8, 8) for _ in range(3))
        self.last.weight = self.first.weight

    def forward(self, x):
        hidden = torch.tanh(self.middle(torch.tanh(self.first(x))))
        return (self.last(hidden) - x).square().mean()


def pipeline():
    """(loss told here, records, bubble of the plan) where a rank's copy of a weight changes."""
    torch.manual_seed(0)
    inputs = torch.randn(8, 8)
    asked = fxzero.Pipeline(2, microbatches=2, cuts=("middle",))
    model = fxzero.compile(Stack(), (inputs,), pipeline=asked, inner="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    records = []
    actions = dict.fromkeys(fxzero.monitor.KINDS, ())
    monitor = Monitor(
        model, optimizer=optimizer, every=2, sinks=[records.append], actions=actions, hardware="l4"
    )
    for number in range(1, 5):
        if number == 3 and dist.get_rank() == 1:
            model.first.weight.data[0, 0] += 1e-6
        with monitor.step(inputs) as step:
            loss = model.step(inputs)
            step.loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    found = [dataclasses.asdict(record) for record in records]
    return loss.item(), found, model.plan.pipeline.bubble


def quiet(**actions):
    """Actions that warn nobody but as given."""
    return {**dict.fromkeys(fxzero.monitor.KINDS, ()), **actions}


def nan_at(number, bad):
    return torch.tensor(math.nan if number >= bad else 1.0)
