"""Gives damaged files to every loader: ``make fuzz``.

The law: a loader returns, or raises an error of fxzero that names the file, within its time and
within 2 GiB; it reads and writes nothing outside of its folder, and runs nothing.  A line of the
table is a loader; what breaks the law is printed with the seed that makes it again:

    make fuzz FUZZ_ARGS="--loader plan --seed 123 --each 1"
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from guard import Guard, Hang, limit_memory
from loaders import LOADERS, Files, Loader, random_text, sign
from mutations import changed_file, damage_folder

from fxzero.errors import FxzeroError

_MORE_MEMORY = 2 * 2**30
_SHOWN = 40
_PLANTED = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef run(): pass\n"


@dataclass
class Result:
    """What a loader made of its inputs."""

    inputs: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


def prepare(root: Path) -> tuple[Path, Path]:
    """A folder for inputs, and one beside it that nobody may read; a module that nobody may run."""
    secrets, folder = root / "secrets", root / "work"
    secrets.mkdir()
    folder.mkdir()
    (secrets / "secret.json").write_text("{}")
    (root / "secret.json").write_text("{}")
    (secrets / "secret.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    (root / "planted.py").write_text(_PLANTED)
    sys.path.append(str(root))
    return folder, secrets


def write_input(random: Random, loader: Loader, files: Files, folder: Path, secrets: Path) -> None:
    """Writes valid files, one or two of which are damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = random.sample(sorted(files), min(len(files), random.choice((1, 1, 1, 2))))
    for name, content in files.items():
        if name in names:
            hostile = str(secrets / "secret.json").encode()
            content = changed_file(random, name, content).replace(b"SECRETS", hostile[:-12])
            content = content.replace(b"SECRET", hostile)
            if random.random() < 0.02:
                content = random_text(random)
        (folder / name).write_bytes(content)
    if loader.signs and random.random() < 0.85:
        sign(folder)
    if loader.folders and random.random() < 0.08:
        damage_folder(random, folder, secrets)


def run(loader: Loader, seeds: range, root: Path, guard: Guard) -> Result:
    """Gives a loader an input for each seed."""
    folder, secrets = root / "work", root / "secrets"
    valid = loader.valid()
    result = Result()
    for files in valid:  # what it accepts, it accepts; what is imported late is imported here
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        loader.load(folder, False)
        with contextlib.suppress(FxzeroError):
            loader.load(folder, True)
    for seed in seeds:
        random = Random(f"{loader.name} {seed}")
        write_input(random, loader, random.choice(valid), folder, secrets)
        further = random.random() < loader.further
        reads = tuple(root / name for name in loader.reads)
        guard.start(folder, loader.seconds, reads)
        failure = _one(loader, folder, further, guard, result)
        if (root / "ran").exists():
            failure = "the planted module ran"
            (root / "ran").unlink()
        if failure:
            result.failures.append(f"{loader.name}, seed {seed}: {failure}")
    return result


def _one(loader: Loader, folder: Path, further: bool, guard: Guard, result: Result) -> str:
    failure, start = "", time.process_time()
    result.inputs += 1
    try:
        loader.load(folder, further)
        outcome = ""
    except FxzeroError as error:
        outcome = error.code
        text = str(error)
        if loader.names_file and str(folder) not in text:
            failure = f"the error names no file: {text:.300}"
    except Hang:
        outcome, failure = "hang", "no end"
    except BaseException as error:
        outcome = type(error).__name__
        lines = traceback.extract_tb(error.__traceback__)[-6:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(lines))
        failure = f"{outcome}: {error!s:.200} at {where}"
    finally:
        violations = guard.stop()
    seconds = time.process_time() - start  # others may use the machine; who waits is stopped
    result.slowest = max(result.slowest, seconds)
    if outcome:
        result.refused[outcome] += 1
    else:
        result.accepted += 1
    if violations:
        failure = f"{violations[0]}; {failure}"
    if seconds > loader.seconds:
        failure = f"took {seconds:.1f} s, at most {loader.seconds:g}; {failure}"
    return failure


def quiet() -> None:
    """No warnings and no advice, of which there would be 100,000."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
    torch.set_num_threads(1)


_HEAD = f"{'loader':<22}{'inputs':>8}{'accepted':>10}{'slowest ms':>12}  refused"


def row(name: str, result: Result) -> str:
    """A line of the table."""
    refused = ", ".join(f"{code} {count}" for code, count in sorted(result.refused.items()))
    figures = f"{result.inputs:>8}{result.accepted:>10}{1e3 * result.slowest:>12.0f}"
    return f"{name:<22}{figures}  {refused}"


def main() -> int:
    names = [loader.name for loader in LOADERS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all loaders together")
    parser.add_argument("--each", type=int, help="of each loader, instead")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--loader", choices=names, action="append", help="only this one, or these")
    given = parser.parse_args()
    quiet()
    shares = sum(loader.share for loader in LOADERS)
    total = broken = 0
    with tempfile.TemporaryDirectory() as made:
        root = Path(made).resolve()
        prepare(root)
        limit_memory(_MORE_MEMORY)
        guard = Guard()
        print(_HEAD, flush=True)
        for loader in LOADERS:
            if given.loader and loader.name not in given.loader:
                continue
            count = given.each or given.inputs * loader.share // shares
            found = run(loader, range(given.seed, given.seed + count), root, guard)
            for failure in found.failures[:_SHOWN]:
                print(failure, file=sys.stderr)
            print(row(loader.name, found), flush=True)
            total, broken = total + count, broken + len(found.failures)
    print(f"{total} inputs, {broken} broke the law")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
