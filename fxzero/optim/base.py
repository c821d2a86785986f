"""What all optimizers of fxzero do alike; ``AdamW``, ``SGD`` and ``Lion`` add their rule.

A step has three parts.  States: each trainable parameter belongs to the arena of its form.  What
there is to do: gradients that exist, and the number that gradients are multiplied by (of a loss
scale, and of clipping).  The update: one launch for each arena on CUDA; on a CPU torch's fused
kernels, in chunks that stay in the cache where weights or moments are narrower than float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxzero.errors import unknown_option
from fxzero.optim.arenas import (
    ALIGNMENT,
    Arena,
    Member,
    State,
    adopt,
    build,
    first_indices,
    gradient_of,
    local,
)
from fxzero.optim.chunks import ChunkedUpdate
from fxzero.optim.forms import Form, Numerics
from fxzero.optim.rule import Control, Rule, Update

_BACKENDS = ("auto", "triton", "torch")


class Optimizer(torch.optim.Optimizer):
    """An optimizer whose states lie in arenas.

    Args:
        params: parameters or groups of them, as torch's optimizers take them.
        defaults: hyperparameters.
        numerics: how weights and moments are kept.
        backend: "triton", "torch", or "auto": Triton on CUDA, torch elsewhere.
        seed: of stochastic rounding.
    """

    rule: ClassVar[Rule]
    # GradScaler hands its scale over instead of dividing gradients, and asks us to skip the step.
    _step_supports_amp_scaling = True

    def __init__(
        self, params: Any, defaults: dict[str, Any], numerics: Numerics, backend: str, seed: int
    ) -> None:
        if backend not in _BACKENDS:
            raise unknown_option(backend, _BACKENDS, where="backend")
        self._numerics, self._backend, self._seed = numerics, backend, seed
        self._updates: list[Update] = []
        self._untrained: list[Tensor] = []
        self._probes: list[tuple[Member, State]] = []
        self._stale = True
        self._scale: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        super().__init__(params, defaults)

    def scale_next_step(self, factor: Tensor) -> None:
        """The next step multiplies gradients by ``factor``, a scalar on their device.

        ``fxzero.clip_grad_norm_(model, max_norm, optimizer=optimizer)`` calls this, so that
        clipping reads no gradient twice.
        """
        self._scale = factor if self._scale is None else self._scale * factor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have gradients.

        Args:
            closure: computes the loss again; what it returns is returned.

        Raises:
            UsageError: a parameter, its gradient or its state is of a kind that cannot be updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._prepare()
        clipped, self._scale = self._scale, None
        control = Control(clipped, self.grad_scale, self.found_inf)
        for update in self._updates:
            ready = [m for m in update.arena.members if m.parameter.grad is not None]
            if ready:
                update(ready, [gradient_of(m) for m in ready], control, self.param_groups)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; states of the parameters that were there before stay as they are."""
        super().add_param_group(param_group)
        self._stale = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep their dtypes: torch casts them to the parameter's."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        by_number = dict(zip(numbers, parameters, strict=True))
        for number, state in state_dict["state"].items():
            self.state[by_number[number]] = dict(state)
        self._stale = True

    def _prepare(self) -> None:
        """Puts every parameter's states into arenas; nothing to do in most steps."""
        if self._stale or any(p.grad is not None for p in self._untrained):
            self._updates = [self._update_of(arena) for arena in self._build()]
            self._stale = False
        elif all(self.state.get(m.parameter) is view for m, view in self._probes):
            return
        for update in self._updates:
            for member, view in update.arena.pairs:
                state = self.state.get(member.parameter)
                if state is not view:
                    adopt(update.arena, member, state)
                    self.state[member.parameter] = view
        self._probes = [next(update.arena.pairs) for update in self._updates]

    def _build(self) -> list[Arena]:
        """Arenas of zeros for all parameters that are trained."""
        everything = [p for group in self.param_groups for p in group["params"]]
        trained = {id(p) for p in everything if (p.requires_grad or p.grad is not None)}
        trained -= {id(p) for p in everything if p.is_meta}
        self._untrained = [p for p in everything if id(p) not in trained and not p.is_meta]
        index = first_indices(everything)
        kinds: dict[Any, list[tuple[int, Tensor]]] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if id(p) in trained and local(p).numel():
                    kinds.setdefault((p.device, self._numerics.form(p)), []).append((number, p))
        return [
            build(form, self.rule.moments, pairs, index, self._alignment(device, form))
            for (device, form), pairs in kinds.items()
        ]

    def _alignment(self, device: torch.device, form: Form) -> int:
        """Elements that a parameter's place in an arena is a multiple of."""
        return ALIGNMENT if self._launches(device) else max(form.quantum, 1)

    def _launches(self, device: torch.device) -> bool:
        return self._backend == "triton" or (self._backend == "auto" and device.type == "cuda")

    def _update_of(self, arena: Arena) -> Update:
        if not self._launches(arena.device):
            return ChunkedUpdate(arena, self.rule, self._seed)
        from fxzero.optim.launch import LaunchedUpdate  # Triton is there on some systems only

        return LaunchedUpdate(arena, self.rule, self._seed)
