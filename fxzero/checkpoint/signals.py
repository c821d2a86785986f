"""Save and leave: what a training does when it is asked to end.

    with fxzero.checkpoint.leaving() as leaving:
        for step in range(done + 1, steps + 1):
            train(step)
            if leaving.asked() or step % 100 == 0:
                fxzero.checkpoint.save(root, model, optimizer, step=step)
            if leaving.decided:
                break

A cluster that wants a machine back sends SIGTERM, to some processes or to all, at some moment of a
step, and torchrun passes it on.  Whoever gets it remembers it; the step goes on.  At its end the
ranks ask each other, so that all leave behind the same step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from fxzero.checkpoint.team import Team
from fxzero.errors import UsageError


class Leaving:
    """Whether a training is to end.

    Attributes:
        decided: whether the ranks have decided to leave.
    """

    def __init__(self, team: Team) -> None:
        self.decided = False
        self._team = team
        self._asked = False

    def asked(self) -> bool:
        """Whether any rank was asked to leave; all ranks call it, and get the same answer.

        Raises:
            PeerError: a rank is gone.
        """
        self.decided = self.decided or self._team.any(self._asked)
        return self.decided

    def _remember(self, *_: Any) -> None:
        self._asked = True


@contextlib.contextmanager
def leaving(number: int = signal.SIGTERM) -> Iterator[Leaving]:
    """Inside, a signal does not end this process but is remembered; all ranks enter together.

    Args:
        number: of the signal.

    Raises:
        UsageError: called in another thread than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UsageError(
            "leaving() was called in another thread, and signals reach the main thread alone\n"
            "  enter it in the main thread, and ask in any"
        )
    team = Team.of_all("asking who leaves")
    state = Leaving(team)
    before = signal.signal(number, state._remember)
    try:
        yield state
    finally:
        signal.signal(number, before)
        team.close()
