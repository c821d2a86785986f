"""A directory of checkpoints: what is in it is whole.

    runs/a/step-100/           committed: complete, synced, every file in its manifest
           step-110.tmp/       being written, or left by a process that died: nobody reads it
           step-100/manifest.json, state.json, shard-00001-model-00001-of-00001.safetensors, ...

A checkpoint is written under its temporary name and renamed when every byte of it is on disk; one
that is deleted is renamed first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fxzero.documents import beside, naming, read_json
from fxzero.errors import CheckpointError
from fxzero.typed_data import read_value

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_TEMPORARY = ".tmp"
_STEP = re.compile(r"step-(\d{1,18})")
_MAX_MANIFEST_BYTES = 2**24  # room for 100,000 files: each rank writes one or two


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its length in bytes and its SHA-256 in hexadecimal digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        format: version of this document.
        step: the training step it was saved at.
        ranks: how many processes wrote it.
        plan: hash of the plan in force, "" without one.
        files: every file but the manifest, by name.
    """

    format: int
    fxzero_version: str
    torch_version: str
    step: int
    ranks: int
    plan: str
    files: dict[str, FileRecord]


def temporary_path(root: Path, step: int) -> Path:
    """Where a checkpoint is written."""
    return root / f"step-{step}{_TEMPORARY}"


def record_file(path: Path) -> FileRecord:
    """Length and checksum of a file, after it has been synced to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileRecord(path.stat().st_size, _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit(temporary: Path, manifest: Manifest) -> Path:
    """Makes a written checkpoint one that is loaded; returns its path."""
    final = temporary.with_name(temporary.name.removesuffix(_TEMPORARY))
    text = json.dumps(dataclasses.asdict(manifest), sort_keys=True, indent=1)
    with (temporary / MANIFEST).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(temporary)
    if final.exists():
        discard(final)
    temporary.rename(final)
    _sync(final.parent)
    return final


def discard(path: Path) -> None:
    """Deletes a checkpoint; one that is half deleted is not taken for a whole one."""
    if path.is_symlink():
        return path.unlink()
    gone = path if path.name.endswith(_TEMPORARY) else path.with_name(path.name + ".old.tmp")
    if gone != path:
        if gone.exists():
            shutil.rmtree(gone)
        path.rename(gone)
    shutil.rmtree(gone)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint, with files of the right lengths.

    Raises:
        CheckpointError: it is missing or damaged, or a file is missing or has another length.
    """
    source = beside(path / MANIFEST, MANIFEST, CheckpointError)
    data = read_json(source, _MAX_MANIFEST_BYTES, CheckpointError)
    with naming(source, CheckpointError):
        manifest: Manifest = read_value(Manifest, data, "manifest")
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.format}, this fxzero reads {FORMAT}\n"
            f"  it was written by fxzero {manifest.fxzero_version}"
        )
    for name, record in manifest.files.items():
        _check_length(path, name, record)
    return manifest


def covered(path: Path, manifest: Manifest, name: str) -> Path:
    """A file of a checkpoint; raises CheckpointError if the manifest does not know its bytes."""
    if name not in manifest.files:
        raise CheckpointError(f"{path / name} is not in {path / MANIFEST}")
    return beside(path / MANIFEST, name, CheckpointError)


def _check_length(path: Path, name: str, record: FileRecord) -> None:
    size = beside(path / MANIFEST, name, CheckpointError).stat().st_size
    if size != record.bytes:
        raise CheckpointError(f"{path / name} has {size} bytes, its manifest says {record.bytes}")


def check_files(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Raises CheckpointError if a file is not what the manifest says, to the byte."""
    for name in names:
        record = manifest.files[name]
        _check_length(path, name, record)
        found = _sha256(path / name)
        if found != record.sha256:
            raise CheckpointError(
                f"{path / name} is damaged: SHA-256 {found[:16]}..., its manifest says "
                f"{record.sha256[:16]}...\n  load an older checkpoint, or copy this file anew"
            )


def verify(path: str | Path) -> Manifest:
    """Reads every byte of a checkpoint and compares it with its manifest.

    Args:
        path: a checkpoint, or a directory of them, of which the latest is checked.

    Raises:
        CheckpointError: names the file that is missing or damaged.
    """
    path = resolve(path)
    manifest = read_manifest(path)
    check_files(path, manifest, manifest.files)
    return manifest


def checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, path) of all committed checkpoints, oldest first."""
    try:
        entries = list(root.iterdir())
    except OSError:
        return []
    found = [(_STEP.fullmatch(entry.name), entry) for entry in entries]
    return sorted((int(match[1]), entry) for match, entry in found if match)


def latest(root: str | Path) -> Path | None:
    """The newest checkpoint in a directory whose files are all there; None if there is none."""
    for _, path in reversed(checkpoints(Path(root))):
        try:
            read_manifest(path)
        except CheckpointError:
            continue
        return path
    return None


def resolve(path: str | Path) -> Path:
    """A checkpoint itself, or the latest in a directory of them.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).exists() or _STEP.fullmatch(path.name):
        return path
    if (found := latest(path)) is None:
        raise CheckpointError(
            f"no checkpoint in {path}\n  one is a directory step-N with {MANIFEST}"
        )
    return found


def rollback(root: str | Path, step: int) -> Path:
    """Deletes all checkpoints after ``step``; returns that of ``step``.

    On many ranks one of them does it, before any loads.

    Raises:
        CheckpointError: there is no whole checkpoint of that step; nothing is deleted.
    """
    known = dict(checkpoints(Path(root)))
    if step not in known:
        steps = ", ".join(map(str, known)) or "none"
        raise CheckpointError(f"no checkpoint of step {step} in {root}\n  there are: {steps}")
    verify(known[step])
    for other, path in known.items():
        if other > step:
            discard(path)
    return known[step]


def retain(root: Path, keep: int) -> None:
    """Deletes all but the ``keep`` newest checkpoints."""
    for _, path in checkpoints(root)[:-keep]:
        discard(path)
