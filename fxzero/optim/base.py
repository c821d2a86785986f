"""What all optimizers of fxzero do alike; ``AdamW``, ``SGD`` and ``Lion`` add their rule.

A step has three parts.  States: each trainable parameter belongs to the arena of its form.  What
there is to do: gradients that exist, and the number that gradients are multiplied by (of a loss
scale, and of clipping).  The update: one launch for each arena on CUDA; on a CPU torch's fused
kernels, in chunks that stay in the cache where weights or moments are narrower than float32.

A backward may do the update itself, a parameter at a time (``begin``, ``take``); then ``step``
updates the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxzero import _torch
from fxzero.errors import RuntimeStateError, UsageError, unknown_option
from fxzero.optim.arenas import (
    ALIGNMENT,
    Arena,
    Member,
    State,
    adopt,
    build,
    check_state,
    first_indices,
    gradient_of,
)
from fxzero.optim.chunks import ChunkedUpdate
from fxzero.optim.forms import Form, Numerics
from fxzero.optim.loading import Uncast
from fxzero.optim.rule import Control, Rule, Update

_BACKENDS = ("auto", "triton", "torch")
_PLAIN = Control(None, None, None)


class Optimizer(Uncast):
    """An optimizer whose states lie in arenas.

    Args:
        params: parameters or groups of them, as torch's optimizers take them.
        defaults: hyperparameters.
        numerics: how weights and moments are kept.
        backend: "triton", "torch", or "auto": Triton on CUDA, torch elsewhere.
        seed: of stochastic rounding.
    """

    rule: ClassVar[Rule]
    # GradScaler sets these for a step, and deletes them, instead of dividing gradients.
    grad_scale: Tensor
    found_inf: Tensor
    _step_supports_amp_scaling = True

    def __init__(
        self, params: Any, defaults: dict[str, Any], numerics: Numerics, backend: str, seed: int
    ) -> None:
        if backend not in _BACKENDS:
            raise unknown_option(backend, _BACKENDS, where="backend")
        self._numerics, self._backend, self._seed = numerics, backend, seed
        self._begin()
        super().__init__(params, defaults)

    def _begin(self) -> None:
        """Without arenas: the next step makes them."""
        self._updates: list[Update] = []
        self._untrained: list[Tensor] = []
        self._probes: list[tuple[Member, State]] = []
        self._places: dict[int, tuple[Update, Member]] = {}
        self._stale = True
        self._scale: Tensor | None = None
        self._reached: set[int] = set()  # by backwards that update
        self._updated: set[int] = set()

    def scale_next_step(self, factor: Tensor) -> None:
        """The next step multiplies gradients by ``factor``, and by no factor that was set before.

        ``fxzero.clip_grad_norm_(model, max_norm, optimizer=optimizer)`` calls this, so that
        clipping writes no gradient.  ``zero_grad`` takes it back.

        Args:
            factor: a tensor of one element.
        """
        self._scale = factor

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; a factor for the gradients that there were goes with them."""
        super().zero_grad(set_to_none)
        self._scale = None

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
        loss_scale: Tensor | None = getattr(self, "grad_scale", None)
        control = Control(clipped, loss_scale, getattr(self, "found_inf", None))
        for update in self._updates:
            members = ((m, m.parameter.grad) for m in update.arena.members)
            ready = [(m, gradient_of(m, given)) for m, given in members if given is not None]
            if ready:
                taken, gradients = [m for m, _ in ready], [gradient for _, gradient in ready]
                update(taken, gradients, control, self.param_groups)
        self._updated.clear()
        return loss

    def begin(self, parameters: Mapping[str, Tensor]) -> None:
        """Prepares for ``take`` of the gradients of these, by name, while a backward runs.

        Raises:
            RuntimeStateError: the last backward has updated one of them, and no step followed.
        """
        again = [name for name, p in parameters.items() if id(p) in self._updated]
        if again:
            raise RuntimeStateError(
                f"a second backward would update {again[0]} once more before optimizer.step()\n"
                '  call optimizer.step() after each backward, or compile with update="step" to '
                "accumulate"
            )
        new = {id(p) for p in parameters.values()} - self._places.keys()
        if new:
            self._reached |= new
            self._stale = True
        self._prepare()

    @torch.no_grad()
    def take(self, parameter: Tensor, gradient: Tensor) -> None:
        """Updates one parameter for the step that ``step`` ends.

        Args:
            gradient: of the parameter, and spread over ranks as it is.
        """
        update, member = self._places[id(parameter)]
        self._updated.add(id(parameter))
        update([member], [gradient_of(member, gradient)], _PLAIN, self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; states of the parameters that were there before stay as they are.

        Raises:
            UsageError: an option outside of its range, or two that exclude each other.
        """
        self.rule.check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._stale = True

    def _check_state(self, parameter: Tensor, state: State) -> None:
        check_state(parameter, self._numerics.form(parameter), self.rule.moments, state)

    def _adopt_loaded(self) -> None:
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        # Each state by itself: a pickled view would take all of its arena along.
        states = {
            p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            for p, state in self.state.items()
        }
        kept = {name: vars(self)[name] for name in ("_numerics", "_backend", "_seed")}
        return {**super().__getstate__(), **kept, "state": defaultdict(dict, states)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def _prepare(self) -> None:
        """Puts every parameter's states into arenas; nothing to do in most steps.

        Raises:
            UsageError: a CUDA graph is being captured, and would do it again in every replay.
        """
        stale = self._stale or any(p.grad is not None for p in self._untrained)
        if not stale and all(self.state.get(m.parameter) is view for m, view in self._probes):
            return
        if _torch.is_capturing():
            raise UsageError(
                "states of an optimizer were not made, or were loaded, since its last step, and a "
                "CUDA graph is being captured\n  run one step before the capture"
            )
        if stale:
            self._stale = True  # should a state be refused
            self._updates = [self._update_of(arena) for arena in self._build()]
            pairs = ((update, m) for update in self._updates for m in update.arena.members)
            self._places = {id(m.parameter): (update, m) for update, m in pairs}
        for update in self._updates:
            for member, view in update.arena.pairs:
                state = self.state.get(member.parameter)
                if state is not view:
                    adopt(update.arena, member, state)
                    self.state[member.parameter] = view
        self._probes = [next(update.arena.pairs) for update in self._updates]
        self._stale = False

    def _build(self) -> list[Arena]:
        """Arenas of zeros for all parameters that have had a gradient, or have a state."""
        everything = self._parameters
        trained = {id(p) for p in everything if p.grad is not None or self.state.get(p)}
        trained |= self._reached
        trained -= {id(p) for p in everything if p.is_meta}
        self._untrained = [p for p in everything if id(p) not in trained and not p.is_meta]
        index = first_indices(everything)
        kinds: dict[Any, list[tuple[int, Tensor]]] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if id(p) in trained:
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
