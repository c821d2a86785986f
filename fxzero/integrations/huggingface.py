"""Hugging Face's Trainer over a model of fxzero: its loop, its arguments, its logs and callbacks.

    trainer = Trainer(
        model=model, args=TrainingArguments("runs/a"), train_dataset=data, memory_budget="6GiB"
    )
    trainer.train()

The model is compiled when the trainer is made, before the Trainer makes its optimizer.  A
checkpoint has the weights as ``from_pretrained`` reads them, the training state as
``fxzero.checkpoint`` writes it, which loads on any number of ranks, and the Trainer's own state:

    checkpoint-100/model.safetensors, config.json     the model's own names
    checkpoint-100/fxzero/step-100/...                weights, optimizer, torch's random generators
    checkpoint-100/random-0.json                      Python's and NumPy's, one file a rank
    checkpoint-100/trainer_state.json
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.tensor import DTensor

from fxzero import checkpoint
from fxzero.checkpoint.contents import named_tensors
from fxzero.clipping import clip_grad_norm_, gradient_norm
from fxzero.compiler import CompiledModule
from fxzero.documents import naming, read_json
from fxzero.errors import CheckpointError, UsageError
from fxzero.integrations.accelerate import check_accelerator, compile_for
from fxzero.integrations.naming import name_optimizer
from fxzero.integrations.refusals import PRECISION, check_options
from fxzero.optim.base import Optimizer
from fxzero.optim.whole import WholeOptimizer
from fxzero.randomness import RandomState

_OPTIONS = (
    "memory_budget", "optimizer", "mesh", "zero", "recompute", "objective", "offload", "precision",
    "inner", "plan", "strict",
)  # fmt: skip
_REFUSED = {
    "bf16": ("computes in autocast", PRECISION),
    "fp16": ("computes in autocast and scales the loss", PRECISION),
    "bf16_full_eval": ("turns the weights into bfloat16 to evaluate", PRECISION),
    "fp16_full_eval": ("turns the weights into float16 to evaluate", PRECISION),
    "torch_compile": ("wraps the model in torch.compile", 'inner="inductor" or inner="eager"'),
    "fsdp": ("shards the model itself", "zero=1, 2 or 3"),
    "deepspeed": ("shards the model itself", "zero=1, 2 or 3"),
    "parallelism_config": ("spreads the model over ranks itself", "mesh= and zero="),
}
_STATE = "fxzero"
_MAX_RANDOM_BYTES = 2**16


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` whose steps are planned, and whose model ``zero`` may shard.

    Takes what ``transformers.Trainer`` takes and, by keyword, these of ``fxzero.compile``:
    memory_budget, optimizer (by default what ``args.optim`` says), mesh, zero, recompute,
    objective, offload, precision, inner, plan, strict.  A model that is already compiled is taken
    as it is.

    Raises:
        UsageError: ``args`` ask for what the Trainer would do to the model by itself, or an option
            that only ``model.step`` serves.
    """

    def __init__(self, model: nn.Module | None = None, args: Any = None, **given: Any) -> None:
        options = {name: given.pop(name) for name in _OPTIONS if name in given}
        check_options(given, "the Trainer")
        if given.get("model_init") is not None:
            raise UsageError("model_init= makes a model for each training\n  give model=")
        if isinstance(model, CompiledModule) and options:
            raise UsageError(f"the model is already compiled\n  leave {', '.join(options)} out")
        super().__init__(model, args, **given)
        options.setdefault("optimizer", self._planned_optimizer())
        if isinstance(model, CompiledModule):
            self.model._is_accelerate_prepared = True
        else:
            compile_for(self.accelerator, self.model, **options)
        self._check_optimizer()
        self._resumed: RandomState | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Refuses what the arguments would do to the model, before any of it is done."""
        for name, (does, instead) in _REFUSED.items():
            if getattr(self.args, name, None):
                raise UsageError(
                    f"TrainingArguments({name}={getattr(self.args, name)!r}) {does}\n"
                    f"  leave it out, and give the Trainer {instead}"
                )
        if self.args.n_gpu > 1:
            raise UsageError(
                f"the Trainer would copy the model to {self.args.n_gpu} devices for each step\n"
                f"  start a process for each: torchrun --nproc_per_node {self.args.n_gpu} ..."
            )
        super().create_accelerator_and_postprocess()
        check_accelerator(self.accelerator)

    def _planned_optimizer(self) -> object:
        """What ``create_optimizer`` will make, as ``fxzero.compile`` is told."""
        if self.optimizer is not None:
            kind, settings = type(self.optimizer), self.optimizer.defaults
        else:
            kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.model
            )
        if issubclass(kind, (Optimizer, WholeOptimizer)):
            return functools.partial(kind, **settings)
        if kind is torch.optim.SGD and settings.get("momentum"):
            return "sgd-momentum"
        return kind

    def _check_optimizer(self) -> None:
        if self.optimizer is None:
            return
        own = {id(p) for p in self.model.parameters()}
        if any(id(p) not in own for group in self.optimizer.param_groups for p in group["params"]):
            raise UsageError(
                "optimizers= holds parameters from before the model was sharded\n"
                "  give optimizer_cls_and_kwargs=, or TrainingArguments(optim=...)"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As transformers'; one of fxzero is told which states the plan has in host memory."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        name_optimizer(self.model, optimizer)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return clip_grad_norm_(self.model, self.args.max_grad_norm)

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: torch.Tensor | None = None
    ) -> torch.Tensor:
        return gradient_norm(self.model) if grad_norm is None else grad_norm

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is None and self.accelerator.num_processes > 1:
            state_dict = _whole_state(self.model)
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoint.save(
            Path(output_dir, _STATE),
            self.model,
            _unwrapped(self.optimizer),
            step=self.state.global_step,
            extra={"scheduler": self.lr_scheduler.state_dict()},
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights are loaded with the optimizer, once there is one."""
        if not Path(resume_from_checkpoint, _STATE).is_dir():
            raise CheckpointError(
                f"{resume_from_checkpoint} has no training state of fxzero\n  it was saved by "
                "another Trainer, or with save_only_model=True: load its weights, and begin anew"
            )

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is None:
            return
        state = Path(checkpoint_dir, _STATE)
        loaded = checkpoint.load(state, self.model, _unwrapped(self.optimizer))
        self.lr_scheduler.load_state_dict(loaded.extra["scheduler"])
        self._resumed = RandomState.now() if loaded.random_state else None

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        before = RandomState.now()
        if Path(best, _STATE).is_dir():
            checkpoint.load(best / _STATE, self.model)
        else:
            checkpoint.load_safetensors(self.model, best)
        before.restore()

    def _save_rng_state(self, output_dir: str) -> None:
        drawn: Any = numpy.random.get_state()
        name, numbers, *rest = drawn
        state = {"python": random.getstate(), "numpy": [name, numbers.tolist(), *rest]}
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self._random_file(output_dir).write_text(json.dumps(state), encoding="utf-8")

    def _load_rng_state(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is None or self._resumed is None:
            return
        self._resumed.restore()
        path = self._random_file(checkpoint_dir)
        state = read_json(path, _MAX_RANDOM_BYTES, CheckpointError)
        with naming(path, CheckpointError):
            _restore_random(state)

    def _random_file(self, directory: str) -> Path:
        return Path(directory, f"random-{self.args.process_index}.json")


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer = optimizer
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else found


def _whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict with whole tensors in host memory; all ranks call it.

    Tied weights are one tensor under all their names.
    """
    found = {}
    for names, tensor in named_tensors(model):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found.update(dict.fromkeys(names, whole.detach().cpu()))
    return found


def _restore_random(state: Any) -> None:
    try:
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        name, numbers, *rest = state["numpy"]
        numpy.random.set_state((name, numpy.array(numbers, dtype=numpy.uint32), *rest))
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise CheckpointError(f"has no state of random generators: {error}") from None
