"""What the gradients of a rank's stages take over a step."""

from __future__ import annotations

from fxzero.pipelining.gradients import Gradients, over_step
from fxzero.pipelining.rehearsal import Step
from fxzero.pipelining.schedules import Action, Kind

ORDER = [
    Action(Kind.FORWARD, 0, 0),
    Action(Kind.FORWARD, 0, 1),
    Action(Kind.BACKWARD, 0, 0),
    Action(Kind.BACKWARD, 0, 1),
    Action(Kind.BACKWARD, 1, 1),
]
# With all gradients throughout: 100 of stage 0, of which 60 become parts of 30, and 7 of stage 1.
STEPS = [Step(1010, 1005), Step(1020, 1010), Step(1030, 1005), Step(1040, 1000), Step(1050, 1000)]
GRADIENTS = {0: Gradients(100, 60, 30, 20), 1: Gradients(7)}


def test_gradients_are_there_from_the_first_backward_and_parts_behind_the_last() -> None:
    assert over_step(ORDER, STEPS, GRADIENTS, finds=False) == [
        Step(1010 - 107, 1005 - 107),
        Step(1020 - 107, 1010 - 107),
        Step(1030 - 7, 1005 - 7),
        Step(max(1040 - 7, 1000 - 7 + 30 + 20), 1000 - 7 - 30),
        Step(1050 - 30, 1000 - 30),
    ]


def test_of_gradients_that_are_found_only_whole_ones_are_missing_at_first() -> None:
    found = over_step(ORDER, STEPS, GRADIENTS, finds=True)
    assert found[:3] == [Step(950, 945), Step(960, 950), Step(1030, 1005)]


def test_stages_that_nobody_trains_change_nothing() -> None:
    assert over_step(ORDER, STEPS, {}, finds=False) == STEPS
