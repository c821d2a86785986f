"""Carrying out what alarms ask for, by all ranks together."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fxzero.checkpoint import Loaded, load, rollback, save
from fxzero.checkpoint.directories import checkpoints
from fxzero.checkpoint.team import Team
from fxzero.errors import AlarmError, AlarmWarning, CheckpointError, UsageError
from fxzero.monitor.record import Alarm

# So often a checkpoint is gone back to: what goes wrong behind it once more will go wrong again.
_TIMES = 2
_ALARMS = "alarms"


class Actions:
    """What is done about each kind of alarm.

    Args:
        by_kind: actions by kind of alarm.
        root: the directory of the user's checkpoints.

    Attributes:
        loaded: what was rolled back to in the latest call of ``carry_out``, if anything.

    Raises:
        UsageError: they save or load, and there is no place or no optimizer.
    """

    def __init__(
        self,
        by_kind: Mapping[str, tuple[str, ...]],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        root: str | Path | None,
    ) -> None:
        self.by_kind, self.model, self.optimizer = by_kind, model, optimizer
        self.root = None if root is None else Path(root)
        self.loaded: Loaded | None = None
        self._times: dict[Path, int] = {}
        asked = {action for actions in by_kind.values() for action in actions}
        for action in sorted(asked & {"checkpoint", "rollback"}):
            missing = "checkpoints=" if root is None else "optimizer=" if optimizer is None else ""
            if missing:
                raise UsageError(f"the action {action!r} needs {missing} of the Monitor")

    def carry_out(self, alarms: Sequence[Alarm], step: int, leads: bool) -> list[Alarm]:
        """Does all but "stop", once for all alarms; they come back with what was done.

        Args:
            step: how many steps were run.
            leads: whether this rank warns for all.

        Raises:
            CheckpointError: on every rank: there is nothing to roll back to, or no writing.
        """
        self.loaded = None
        asked = {action: self._asking(alarms, action) for action in ("checkpoint", "rollback")}
        if asked["checkpoint"]:
            self._save(asked["checkpoint"], step)
        if asked["rollback"]:
            self.loaded = self._roll_back(asked["rollback"])
        done = [dataclasses.replace(alarm, done=self.by_kind[alarm.kind]) for alarm in alarms]
        for alarm in done if leads else ():
            if "warn" in alarm.done:
                did = [name for name in alarm.done if name != "warn"]
                text = f"{alarm.kind}: {alarm.message}" + (f" -> {', '.join(did)}" if did else "")
                warnings.warn(text, AlarmWarning, stacklevel=2)
        return done

    def stop(self, alarms: Sequence[Alarm]) -> None:
        """Raises AlarmError if an alarm asks for that."""
        stopping = self._asking(alarms, "stop")
        if stopping:
            texts = [f"{alarm.kind}: {alarm.message}" for alarm in stopping]
            raise AlarmError("\n  ".join(["training was stopped by its monitor", *texts]))

    def _asking(self, alarms: Sequence[Alarm], action: str) -> list[Alarm]:
        return [alarm for alarm in alarms if action in self.by_kind[alarm.kind]]

    def _save(self, alarms: Sequence[Alarm], step: int) -> None:
        assert self.root is not None
        extra = {"alarms": [f"{alarm.kind}: {alarm.message}" for alarm in alarms]}
        save(self.root / _ALARMS, self.model, self.optimizer, step=step, extra=extra)

    def _roll_back(self, alarms: Sequence[Alarm]) -> Loaded:
        """Loads the newest whole checkpoint from before the alarms; later ones are deleted."""
        assert self.root is not None
        good = min(alarm.last_good for alarm in alarms)
        root, team = self.root, Team.of_all("rolling back")
        try:
            path: Path = team.lead(lambda: _newest(root, good))
        finally:
            team.close()
        self._times[path] = self._times.get(path, 0) + 1
        if self._times[path] > _TIMES:
            what = alarms[0]
            raise AlarmError(
                f"{path} was rolled back to {_TIMES} times, and again: {what.kind}: {what.message}"
            )
        loaded = load(path, self.model, self.optimizer)
        for parameter in self.model.parameters():
            parameter.grad = None
        return loaded


def _newest(root: Path, last_good: int) -> Path:
    """The newest whole checkpoint up to a step; what comes behind it is deleted.

    Raises:
        CheckpointError: there is none.
    """
    known = checkpoints(root)
    for step, _ in reversed(known):
        if step <= last_good:
            try:
                return rollback(root, step)
            except CheckpointError:
                continue
    there = ", ".join(str(step) for step, _ in known) or "none"
    raise CheckpointError(
        f"no whole checkpoint in {root} up to step {last_good} to roll back to\n"
        f"  there are: {there}\n  save some in the loop with fxzero.checkpoint.save"
    )
