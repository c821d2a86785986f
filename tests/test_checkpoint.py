"""Checkpoints of one process: whole or absent, bitwise, and errors that name the file."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import fxzero
from fxzero import CheckpointError, UsageError, checkpoint


class Tied(nn.Module):
    """Tied weights, a scalar, statistics of batches, dropout."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        hidden = self.drop(self.norm(self.embed(x).mean(1)) * self.scale)
        return self.head(hidden).square().mean()


X = torch.randint(10, (6, 3), generator=torch.Generator().manual_seed(0))


def training(kind=torch.optim.AdamW, **options):
    model = fxzero.compile(Tied(), inner="eager")
    return model, kind(model.parameters(), **{"lr": 1e-2, **options})


def train(model, optimizer, steps=3):
    losses = []
    for _ in range(steps):
        loss = model(X)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def saved(tmp_path):
    """A directory with a checkpoint of step 3, and what trained it."""
    model, optimizer = training()
    train(model, optimizer)
    checkpoint.save(tmp_path, model, optimizer, step=3, extra={"epoch": 1})
    return tmp_path, model, optimizer


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"betas": (0.8, 0.9)}),
        pytest.param(torch.optim.SGD, {"momentum": 0.9}, marks=pytest.mark.slow),
        pytest.param(torch.optim.Adagrad, {}, marks=pytest.mark.slow),
        (torch.optim.AdamW, {"lr": torch.tensor(0.01)}),
        (fxzero.optim.AdamW, {"betas": (0.8, 0.9)}),
        pytest.param(fxzero.optim.SGD, {"nesterov": True}, marks=pytest.mark.slow),
        pytest.param(fxzero.optim.Lion, {"lr": torch.tensor(0.01)}, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_bit_for_bit(tmp_path, kind, options):
    model, optimizer = training(kind, **options)
    train(model, optimizer)
    checkpoint.save(tmp_path, model, optimizer, step=3, extra={"epoch": 1})
    expected = train(model, optimizer)
    torch.manual_seed(99)
    other, others = training(kind, lr=1.0)
    loaded = checkpoint.load(tmp_path, other, others)
    assert (loaded.step, loaded.extra, loaded.random_state) == (3, {"epoch": 1}, True)
    assert train(other, others) == expected
    state, same = model.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert others.param_groups[0]["lr"] == pytest.approx(0.01)


def test_saving_makes_no_optimizer_state(tmp_path):
    model, optimizer = training()
    checkpoint.save(tmp_path, model, optimizer, step=0)
    assert not optimizer.state
    checkpoint.load(tmp_path, model, optimizer)
    assert not optimizer.state


def test_in_the_background_the_state_is_that_of_the_call(saved):
    root, model, optimizer = saved
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saving = checkpoint.save_async(root, model, optimizer, step=4)
    train(model, optimizer)
    assert saving.wait().name == "step-4"
    assert saving.done
    checkpoint.load(root, model)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_a_failure_in_the_background_is_raised_by_wait(saved, monkeypatch):
    root, model, _ = saved
    monkeypatch.setattr(checkpoint.saving, "commit", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        checkpoint.save_async(root, model, step=5).wait()
    assert checkpoint.latest(root).name == "step-3"


def test_the_newest_are_kept_and_one_can_go_back(saved):
    root, model, optimizer = saved
    for step in (10, 20, 100):
        checkpoint.save(root, model, optimizer, step=step, keep=3)
    assert [step for step, _ in checkpoint.directories.checkpoints(root)] == [10, 20, 100]
    assert checkpoint.latest(root).name == "step-100"
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of step 3 in .*\n  there are: 10, 20"
    ):
        checkpoint.rollback(root, 3)
    assert checkpoint.rollback(root, 10) == root / "step-10"
    assert os.listdir(root) == ["step-10"]
    checkpoint.save(root, model, optimizer, step=10)  # anew, in its place
    assert os.listdir(root) == ["step-10"]


def test_a_flipped_byte_is_named(saved):
    root, model, optimizer = saved
    (file,) = (root / "step-3").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged: SHA-256"):
        checkpoint.load(root, model, optimizer)
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged: SHA-256"):
        checkpoint.verify(root)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_a_file_that_was_cut_or_lost_is_named_and_older_ones_are_found(saved):
    root, model, optimizer = saved
    newer = checkpoint.save(root, model, optimizer, step=4)
    (file,) = newer.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=rf"{file.name} has \d+ bytes, its manifest says"):
        checkpoint.load(newer, model)
    assert checkpoint.latest(root).name == "step-3"
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} is missing: No such file"):
        checkpoint.verify(newer)
    assert checkpoint.load(root, model).step == 3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(format=7), "has format 7, this fxzero reads 1"),
        (lambda m: m.pop("step"), r"missing \['step'\]"),
        (
            lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}),
            "outside its directory",
        ),
        (lambda m: m.update(files=3), "must be an object, not int"),
    ],
)
def test_a_strange_manifest_is_refused(saved, change, text):
    root, model, _ = saved
    path = root / "step-3" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=text):
        checkpoint.load(root / "step-3", model)
    assert checkpoint.latest(root) is None


def test_another_model_is_refused_with_the_names(saved):
    root, _, optimizer = saved
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(root, nn.Linear(4, 4))
    assert str(caught.value).splitlines() == [
        f"[FXZ701] {root / 'step-3'}: the checkpoint is of another model",
        "  in the model only: bias, weight",
        "  in the checkpoint only: embed.weight, norm.bias, norm.num_batches_tracked, "
        "norm.running_mean, norm.running_var and 2 more",
    ]
    other = Tied()
    other.scale = nn.Parameter(torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"scale has shape \[\] in the checkpoint, \[2\] in"):
        checkpoint.load(root, other)
    with pytest.raises(CheckpointError, match="the optimizer holds a parameter of shape"):
        checkpoint.load(root, Tied(), optimizer)


def test_bad_arguments_are_named(tmp_path):
    model, _ = training()
    with pytest.raises(UsageError, match="step=-1 must be a number of steps, at least 0"):
        checkpoint.save(tmp_path, model, step=-1)
    with pytest.raises(UsageError, match="extra cannot be written as JSON"):
        checkpoint.save(tmp_path, model, step=1, extra={"x": torch.ones(1)})
    with pytest.raises(UsageError, match="keep=0 must be at least 1"):
        checkpoint.save(tmp_path, model, step=1, keep=0)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.load(tmp_path, model)


def test_weights_go_out_and_in_under_their_own_names(saved, tmp_path):
    _, model, _ = saved
    for size, files in ((10**9, 1), (100, 3)):
        folder = checkpoint.export_safetensors(model, tmp_path / str(size), file_bytes=size)
        assert len(list(folder.glob("*.safetensors"))) == files
        other = Tied()
        checkpoint.load_safetensors(other, folder)
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert other.head.weight is other.embed.weight
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    with pytest.raises(CheckpointError, match=r"names a file outside its directory: '../b'"):
        checkpoint.load_safetensors(Tied(), folder)
    with pytest.raises(CheckpointError, match="has no weight called weight"):
        checkpoint.load_safetensors(nn.Linear(1, 1), tmp_path / "1000000000")


@pytest.mark.slow
def test_transformers_reads_what_is_exported(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    config.save_pretrained(tmp_path)
    checkpoint.export_safetensors(model, tmp_path, file_bytes=20_000)
    other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    other.save_pretrained(tmp_path / "again")
    third = transformers.GPT2LMHeadModel(config)
    checkpoint.load_safetensors(third, tmp_path / "again")
    pairs = zip(model.parameters(), third.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


_KILLED = """
    import os, random, shutil, signal, sys, tempfile
    from pathlib import Path
    import torch
    from fxzero import checkpoint
    from fxzero.checkpoint import directories, saving

    torch.set_num_threads(1)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def half_deleted(path):
        next(Path(path).iterdir()).unlink()
        die()

    def half_written(path, **__):
        Path(path).with_name("shard-00001-model-00001-of-00001.safetensors").write_bytes(b"x" * 99)
        die()

    PLACES = {
        "writing tensors": (saving.state_dict_saver, "save", lambda *_, **k: half_written(
            Path(k["storage_writer"].path) / "x")),
        "hashing": (saving, "record_file", die),
        "before the rename": (directories.Path, "rename", die),
        "after the rename": (saving, "retain", die),
        "deleting old ones": (directories.shutil, "rmtree", half_deleted),
    }

    def set_to(value):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)

    root = Path(tempfile.mkdtemp())
    set_to(0)
    checkpoint.save(root, model, optimizer, step=0)
    whole = 0
    for attempt in range(1, 101):
        owner, name, replacement = list(PLACES.values())[attempt % len(PLACES)]
        if os.fork() == 0:
            set_to(attempt)
            setattr(owner, name, replacement)
            checkpoint.save(root, model, optimizer, step=attempt, keep=2)
            os._exit(0)
        os.wait()
        loaded = checkpoint.load(root, model, optimizer)
        values = {float(v) for p in model.parameters() for v in p.flatten()[:2]}
        assert values == {float(loaded.step)}, (attempt, loaded, values)
        assert loaded.step in (whole, attempt), (attempt, loaded)
        whole = loaded.step
    assert whole > 90, whole
    shutil.rmtree(root)
    print("done")
"""


@pytest.mark.slow
def test_a_hundred_kills_in_five_places_leave_only_whole_checkpoints():
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_KILLED)],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.stdout.endswith("done\n"), result.stderr[-2000:]
