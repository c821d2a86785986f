"""Scores of series, fingerprints of weights, distributions of inputs: each against its law."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxzero import UsageError
from fxzero.monitor import InputReference, Thresholds
from fxzero.monitor.alarms import SeriesWatch
from fxzero.monitor.fingerprints import fingerprint
from fxzero.monitor.inputs import InputWatch, stability_index
from fxzero.monitor.statistics import DecayScore, SpikeScore


def noise(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(3.0, 0.1, count)


def test_spike_scores_are_numpys() -> None:
    values = noise(300)
    scorer = SpikeScore(window=64, least=10)
    found = [scorer.score(value) for value in values]
    for i, value in enumerate(values):
        before = values[max(i - 64, 0) : i]
        if len(before) < 10:
            assert found[i] == 0
            continue
        middle = np.median(before)
        spread = 1.4826 * np.median(np.abs(before - middle))
        assert found[i] == pytest.approx((value - middle) / spread, rel=1e-9)


def test_decay_scores_are_numpys() -> None:
    values = noise(500)
    scorer = DecayScore(stretch=50)
    found = [scorer.score(value) for value in values]
    stretches = values.reshape(10, 50)
    means, errors = stretches.mean(1), stretches.var(1, ddof=1) / 50
    for i in range(1, 10):
        best = int(means[:i].argmin())
        expected = (means[i] - means[best]) / math.sqrt(errors[i] + errors[best])
        assert found[50 * i + 49] == pytest.approx(expected, rel=1e-9)
    assert [i for i, score in enumerate(found) if score] == [50 * i + 49 for i in range(1, 10)]


def alarms_in(losses: Any) -> list[tuple[str, int]]:
    """Kinds and steps of the alarms of some losses, looked at 50 by 50."""
    watch, found = SeriesWatch(Thresholds()), []
    for start in range(0, len(losses), 50):
        part = [float(loss) for loss in losses[start : start + 50]]
        steps = range(start + 1, start + 1 + len(part))
        found += watch.look(steps, part, [None] * len(part))
    return [(alarm.kind, alarm.step) for alarm in found]


@pytest.mark.parametrize("seed", range(3))
def test_noise_raises_no_alarm(seed: int) -> None:
    assert not alarms_in(noise(1000, seed))
    # nor does a loss that falls as losses do
    assert not alarms_in(noise(1000, seed) + 4 * np.exp(-np.arange(1000) / 200))


@pytest.mark.parametrize("size", [8.0, 12.0, 100.0])
def test_a_spike_of_some_standard_deviations_is_found_at_its_step(size: float) -> None:
    losses = noise(1000)
    losses[640] = 3.0 + size * 0.1
    assert alarms_in(losses) == [("loss_spike", 641)]


def test_a_slow_decay_is_found_and_no_spike_is_seen_in_it() -> None:
    losses = noise(2000)
    losses[800:] += 0.1 * np.arange(1200) / 1000  # a standard deviation in 1,000 steps
    found = alarms_in(losses)
    assert {kind for kind, _ in found} == {"loss_decay"}
    assert found[0][1] <= 1700


def test_series_that_do_not_move_raise_no_alarm() -> None:
    losses = np.full(1000, 2.0)
    losses[500:] *= 1 + 1e-4
    assert not alarms_in(losses)


def test_norms_are_judged_by_their_logarithm() -> None:
    watch = SeriesWatch(Thresholds())
    norms = np.exp(np.random.default_rng(0).normal(0, 0.3, 100))
    norms[90] = math.exp(0.3 * 9)
    steps = range(1, 101)
    (alarm,) = watch.look(steps, [1.0] * 100, [float(n) for n in norms])
    assert (alarm.kind, alarm.step, alarm.last_good) == ("gradient_spike", 91, 90)


def test_values_that_are_no_numbers_do_not_enter_statistics() -> None:
    values = noise(200)
    one, other = SpikeScore(), SpikeScore()
    expected = [one.score(value) for value in values]
    found = []
    for value in values:
        assert other.score(math.nan) == other.score(math.inf) == 0
        found.append(other.score(value))
    assert found == expected


# Fingerprints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_fingerprint_changes_with_any_bit(dtype: torch.dtype) -> None:
    tensor = (100 * torch.randn(300, generator=torch.Generator().manual_seed(0))).to(dtype)
    before = fingerprint(tensor).item()
    assert fingerprint(tensor.clone()).item() == before
    bits = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        tensor.element_size()
    ])  # fmt: skip
    for place in (0, 7, 299):
        for bit in (0, tensor.element_size() * 8 - 2):
            changed = bits.clone()
            changed[place] ^= 1 << bit
            assert fingerprint(changed.view(dtype)).item() != before


def test_a_fingerprint_sees_the_order_and_all_chunks() -> None:
    tensor = torch.arange(200_000, dtype=torch.float32)
    swapped = tensor.clone()
    swapped[[3, 150_000]] = tensor[[150_000, 3]]
    last = tensor.clone()
    last[-1] += 1
    assert len({fingerprint(t).item() for t in (tensor, swapped, last)}) == 3


def test_fingerprints_of_odd_tensors() -> None:
    assert fingerprint(torch.zeros(0)).item() == 0
    assert fingerprint(torch.tensor(2.0)).shape == ()
    matrix = torch.randn(6, 5)
    assert fingerprint(matrix.T).item() == fingerprint(matrix.T.contiguous()).item()
    numbers = torch.complex(matrix, matrix)
    assert fingerprint(numbers).item() != fingerprint(numbers.conj().resolve_conj()).item()


# Inputs


def batches(count: int, shift: float = 0.0, seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """Features of three columns, and labels from 0 to 3."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(32, 3, generator=generator) + torch.tensor([0.0, shift, 0.0]),
         torch.randint(4, (32,), generator=generator))
        for _ in range(count)
    ]  # fmt: skip


def drift_of(reference: InputReference, seen: Any) -> Any:
    watch = InputWatch(reference)
    for batch in seen:
        watch.add(batch, {})
    return watch.drift(watch.numbers(), Thresholds().input_drift)


def test_the_stability_index_is_the_textbooks() -> None:
    found = stability_index(torch.tensor([40.0, 60.0]), torch.tensor([500, 500]))
    p, q = np.array([40.5, 60.5]) / 101, np.array([0.5, 0.5])
    assert found == pytest.approx(float(((p - q) * np.log(p / q)).sum()), rel=1e-12)
    assert stability_index(torch.tensor([30.0, 70.0]), torch.tensor([30, 70])) == 0


@pytest.mark.parametrize("count", [8, 40])
def test_inputs_of_one_population_do_not_drift(count: int) -> None:
    reference = InputReference.of(batches(40))
    for seed in range(1, 21):
        drift = drift_of(reference, batches(count, seed=seed))
        assert drift.psi < drift.threshold


def test_a_column_that_moves_is_named() -> None:
    drift = drift_of(InputReference.of(batches(40)), batches(10, shift=1.5, seed=1))
    assert drift.name == "[0], column 1"
    assert drift.psi > drift.threshold


def test_a_label_that_is_missing_and_values_that_are_no_numbers_are_drift() -> None:
    reference = InputReference.of(batches(40))
    (labels,) = [feature for feature in reference.features if feature.name == "[1]"]
    assert labels.edges == (0, 1, 2, 3)  # each has a bin of its own
    seen = batches(10, seed=1)
    drift = drift_of(reference, [(x, y.clamp(max=2)) for x, y in seen])
    assert (drift.name, drift.psi > drift.threshold) == ("[1]", True)
    broken = [(torch.where(torch.rand(x.shape) < 0.3, math.nan, x), y) for x, y in seen]
    drift = drift_of(reference, broken)
    assert drift.psi > drift.threshold


def test_a_reference_goes_to_json_and_back(tmp_path: Path) -> None:
    reference = InputReference.of({"x": x, "labels": y} for x, y in batches(5))
    assert [f.name for f in reference.features][-2:] == ["['x'], column 2", "['labels']"]
    reference.save(tmp_path / "inputs.json")
    assert InputReference.load(tmp_path / "inputs.json") == reference


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.pop("samples"), "reference: missing ['samples'], unknown []"),
        (lambda d: d.update(format=7), "has format 7, this fxzero reads 1"),
        (lambda d: d.update(samples=0), "is a reference of no samples, or of no features"),
        (lambda d: d["features"][0]["counts"].pop(), "a count for each of its 11 bins, and has 10"),
        (lambda d: d["features"][0]["edges"].reverse(), "must have finite, ascending edges and"),
        (lambda d: d["features"][0]["edges"].__setitem__(0, "a"), "must be float, not str"),
        (
            lambda d: d["features"][0]["edges"].__setitem__(0, math.nan),
            "inputs.json has a number that is nan",
        ),
    ],
)
def test_references_that_cannot_be_are_refused(tmp_path: Path, change: Any, text: str) -> None:
    path = tmp_path / "inputs.json"
    InputReference.of(batches(5)).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError) as caught:
        InputReference.load(path)
    assert text in str(caught.value)


def test_references_need_batches_of_one_structure() -> None:
    with pytest.raises(UsageError, match=r"a reference needs batches with tensors, and there are"):
        InputReference.of([])
    with pytest.raises(UsageError, match=r"\[1\] is in 1 of 2 batches\n  give batches of one"):
        InputReference.of([(torch.ones(2, 2), torch.ones(2)), (torch.ones(2, 2),)])
    watch = InputWatch(InputReference.of(batches(5)))
    with pytest.raises(
        UsageError, match=r"has 4 features, the inputs have 2, and .* differs\n  make the"
    ):
        watch.add((torch.ones(4, 2),), {})
