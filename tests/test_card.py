"""Training cards: what a plan knows, what follows from what it is told, and what is left open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import gpt_plan

from fxzero.cli import main
from fxzero.errors import UsageError

TOLD: dict[str, Any] = {
    "steps": 36_000,
    "tokens_per_step": 8_192,
    "dollars_per_device_hour": 2.5,
    "watts": 700,
    "grams_co2_per_kwh": 400,
    "power_usage_effectiveness": 1.2,
}


def test_cost_and_energy_follow_from_steps_price_and_watts() -> None:
    plan = gpt_plan()
    assert plan.step_seconds == pytest.approx(1.98)
    data = json.loads(plan.card(**TOLD).to_json())
    assert data["cost"]["device_hours"] == pytest.approx(19.8)
    assert data["cost"]["dollars"] == pytest.approx(49.5)
    assert data["cost"]["tokens"] == 36_000 * 8_192
    assert data["energy"]["kilowatt_hours"] == pytest.approx(19.8 * 0.7 * 1.2)
    assert data["energy"]["kilograms_co2"] == pytest.approx(19.8 * 0.7 * 1.2 * 0.4)


def test_markdown_and_json_hold_the_same_facts() -> None:
    card = gpt_plan().card(**TOLD)
    data = json.loads(card.to_json())
    assert data.pop("schema_version") == 1
    assert [len(section) for section in data.values()] == [*map(len, card.sections.values())]
    rows = [line for line in str(card).splitlines() if line.startswith("| ")]
    assert len(rows) == sum(map(len, data.values())) + len(data)
    assert "| peak of a device | 4.62 GiB |" in rows
    assert "| steps | 36,000 |" in rows
    assert data["memory"]["peak_of_a_device_bytes"] == gpt_plan().peak_bytes
    assert data["precision"]["saved_dtypes"] == ["float32"]
    assert data["versions"]["plan"] == gpt_plan().hash


def test_what_nobody_told_is_marked_and_null() -> None:
    card = gpt_plan().card()
    data = json.loads(card.to_json())
    assert set(data["data_and_use"].values()) == {None}
    assert (data["cost"]["dollars"], data["energy"]["kilowatt_hours"]) == (None, None)
    for name in ("dataset", "licence", "intended use", "evaluation", "dollars", "steps"):
        assert f"| {name} | **TO BE FILLED IN** |" in str(card)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be positive"),
        ({"watts": float("nan")}, "watts=nan must be positive"),
        ({"power_usage_effectiveness": 0.5}, "must be at least 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gpt_plan().card(**changes)


def test_text_of_a_plan_cannot_break_the_table() -> None:
    card = str(gpt_plan(notes=("a | b\n<script>",)).card())
    assert "| note 1 | a \\| b?&lt;script> |" in card


@pytest.mark.parametrize("suffix", [".md", ".json"])
def test_the_command_writes_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("fxzero.cli._make_plan", lambda **_: gpt_plan())
    path = tmp_path / f"card{suffix}"
    assert main(["plan", "gpt2", "--card", str(path)]) == 0
    card = gpt_plan().card()
    assert path.read_text() == (card.to_json() if suffix == ".json" else str(card))


def test_a_card_with_another_suffix_is_refused_before_planning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "gpt2", "--card", "card.txt"]) == 2
    assert "card.txt must end in .md or .json" in capsys.readouterr().err
