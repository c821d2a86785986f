"""Safetensors files, whatever is in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fxzero.errors import CheckpointError, described


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        CheckpointError: names the file, whatever safetensors or torch say of what is in it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot read {path}: {described(error)}") from None
