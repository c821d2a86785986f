"""What the ranks of a training do to which something happens: six steps, a checkpoint every two.

Each rank ends as a process of a script does, and leaves what it has seen in a file.  Losses and
weights of a training that is taken up again are, to the bit, those of one to which nothing
happened: the model has dropout, and batches depend on the step and the rank alone.
"""

import contextlib
import os
import pickle
import signal
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import fxzero
from fxzero import _torch

STEPS, EVERY = 6, 2
_HANG = 60.0


@dataclass(frozen=True)
class Setup:
    """How a training is compiled and what belongs to a step.

    Attributes:
        options: of ``fxzero.compile``.
        accumulates: how many backwards a step has, reduced with the last.
        clips: whether gradients are clipped.
        dropout: a probability.
        width: of the layers.
        ranks: how many train.
        sizes: of the mesh, by dimension; none: one that fxzero makes.
    """

    options: dict
    accumulates: int = 1
    clips: bool = False
    dropout: float = 0.1
    width: int = 12
    ranks: int = 2
    sizes: tuple = ()


def _pipeline(schedule, **options):
    return {"pipeline": fxzero.Pipeline(2, schedule, microbatches=2), **options}


SETUPS = {
    "zero 0": Setup({"zero": 0}),
    "zero 1": Setup({"zero": 1}),
    "zero 2": Setup({"zero": 2}),
    "zero 3": Setup({"zero": 3}),
    "clipped": Setup({"zero": 3}, clips=True),
    "accumulated": Setup({"zero": 1}, accumulates=2),
    "micro-batches": Setup({"zero": 2, "microbatches": 2}),
    "updated in the backward": Setup(
        {"zero": 2, "update": "backward", "optimizer": fxzero.optim.AdamW}
    ),
    "generated": Setup({"zero": 3, "inner": "inductor"}),
    "1f1b": Setup(_pipeline("1f1b"), clips=True),
    "zb1p": Setup(_pipeline("zb1p")),
    "pp x dp": Setup(_pipeline("1f1b", zero=2), ranks=4, sizes=(("pp", 2), ("dp", 2)), clips=True),
    "hybrid": Setup({"zero": 3}, ranks=4, sizes=(("dp_replicate", 2), ("dp_shard", 2))),
    "wide": Setup({"zero": 3}, width=128),
    "without dropout": Setup({"zero": 3}, dropout=0.0),
}


@dataclass(frozen=True)
class Fault:
    """What happens.

    Attributes:
        kind: a function of ``_KINDS``.
        rank: to which process.
        at: "step", "forward", "backward", "loss", "clip", "optimizer" or "save".
        step: in which step.
    """

    kind: str
    rank: int = 1
    at: str = "forward"
    step: int = 4


def _limited(size):
    """Files that grow beyond ``size`` bytes kill this process, in the middle of a write."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _raise():
    raise ValueError("the loss met a value it cannot take")


_KINDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(_HANG),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "slow": lambda: time.sleep(0.7),
    "raise": _raise,
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "kill in the shard": lambda: _limited(100_000),
    "kill in the state": lambda: _limited(1_000_000),
}


class Now:
    """What this process may still meet, and where it is."""

    fault = None
    step = 0


def meet(place):
    """Lets happen what is to happen here."""
    fault = Now.fault
    if fault is not None and (fault.rank, fault.at, fault.step) == (
        dist.get_rank(),
        place,
        Now.step,
    ):
        Now.fault = None
        _KINDS[fault.kind]()


@torch.library.custom_op("fxzero_faults::point", mutates_args=())
def point(x: torch.Tensor, place: str) -> torch.Tensor:
    """A copy; something may happen meanwhile."""
    meet(place)
    return x.clone()


point.register_fake(lambda x, place: torch.empty_like(x))
point.register_autograd(lambda context, gradient: (point(gradient, "backward"), None))


class Model(nn.Module):
    """Three layers on both sides of the place where something may happen."""

    def __init__(self, dropout, width):
        super().__init__()
        self.low = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width))
        self.drop = nn.Dropout(dropout)
        self.high = nn.Sequential(nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, 4)

    def forward(self, x, labels):
        hidden = point(self.drop(self.low(x)), "forward")
        logits = point(self.head(self.high(hidden)), "loss")
        return nn.functional.cross_entropy(logits, labels)


class Training:
    """A model, its optimizer, and a step."""

    def __init__(self, name):
        self.setup = setup = SETUPS[name]
        torch.manual_seed(0)
        sizes = dict(setup.sizes)
        mesh = None  # fxzero connects the processes of a launcher, also of one that starts again
        if sizes:
            mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        options = {"inner": "eager", "recompute": "none", **setup.options}
        options["mesh"] = mesh
        self.same_data = "pipeline" in options
        self.mesh = mesh
        model = Model(setup.dropout, setup.width)
        first = self.batch(1) if self.same_data else None
        self.model = fxzero.compile(model, first, **options)
        trained = list(self.model.parameters())
        kind = torch.optim.AdamW
        if options.get("update") == "backward":
            kind = fxzero.optim.AdamW
        self.optimizer = kind(trained, lr=1e-2)
        if options.get("update") == "backward":
            self.model.update_with(self.optimizer)
        torch.manual_seed(1 + dist.get_rank())

    def batch(self, step, part=0):
        """Rows of this rank; those of the ranks of one pipeline are the same."""
        sizes = dict(self.setup.sizes)
        if "dp" in sizes:
            parts = [self.mesh.get_local_rank("dp")]
        else:
            parts = [0 if self.same_data else dist.get_rank()]
        if self.setup.dropout == 0.0:  # one batch, for any number of ranks
            whole = _rows(100 * step, 12)
            return tuple(column.chunk(dist.get_world_size())[dist.get_rank()] for column in whole)
        rows = [_rows(100 * step + 10 * part + each) for each in parts]
        return tuple(torch.cat(column) for column in zip(*rows, strict=True))

    def step(self, number):
        """One training step; its loss."""
        Now.step = number
        meet("step")
        setup, model = self.setup, self.model
        losses = []
        for part in range(setup.accumulates):
            last = part == setup.accumulates - 1
            with contextlib.nullcontext() if last else model.no_sync():
                losses.append(self._backward(self.batch(number, part)))
        if setup.clips:
            meet("clip")
            fxzero.clip_grad_norm_(model, 0.5)
        meet("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(losses)

    def _backward(self, batch):
        if self.same_data or self.setup.options.get("microbatches"):
            return self.model.step(*batch).item()
        loss = self.model(*batch)
        loss.backward()
        return loss.item()

    def weights(self):
        """Whole weights that this rank has, by name."""
        named = self.model.state_dict().items()
        return {name: _whole(tensor) for name, tensor in named if not tensor.is_meta}

    def save(self, root, number, **options):
        Now.step = number
        meet("save")
        fxzero.checkpoint.save(root, self.model, self.optimizer, step=number, **options)

    def load(self, root):
        """The step that was saved; 0 where none was."""
        return 0 if fxzero.checkpoint.latest(root) is None else self.read(root)

    def read(self, path):
        """The step of a checkpoint, which is loaded."""
        return fxzero.checkpoint.load(path, self.model, self.optimizer).step


def _rows(seed, count=8):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 6, generator=generator),
        torch.randint(4, (count,), generator=generator),
    )


def _whole(tensor):
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def run(setup, root=None, steps=STEPS):
    """Losses by step, and weights, of a training that starts or is taken up again."""
    Now.fault = None
    training = Training(setup)
    done = 0 if root is None else training.load(root)
    losses = {number: training.step(number) for number in range(done + 1, steps + 1)}
    return losses, training.weights()


def run_and_save(setup, root):
    """A checkpoint of step ``EVERY``."""
    Now.fault = None
    training = Training(setup)
    for number in range(1, EVERY + 1):
        training.step(number)
    training.save(root, EVERY)


def timeouts(seconds):
    """Of the mesh's group, of a pipeline's, and of the agreement's where ranks plan, in seconds."""
    with _waiting_for(seconds):
        state = Training("1f1b").model._fxzero
        groups = state.pipeline.mesh.devices.get_group("pp"), state.pipeline.line.back
        return tuple(_timeout(each) for each in (*groups, state.pipeline.agreement.group))


def _timeout(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


@contextlib.contextmanager
def _waiting_for(seconds):
    """Inside, ranks wait so long for each other, and later in groups that are made here."""
    before = _torch.default_timeout()
    _torch.set_timeout(dist.group.WORLD, timedelta(seconds=seconds))
    try:
        yield
    finally:
        _torch.set_timeout(dist.group.WORLD, before)


def meets(setup, root, answers, fault, patience):
    """A training to which something happens; this process ends.

    Args:
        patience: how many seconds ranks wait for each other once all of them have made their plans.
    """
    Now.fault, answer = fault, {}
    begun = time.monotonic()
    with contextlib.suppress(fxzero.PeerError), _noting(answer):
        with _waiting_for(patience) if "1f1b" in setup else contextlib.nullcontext():
            training = Training(setup)  # a pipeline makes groups of its own
        with fxzero.checkpoint.leaving() as leaving, contextlib.ExitStack() as stack:
            for number in range(1, STEPS + 1):
                if number == fault.step:
                    stack.enter_context(_waiting_for(patience))
                begun = time.monotonic()
                training.step(number)
                if leaving.asked() or number % EVERY == 0:
                    extra = {"notes": "x" * 2_000_000} if fault.at == "save" else {}
                    training.save(root, number, extra=extra)
                if leaving.decided:
                    break
        answer.update(left=number, weights=training.weights())
    answer.update(seconds=time.monotonic() - begun, met=Now.fault is None)
    Path(answers, str(dist.get_rank())).write_bytes(pickle.dumps(answer))
    os._exit(0)


@contextlib.contextmanager
def _noting(answer):
    """Notes what an error says that is raised inside, and its traceback."""
    try:
        yield
    except Exception as error:
        text = "".join(traceback.format_exception_only(error)).strip()
        answer.update(told=text, trace=traceback.format_exc())


def told(action):
    """What the error says that an action ends with; "no error" without any."""
    answer = {}
    with contextlib.suppress(Exception), _noting(answer):
        action()
    return answer.get("told", "no error")
