"""A model card's section on training: what a Plan knows, and marked places for what it cannot know.

Every fact is written once, with its value for JSON and its text for Markdown, so that the two never
differ.  Cost and energy are of forward and backward passes as they are modelled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fxzero.errors import UsageError
from fxzero.hardware import describe, names
from fxzero.plans import Plan, Value
from fxzero.report import wording
from fxzero.report.wording import printable
from fxzero.units import format_bytes, format_count, format_seconds

SCHEMA_VERSION = 1
_TO_FILL_IN = ("dataset", "licence", "intended use", "limitations", "evaluation", "contact")
_FILL_IN = "**TO BE FILLED IN**"
_BYTES = " bytes"  # ends names of sizes, which are exact in JSON and rounded in Markdown


@dataclass(frozen=True)
class Training:
    """What a plan cannot know of a training; None: not known.

    Attributes:
        steps: of the optimizer.
        tokens_per_step: of all ranks together.
        watts: of a device, host and network not included.
        power_usage_effectiveness: energy of the whole data centre by that of its machines.
    """

    steps: int | None = None
    tokens_per_step: int | None = None
    dollars_per_device_hour: float | None = None
    watts: float | None = None
    grams_co2_per_kwh: float | None = None
    power_usage_effectiveness: float = 1.0

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if number is not None and not 0 < number < math.inf:
                raise UsageError(f"{name}={number} must be positive")
        if self.power_usage_effectiveness < 1:
            raise UsageError(
                f"power_usage_effectiveness={self.power_usage_effectiveness} must be at least 1"
            )


@dataclass(frozen=True)
class Fact:
    """One line: ``value`` for JSON, ``text`` for people; None: somebody has to fill it in."""

    name: str
    value: object
    text: str


@dataclass(frozen=True)
class Card:
    """Facts by section; as text it is Markdown."""

    sections: dict[str, tuple[Fact, ...]]

    def to_markdown(self) -> str:
        """A section of a model card: a table for each part."""
        lines = ["## Training"]
        for title, facts in self.sections.items():
            lines += ["", f"### {title.capitalize()}", "", "| | |", "|---|---|"]
            lines += [f"| {_label(fact)} | {_cell(fact)} |" for fact in facts]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """The same facts as JSON; null where something is to be filled in."""
        data: dict[str, object] = {"schema_version": SCHEMA_VERSION}
        for title, facts in self.sections.items():
            data[_key(title)] = {_key(fact.name): fact.value for fact in facts}
        return json.dumps(data, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes JSON to a file with that suffix, Markdown to others."""
        path = Path(path)
        path.write_text(self.to_json() if path.suffix == ".json" else self.to_markdown())

    def __str__(self) -> str:
        return self.to_markdown()


def make_card(plan: Plan, training: Training) -> Card:
    """The card of a plan; see ``Plan.card``."""
    unknown = tuple(Fact(name, None, "") for name in _TO_FILL_IN)
    return Card(
        {
            "model": tuple(_model(plan)),
            "memory": tuple(_memory(plan)),
            "parallelism": tuple(_parallelism(plan)),
            "precision": tuple(_precision(plan)),
            "cost": tuple(_cost(plan, training)),
            "energy": tuple(_energy(plan, training)),
            "versions": tuple(_versions(plan)),
            "assumptions": tuple(_assumptions(plan)),
            "data and use": unknown,
        }
    )


def _model(plan: Plan) -> Iterator[Fact]:
    model = plan.model
    yield _text("name", model.name)
    yield Fact("parameters", model.parameters, format_count(model.parameters))
    inputs = [printable(shape) for shape in model.inputs]
    yield Fact("inputs of a rank", inputs, ", ".join(inputs))
    yield _text("optimizer", plan.request.optimizer)


def _memory(plan: Plan) -> Iterator[Fact]:
    yield _bytes("peak of a device", plan.peak_bytes)
    if plan.request.memory_budget is not None:
        yield _bytes("memory budget", plan.request.memory_budget)
        yield Fact("fits", plan.fits, wording.verdict(plan))
    yield _bytes("smallest budget with a plan", plan.minimum_budget)
    for role, size in plan.peak.breakdown.items():
        yield _bytes(f"{role} at the peak", size)
    yield _text("recompute", wording.recompute_price(plan))
    if plan.offloaded:
        yield _text("offload", wording.offload_price(plan))


def _parallelism(plan: Plan) -> Iterator[Fact]:
    yield Fact("devices", len(plan.ranks), str(len(plan.ranks)))
    yield _text("kind of device", plan.request.device)
    mesh = dict(plan.request.mesh)
    yield Fact("mesh", mesh, wording.mesh_text(plan) or "one device")
    if mesh:
        yield _text("zero", plan.request.zero)
    if plan.pipeline:
        yield _text("pipeline", wording.pipeline_text(plan.pipeline))


def _precision(plan: Plan) -> Iterator[Fact]:
    """Dtypes of what is alive at the peak."""
    for role in ("parameter", "gradient", "saved"):
        dtypes = sorted({_dtype(v) for v in plan.peak.alive if v.role == role and v.shape})
        if dtypes:
            yield Fact(f"{role} dtypes", dtypes, ", ".join(dtypes))
    size = plan.request.optimizer_bytes_per_parameter
    yield Fact("optimizer bytes per parameter", size, f"{size:.3g}")


def _cost(plan: Plan, training: Training) -> Iterator[Fact]:
    yield Fact("step seconds", plan.step_seconds, f"{format_seconds(plan.step_seconds)}, modelled")
    yield _number("steps", training.steps)
    tokens = _product(training.steps, training.tokens_per_step)
    yield _number("tokens", tokens, "" if tokens is None else format_count(tokens))
    hours = _device_hours(plan, training)
    yield _number("device hours", hours)
    yield _number("dollars per device hour", training.dollars_per_device_hour)
    yield _number("dollars", _product(hours, training.dollars_per_device_hour))


def _energy(plan: Plan, training: Training) -> Iterator[Fact]:
    watts = training.watts or _board_watts(plan)
    hours, effectiveness = _device_hours(plan, training), training.power_usage_effectiveness
    kilowatt_hours = _product(hours, watts, effectiveness / 1000)
    yield _number("watts of a device", watts)
    yield _number("power usage effectiveness", effectiveness)
    yield _number("kilowatt hours", kilowatt_hours)
    yield _number("grams CO2 per kilowatt hour", training.grams_co2_per_kwh)
    kilograms = _product(kilowatt_hours, training.grams_co2_per_kwh, 1 / 1000)
    yield _number("kilograms CO2", kilograms)


def _versions(plan: Plan) -> Iterator[Fact]:
    yield _text("fxzero", plan.fxzero_version)
    yield _text("torch", plan.torch_version)
    yield _text("plan", plan.hash)


def _assumptions(plan: Plan) -> Iterator[Fact]:
    yield _text("time", "forward and backward as modelled; optimizer, data and stops not counted")
    yield _text(
        "energy", "devices at their stated watts all the time; hosts and network by the PUE"
    )
    for index, note in enumerate(plan.notes, 1):
        yield _text(f"note {index}", note)


def _device_hours(plan: Plan, training: Training) -> float | None:
    return _product(training.steps, plan.step_seconds * len(plan.ranks) / 3600)


def _board_watts(plan: Plan) -> float | None:
    """Watts of a device of the library that was planned for; a user's file may be gone."""
    name = plan.request.hardware
    return describe(name).watts if name in names() else None


def _product(*factors: float | None) -> float | None:
    """The product, if all factors are known."""
    known = [factor for factor in factors if factor is not None]
    return math.prod(known) if len(known) == len(factors) else None


def _dtype(value: Value) -> str:
    return printable(value.shape.partition("[")[0])


def _text(name: str, text: str) -> Fact:
    return Fact(name, printable(text), printable(text))


def _bytes(name: str, size: int) -> Fact:
    return Fact(f"{name}{_BYTES}", size, format_bytes(size))


def _number(name: str, number: float | None, text: str = "") -> Fact:
    if number is None or text:
        return Fact(name, number, text)
    large = isinstance(number, int) or number >= 1000
    return Fact(name, number, f"{number:,.0f}" if large else f"{number:.4g}")


def _label(fact: Fact) -> str:
    return fact.name.removesuffix(_BYTES)


def _cell(fact: Fact) -> str:
    return _FILL_IN if fact.value is None else fact.text.replace("|", "\\|").replace("<", "&lt;")


def _key(name: str) -> str:
    return name.replace(" ", "_").lower()
