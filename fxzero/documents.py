"""Files that may come from strangers: read as data of bounded size, or refused.

Every loader of JSON or TOML reads through here, and the errors are of its own kind and name the
file.  What is read is

    a regular file      a pipe or a device would be waited for without end
    of a bounded size   what the loader says its largest document can have
    in UTF-8            whatever the locale
    nested up to 64 times
    with numbers that are finite and have up to 100 digits, and with every key once

A name that a document gives of a file is that of a file beside it (``beside``): never a path, and
never a link to somewhere else.
"""

from __future__ import annotations

import contextlib
import json
import math
import stat
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxzero.errors import FxzeroError

# Python code that walks a document calls itself for each level, and Python allows 1,000 calls.
# The deepest of our own, a graph whose node has nested arguments, has about 12 levels.
MAX_DEPTH = 64
# A generator of random numbers may have a state of 256 bits, which are 78 digits; Python refuses to
# print numbers of more than 4,300, and so could not say what is wrong with them.
MAX_DIGITS = 100
# tomllib takes the square of the parts of a dotted key: 30,000 in a file of 64 KiB take minutes.
MAX_DOTS = 64

_LARGEST = 10**MAX_DIGITS


def read_text(path: Path, limit: int, error: type[FxzeroError]) -> str:
    """The text of a file of at most ``limit`` bytes.

    Raises:
        error: there is no such file, or none that is read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"cannot read {path}: not a file")
        with path.open("rb") as file:
            content = file.read(limit + 1) if status.st_size <= limit else None
    except (OSError, ValueError) as failure:  # ValueError: no file can have this name
        if isinstance(failure, error):
            raise
        raise error(f"cannot read {path}: {reason(failure)}") from None
    if content is None or len(content) > limit:
        size = max(status.st_size, limit + 1)
        raise error(f"{path} has {size} bytes, more than the {limit} that are read")
    try:
        return content.decode()
    except UnicodeDecodeError as failure:
        raise error(f"{path} is not UTF-8: {failure}") from None


def read_json(path: Path, limit: int, error: type[FxzeroError], *, finite: bool = True) -> Any:
    """The JSON document in a file of at most ``limit`` bytes.

    Raises:
        error: as ``read_text`` and ``parse_json``.
    """
    return parse_json(read_text(path, limit, error), str(path), error, finite=finite)


def parse_json(text: str, where: str, error: type[FxzeroError], *, finite: bool = True) -> Any:
    """A JSON document.

    Args:
        where: begins the error's text.
        finite: whether "NaN" and "Infinity", which Python writes, are refused.

    Raises:
        error: the text is no JSON, or exceeds a limit.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as failure:
        raise error(f"{where} is not JSON: {shortened(str(failure))}") from None
    _check(value, where, error, finite=finite)
    return value


def format_json(value: Any, indent: int | None = None) -> str:
    """Data as JSON; numbers that JSON has not are the strings "nan", "inf" and "-inf"."""
    return json.dumps(_speakable(value), indent=indent, allow_nan=False)


def parse_toml(text: str, where: str, error: type[FxzeroError]) -> dict[str, Any]:
    """A TOML document; what says which limits it exceeds is left to whoever knows its keys.

    Raises:
        error: the text is no TOML, or exceeds a limit.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if (dots := line.count(".")) > MAX_DOTS:
            raise error(f"{where}: line {number} has {dots} dots, more than {MAX_DOTS}")
    try:
        value = tomllib.loads(text)
    except (ValueError, RecursionError) as failure:
        raise error(f"{where} is not TOML: {shortened(str(failure))}") from None
    _check(value, where, error, finite=False)
    return value


def beside(source: Path, name: str, error: type[FxzeroError], *, links: bool = False) -> Path:
    """The path of the file that the document ``source`` calls ``name``.

    Args:
        links: whether it may be a link, as in Hugging Face's cache, where every file is one.

    Raises:
        error: the name is a path, or that of no regular file.
    """
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise error(f"{source} names a file outside its directory: {name!r}")
    path = source.with_name(name)
    try:
        mode = (path.stat() if links else path.lstat()).st_mode
    except (OSError, ValueError) as failure:
        raise error(f"{_shown(path)} is missing: {reason(failure)}") from None
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "no file"
        raise error(f"{_shown(path)} is {kind}\n  only what lies in {source.parent} itself is read")
    return path


@contextlib.contextmanager
def naming(path: Path, error: type[FxzeroError]) -> Iterator[None]:
    """Errors of what a file holds become ``error``, with the file's path before the text."""
    try:
        yield
    except FxzeroError as found:
        raise error(f"{path}: {found.text}") from None


def shortened(text: str) -> str:
    """At most 80 characters of a text that a stranger wrote."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def reason(error: Exception) -> str:
    """What an error of the operating system says, without its number."""
    return getattr(error, "strerror", None) or str(error)


def _speakable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _speakable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_speakable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


def _check(value: Any, where: str, error: type[FxzeroError], *, finite: bool) -> None:
    """Refuses what is nested too deeply, and numbers that nothing can be done with."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise error(f"{where} is nested more than {MAX_DEPTH} times")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif type(item) is int and abs(item) >= _LARGEST:
                raise error(f"{where} has a number of more than {MAX_DIGITS} digits")
            elif finite and type(item) is float and not math.isfinite(item):
                raise error(f"{where} has a number that is {item}")
        level, depth = inner, depth + 1


def _shown(path: Path) -> str:
    """A path in an error, whatever characters a stranger gave it."""
    return str(path).encode("ascii", "backslashreplace").decode()
