"""``fxzero.search``: the fastest way to train on so many devices, and why others are slower.

The model is traced once; all ways are estimated from its sketch.  What is chosen is an estimate:
the plan of a way, ``found.plan()``, is made in full.

    goal         what is asked
    time         the fastest way on all devices
    devices      the fewest devices that the model fits on, up to all
    batch        the most examples a step that fit without adding gradients up
    cost         the cheapest step, on any number of devices up to all
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fxzero.cluster.estimate import Estimate, Estimator
from fxzero.cluster.sketch import Sketch
from fxzero.cluster.ways import Way, ways
from fxzero.errors import UsageError, unknown_option
from fxzero.forecast import plan as plan_of
from fxzero.hardware import Hardware, describe
from fxzero.mesh import Mesh
from fxzero.microbatches import Batch, Call, loss_of
from fxzero.options import Options, call_arguments, check_options
from fxzero.pipelining.footprint import Levels
from fxzero.pipelining.forecast import Forecaster, Setting
from fxzero.pipelining.request import Pipeline
from fxzero.plans import Plan
from fxzero.precision import Precision
from fxzero.timeline import tensor_bytes

GOALS = ("time", "devices", "batch", "cost")
_STAGES = (0, 1, 2, 3)
# What may travel, where codes may: int8 both ways, and ZeRO++'s mix.
_SENDS = ((None, None), ("int8", "int8"), ("int8", "int4"))
# How many ways are planned in full before the first is taken whether it fits or not.
_PLANNED = 4


@dataclass(frozen=True)
class Question:
    """What is searched for, enough to plan any way in full.

    Attributes:
        model, call: with the smallest micro-batch.
        global_batch: examples of a step of all devices.
        smallest: examples of the smallest micro-batch.
        price: of a device-hour; None: not known.
    """

    model: nn.Module = field(repr=False)
    call: Call = field(repr=False)
    options: Options = field(repr=False)
    hardware: Hardware
    devices: int
    global_batch: int
    smallest: int
    goal: str
    price: float | None
    optimizers: tuple[object, ...]
    loss_fn: Any
    name: str


@dataclass(frozen=True)
class Found:
    """All ways, the best first.

    Attributes:
        ranked: ways that fit by what the goal asks for least of, then those that do not, by bytes.
    """

    question: Question
    ranked: tuple[Estimate, ...]

    @property
    def best(self) -> Estimate:
        """The first; it may not fit."""
        return self.ranked[0]

    @property
    def fits(self) -> bool:
        return self.best.fits

    def examples(self, estimate: Estimate) -> int:
        """Of a step."""
        way = estimate.way
        return (
            self.question.smallest * way.microbatch * way.microbatches * way.replicate * way.shard
        )

    def cost(self, estimate: Estimate) -> float | None:
        """Of a step, in the currency of the price; None: no price was given."""
        price = self.question.price
        return None if price is None else price * devices_of(estimate.way) * estimate.seconds / 3600

    def reason(self, estimate: Estimate) -> str:
        """Why a way is not the best one: what it has most of besides."""
        best = self.best
        if not estimate.fits:
            return "does not fit"
        if estimate is best:
            return ""
        more = {
            "recompute": estimate.recompute - best.recompute,
            "waits for links": estimate.links - best.links,
            "waits for other stages": estimate.bubble - best.bubble,
            "uneven stages" if estimate.way.schedule else "smaller micro-batches": (
                estimate.compute - best.compute
            ),
            "optimizer": estimate.update - best.update,
        }
        return max(more, key=more.__getitem__)

    def plan(self, estimate: Estimate | None = None, **options: Any) -> Plan:
        """The plan of a way, made in full.

        Args:
            estimate: None: the best way whose plan fits, of the first few.
            options: of ``fxzero.plan``, besides.
        """
        if estimate is not None:
            return _planned(self.question, estimate.way, options)
        first = found = _planned(self.question, self.best.way, options)
        for each in self.ranked[1:_PLANNED]:
            if found.fits:
                return found
            found = _planned(self.question, each.way, options)
        return found if found.fits else first

    def __str__(self) -> str:
        from fxzero.report.search import render

        return render(self)


def devices_of(way: Way) -> int:
    """How many a way uses."""
    return way.pipeline * way.replicate * way.shard


def search(
    model: nn.Module,
    example_inputs: Any = (),
    *,
    kwargs: dict[str, Any] | None = None,
    hardware: object,
    devices: int,
    global_batch: int | None = None,
    goal: str = "time",
    price: float | None = None,
    memory_budget: object = None,
    optimizer: object = "adamw",
    precision: Any = None,
    recompute: Any = "auto",
    offload: bool = False,
    zero: Any = "auto",
    send_codes: bool = False,
    inner: str = "eager",
    loss_fn: Any = None,
    name: str | None = None,
) -> Found:
    """Ways to train a model on many devices, estimated and ranked.

    Args:
        example_inputs: of the smallest micro-batch that may be taken, one example for most models.
        hardware: name of a description, or the path of a TOML file.
        devices: how many there are.
        global_batch: examples of a step of all devices; None: as many as each has one micro-batch.
        goal: "time", "devices", "batch" or "cost".
        price: of a device-hour, which "cost" needs.
        memory_budget: of each device; None: its memory less a reserve.
        optimizer: what holds states, or a list of what may.
        zero: the stage, or "auto": any.
        send_codes: whether gathers and reductions may move codes of 8 or 4 bits.

    Raises:
        UsageError: an option that cannot be right, or a global batch that cannot be divided.
        CaptureError, DeviceError: see ``fxzero.compile``.
    """
    call = call_arguments(example_inputs, kwargs)
    described = describe(hardware)
    optimizers = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
    options = check_options(
        device=described.device,
        memory_budget=memory_budget,
        optimizer=optimizers[0],
        recompute=recompute,
        inner=inner,
        offload=offload,
        precision=precision,
        zero=zero,
        mesh=Mesh({}),
        hardware=described,
    )
    batch = Batch.of(*call)
    total = _checked(devices, global_batch, goal, price, batch.size)
    called = name or type(model).__name__
    question = Question(
        model=model,
        call=call,
        options=options,
        hardware=described,
        devices=devices,
        global_batch=total,
        smallest=batch.size,
        goal=goal,
        price=price,
        optimizers=optimizers,
        loss_fn=loss_fn,
        name=called,
    )
    estimator = _estimator(question, batch)
    stages = _STAGES if zero == "auto" else (int(zero),)
    sends = _SENDS if send_codes else _SENDS[:1]
    found = _answers(question, estimator, total // batch.size, stages, sends)
    if not found:
        raise UsageError(
            f"a global batch of {total} cannot be divided over {devices} devices\n"
            f"  give a multiple of {batch.size}, and of a divisor of {devices}"
        )
    return Found(question, tuple(sorted(found, key=_order(question))))


def _checked(
    devices: int, global_batch: int | None, goal: str, price: float | None, smallest: int
) -> int:
    """The global batch."""
    if goal not in GOALS:
        raise unknown_option(goal, GOALS, where="goal")
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise UsageError(f"devices={devices!r} must be a positive number")
    if price is not None and not 0 < price < float("inf"):
        raise UsageError(f"price={price!r} must be a positive number for a device-hour")
    if goal == "cost" and price is None:
        raise UsageError('goal="cost" needs the price of a device-hour')
    total = devices * smallest if global_batch is None else global_batch
    if isinstance(total, bool) or not isinstance(total, int) or total < 1 or total % smallest:
        raise UsageError(
            f"global_batch={total!r} must be a multiple of the smallest micro-batch, {smallest}"
        )
    return total


def _estimator(question: Question, batch: Batch) -> Estimator:
    loss = functools.partial(loss_of, loss_fn=question.loss_fn)
    forecaster = Forecaster(question.model, loss, question.options, question.name)
    setting = Setting(Pipeline(), batch, 1, Mesh({}), question.options)
    chooser = forecaster.chooser(setting)
    levels = Levels.of(chooser.profile, question.options, forecaster.costs)
    sketch = Sketch(chooser, levels, question.optimizers)
    budget, held = question.options.memory_budget, tensor_bytes(batch.leaves)
    return Estimator(sketch, question.hardware, budget, held)


def _answers(
    question: Question,
    estimator: Estimator,
    batch: int,
    stages: Sequence[int],
    sends: Sequence[tuple[str | None, str | None]],
) -> list[Estimate]:
    """Estimates of all ways that the goal asks about.

    Args:
        batch: times the smallest micro-batch.
    """

    def on(devices: int, examples: int) -> list[Estimate]:
        node = question.hardware.devices
        given = ways(
            devices,
            examples,
            units=estimator.sketch.units,
            node=node,
            zero=stages,
            optimizers=len(question.optimizers),
            sends=sends,
        )
        return list(_estimates(estimator, given))

    if question.goal == "time":
        return on(question.devices, batch)
    if question.goal == "batch":
        return _largest_batch(question.devices, on)
    counts = [n for n in range(1, question.devices + 1) if question.devices % n == 0]
    if question.goal == "cost":
        return [estimate for count in counts for estimate in on(count, batch)]
    for count in counts:
        found = on(count, batch)
        if any(each.fits for each in found):
            break
    return found


def _estimates(estimator: Estimator, given: Iterable[Way]) -> Iterable[Estimate]:
    for way in given:
        try:
            yield estimator(way)
        except UsageError:  # no such schedule of so few micro-batches
            continue


def _largest_batch(devices: int, on: Any) -> list[Estimate]:
    """Ways of one micro-batch a device, of as many examples as fit."""

    def single(local: int) -> list[Estimate]:
        return [each for each in on(devices, local * devices) if each.way.microbatches == 1]

    fitting, low, high = single(1), 1, 2
    if not any(each.fits for each in fitting):
        return fitting
    found = single(high)
    while any(each.fits for each in found):
        fitting, low, high = found, high, 2 * high
        found = single(high)
    while high - low > 1:
        middle = (low + high) // 2
        found = single(middle)
        if any(each.fits for each in found):
            fitting, low = found, middle
        else:
            high = middle
    return fitting


def _order(question: Question) -> Any:
    def key(estimate: Estimate) -> tuple[Any, ...]:
        paid = devices_of(estimate.way) if question.goal == "cost" else 1
        asked = paid * estimate.seconds if estimate.fits else float(estimate.required_bytes)
        return not estimate.fits, asked, str(estimate.way)

    return key


def _planned(question: Question, way: Way, options: dict[str, Any]) -> Plan:
    whole = Batch.of(*question.call).times(way.microbatch)
    pipeline = None
    if way.schedule:
        whole = whole.times(way.microbatches)
        pipeline = Pipeline(way.stages, way.schedule, way.microbatches)
    args, kwargs = whole.structure.fill(list(whole.leaves))
    asked: Precision = question.options.precision
    weights, gradients = way.sends
    found = plan_of(
        question.model,
        args,
        kwargs=kwargs,
        name=question.name,
        hardware=question.hardware,
        mesh=dict(way.mesh.sizes) or None,
        zero=way.zero,
        pipeline=pipeline,
        optimizer=question.optimizers[way.optimizer],
        memory_budget=question.options.memory_budget,
        recompute=question.options.recompute,
        offload=question.options.offload,
        inner=question.options.inner,
        precision=replace(asked, send_weights=weights, send_gradients=gradients),
        loss_fn=question.loss_fn,
        accumulate=pipeline is None and way.microbatches > 1,
        **options,
    )
    if pipeline is None and way.microbatches > 1:
        note = f"step times are of one of {way.microbatches} micro-batches"
        found = replace(found, notes=(*found.notes, note))
    return found
