"""A plain loop over Accelerate's data, optimizer and scheduler, and a model of fxzero.

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = compile_for(accelerator, model, memory_budget="6GiB")
    optimizer = torch.optim.AdamW(model.parameters())         # after the model is sharded
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                fxzero.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()

``prepare`` leaves a model alone that it takes for one it has prepared before, so it neither copies
it into DistributedDataParallel nor wraps it in autocast; ``accumulate`` uses the model's own
``no_sync``.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

import fxzero
from fxzero.errors import UsageError
from fxzero.integrations.refusals import PRECISION

_OWN_LOOPS = {
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.FSDP: "FSDP",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}


def compile_for(
    accelerator: Accelerator, model: nn.Module, example_inputs: Any = None, **options: Any
) -> Any:
    """``fxzero.compile`` for a loop of Accelerate: on its device, over its processes.

    Args:
        accelerator: the one whose ``prepare`` will be given the model, or only optimizer and data.
        options: those of ``fxzero.compile``.

    Returns:
        The model.  Make the optimizer with its parameters, which on many ranks are new ones.

    Raises:
        UsageError: the accelerator has settings by which it would change how the model computes.
    """
    check_accelerator(accelerator)
    if accelerator.device_placement:
        model.to(accelerator.device)
    compiled = fxzero.compile(model, example_inputs, **options)
    compiled._is_accelerate_prepared = True
    if accelerator.num_processes > 1:
        accelerator.register_save_state_pre_hook(_refuse_to_save)
    return compiled


def check_accelerator(accelerator: Accelerator) -> None:
    """Raises UsageError for settings by which a model would be wrapped or computed otherwise."""
    started = dist.get_world_size() if dist.is_initialized() else int(os.getenv("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UsageError(
            f"{started} processes were started, and the accelerator has {accelerator.num_processes}"
            "\n  without CUDA devices it connects them with Accelerator(cpu=True), or "
            "TrainingArguments(use_cpu=True)"
        )
    if accelerator.mixed_precision != "no":
        raise UsageError(
            f"mixed_precision={accelerator.mixed_precision!r} wraps the model in Accelerate's "
            f"autocast, and plans count other dtypes\n  leave it out, and give {PRECISION}"
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        backend = accelerator.state.dynamo_plugin.backend.value.lower()
        raise UsageError(
            f"dynamo_backend={backend!r} wraps the model in torch.compile, and fxzero generates "
            'code itself\n  leave it out, and give inner="inductor" or inner="eager"'
        )
    if accelerator.distributed_type in _OWN_LOOPS:
        raise UsageError(
            f"{_OWN_LOOPS[accelerator.distributed_type]} shards the model itself\n"
            "  leave it out of the accelerator's configuration, and give zero=1, 2 or 3"
        )
    if accelerator.parallelism_config is not None:
        raise UsageError(
            "parallelism_config spreads the model over ranks itself\n"
            "  leave it out, and give mesh= and zero="
        )


def _refuse_to_save(models: Any, weights: Any, directory: str) -> None:
    raise UsageError(
        "accelerator.save_state writes the first rank's shards alone, as a pickle\n"
        "  fxzero.checkpoint.save(directory, model, optimizer, step=...) writes all of them"
    )
