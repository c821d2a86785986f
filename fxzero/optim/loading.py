"""States of optimizers that are loaded as they are; torch casts them to their parameters' dtypes.

A second moment in float32 of a bfloat16 weight would lose its last bits in every restart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


class Uncast(torch.optim.Optimizer, ABC):
    """An optimizer that keeps the dtypes of loaded states."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep their dtypes: torch casts them.

        Raises:
            UsageError: a state was made by an optimizer that keeps other things; nothing is loaded.
        """
        taken: dict[Tensor, State] = {}

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            taken.update(self._states_in(given))
            return {**given, "state": {}}

        def give(_: torch.optim.Optimizer) -> None:
            self.state.update(taken)
            self._adopt_loaded()

        # The last to see what the user's hooks make of it, and the first to be ready for others.
        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(give, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _states_in(self, state_dict: dict[str, Any]) -> dict[Tensor, State]:
        """By parameter: what a state dict has, checked."""
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        # Where there are more of one than of the other, torch will say so.
        by_number = dict(zip(numbers, self._parameters, strict=False))
        found = {by_number[n]: dict(s) for n, s in state_dict["state"].items() if n in by_number}
        for parameter, state in found.items():
            self._check_state(parameter, state)
        return found

    @abstractmethod
    def _check_state(self, parameter: Tensor, state: State) -> None:
        """Raises a UsageError if a parameter's state is not what this optimizer keeps."""

    @abstractmethod
    def _adopt_loaded(self) -> None:
        """Makes loaded states this optimizer's own."""

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]
