"""Weights for others, and from others: safetensors files with the model's own names.

    export/model.safetensors                       one file, or
    export/model-00001-of-00003.safetensors, ...   several
    export/model.safetensors.index.json            and which holds what

That is what Hugging Face's ``from_pretrained`` reads and ``save_pretrained`` writes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from fxzero.checkpoint.contents import Tensors, named_tensors
from fxzero.checkpoint.team import Team
from fxzero.checkpoint.tensor_files import opened
from fxzero.documents import beside, naming, read_json
from fxzero.errors import CheckpointError, UsageError
from fxzero.sharding import ids_elsewhere, padded_rows
from fxzero.typed_data import read_value

_ONE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FILE_BYTES = 5 * 10**9
# That of DeepSeek-V3, with 91,000 tensors, has 9 MB.
_MAX_INDEX_BYTES = 2**26


def export_safetensors(
    model: nn.Module, directory: str | Path, *, file_bytes: int = _FILE_BYTES
) -> Path:
    """Writes the model's whole weights, tied ones once; all ranks call it.

    One tensor at a time is made whole, and the first rank holds one file's worth of them.

    Args:
        file_bytes: how large a file may become.

    Returns:
        The directory.

    Raises:
        UsageError: the model's stages are on several ranks.
    """
    _check_whole(model)
    directory, team = Path(directory), Team.of_all(f"writing {directory}")
    try:
        team.lead(lambda: directory.mkdir(parents=True, exist_ok=True))
        tensors = {names[0]: tensor for names, tensor in named_tensors(model)}
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        groups = _grouped(sizes, file_bytes)
        files = {}
        for number, names in enumerate(groups, start=1):
            whole = {name: _whole(tensors[name]) for name in names}
            several = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            file = several if len(groups) > 1 else _ONE
            team.lead(functools.partial(_write, directory / file, whole))
            files.update(dict.fromkeys(names, file))
        if len(groups) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
            text = json.dumps(index, indent=2)
            team.lead(
                lambda: _replace(directory / _INDEX, lambda partial: partial.write_text(text))
            )
    finally:
        team.close()
    return directory


def _check_whole(model: nn.Module) -> None:
    if ids_elsewhere(model):
        raise UsageError(
            "the stages of this model are on several ranks, and files of weights are of whole ones"
            "\n  save a fxzero checkpoint: it loads without a pipeline, and such a model is whole"
        )


def load_safetensors(model: nn.Module, directory: str | Path) -> None:
    """Loads weights by their names into a model in place, each rank the rows that it keeps.

    A file's path may be given instead of a directory.  Names of tied weights may be missing but for
    one of them.

    Raises:
        CheckpointError: a file cannot be read, a weight is missing or has another shape; on every
            rank.
    """
    team = Team.of_all(f"reading {directory}")
    try:
        team.do(lambda: _load(model, Path(directory)))
    finally:
        team.close()


def _grouped(sizes: dict[str, int], limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def _write(path: Path, tensors: Tensors) -> None:
    _replace(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Puts what ``write`` writes in a file's place, which is the old or the new one, never half."""
    partial = path.with_name(path.name + ".tmp")
    write(partial)
    partial.replace(path)


@torch.no_grad()
def _load(model: nn.Module, source: Path) -> None:
    where, elsewhere = _places(source), ids_elsewhere(model)
    for names, tensor in named_tensors(model):
        if id(tensor) in elsewhere:
            continue
        found = next((name for name in names if name in where), None)
        if found is None:
            raise CheckpointError(f"{source} has no weight called {' or '.join(names)}")
        _copy(tensor, where[found], found)


def _places(source: Path) -> dict[str, Path]:
    """The file of each weight."""
    if source.is_file():
        return dict.fromkeys(_names(source), source)
    if (source / _ONE).exists():
        one = beside(source / _INDEX, _ONE, CheckpointError, links=True)
        return dict.fromkeys(_names(one), one)
    index = source / _INDEX
    if not index.exists():
        raise CheckpointError(f"{source} has neither {_ONE} nor {_INDEX}")
    data = read_json(index, _MAX_INDEX_BYTES, CheckpointError)
    with naming(index, CheckpointError):
        parts = read_value(dict[str, object], data, "index")
        files = read_value(dict[str, str], parts.get("weight_map"), "weight_map")
    known = {name: beside(index, name, CheckpointError, links=True) for name in files.values()}
    return {name: known[file] for name, file in files.items()}


def _names(path: Path) -> list[str]:
    with opened(path) as file:
        return list(file.keys())


def _copy(target: torch.Tensor, path: Path, name: str) -> None:
    with opened(path) as file:
        saved = file.get_slice(name)
        shape = list(saved.get_shape())
        if shape != list(target.shape):
            raise CheckpointError(
                f"{name} has shape {shape} in {path}, {list(target.shape)} in the model"
            )
        if not isinstance(target, DTensor):
            target.copy_(file.get_tensor(name))
            return
        local = target.to_local()
        start = _first_row(target)
        if local.ndim == 0:
            local.copy_(file.get_tensor(name))
        elif local.numel():
            local.copy_(saved[start : start + local.shape[0]])


def _first_row(target: DTensor) -> int:
    """Where this rank's rows begin in the whole tensor."""
    for dimension, placement in enumerate(target.placements):
        if placement.is_shard(0):
            parts = target.device_mesh.size(dimension)
            return padded_rows(target.shape[0], parts) * target.device_mesh.get_local_rank(
                dimension
            )
    return 0
