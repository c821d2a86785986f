"""A configuration file -> the module that it describes and its inputs, on the meta device.

``model_type`` says who builds it:

    "fxzero-unet"    fxzero: the U-Net of a diffusion model (``unet.py``)
    anything else    the class of transformers that the file names, or the first that trains

No weights are read and none are allocated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxzero import unet
from fxzero.configuration_limits import checked_configuration, counted_modules
from fxzero.documents import read_json, shortened
from fxzero.errors import UsageError, described

_DEFAULT_BATCH, _DEFAULT_SEQ = 1, 1024
_MAX_FILE_BYTES = 2**23  # the names of 21,841 labels, there and back, have about 1.5 MiB


def build_configuration(
    path: Path, *, batch: int | None, seq: int | None, dtype: torch.dtype | None
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model of a config.json and keyword arguments for it.

    Args:
        batch, seq: sizes of the inputs; None: 1, and 1024 or what the model can take.
        dtype: of the weights; None: what the configuration names, else float32.

    Raises:
        UsageError: the file is no configuration, or of a model that cannot be built or trained.
    """
    data = _read_config(path)
    if data.get("model_type") == unet.MODEL_TYPE:
        return _unet(path, data, batch or _DEFAULT_BATCH, seq, dtype or torch.float32)
    return _transformer(path, data, batch or _DEFAULT_BATCH, seq, dtype)


def _read_config(path: Path) -> dict[str, Any]:
    data = read_json(path, _MAX_FILE_BYTES, UsageError)
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds no configuration, but a {type(data).__name__}")
    return checked_configuration(data, path)


def _unet(
    path: Path, data: dict[str, Any], batch: int, seq: int | None, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    if seq is not None:
        raise UsageError(f"--seq {seq} has no effect: {unet.MODEL_TYPE} takes images")
    config = unet.UNetConfig.read(data, str(path))
    with torch.device("meta"), counted_modules(path), _building(path):
        return unet.UNet(config).to(dtype), unet.inputs(config, batch, dtype)


# transformers


def _transformer(
    path: Path, data: dict[str, Any], batch: int, seq: int | None, dtype: torch.dtype | None
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    try:
        import transformers
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        raise UsageError(f"{path} needs transformers: {described(error)}") from error
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UsageError(
            f"{path}: model_type {shortened(repr(kind))} is not known to transformers "
            f"{transformers.__version__}"
        )
    if "quantization_config" in data:
        raise UsageError(f"{path}: training of quantized weights cannot be planned")
    with _building(path):
        config = CONFIG_MAPPING[kind].from_dict(data)
        config.use_cache = False
        task, architecture = _choose_architecture(config, path)
        weights = dtype or config.dtype or torch.float32
        with torch.device("meta"), counted_modules(path):
            model = getattr(transformers, architecture)._from_config(config, dtype=weights)
        inputs = _image_inputs if task == "image classification" else _token_inputs
        return model, inputs(config, batch, seq, weights)


@contextlib.contextmanager
def _building(path: Path) -> Iterator[None]:
    """What the classes of others say of a configuration is about its file."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{path}: cannot build the model: {described(error)}") from error


def _choose_architecture(config: Any, path: Path) -> tuple[str, str]:
    """Task and class: the one that the configuration names, else the first task it can train."""
    from transformers.models.auto import modeling_auto

    tasks = {
        "sequence to sequence": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "masked language": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "causal language": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "image classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    able = {
        task: (names,) if isinstance(names, str) else names
        for task, mapping in tasks.items()
        if (names := mapping.get(config.model_type))
        and (task != "sequence to sequence" or config.is_encoder_decoder)
    }
    named = (config.architectures or [None])[0]
    for task, names in able.items():
        if named in names:
            return task, named
    if able and (named is None or named.endswith("Model")):
        task, names = next(iter(able.items()))
        return task, names[0]
    raise UsageError(
        f"{path}: no inputs are known for {named or config.model_type}, which is none of a causal, "
        "masked, sequence to sequence or image classification model\n"
        "  write a factory that returns the model and its inputs: package.module:factory"
    )


def _token_inputs(config: Any, batch: int, seq: int | None, dtype: torch.dtype) -> dict[str, Any]:
    longest = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None)
    if seq is not None and longest is not None and seq > longest and not rotary:
        raise UsageError(f"--seq {seq}: {config.model_type} has {longest} positions")
    seq = seq or min(_DEFAULT_SEQ, longest or _DEFAULT_SEQ)
    return {
        name: torch.zeros(batch, seq, dtype=torch.int64, device="meta")
        for name in ("input_ids", "labels")
    }


def _image_inputs(config: Any, batch: int, seq: int | None, dtype: torch.dtype) -> dict[str, Any]:
    if seq is not None:
        raise UsageError(f"--seq {seq} has no effect: {config.model_type} takes images")
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", 3)
    return {
        "pixel_values": torch.zeros(batch, channels, height, width, dtype=dtype, device="meta"),
        "labels": torch.zeros(batch, dtype=torch.int64, device="meta"),
    }
