"""What the safetensors files of a checkpoint say they hold, checked before torch reads them.

    shard-00001-....safetensors    "model.up.weight": 3 rows from row 0
    shard-00002-....safetensors    "model.up.weight": 2 rows from row 3    ->    5 rows

Every file must be in the manifest, whose checksums cover all bytes.  safetensors itself checks that
tensors lie in their file; here it is checked that parts make up a whole, so that nothing larger
than the files is allocated for what they say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fxzero.checkpoint.directories import Manifest, covered
from fxzero.checkpoint.tensor_files import opened
from fxzero.documents import naming, parse_json, shortened
from fxzero.errors import CheckpointError
from fxzero.typed_data import read_value

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
_SUFFIX = ".safetensors"
# Where torch.distributed.checkpoint writes at which offsets parts begin.
_OFFSETS = "DCP_SHARDING_INFO"
# By the format's names.
_DTYPES = {
    "BOOL": torch.bool,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class Part:
    """A part of a tensor: where it begins in the whole one, and its shape."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Saved:
    """What torch writes of a part."""

    saved_offsets: tuple[int, ...]


def saved_tensors(source: Path, manifest: Manifest) -> Shapes:
    """Shape and dtype of every whole tensor in a checkpoint, by name.

    Raises:
        CheckpointError: names a file that is not in the manifest or is no safetensors file, or a
            tensor whose parts make no whole.
    """
    parts: dict[str, list[Part]] = {}
    for path in sorted(source.glob(f"*{_SUFFIX}")):
        for name, part in _parts(covered(source, manifest, path.name)).items():
            parts.setdefault(name, []).append(part)
    with naming(source, CheckpointError):
        return {name: _whole(name, found) for name, found in parts.items()}


def _parts(path: Path) -> dict[str, Part]:
    with opened(path) as file:
        text = (file.metadata() or {}).get(_OFFSETS)
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        found = {name: (each.get_shape(), each.get_dtype()) for name, each in slices.items()}
    offsets = None
    if text:
        data = parse_json(text, f"{path}: its metadata", CheckpointError)
        with naming(path, CheckpointError):
            offsets = read_value(dict[str, _Saved], data, "metadata")
    with naming(path, CheckpointError):
        return {name: _part(name, *known, offsets) for name, known in found.items()}


def _part(name: str, shape: Sequence[int], kind: str, offsets: Mapping[str, _Saved] | None) -> Part:
    shown = shortened(repr(name))
    if kind not in _DTYPES:
        raise CheckpointError(f"{shown} has dtype {kind}, none of {', '.join(_DTYPES)}")
    if offsets is not None and name not in offsets:
        raise CheckpointError(f"the metadata does not say where {shown} begins")
    begins = (0,) * len(shape) if offsets is None else offsets[name].saved_offsets
    if len(begins) != len(shape) or min(begins, default=0) < 0:
        raise CheckpointError(f"{shown} of shape {list(shape)} begins at {[*begins]!r:.80}")
    return Part(begins, tuple(shape), _DTYPES[kind])


def _whole(name: str, parts: list[Part]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a tensor; its parts have as many elements, each part its own place."""
    first, dimensions = parts[0], range(len(parts[0].shape))
    if any(len(part.shape) != len(dimensions) or part.dtype != first.dtype for part in parts):
        raise CheckpointError(f"{shortened(name)} has parts of different dtypes or dimensions")
    shape = tuple(max(part.offsets[d] + part.shape[d] for part in parts) for d in dimensions)
    filled = [part for part in parts if 0 not in part.shape]
    held = sum(math.prod(part.shape) for part in filled)
    if held != math.prod(shape) or len({part.offsets for part in filled}) != len(filled):
        raise CheckpointError(
            f"{shortened(name)} of shape {[*shape]!r:.80} has {len(filled)} parts with {held} "
            f"elements, not {math.prod(shape)}"
        )
    return shape, first.dtype
