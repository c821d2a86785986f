"""A Lightning strategy: the module's forward is planned, and its parameters may be sharded.

    trainer = lightning.Trainer(
        strategy=LightningStrategy(submodule="model", memory_budget="6GiB", zero=3),
        accelerator="cpu", devices=2,
    )
    trainer.fit(module, loader)

``submodule`` is what ``training_step`` calls, and has all that is trained; without it the
LightningModule's own ``forward`` is planned.  The loop is Lightning's: accumulation, clipping,
validation, callbacks.  Its checkpoints become directories of ``fxzero.checkpoint``, which load on
any number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

import fxzero
from fxzero import checkpoint
from fxzero.checkpoint.state import DTYPES
from fxzero.clipping import clip_grad_norm_
from fxzero.compiler import CompiledModule
from fxzero.errors import CheckpointError, UsageError
from fxzero.integrations.naming import name_optimizer
from fxzero.integrations.refusals import check_options

_ELSEWHERE = ("state_dict", "optimizer_states")


class LightningStrategy(DDPStrategy):  # type: ignore[misc]
    """One process a device, as ``DDPStrategy`` starts them, around a model of fxzero.

    Args:
        submodule: the qualified name of what is trained; "": the LightningModule itself.
        options: those of ``fxzero.compile`` except example_inputs, pipeline, microbatches, update
            and loss_fn; ``optimizer`` is to be what ``configure_optimizers`` returns.

    Raises:
        UsageError: an option that only ``model.step`` serves.
    """

    strategy_name = "fxzero"

    def __init__(self, submodule: str = "", **options: Any) -> None:
        check_options(options, "Lightning")
        self.submodule = submodule
        self.options = options
        self._clipping = _Clipping(self)
        super().__init__()

    @property
    def precision_plugin(self) -> Precision:
        return self._clipping

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and type(plugin) is not Precision:
            raise UsageError(
                f"precision={plugin.precision!r} has Lightning change what the model computes in\n"
                "  leave it out, and give the strategy "
                "precision=fxzero.Precision(param=torch.bfloat16)"
            )

    @property
    def compiled(self) -> Any:
        """The module that fxzero runs."""
        assert self.lightning_module is not None
        return self.lightning_module.get_submodule(self.submodule)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def setup_distributed(self) -> None:
        """Connects the processes, where there are several."""
        self.set_world_ranks()
        if self.world_size > 1:
            super().setup_distributed()

    def setup(self, trainer: LightningTrainer) -> None:
        """Compiles the module, then makes optimizers of what its parameters have become."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        self._check_module()
        if not isinstance(self.compiled, CompiledModule):
            fxzero.compile(self.compiled, **self.options)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            if len(self.optimizers) > 1:
                raise UsageError(
                    f"{len(self.optimizers)} optimizers, and a step is planned for one\n"
                    "  give one of them several groups of parameters"
                )
            for optimizer in self.optimizers:
                name_optimizer(self.compiled, optimizer)
        self.setup_precision_plugin()

    def _check_module(self) -> None:
        module = self.lightning_module
        assert module is not None
        children = [name for name, _ in module.named_children()]
        named = " or ".join(f"submodule={name!r}" for name in children)
        if not self.submodule and type(module).forward is LightningModule.forward:
            raise UsageError(
                f"{type(module).__name__} has no forward of its own, and forward is what is planned"
                f"\n  say what training_step calls: {named}"
            )
        if self.submodule not in dict(module.named_modules()):
            raise UsageError(
                f"{type(module).__name__} has no submodule {self.submodule!r}\n  it has: {named}"
            )
        inside = {id(p) for p in self.compiled.parameters()}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in inside:
                raise UsageError(
                    f"{name} is trained, and is not in submodule={self.submodule!r}\n"
                    "  one submodule has to have all that is trained"
                )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's; an error if it never came to the planned forward."""
        output = super().training_step(*args, **kwargs)
        if vars(self.compiled)["_fxzero"].latest is None:
            called = f"{self.submodule}.forward" if self.submodule else "self(...)"
            raise UsageError(
                f"training_step did not call {called}, which is what is planned\n"
                "  call it, or name what is called: LightningStrategy(submodule=...)"
            )
        return output

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While Lightning accumulates gradients they are not averaged."""
        with self.compiled.no_sync():
            yield

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: ``save_checkpoint`` takes the weights where they are."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {}

    def save_checkpoint(
        self, checkpoint_: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Writes a directory; all ranks call it.

        Raises:
            UsageError: a callback's state, or a hyperparameter, is nothing that JSON holds.
        """
        rest = {name: value for name, value in checkpoint_.items() if name not in _ELSEWHERE}
        assert self.lightning_module is not None
        checkpoint.save(
            Path(self.broadcast(filepath)),
            self.lightning_module,
            self.optimizers[0] if self.optimizers else None,
            step=checkpoint_["global_step"],
            extra=_encoded(rest, "checkpoint"),
            keep=1,
        )

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads weights and, to train on, the optimizer; returns the rest."""
        assert self.lightning_module is not None
        optimizer = self.optimizers[0] if self.optimizers else None
        loaded = checkpoint.load(checkpoint_path, self.lightning_module, optimizer)
        return {**_decoded(loaded.extra), "state_dict": {}, "optimizer_states": []}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Done by ``load_checkpoint``."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Done by ``load_checkpoint``."""

    def teardown(self) -> None:
        """Lightning's, but shards stay on their device."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


class _Clipping(Precision):  # type: ignore[misc]
    """Computes as the model says, and clips by the norm of whole gradients."""

    def __init__(self, strategy: LightningStrategy) -> None:
        self.strategy = strategy

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        model: nn.Module = self.strategy.compiled
        clip_grad_norm_(model, clip_val)


def _encoded(value: Any, where: str) -> Any:
    """What Lightning and its callbacks keep, as JSON has it."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Path():
            return str(value)
        case torch.Tensor():
            kind = str(value.dtype).removeprefix("torch.")
            return {"tensor": value.tolist(), "dtype": kind}
        case list() | tuple():
            return [_encoded(item, f"{where}[{index}]") for index, item in enumerate(value)]
        case Mapping() if all(isinstance(key, str) for key in value):
            return {key: _encoded(item, f"{where}.{key}") for key, item in value.items()}
    raise UsageError(
        f"{where} is {type(value).__name__}, which JSON does not hold, and checkpoints have no "
        "pickles\n  save_hyperparameters(ignore=...) leaves a hyperparameter out"
    )


def _decoded(value: Any) -> Any:
    match value:
        case {"tensor": numbers, "dtype": str() as kind, **rest} if not rest:
            try:
                if kind in DTYPES:
                    return torch.tensor(numbers, dtype=DTYPES[kind])
            except (TypeError, ValueError, RuntimeError, OverflowError):
                pass
            raise CheckpointError(f"the checkpoint has a tensor that is no {kind!r:.80}")
        case dict():
            return {key: _decoded(item) for key, item in value.items()}
        case list():
            return [_decoded(item) for item in value]
    return value
