"""Watches a training: how fast it is, what it takes, and whether it is still right.

    monitor = fxzero.monitor.Monitor(model, optimizer=optimizer, sinks=[JsonLines("run.jsonl")])
    for inputs in loader:
        with monitor.step(*inputs) as step:
            loss = model(*inputs)
            loss.backward()
            step.loss(loss)
            optimizer.step()
            optimizer.zero_grad()

Every step's loss is kept, and every N steps a record is made: ranks tell each other what they saw
in one small collective, so that all of them decide alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fxzero.agreement import Agreement
from fxzero.checkpoint import Loaded
from fxzero.clipping import gradient_norm
from fxzero.errors import AlarmWarning, FxzeroError, UsageError, described
from fxzero.mesh import Mesh
from fxzero.monitor import planned, shadow
from fxzero.monitor.actions import Actions
from fxzero.monitor.alarms import SeriesWatch, Thresholds, check_actions
from fxzero.monitor.checks import Checks
from fxzero.monitor.clock import Clock
from fxzero.monitor.inputs import InputReference, count_samples, count_tokens
from fxzero.monitor.peaks import PeakMeter
from fxzero.monitor.record import Alarm, Record
from fxzero.monitor.sinks import Sink, as_sink
from fxzero.monitor.window import Told, Window, told
from fxzero.units import format_bytes

# Steps between records: ranks tell each other the loss of each.
_MOST = 10_000


class Step:
    """One step of the loop, inside ``with monitor.step(...)``.

    Attributes:
        number: which it is, counted from 1.
        loaded: what was loaded if an alarm rolled back behind this step, for schedulers and
            loaders to follow; None: nothing was.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.loaded: Loaded | None = None
        self.losses: list[torch.Tensor] = []
        self.norm: torch.Tensor | None = None

    def loss(self, value: torch.Tensor | float) -> None:
        """Tells the step's loss; that of several micro-batches is their mean.

        Raises:
            UsageError: it is no single number.
        """
        self.losses.append(_scalar(value, "loss"))

    def gradient_norm(self, value: torch.Tensor | float) -> None:
        """Tells the norm of the gradients, as ``fxzero.clip_grad_norm_`` returns it.

        Without it the monitor computes the norm itself, every N steps.

        Raises:
            UsageError: it is no single number.
        """
        self.norm = _scalar(value, "gradient_norm")


class Monitor:
    """Watches the steps of a training loop.

    On many ranks all of them make it, with the same settings, and run the same steps.

    Args:
        model: compiled by ``fxzero.compile``, or any module, of which there is less to say.
        every: a record is made, and alarms are looked for, behind the first step and then every so
            many, at most 10,000.
        optimizer: what updates the weights; it tells when gradients are complete.
        sinks: where records go: ``JsonLines``, ``TensorBoard``, ``Prometheus``, functions.
        actions: for kinds of alarms what to do: "warn" (all kinds, unless they stand here),
            "checkpoint", "rollback", "stop", or several of them; () only records.
        checkpoints: the directory that the loop saves its checkpoints in; their steps are numbers
            of finished steps.
        shadow_every: how often a micro-batch runs once more without any pass; 0: never; None: every
            1,000 steps where the memory budget has room for that.
        inputs: an ``InputReference``, or the path of one, that inputs are compared with.
        hardware: what MFU is a share of, as ``fxzero.plan`` takes it; None: known CUDA devices.
        thresholds: where alarms begin.

    Raises:
        UsageError: a setting that cannot be right, or a sink that cannot be opened.
        DivergenceError: ranks have different settings.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 50,
        optimizer: torch.optim.Optimizer | None = None,
        sinks: Sequence[Any] = (),
        actions: Mapping[str, str | Sequence[str]] | None = None,
        checkpoints: str | Path | None = None,
        shadow_every: int | None = None,
        inputs: InputReference | str | Path | None = None,
        hardware: object = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        _check_count("every", every, 1, _MOST)
        if shadow_every is not None:
            _check_count("shadow_every", shadow_every, 0)
            if shadow_every and (why := shadow.obstacle(model)):
                raise UsageError(f"shadow_every={shadow_every} cannot be: {why}\n  leave it out")
        self.model, self.every, self.optimizer = model, every, optimizer
        self._steps, self._steps_agreed = 0, True
        self._thresholds = thresholds = thresholds or Thresholds()
        reference = InputReference.load(inputs) if isinstance(inputs, str | Path) else inputs
        by_kind = check_actions(actions)
        self._actions = Actions(by_kind, model, optimizer, checkpoints)
        self._agreement = _agreement_of(model)
        self._agree((every, shadow_every, sorted(by_kind.items()), thresholds, reference))
        self._series = SeriesWatch(thresholds)
        self._checks = Checks(model, self._agreement, thresholds, reference, shadow_every)
        self._window = Window(every)
        self._clock = Clock(model)
        self._peak = PeakMeter(model, optimizer)
        self._operations = planned.Operations()
        self._hardware = planned.hardware_of(model, hardware)
        self._own_seconds = 0.0
        self._notes = self._limits()
        self._begun = self._inside = self._misses_norm = False
        self._sinks = self._opened([as_sink(sink) for sink in sinks])

    @property
    def steps(self) -> int:
        """How many steps are finished; set it when training goes on from a checkpoint."""
        return self._steps

    @steps.setter
    def steps(self, count: int) -> None:
        _check_count("steps", count, 0)
        self._steps, self._steps_agreed = count, False
        self._window.clear()

    @contextlib.contextmanager
    def step(self, *args: Any, **kwargs: Any) -> Iterator[Step]:
        """One step of the loop: forward, backward and the optimizer's step are inside.

        Args:
            args, kwargs: the inputs of the model in this step, as it is called, or as
                ``model.step`` is.  They are counted, compared with the reference, and used for the
                shadow check.

        Raises:
            AlarmError: behind the step, on every rank, where an alarm's action is "stop".
            UsageError: no rank told a loss, or inputs are not those of the reference, or not those
                that the model was called with.
            DivergenceError: ranks have finished different numbers of steps.
            PeerError: another rank does not answer.
        """
        if self._inside:
            raise UsageError("a step of the monitor began inside another one")
        self._agree_on_steps()
        step = Step(self.steps + 1)
        shadowed = self._checks.wants(step.number)
        due = shadowed or not self._begun or step.number % self.every == 0
        self._clock.begin(due)
        self._inside = True
        try:
            with self._probed(step) if due else contextlib.nullcontext():
                yield step
        finally:
            self._inside = False
        self._clock.end(due)
        self._steps = step.number
        if self._counts:
            self._window.samples += count_samples(args, kwargs)
            self._window.tokens += count_tokens(args, kwargs)
            self._checks.count(args, kwargs)
        self._window.add(step.losses, step.norm)
        if due:
            begin = time.perf_counter()
            self._report(step, args, kwargs)
            self._own_seconds = time.perf_counter() - begin
            self._clock.restart()

    def close(self) -> None:
        """Closes the sinks.  All that they were given is written already."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    @contextlib.contextmanager
    def _probed(self, step: Step) -> Iterator[None]:
        """Inside, the peak is measured, and the norm of gradients when they are complete."""

        def look(*_: Any) -> None:
            if step.norm is None and self._keeps_gradients:
                with self._peak.unseen():
                    step.norm = _norm(self.model)

        # The first step is traced inside, which is no part of it.
        with contextlib.ExitStack() as stack:
            if self._begun:
                stack.enter_context(self._peak.measured())
            if self.optimizer is not None:
                handle = self.optimizer.register_step_pre_hook(look)
                stack.callback(handle.remove)
            yield
            look()
        if step.norm is None and self._keeps_gradients and not self._misses_norm:
            self._misses_norm = True
            self._notes += (
                "no gradient norm: no parameter has a gradient when the step ends\n"
                "  give the Monitor the optimizer, or call step.gradient_norm(norm)",
            )

    def _report(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes a record of the steps since the last one, and acts on it."""
        said = self._tell(step.number)
        if not self._begun:
            self._begun = True
            self._notes += self._checks.settle()
        alarms = [*self._series_alarms(said), *self._checks.look(step.number, said, args, kwargs)]
        if said.excess > self._thresholds.peak:
            alarms.append(self._peak_alarm(step.number, said))
        record = self._record(said)
        try:
            alarms = self._actions.carry_out(alarms, step.number, self._leads)
        except FxzeroError:
            self._write(dataclasses.replace(record, alarms=tuple(alarms)))
            raise
        self._write(dataclasses.replace(record, alarms=tuple(alarms)))
        self._actions.stop(alarms)
        if self._actions.loaded is not None:
            step.loaded = self._actions.loaded
            self._steps = step.loaded.step
            self._checks.forget(self._steps)

    def _tell(self, number: int) -> Told:
        """What all ranks have seen since the last record.

        Raises:
            UsageError: no rank was told a loss; on all of them.
        """
        peak, expected = self._peak.bytes, self._planned.peak_bytes
        steps = len(self._window.losses)
        mine = self._window.numbers(
            number,
            seconds=self._clock.seconds,
            loading=self._clock.loading,
            flops=self._operations.of_step(self.model, self._window.samples // steps),
            peak_bytes=peak,
            excess=peak / expected if peak and expected and self._peak.is_new else 0.0,
            changed=self._checks.changed(),
        )
        self._window.clear()
        every = mine[None]
        if self._agreement is not None:
            every = self._agreement.numbers(mine, f"the monitor's record of step {number}")
        said = told(every, self._window.size)
        missing = [s for s, loss in zip(said.steps, said.losses, strict=True) if loss is None]
        if missing:
            raise UsageError(
                f"no loss was told in step {missing[0]}\n"
                "  call step.loss(loss) inside `with monitor.step(...) as step`"
            )
        return said

    def _series_alarms(self, said: Told) -> list[Alarm]:
        losses = [loss for loss in said.losses if loss is not None]
        alarms = self._series.look(said.steps, losses, said.norms)
        if self._agreement is None or not said.odd:
            return alarms
        ranks = ", ".join(str(self._agreement.ranks[place]) for place in said.odd)
        return [
            dataclasses.replace(alarm, message=f"{alarm.message}, by rank {ranks}")
            if alarm.kind == "not_finite"
            else alarm
            for alarm in alarms
        ]

    def _peak_alarm(self, number: int, said: Told) -> Alarm:
        limit = self._thresholds.peak
        text = (
            f"step {number} took {said.excess:.3g} times the planned peak, threshold {limit:g}: "
            f"{format_bytes(said.peak_bytes or 0)} on the fullest rank"
        )
        return Alarm("peak", number, said.excess, limit, number, text)

    def _record(self, said: Told) -> Record:
        expected, ranks = (
            self._planned,
            1 if self._agreement is None else len(self._agreement.ranks),
        )
        steps, losses = len(said.steps), [loss for loss in said.losses if loss is not None]
        speed = steps * said.seconds
        mfu = None
        if self._hardware is not None and said.flops:
            peak = planned.peak_of(self.model, self._hardware)
            mfu = said.flops / (said.seconds * peak * ranks)
        notes, self._notes = self._notes, ()
        return Record(
            step=said.steps[-1],
            steps=steps,
            time=time.time(),
            loss=losses[-1],
            mean_loss=math.fsum(losses) / steps,
            gradient_norm=next((norm for norm in reversed(said.norms) if norm is not None), None),
            step_seconds=said.seconds,
            loading_seconds=said.loading,
            samples_per_second=said.samples / speed if said.samples else None,
            tokens_per_second=said.tokens / speed if said.tokens else None,
            mfu=mfu,
            measured_peak_bytes=said.peak_bytes,
            planned_peak_bytes=expected.peak_bytes,
            planned_step_seconds=expected.step_seconds,
            planned_recompute_seconds=expected.recompute_seconds,
            planned_communication_seconds=expected.communication_seconds,
            planned_exposed_seconds=expected.exposed_seconds,
            planned_bubble=expected.bubble,
            input_drift=self._checks.drift,
            monitor_seconds=self._own_seconds,
            notes=notes,
        )

    def _write(self, record: Record) -> None:
        """Gives a record to the sinks; one that fails is given no more, and that is said."""
        for sink in [*self._sinks]:
            try:
                sink.write(record)
            except Exception as error:
                self._sinks.remove(sink)
                text = f"the sink {sink!r} failed and is given no more records: {described(error)}"
                self._notes += (text,)
                warnings.warn(text, AlarmWarning, stacklevel=2)

    def _opened(self, sinks: list[Sink]) -> list[Sink]:
        """The sinks of the first rank, open; none on the others."""

        def open_all() -> str:
            for sink in sinks:
                try:
                    sink.open()
                except OSError as error:
                    text = f"the sink {sink!r} cannot be opened: {error.strerror}"
                    raise UsageError(text) from None
            return ""

        if self._agreement is None:
            open_all()
        else:
            self._agreement.of_first(open_all)
        return sinks if self._leads else []

    def _agree(self, settings: tuple[Any, ...]) -> None:
        """Raises DivergenceError if ranks have different settings."""
        if self._agreement is not None:
            digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
            text = f"every={settings[0]}, shadow_every={settings[1]}, settings {digest}"
            advice = "give all ranks the same every, actions, thresholds and inputs"
            self._agreement.on_equal(
                text, [self._agreement.ranks], "ranks have different monitors", advice
            )

    def _agree_on_steps(self) -> None:
        """Raises DivergenceError if ranks were told to go on from different steps."""
        if self._agreement is not None and not self._steps_agreed:
            self._agreement.on_equal(
                f"{self._steps} finished steps",
                [self._agreement.ranks],
                "ranks go on from different steps",
                "set monitor.steps to the step of the checkpoint that all have loaded",
            )
        self._steps_agreed = True

    @property
    def _planned(self) -> planned.Planned:
        return planned.Planned.of(planned.plan_of(self.model))

    @property
    def _leads(self) -> bool:
        return self._agreement is None or self._agreement.leads

    @property
    def _keeps_gradients(self) -> bool:
        state = vars(self.model).get("_fxzero")
        return state is None or not state.options.updates

    @property
    def _counts(self) -> bool:
        """Whether this rank's batch is no other rank's: those of a pipeline are given the same."""
        state = vars(self.model).get("_fxzero")
        if state is None or state.pipeline is None or state.pipeline.joins:
            return True
        return bool(state.pipeline.line.rank == 0)

    def _limits(self) -> tuple[str, ...]:
        """What will not be known, and why."""
        found = []
        if self._hardware is None:
            found.append("no mfu: the peak of this device is not known, give hardware=")
        if self._peak.obstacle:
            found.append(f"no measured peak: {self._peak.obstacle}")
        if not self._keeps_gradients:
            found.append('no gradient norm: update="backward" never has all gradients at once')
        return tuple(found)


def _agreement_of(model: nn.Module) -> Agreement | None:
    """The ranks that train a model together; None: this process does it alone."""
    state = vars(model).get("_fxzero")
    if state is not None:
        owner = state.pipeline or state.ranks
        found: Agreement | None = None if owner is None else owner.agreement
        return found
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    world = dist.get_world_size()
    device = next((p.device.type for p in model.parameters()), "cpu")
    return Agreement(Mesh({"dp": world}, DeviceMesh(device, list(range(world)))))


@torch.no_grad()
def _norm(model: nn.Module) -> torch.Tensor | None:
    """The norm of the gradients, if there are any; all ranks ask together."""
    state = vars(model).get("_fxzero")
    pipelined = state is not None and state.pipeline is not None
    if not pipelined and all(p.grad is None for p in model.parameters()):
        return None
    return gradient_norm(model)


def _scalar(value: torch.Tensor | float, what: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.numel() == 1:
            return value.detach().reshape(())
        raise UsageError(f"step.{what} takes one number, not a tensor {list(value.shape)}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"step.{what} takes a number, not {type(value).__name__}")
    return torch.tensor(float(value), dtype=torch.float64)


def _check_count(name: str, value: object, least: int, most: int | None = None) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not is_count or (most is not None and value > most):  # type: ignore[operator]
        limit = f"at least {least}" + (f" and at most {most}" if most is not None else "")
        raise UsageError(f"{name}={value!r} must be a number of steps, {limit}")
