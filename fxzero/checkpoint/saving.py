"""Saving and loading a training state, by all ranks together.

    all ranks    write their shards to step-N.tmp/, then hash some of the files each
    first rank   writes state.json and manifest.json, syncs, and renames step-N.tmp to step-N

A rank that fails makes all ranks raise, and the temporary directory stays what it is: unread.
Loading checks every byte first, then copies into the tensors that the model has, however many
ranks wrote them.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from fxzero import __version__
from fxzero.checkpoint.contents import (
    Contents,
    Tensors,
    empty_like_saved,
    model_tensors,
    named_tensors,
    optimizer_contents,
    restore_optimizer,
)
from fxzero.checkpoint.directories import (
    FORMAT,
    STATE,
    FileRecord,
    Manifest,
    check_files,
    commit,
    covered,
    read_manifest,
    record_file,
    resolve,
    retain,
    temporary_path,
)
from fxzero.checkpoint.shards import Shapes, saved_tensors
from fxzero.checkpoint.state import State, read_state, written_state
from fxzero.checkpoint.team import Team
from fxzero.documents import naming
from fxzero.errors import CheckpointError, UsageError, listed
from fxzero.randomness import RandomState
from fxzero.sharding import ids_elsewhere


@dataclass(frozen=True)
class Loaded:
    """What was loaded besides tensors.

    Attributes:
        extra: what was given to ``save``.
        random_state: whether this rank's random generators were set; they are only if as many
            ranks load as have saved.
    """

    path: Path
    step: int
    extra: dict[str, Any]
    random_state: bool


class Saving:
    """A checkpoint that is being written in the background."""

    def __init__(self, write: Callable[[], Path]) -> None:
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(write,), name="fxzero checkpoint")
        self._thread.start()

    def _run(self, write: Callable[[], Path]) -> None:
        try:
            self._path = write()
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> Path:
        """The checkpoint's path, once it is whole; raises what went wrong."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path


def save(
    root: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int,
    extra: dict[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Writes a checkpoint, ``root``/step-N; it is whole, or not there, whatever happens meanwhile.

    All ranks call it; ``root`` is a directory that all of them see.  Optimizer state is saved as it
    is: none is made.

    Args:
        extra: anything that JSON can hold, such as a scheduler's ``state_dict``.
        keep: how many checkpoints to keep; None: all.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: on every rank, if it failed on one.
        PeerError: a rank is gone.
    """
    job = _prepare(root, model, optimizer, step=step, extra=extra, keep=keep)
    return job.write()


def save_async(
    root: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int,
    extra: dict[str, Any] | None = None,
    keep: int | None = None,
) -> Saving:
    """As ``save``, but returns as soon as the state is copied to host memory.

    Training may go on; wait for the result before the next save.
    """
    job = _prepare(root, model, optimizer, step=step, extra=extra, keep=keep)
    tensors = {name: _host_copy(tensor) for name, tensor in job.contents.tensors.items()}
    return Saving(replace(job, contents=replace(job.contents, tensors=tensors)).write)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()
    return copy.detach()


@dataclass(frozen=True)
class _Job:
    """A checkpoint to be written."""

    root: Path
    contents: Contents
    step: int
    extra: dict[str, Any]
    keep: int | None
    plan: str
    team: Team

    def write(self) -> Path:
        team, temporary = self.team, temporary_path(self.root, self.step)
        try:
            team.lead(lambda: _fresh_directory(temporary))
            team.do(lambda: self._write_tensors(temporary))
            team.lead(lambda: self._write_state(temporary))
            names = team.lead(lambda: sorted(entry.name for entry in temporary.iterdir()))
            mine = names[team.rank :: team.size]
            records = team.collect(lambda: {name: record_file(temporary / name) for name in mine})
            files = {name: record for part in records for name, record in part.items()}
            final: Path = team.lead(lambda: self._commit(temporary, files))
        finally:
            team.close()
        return final

    def _write_tensors(self, temporary: Path) -> None:
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        with _quiet(), _failures_of_ranks():
            state_dict_saver.save(
                dict(self.contents.tensors),
                storage_writer=writer,
                process_group=self.team.group,
                no_dist=self.team.group is None,
            )

    def _write_state(self, temporary: Path) -> None:
        text = written_state(self.extra, self.contents.settings)
        (temporary / STATE).write_text(text, encoding="utf-8")

    def _commit(self, temporary: Path, files: dict[str, FileRecord]) -> Path:
        manifest = Manifest(
            format=FORMAT,
            fxzero_version=__version__,
            torch_version=torch.__version__,
            step=self.step,
            ranks=self.team.size,
            plan=self.plan,
            files=files,
        )
        final = commit(temporary, manifest)
        if self.keep is not None:
            retain(self.root, self.keep)
        return final


def _prepare(
    root: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    step: int,
    extra: dict[str, Any] | None,
    keep: int | None,
) -> _Job:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise UsageError(f"step={step!r} must be a number of steps, at least 0")
    if keep is not None and keep < 1:
        raise UsageError(f"keep={keep!r} must be at least 1")
    written_state(extra or {}, {})  # what is wrong with it is said before anything is written
    tensors = model_tensors(model)
    optimized = Contents({}, {}) if optimizer is None else optimizer_contents(model, optimizer)
    team = Team.of_all(f"saving step {step}")
    # Buffers (running statistics) are each rank's own; those of the first that has them are saved.
    buffers = [f"model.{name}" for name, _ in model.named_buffers()]
    holders = team.collect(lambda: [name for name in buffers if name in tensors])
    for name in buffers:
        if any(name in held for held in holders[: team.rank]):
            tensors.pop(name, None)
    random = {f"rng.{team.rank}.{kind}": state for kind, state in _random_state().items()}
    contents = Contents({**tensors, **optimized.tensors, **random}, optimized.settings)
    plan = _plan_hash(model)
    return _Job(Path(root), contents, step, extra or {}, keep, plan, team)


def _random_state() -> Tensors:
    state = RandomState.now()
    return {"cpu": state.cpu} if state.cuda is None else {"cpu": state.cpu, "cuda": state.cuda}


def _plan_hash(model: nn.Module) -> str:
    state = vars(model).get("_fxzero")
    return state.latest.plan.hash if state is not None and state.latest is not None else ""


def _fresh_directory(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def load(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Loaded:
    """Loads a checkpoint, or the latest of a directory, into a model and its optimizer in place.

    All ranks call it; there may be more or fewer of them than have saved.  Every byte is checked
    before any tensor is touched.

    Raises:
        CheckpointError: on every rank: there is no checkpoint, a file of it is damaged (which is
            named), or it is of another model.
    """
    team = Team.of_all(f"loading {path}")
    try:
        return _load(path, model, optimizer, team)
    finally:
        team.close()


def _load(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, team: Team
) -> Loaded:
    source: Path = team.lead(lambda: resolve(path))
    manifest = team.do(lambda: read_manifest(source))
    names = sorted(manifest.files)[team.rank :: team.size]
    team.do(lambda: check_files(source, manifest, names))
    state = team.do(lambda: read_state(covered(source, manifest, STATE)))
    saved = team.do(lambda: saved_tensors(source, manifest))
    wanted = team.do(lambda: _targets(source, saved, model, optimizer, state))
    mine = {
        name: torch.zeros(shape, dtype=dtype)
        for name, (shape, dtype) in saved.items()
        if name.startswith(f"rng.{team.rank}.")
    }
    team.do(lambda: _read({**wanted, **mine}, source, team))
    if optimizer is not None:
        tensors = {name: t for name, t in wanted.items() if name.startswith("optimizer.")}
        team.do(lambda: _restore_optimizer(source, model, optimizer, state, tensors))
    restored = manifest.ranks == team.size and f"rng.{team.rank}.cpu" in mine
    if restored:
        cuda = mine.get(f"rng.{team.rank}.cuda")
        team.do(lambda: _restore_random(RandomState(mine[f"rng.{team.rank}.cpu"], cuda), source))
    return Loaded(source, manifest.step, state.extra, restored)


def _restore_optimizer(
    source: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    tensors: Tensors,
) -> None:
    with naming(source, CheckpointError):
        restore_optimizer(model, optimizer, state, tensors)


def _restore_random(state: RandomState, source: Path) -> None:
    try:
        state.restore()
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{source} has no state of a random generator: {error}") from None


def _targets(
    source: Path,
    saved: Shapes,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: State,
) -> Tensors:
    """Where each tensor of the checkpoint goes."""
    with naming(source, CheckpointError):
        return _checked_targets(saved, model, optimizer, state)


def _checked_targets(
    saved: Shapes, model: nn.Module, optimizer: torch.optim.Optimizer | None, state: State
) -> Tensors:
    targets = model_tensors(model)
    known = {f"model.{names[0]}" for names, _ in named_tensors(model)}
    _check_names({name for name in saved if name.startswith("model.")}, known)
    for name, tensor in targets.items():
        if saved[name][0] != tuple(tensor.shape):
            raise CheckpointError(
                f"{name.removeprefix('model.')} has shape {list(saved[name][0])} in the "
                f"checkpoint, {list(tensor.shape)} in the model"
            )
    if optimizer is None:
        return targets
    if not state.groups:
        raise CheckpointError("the checkpoint was saved without an optimizer")
    elsewhere = ids_elsewhere(model)
    parameters = {n: p for n, p in model.named_parameters() if id(p) not in elsewhere}
    for name, (shape, dtype) in saved.items():
        if name.startswith("optimizer."):
            parameter = parameters.get(name.removeprefix("optimizer.").rpartition(".")[0])
            if parameter is not None:
                targets[name] = empty_like_saved(shape, dtype, parameter)
    return targets


def _check_names(saved: set[str], known: set[str]) -> None:
    lines = []
    for names, where in (
        (known - saved, "in the model only"),
        (saved - known, "in the checkpoint only"),
    ):
        if names:
            bare = [name.removeprefix("model.") for name in sorted(names)]
            lines.append(f"  {where}: {listed(bare, 5)}")
    if lines:
        raise CheckpointError("\n".join(["the checkpoint is of another model", *lines]))


def _read(tensors: Tensors, source: Path, team: Team) -> None:
    with _quiet(), _failures_of_ranks():
        state_dict_loader.load(
            dict(tensors),
            storage_reader=HuggingFaceStorageReader(str(source)),
            process_group=team.group,
            no_dist=team.group is None,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _failures_of_ranks() -> Iterator[None]:
    """Torch tells every rank what went wrong on some, in an error that is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        rank, (problem, _) = min(error.failures.items(), key=lambda item: item[0])
        text = f"rank {rank} failed: {type(problem).__name__}: {problem}"
        raise CheckpointError(text) from problem
