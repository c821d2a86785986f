"""What each rank of a pool runs: five steps of a model, by fxzero or by DistributedDataParallel."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zoo
from test_overlap import carried_out
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

import fxzero
from fxzero import capture as capturing
from fxzero import collectives, training_step
from fxzero.allocations import peak_of_allocations
from fxzero.collectives import is_wait, starts_transfer
from fxzero.inner import compile_graph
from fxzero.mesh import Mesh
from fxzero.options import Options
from fxzero.planner import Planner

STEPS = 5


TRACES = {}  # of the model that was traced last: one serves all stages that shard it


@contextlib.contextmanager
def shared_traces(name, model, inner):
    """Inside, compilations of this model find the trace of an earlier one."""
    key = (name, any(isinstance(p, DTensor) for p in model.parameters()), inner)
    if key not in TRACES:
        TRACES.clear()
    known = TRACES.setdefault(key, {})

    def capture(*args, differentiable=None, **options):
        if differentiable not in known:
            known[differentiable] = capturing.capture(
                *args, differentiable=differentiable, **options
            )
        return known[differentiable]

    training_step.capture = capture
    try:
        yield
    finally:
        training_step.capture = capturing.capture


class Step(nn.Module):
    """A model of the zoo reduced to its loss."""

    def __init__(self, name):
        super().__init__()
        self.model, _, _, self.loss = zoo.build(name)

    def forward(self, *args, **kwargs):
        return self.loss(self.model(*args, **kwargs))


def batches(name, count):
    """Inputs that differ by rank and step: the zoo's, rolled along their last dimension."""
    _, args, kwargs, _ = zoo.build(name)
    for step in range(count):
        shift = 1 + step + 10 * dist.get_rank()
        yield (
            tuple(_rolled(value, shift) for value in args),
            {key: _rolled(value, shift) for key, value in kwargs.items()},
        )


def _rolled(value, shift):
    if isinstance(value, torch.Tensor) and value.ndim > 1:
        return value.roll(shift, -1)
    return value


def whole(tensor):
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def by_fxzero(name, accumulate=1, clip=None, optimizer="AdamW", **options):
    """(losses, parameters, norms, plan's peak) of fxzero."""
    torch.manual_seed(0)
    options = {"inner": "eager", "recompute": "none", **options}
    model = fxzero.compile(Step(name), **options)

    def norm(limit):
        return fxzero.clip_grad_norm_(model, limit)

    with shared_traces(name, model, options["inner"]):
        result = _train(name, model, norm, accumulate, clip, optimizer)
    return *result, model.plan.peak_bytes


def by_ddp(name, accumulate=1, clip=None, optimizer="AdamW", generated=False):
    """(losses, parameters, norms) of torch: eager, or with code by its own compiler."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Step(name), find_unused_parameters=False)
    if generated:
        model = torch.compile(model, dynamic=False, options={"fallback_random": True})

    def norm(limit):
        return nn.utils.clip_grad_norm_(model.parameters(), limit)

    return _train(name, model, norm, accumulate, clip, optimizer)


def _train(name, model, norm, accumulate, clip, optimizer="AdamW"):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(torch.optim, optimizer)(trained, lr=1e-3)
    torch.manual_seed(1 + dist.get_rank())
    losses, norms = [], []
    for index, (args, kwargs) in enumerate(batches(name, STEPS * accumulate)):
        last = (index + 1) % accumulate == 0
        if last:
            loss = model(*args, **kwargs)
            loss.backward()
        else:
            with model.no_sync():
                loss = model(*args, **kwargs)
                loss.backward()
        losses.append(loss.item())
        if last:
            if clip is not None:
                norms.append(norm(clip).item())
            optimizer.step()
            optimizer.zero_grad()
    return losses, [whole(p) for p in model.parameters()], norms


class Small(nn.Module):
    """Rows that no number of ranks divides, a scalar, and statistics of batches."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return (self.stack(x) * self.scale).square().mean()


def inputs(rows=8):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(dist.get_rank()))


def by_fxzero_hybrid(name, zero):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    return by_fxzero(name, zero=zero, mesh=mesh)


def around_a_step():
    """What a script does besides training steps, on sharded parameters."""
    torch.manual_seed(dist.get_rank())  # the first rank's values are taken
    model = fxzero.compile(Small(), zero=3, inner="eager")
    torch.manual_seed(0)
    expected = Small()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert isinstance(ours, DTensor)
        assert isinstance(ours, nn.Parameter)
        assert torch.equal(whole(ours), theirs.detach())

    # A forward without gradients, alone and with parameters gathered once.
    x = inputs()
    model.eval(), expected.eval()
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
        with model.gathered():
            assert torch.equal(model(x), expected(x))
            assert not isinstance(model.scale, DTensor)
    assert isinstance(model.scale, DTensor)
    model.train()

    # Forgetting an accumulation that was begun.
    with model.no_sync():
        model(x).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(fxzero.FxzeroError, match="gradients of no_sync steps are not reduced yet"):
        fxzero.clip_grad_norm_(model, 1.0)
    model.zero_grad()
    model(x).backward()
    once = [whole(p.grad) for p in model.parameters()]
    model.zero_grad()
    model(x).backward()
    assert all(map(torch.equal, once, [whole(p.grad) for p in model.parameters()]))
    model(x).backward()  # added to what is reduced
    for gradient, parameter in zip(once, model.parameters(), strict=True):
        assert torch.equal(2 * gradient, whole(parameter.grad))
    model.zero_grad()

    # Many optimizers, a list of them at once or one tensor at a time.
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop):
        for foreach in (False, True):
            optimizer = kind(model.parameters(), lr=1e-3, foreach=foreach)
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()

    # Saving and loading through a state dict of whole tensors.
    state = {name: whole(value) for name, value in model.state_dict().items()}
    other = Small()
    other.load_state_dict(state)
    assert set(state) == set(expected.state_dict())

    assert model.verify(x).exact
    return "done"


def ranks_that_accumulate_differently(zero):
    """Gradients, layouts and micro-batches that not all ranks have; what is pending stays."""
    torch.manual_seed(0)
    rank, x = dist.get_rank(), inputs()
    model = fxzero.compile(MeanSquare(nn.Linear(6, 3)), zero=zero, inner="eager")
    model(x).backward()
    once = [whole(p.grad) for p in model.parameters()]

    # Only the first has gradients.
    if rank:
        model.zero_grad()
    model(x).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()

    # Strides that only the last has not seen yet.
    model(x).backward()
    model(x.t().contiguous().t() if rank else x).backward()
    for gradient, parameter in zip(once, model.parameters(), strict=True):
        torch.testing.assert_close(2 * gradient, whole(parameter.grad))
    model.zero_grad()

    # autograd.grad hands out what is reduced, and leaves what is not.
    with model.no_sync():
        model(x).backward()
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(leaf), [leaf])
    assert found.shape == x.shape
    model(x).backward()
    for gradient, parameter in zip(once, model.parameters(), strict=True):
        torch.testing.assert_close(2 * gradient, whole(parameter.grad))
    model.zero_grad()
    found = torch.autograd.grad(model(x), list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, whole(b)) for a, b in zip(once, found, strict=True))

    # A last batch that is smaller on one rank.
    model = fxzero.compile(
        MeanSquare(nn.Linear(6, 3)), zero=zero, inner="eager", microbatches="auto"
    )
    model.step(x)
    try:
        model.step(x[:6] if rank else x)
    except fxzero.FxzeroError as error:
        return str(error)
    return "no error"


def different_lengths():
    model = fxzero.compile(Small(), zero=3, inner="eager")
    try:
        model(inputs(8 + dist.get_rank()))
    except fxzero.FxzeroError as error:
        return str(error)
    return "no error"


def too_small_a_budget():
    model = fxzero.compile(Small(), zero=3, inner="eager", memory_budget="1KiB")
    try:
        model(inputs())
    except fxzero.BudgetError as error:
        return str(error)
    return "no error"


def measured_peak(zero, inner="eager"):
    """(measured, planned) peak of a step, the optimizer's in it, and the losses of four steps."""
    torch.manual_seed(0)
    losses = []
    name = "gpt2 of 2 layers"
    model = fxzero.compile(Step(name), zero=zero, inner=inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ((args, kwargs),) = batches(name, 1)

    def step():
        loss = model(*args, **kwargs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    with shared_traces(name, model, inner):
        step()
    # Threads of gloo may let go of what a collective read a moment after it has ended.
    peaks = [fxzero.measure(step).tensor_bytes for _ in range(3)]
    return min(peaks), model.plan.peak_bytes, losses


def gathers_side_by_side():
    """Several run at once while this thread uses memory, which breaks with torch's operator."""
    ranks, group = dist.get_world_size(), dist.group.WORLD.group_name
    for _ in range(150):
        running = []
        for size in (3, 2000, 17, 700, 1, 2999, 64, 1500, 333, 5):
            part = torch.full((size,), float(dist.get_rank()))
            running.append((collectives.OVER_GLOO(part, ranks, group), part))
            if len(running) > 3:
                _check_gathered(*running.pop(0), ranks)
        for whole, part in running:
            _check_gathered(whole, part, ranks)
    return "done"


def stepped(zero):
    """Losses and gradients of two steps of four micro-batches; ``zero`` None: by DDP in a loop."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model = MeanSquare(plain)
    if zero is None:
        model = nn.parallel.DistributedDataParallel(model)
    else:
        model = fxzero.compile(model, zero=zero, inner="eager", microbatches=4)
    losses = []
    for _ in range(2):
        batch = inputs(8)
        model.zero_grad()
        if zero is not None:
            losses.append(model.step(batch).item())
            continue
        found = []
        for index, part in enumerate(batch.chunk(4)):
            with model.no_sync() if index < 3 else contextlib.nullcontext():
                loss = model(part) / 4
                loss.backward()
            found.append(loss.detach())
        losses.append(torch.stack(found).sum().item())
    return losses, [whole(p.grad) for p in model.parameters()]


class MeanSquare(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).square().mean()


def accumulated_peaks(zero, syncs):
    """(measured, planned) peaks of the second and third of four micro-batches.

    Args:
        syncs: whether each of them averages its gradients.
    """
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(200, 200), nn.Tanh()) for _ in range(6))
    model = MeanSquare(nn.Sequential(*layers))
    model = fxzero.compile(model, zero=zero, inner="eager", optimizer="none")
    batch = torch.randn(100, 200)
    peaks = []
    for _ in range(3):
        for index in range(4):
            context = contextlib.nullcontext() if syncs or index == 3 else model.no_sync()
            with context:
                measured = fxzero.measure(lambda: model(batch).backward())
            peaks.append((measured.tensor_bytes, model.plan.peak_bytes))
        model.zero_grad()
    # Threads of gloo may let go of what a collective read a moment after it has ended.
    return [min(peaks[index::4]) for index in range(1, 3)]


def collectives_in_generated_code():
    """For both graphs of a step the names of its collectives and waits, in graph and code."""
    captured = capturing.capture(Small(), (inputs(),), inner="inductor").graph
    sharding = Mesh({"dp": dist.get_world_size()}).sharding(3)
    made = Planner(captured, Options(sharding=sharding, inner="inductor"), "small")
    split = carried_out(made, bucket_bytes=0, in_flight=2)
    answers = []
    for module, backward in ((split.forward, False), (split.backward, True)):
        collectives.bind(module, {"dp": dist.group.WORLD.group_name})
        moves = (n for n in module.graph.nodes if is_wait(n) or starts_transfer(n.target))
        names = [str(node.target) for node in moves]
        code = compile_graph(module, "inductor", backward=backward).__generated__.source_code
        calls = r"torch\.ops\.((?:fxzero|_c10d_functional)\.\w+\.default)\("
        written = [name.replace("_.default", ".default") for name in re.findall(calls, code)]
        answers.append((names, written))
    return answers


def _check_gathered(whole, part, ranks):
    collectives.WAIT(whole)
    expected = torch.arange(ranks, dtype=part.dtype).repeat_interleave(len(part))
    assert torch.equal(whole, expected)


def workspaces():
    """(allocated besides results, what plans count) of each collective, in bytes."""
    ranks, group = dist.get_world_size(), dist.group.WORLD.group_name
    part = torch.randn(64, 256)
    wholes = [torch.randn(ranks * rows, 256) for rows in (64, 32, 16)]
    calls = [
        (collectives.OVER_GLOO, part, (ranks, group)),
        (collectives.REDUCE_SCATTER, wholes[0], ("avg", ranks, group)),
        (collectives.ALL_REDUCE, wholes[0], ("avg", group)),
        (collectives.COALESCED[collectives.ALL_REDUCE], wholes, ("avg", group)),
    ]
    return {str(target): _workspace(target, *given) for target, *given in calls}


def _workspace(target, argument, others):
    dist.barrier()
    time.sleep(0.2)  # until threads of gloo have let go of what the one before has read
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        made = target(argument, *others)
        made = made if isinstance(made, list) else [made]
        for tensor in made:
            collectives.WAIT(tensor)
    besides = peak_of_allocations(record) - sum(tensor.nbytes for tensor in made)
    read = argument if isinstance(argument, list) else [argument]
    return besides, collectives.workspace_bytes(target, read, made)


def train_and_save(root):
    """Saves after three steps; what two more come to, and the first rank's whole parameters."""
    torch.manual_seed(0)
    model = fxzero.compile(Small(), zero=3, inner="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    few_steps(model, optimizer, 3)
    fxzero.checkpoint.save(root, model, optimizer, step=3)
    state = whole_state(model, optimizer)
    return state, few_steps(model, optimizer, 2)


def few_steps(model, optimizer, count):
    losses = []
    for _ in range(count):
        loss = model(inputs())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole_state(model, optimizer):
    state = {name: whole(value) for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            state[f"{name} {key}"] = whole(value)
    return state


def load_and_train(root, zero):
    """What is loaded from another number of ranks, and what two more steps come to."""
    model = fxzero.compile(Small(), zero=zero, inner="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    fxzero.checkpoint.load(root, model, optimizer)
    return whole_state(model, optimizer), few_steps(model, optimizer, 2)


def export_and_load(root):
    model = fxzero.compile(Small(), zero=3, inner="eager")
    fxzero.checkpoint.export_safetensors(model, root)
    before = [whole(p) for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fxzero.checkpoint.load_safetensors(model, root)
    assert all(map(torch.equal, before, [whole(p) for p in model.parameters()]))
    return "done"


def read_by_fsdp(root):
    """FSDP2 reads the model's part of a checkpoint with torch alone."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    fully_shard(model)
    state = {f"model.stack.{name}": value for name, value in model.state_dict().items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(f"{root}/step-3"))
    return {name.removeprefix("model."): whole(value) for name, value in state.items()}


def save_on_a_full_disk(root):
    """The first rank's disk is full."""
    from fxzero.checkpoint import saving

    def full(path):
        raise OSError(28, "No space left on device")

    model = fxzero.compile(Small(), zero=3, inner="eager")
    record = saving.record_file
    if dist.get_rank() == 0:
        saving.record_file = full
    try:
        fxzero.checkpoint.save(root, model, step=9)
    except fxzero.CheckpointError as error:
        return str(error)
    finally:
        saving.record_file = record
    return "no error"


def killed_in_the_backward(directory):
    """The last rank kills itself after its second forward; the others write what they are told."""
    model = fxzero.compile(Small(), zero=3, inner="eager")
    model(inputs()).backward()
    loss = model(inputs())
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        loss.backward()
    except fxzero.PeerError as error:
        Path(directory, str(dist.get_rank())).write_text(str(error))
        os._exit(1)  # as a script does that catches nothing


def meta_initialised():
    """A model whose whole weights never exist: sharded on the meta device, then made and set."""
    with torch.device("meta"):
        model = Small()
    model = fxzero.compile(model, zero=3, inner="eager")
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with torch.no_grad():
        model.scale.fill_(2.0)
    weights = [whole(p) for p in model.parameters()]
    assert all(bool(w.isfinite().all()) and float(w.abs().max()) < 10 for w in weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert few_steps(model, optimizer, 20)[-1] < few_steps(model, optimizer, 1)[0] * 2
    assert model.verify(inputs()).exact
    assert not any(map(torch.equal, weights[:1], [whole(p) for p in model.parameters()][:1]))
    return "done"


class TwoOutputs(nn.Module):
    """A loss, and something beside it that a gradient may come through."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.layer(x)
        return hidden.square().mean(), hidden


def unplanned_gradient():
    model = fxzero.compile(TwoOutputs(), zero=3, inner="eager")
    loss, hidden = model(inputs())
    with pytest.raises(fxzero.FxzeroError) as caught:
        (loss + hidden.sum()).backward()
    return str(caught.value)


def in_mixed_precision(zero):
    """Computed in bfloat16, reduced and kept in float32."""
    torch.manual_seed(0)
    precision = fxzero.Precision(param=torch.bfloat16, reduce=torch.float32)
    name = "gpt2 of 2 layers"
    model = fxzero.compile(Step(name), zero=zero, precision=precision, inner="eager")
    with shared_traces(f"{name} in bfloat16", model, "eager"):
        result = _train(name, model, None, 1, None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ((args, kwargs),) = batches(name, 1)
    with torch.no_grad():
        assert model(*args, **kwargs).isfinite()
    return result
