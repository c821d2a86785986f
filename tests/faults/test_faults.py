"""The fault matrix: real processes over gloo, real signals, real full disks (``matrix.py``).

Each case ends in a named error on every rank that lives, and in a training that is taken up again
and is, to the bit, one to which nothing happened.
"""

import functools
import pickle
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from faults.matrix import CASES, ELSEWHERE, LIVING
from faults.training import EVERY, SETUPS, STEPS
from pool import Pool

from fxzero import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]
_TESTS = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def healthy():
    """Worlds to which nothing happens, by their number of ranks."""
    made = {}

    def pool(ranks):
        if ranks not in made:
            made[ranks] = Pool(ranks, served=True)
        return made[ranks]

    yield pool
    for each in made.values():
        each.close()


@pytest.fixture(scope="module")
def undisturbed(healthy):
    """Losses by step, and weights, of every rank of a training to which nothing happens."""
    return functools.cache(
        lambda setup: healthy(SETUPS[setup].ranks).run("faults.training:run", setup=setup)
    )


def _meets(case, root, answers):
    """What the ranks of a training say to which something happens, by rank, and after how long."""
    answers.mkdir()
    lost = case.fault.kind in ("hang", "stop")
    stuck = {case.fault.rank} if lost else set()
    with Pool(case.ranks, served=True) as pool:
        begun = time.monotonic()
        pool.run(
            "faults.training:meets",
            timeout=100,
            dying=range(case.ranks),
            stuck=stuck,
            setup=case.setup,
            root=str(root),
            answers=str(answers),
            fault=case.fault,
            patience=case.patience,
        )
    assert time.monotonic() - begun < 100
    return {int(path.name): pickle.loads(path.read_bytes()) for path in answers.iterdir()}


def _check_equal(found, expected):
    """Losses and weights of ranks, which may have begun later, are to the bit those expected."""
    for (losses, weights), (all_losses, all_weights) in zip(found, expected, strict=True):
        assert losses == {number: all_losses[number] for number in losses}
        assert STEPS in losses
        assert weights.keys() == all_weights.keys()
        assert all(torch.equal(tensor, all_weights[name]) for name, tensor in weights.items())


def _later(case):
    return () if case.quick else (pytest.mark.exhaustive,)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=_later(case), id=case.name) for case in CASES]
)
def test_a_fault_is_named_and_training_is_taken_up_bit_for_bit(
    case, healthy, undisturbed, tmp_path
):
    answers = _meets(case, tmp_path / "root", tmp_path / "answers")
    fault = case.fault
    living = {*range(case.ranks)} - ({fault.rank} if fault.kind not in _ALL_LIVE else set())
    assert answers.keys() == living, {r: a.get("trace") for r, a in answers.items()}
    assert fault.rank not in answers or answers[fault.rank]["met"]
    if fault.kind in ("slow", "terminate"):
        _check_unharmed(case, answers)
    for rank, answer in answers.items():
        if fault.kind == "raise" and rank == fault.rank:
            assert answer["told"].splitlines()[0] == _RAISED
            assert "training.py" in answer["trace"]
            assert answer["trace"].rindex(_RAISED) > answer["trace"].rindex("training.py")
        elif case.told:
            kind, _, text = answer["told"].partition(": ")
            assert kind == "fxzero.errors.PeerError"
            first, *rest = text.splitlines()
            assert re.search(case.told, first), text
            assert any(re.search(case.more, line) for line in rest), text
            assert rest[-1].startswith("  torch says: ")
    if fault.kind in ("hang", "stop"):
        for answer in answers.values():
            # Half a second is left for a word from the others, the rest to a busy machine.
            assert case.patience - 1 <= answer["seconds"] <= case.patience + 2.5
    root = tmp_path / "root"
    left = fault.step + (fault.at == "save")  # what comes during a save is asked after a step
    saved = {"slow": STEPS, "terminate": left}.get(fault.kind, EVERY)
    assert checkpoint.verify(root).step == saved
    if saved == STEPS:
        shutil.rmtree(root / f"step-{STEPS}")
    again = healthy(case.ranks).run("faults.training:run", setup=case.setup, root=str(root))
    _check_equal(again, undisturbed(case.setup))


_ALL_LIVE = ("raise", "slow", "terminate")
_RAISED = "ValueError: the loss met a value it cannot take"


def _check_unharmed(case, answers):
    """A slow rank delays all; a signal to one rank lets all leave with the same step."""
    left = {answer["left"] for answer in answers.values()}
    slow = case.fault.kind == "slow"
    assert left == {STEPS} if slow else left <= {case.fault.step, case.fault.step + 1}
    assert len(left) == 1
    assert not any("told" in answer for answer in answers.values())


@pytest.fixture(scope="module")
def told_in(healthy):
    """What each rank is told in a world that lives on, by case, and what becomes of it."""

    @functools.cache
    def of(task):
        setup, _ = LIVING[task]
        given = {"setup": setup}
        if task == "disagreements":
            return healthy(2).run(f"faults.worlds:{task}", **given)
        root = Path(tempfile.mkdtemp())
        root.chmod(0o755)  # a rank that becomes nobody looks for it
        try:
            return healthy(2).run(f"faults.worlds:{task}", root=str(root / "runs"), **given)
        finally:
            shutil.rmtree(root)

    return of


@pytest.mark.parametrize(
    ("task", "name", "first", "behind"),
    [(task, name, *texts) for task, (_, cases) in LIVING.items() for name, texts in cases.items()],
    ids=lambda value: value if value and value[0] in "CF" and value[1:2].isdigit() else "",
)
def test_all_ranks_are_told_and_train_on(told_in, task, name, first, behind):
    """No collective is started, no old checkpoint touched, no damaged byte used."""
    for rank, answers in enumerate(told_in(task)):
        text, after = answers[name]
        line, _, rest = text.removeprefix("fxzero.errors.").partition("\n")
        assert re.search(first, line), (rank, text)
        assert re.search(behind, rest, re.MULTILINE), (rank, text)
        if task == "refusals":
            kept, newest, went_on, saved = after
            assert (kept, newest, went_on, saved) == (True, f"step-{EVERY}", True, STEPS)
        else:
            assert after is True


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_another_number_of_ranks_goes_on(healthy, tmp_path, ranks):
    """F6: the same global batches, in other parts: sums round otherwise, by 1e-6 at the most."""
    given = {"setup": "without dropout"}
    expected = healthy(2).run("faults.training:run", **given)
    healthy(2).run("faults.training:run_and_save", root=str(tmp_path), **given)
    found = healthy(ranks).run("faults.training:run", root=str(tmp_path), **given)
    for number in range(EVERY + 1, STEPS + 1):
        mean = sum(losses[number] for losses, _ in expected) / 2
        assert abs(sum(losses[number] for losses, _ in found) / ranks - mean) <= 1e-6
    for name, tensor in expected[0][1].items():
        assert float((found[0][1][name] - tensor).abs().max()) <= 1e-6


def test_groups_of_ours_wait_as_long_as_the_users(healthy):
    assert healthy(2).run("faults.training:timeouts", seconds=77) == [(77.0, 77.0, 1800.0)] * 2


def test_what_other_files_have_is_there():
    """And the matrix has the cases that were promised."""
    cases = [case.id for case in CASES]
    cases += [name.split()[0] for _, texts in LIVING.values() for name in texts]
    cases += ["F5", "F6", "F8"]  # test_launcher.py, and above
    for file, tests in ELSEWHERE.items():
        text = (_TESTS / file).read_text()
        for case, test in tests:
            assert f"\ndef {test}(" in text, test
            cases.append(case)
    assert len(cases) >= 40
    asked = {f"F{i}" for i in range(1, 9)} | {f"C{i}" for i in range(1, 11)}
    assert asked <= {*cases}
