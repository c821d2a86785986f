"""What optimizers that need whole tensors do alike; ``Muon`` and ``Adafactor`` add their updates.

Parameters that every rank has whole are updated by each for itself, those that ranks share at their
homes (``homes``), both by the same three methods, so that how many ranks there are changes no bit:

    send         this rank's rows of what the work needs
    work         the update from the whole
    receive      this rank's rows of what comes out

States are cut over ranks as their parameters are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from fxzero.errors import UsageError
from fxzero.optim.arenas import local
from fxzero.optim.homes import Cut, Homed, agree_on_gradients, at_homes, cut_of, has_usable_gradient
from fxzero.optim.loading import Uncast

Group = dict[str, Any]


class WholeOptimizer(Uncast):
    """An optimizer of tensors that each have a rank where they are whole."""

    def add_param_group(self, param_group: Group) -> None:
        """As torch's.

        Raises:
            UsageError: a parameter that cannot be updated, or an option outside of its range.
        """
        self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            for parameter in self.param_groups[-1]["params"]:
                self._check_parameter(parameter)
        except UsageError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have gradients; all ranks that share some must call it.

        Args:
            closure: computes the loss again; what it returns is returned.

        Raises:
            UsageError: a gradient is sparse, or spread over ranks otherwise than its parameter.
            DivergenceError: only some ranks have a gradient; on every rank, and nothing changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        whole, shared = self._ready()
        for homed in whole:
            homed.receive(homed.work(list(homed.send())))
        for cut, sharing in shared.items():
            at_homes(cut, sharing)
        return loss

    def _ready(self) -> tuple[list[Homed], dict[Cut, list[Homed]]]:
        """What has gradients: parameters that are whole, and those that ranks share."""
        whole: list[Homed] = []
        by_cut: dict[Cut, list[tuple[Tensor, Group]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                cut = cut_of(parameter)
                if cut is not None:
                    by_cut.setdefault(cut, []).append((parameter, group))
                elif has_usable_gradient(parameter):
                    whole.append(self._homed(parameter, group))
        shared = {}
        for cut, pairs in by_cut.items():
            numbers = agree_on_gradients(cut, [parameter for parameter, _ in pairs])
            shared[cut] = [self._homed(*pairs[n]) for n in numbers]
        return whole, shared

    @abstractmethod
    def _homed(self, parameter: Tensor, group: Group) -> Homed:
        """A parameter with its states, spread as it is; those that were loaded may be whole."""

    @abstractmethod
    def _check_options(self, group: Mapping[str, Any]) -> None:
        """Raises a UsageError for the first option that cannot be right."""

    @abstractmethod
    def _check_parameter(self, parameter: Tensor) -> None:
        """Raises a UsageError for a parameter that cannot be updated."""

    def _check_state(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        pass

    def _adopt_loaded(self) -> None:
        pass  # a state is adopted in the step that needs it


def spread(
    state: Tensor, parameter: Tensor, dtype: torch.dtype, placements: tuple[Placement, ...] = ()
) -> Tensor:
    """A state where its parameter is, itself if it is there; one that was loaded may be whole.

    Args:
        placements: over ranks, or none: the parameter's.
    """
    device = local(parameter).device
    if isinstance(parameter, DTensor):
        wanted = placements or parameter.placements
        if not isinstance(state, DTensor):
            # Without a source everyone cuts what it has, and nothing is sent.
            mesh, whole = parameter.device_mesh, state.to(device)
            state = distribute_tensor(whole, mesh, wanted, src_data_rank=None)
        elif state.placements != wanted:
            state = state.redistribute(placements=wanted)
    elif isinstance(state, DTensor):
        state = state.full_tensor()
    return state.to(device, dtype)
