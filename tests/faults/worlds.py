"""What happens to trainings whose processes all live on: each is told, and trains on.

A task goes through several cases in one world, and answers by case with what this rank was told and
whether the training that went on is, to the bit, one to which nothing happened.
"""

import contextlib
import os
import resource
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from faults.training import EVERY, STEPS, Training, run, told

import fxzero
from fxzero import checkpoint

_ROOT = 0
_NOBODY = 65534


def _trained_on(training, done, expected):
    """Whether the rest of a training comes to what is expected."""
    losses = {number: training.step(number) for number in range(done + 1, STEPS + 1)}
    return _equal((losses, training.weights()), expected)


def _equal(found, expected):
    (losses, weights), (other_losses, other_weights) = found, expected
    return all(other_losses[number] == loss for number, loss in losses.items()) and all(
        torch.equal(other_weights[name], tensor) for name, tensor in weights.items()
    )


def disagreements(setup):
    """What ranks are told that come with different batches or modes, or another model."""
    expected, answers = run(setup), {}
    second = dist.get_rank() == 1

    def strange(name, batch=lambda x, y: (x, y), change=lambda model: None, back=None):
        training = Training(setup)
        training.step(1)
        if second:
            change(training.model)
        x, labels = training.batch(2)
        given = batch(x, labels) if second else (x, labels)
        text = told(lambda: _forward(training, given))
        if second and back is not None:
            back(training.model)
        torch.manual_seed(0)  # tracing may draw
        answers[name] = text, _trained_after(training)

    def _trained_after(training):
        """Whether the world still trains as a new one does."""
        training.model.zero_grad()
        del training
        return _equal(run(setup), expected)

    strange("F3 rows", lambda x, y: (x[:4], y[:4]))
    strange("F3 dtype", lambda x, y: (x.double(), y))
    strange("F3 mode", change=lambda m: m.eval(), back=lambda m: m.train())
    strange(
        "F3 frozen",
        change=lambda m: m.head.bias.requires_grad_(False),
        back=lambda m: m.head.bias.requires_grad_(True),
    )
    strange("F3 labels", lambda x, y: (x, y.int()))
    for name, options in (("F3 layer", {}), ("F3 stage", {"zero": 1})):
        answers[name] = told(lambda o=options: _other_model(o)), _equal(run(setup), expected)
    return answers


def _forward(training, batch):
    if training.same_data:
        training.model.step(*batch)
    else:
        training.model(*batch)


def _other_model(options):
    """The second rank's options are others; without any, its activation is."""
    second = dist.get_rank() == 1
    layer = torch.nn.GELU() if second and not options else torch.nn.Tanh()
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), layer)
    given = {"zero": 3, "inner": "eager", **(options if second else {})}
    fxzero.compile(model, **given)(torch.ones(4, 6))


def damages(setup, root):
    """What ranks are told of a checkpoint somebody has damaged; then they load the one before."""
    expected = run(setup)
    training = Training(setup)
    for number in range(1, 2 * EVERY + 1):
        training.step(number)
        if number % EVERY == 0:
            training.save(root, number)
    answers = {}
    for name, damage in _DAMAGES.items():
        copy = Path(f"{root} {name}")
        _alone(lambda copy=copy: shutil.copytree(root, copy))
        _alone(lambda copy=copy, damage=damage: damage(copy / f"step-{2 * EVERY}"))
        again = Training(setup)
        text = told(lambda copy=copy, again=again: again.read(copy / f"step-{2 * EVERY}"))
        done = again.read(copy / f"step-{EVERY}")
        answers[name] = text, _trained_on(again, done, expected)
    return answers


def _alone(action):
    """Done by the first rank, while the others wait."""
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def _shards(path):
    return sorted(path.glob("*.safetensors"))


def _flip(path):
    file = _shards(path)[0]
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def _swap(path):
    one, other = _shards(path)[:2]
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _cut(path):
    os.truncate(_shards(path)[1], 99)


_DAMAGES = {
    "C4 flip": _flip,
    "C4 swap": _swap,
    "C4 cut": _cut,
    "C4 delete": lambda path: _shards(path)[1].unlink(),
    "C4 manifest": lambda path: (path / "manifest.json").write_text("{"),
    "C4 state": lambda path: (path / "state.json").write_text("{}"),
}


def refusals(setup, root):
    """What ranks are told of a disk that takes no checkpoint; training and saving go on."""
    expected, answers = run(setup), {}
    for name, (refusing, ranks) in _REFUSALS.items():
        place = f"{root} {name}"
        training = Training(setup)
        for number in range(1, 2 * EVERY + 1):
            training.step(number)
            if number == EVERY:
                training.save(place, number)
        before = _contents(Path(place, f"step-{EVERY}"))
        with refusing(Path(place)) if dist.get_rank() in ranks else contextlib.nullcontext():
            notes = {"notes": "x" * 2_000_000} if "state" in name else {}
            text = told(
                lambda place=place, notes=notes, training=training: training.save(
                    place, 2 * EVERY, extra=notes
                )
            )
        dist.barrier()
        kept = _contents(Path(place, f"step-{EVERY}")) == before
        newest = checkpoint.latest(place).name
        dist.barrier()
        went_on = _trained_on(training, 2 * EVERY, expected)
        training.save(place, STEPS)
        saved = checkpoint.verify(place).step
        answers[name] = text, (kept, newest, went_on, saved)
    return answers


def _contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@contextlib.contextmanager
def _full(size):
    """No file may become larger: write() fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def _read_only(root):
    """Nothing may be made in the directory, not even by root, who becomes nobody."""
    mode = root.stat().st_mode
    root.chmod(0o555)
    user = os.geteuid()
    if user == _ROOT:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if user == _ROOT:
            os.seteuid(user)
        root.chmod(mode)


_REFUSALS = {
    "C8 first rank": (lambda root: _full(100_000), (0,)),
    "C8 second rank": (lambda root: _full(100_000), (1,)),
    "C8 both ranks": (lambda root: _full(100_000), (0, 1)),
    "C8 state": (lambda root: _full(1_000_000), (0,)),
    "C8 read-only": (_read_only, (0,)),
}
