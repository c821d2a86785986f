"""What all optimizers of fxzero do alike; ``AdamW``, ``SGD`` and ``Lion`` add their rule.

A step has three parts.  States: each trainable parameter belongs to the arena of its form.  What
there is to do: gradients that exist, and the number that gradients are multiplied by (of a loss
scale, and of clipping).  The update: one launch for each arena on CUDA; on a CPU torch's fused
kernels, in chunks that stay in the cache where weights or moments are narrower than float32.
States may wait for it in host memory.

A backward may do the update itself, a parameter at a time (``begin``, ``take``); then ``step``
updates the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
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
    on_host,
)
from fxzero.optim.chunks import ChunkedUpdate, Scratch
from fxzero.optim.forms import Form, Numerics
from fxzero.optim.hosted import HostedUpdate, turn_elements
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
        offload: whether states wait for each step in host memory.
    """

    rule: ClassVar[Rule]
    # GradScaler sets these for a step, and deletes them, instead of dividing gradients.
    grad_scale: Tensor
    found_inf: Tensor
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        numerics: Numerics,
        backend: str,
        seed: int,
        offload: bool,
    ) -> None:
        if backend not in _BACKENDS:
            raise unknown_option(backend, _BACKENDS, where="backend")
        if not isinstance(offload, bool):
            raise UsageError(f"offload={offload!r} must be True or False")
        self._numerics, self._backend, self._seed = numerics, backend, seed
        # Whose states are in host memory; None: all of them.
        self._hosted: tuple[Tensor, ...] | None = None if offload else ()
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
        self._finish_copies()
        return loss

    def keep_on_host(self, parameters: Iterable[Tensor]) -> None:
        """From the next step on, states of these, and of no others, wait in host memory.

        ``model.update_with(optimizer)`` calls this with what the Plan says.
        """
        hosted = tuple(parameters)
        before = None if self._hosted is None else {id(p) for p in self._hosted}
        if before == {id(p) for p in hosted}:
            return
        self._hosted, self._stale = hosted, True
        # By way of the host: the device need not have room for old and new arenas at once.
        for parameter, state in self.state.items():
            self.state[parameter] = {name: on_host(value) for name, value in state.items()}
        self._updates, self._probes, self._places = [], [], {}

    @property
    def host_tensors(self) -> list[Tensor]:
        """What is in host memory."""
        arenas = (update.arena for update in self._updates)
        return [t for arena in arenas if arena.on_host for t in arena.tensors.values()]

    @property
    def stages(self) -> list[Tensor]:
        """What states from host memory go through, on the device."""
        hosted = (update for update in self._updates if isinstance(update, HostedUpdate))
        return [tensor for update in hosted for tensor in update.stage]

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
        kept = {n: vars(self)[n] for n in ("_numerics", "_backend", "_seed", "_hosted")}
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
        hosted = {id(p) for p in (everything if self._hosted is None else self._hosted)}
        kinds: dict[Any, list[tuple[int, Tensor]]] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if id(p) in trained:
                    kind = p.device, self._numerics.form(p), id(p) in hosted
                    kinds.setdefault(kind, []).append((number, p))
        arenas = []
        for (device, form, hosts), pairs in kinds.items():
            alignment = self._alignment(device, form, hosts)
            arenas.append(build(form, self.rule.moments, pairs, index, alignment, hosts))
        return arenas

    def _alignment(self, device: torch.device, form: Form, on_host: bool) -> int:
        """Elements that a parameter's place in an arena is a multiple of.

        Parameters that are cut into turns are so between multiples: torch's kernels round the last
        elements of a tensor in another way.
        """
        return ALIGNMENT if on_host or self._launches(device) else max(form.quantum, 1)

    def _launches(self, device: torch.device) -> bool:
        return self._backend == "triton" or (self._backend == "auto" and device.type == "cuda")

    def _update_of(self, arena: Arena) -> Update:
        if not arena.on_host:
            return self._update_in_place(arena, None)
        scratch = Scratch(turn_elements(sum(member.elements for member in arena.members)))
        return HostedUpdate(arena, lambda staged: self._update_in_place(staged, scratch))

    def _update_in_place(self, arena: Arena, scratch: Scratch | None) -> Update:
        if not self._launches(arena.device):
            return ChunkedUpdate(arena, self.rule, self._seed, scratch)
        from fxzero.optim.launch import LaunchedUpdate  # Triton is there on some systems only

        return LaunchedUpdate(arena, self.rule, self._seed)

    def _finish_copies(self) -> None:
        """Waits for states that are copied to the host, where anybody may read them."""
        for update in self._updates:
            if update.arena.on_host and update.arena.device.type == "cuda":
                torch.cuda.current_stream(update.arena.device).synchronize()
