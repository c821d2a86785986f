"""What fxzero finds on this machine, as text: versions, devices, compilers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator

from fxzero import __version__
from fxzero.units import format_bytes

_OLDEST, _NEWEST = (2, 11), (2, 13)
_LIBRARIES = ("triton", "transformers", "networkx", "scipy", "safetensors")


def describe_environment() -> str:
    """One fact a line, torch's support status among them."""
    return "\n".join(f"{name:<14} {fact}" for name, fact in _facts())


def _facts() -> Iterator[tuple[str, str]]:
    import torch

    yield "fxzero", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, {_support(torch.__version__)}"
    for library in _LIBRARIES:
        yield library, _version(library)
    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads{_host_memory()}"
    if not torch.cuda.is_available():
        yield "cuda", "no device"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield f"cuda:{index}", f"{name}, {format_bytes(free)} free of {format_bytes(total)}"
    compiler = _compiler()
    yield "c++ compiler", compiler or "none"
    if compiler:
        yield "inner", "inductor (default where a compiler is present)"
    else:
        yield "inner", "eager (inductor needs a compiler: install g++ or set CXX)"


def _support(version: str) -> str:
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    supported = ".".join(map(str, _OLDEST)) + " to " + ".".join(map(str, _NEWEST))
    word = "supported" if _OLDEST <= release <= _NEWEST else "NOT supported"
    return f"{word} ({supported})"


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _host_memory() -> str:
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not every platform tells
        return ""
    return f", {format_bytes(size)}"


def _compiler() -> str | None:
    """Where Inductor's C++ compiler is."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), None)
