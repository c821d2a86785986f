"""What is looked at besides losses and norms: weights, inputs, and the graphs themselves.

Each check remembers the latest step that it found in order: a rollback goes behind none that came
later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from fxzero.agreement import Agreement
from fxzero.errors import UsageError
from fxzero.monitor import shadow
from fxzero.monitor.alarms import Thresholds
from fxzero.monitor.fingerprints import disagreement, fingerprints
from fxzero.monitor.inputs import InputReference, InputWatch
from fxzero.monitor.record import Alarm
from fxzero.monitor.window import Told
from fxzero.ties import changed_ties, ties_of

# Samples that are compared with the reference at once, at least.
_SAMPLES = 256


class Checks:
    """The checks of one model.

    Args:
        agreement: the ranks that train together; None: there is one.
        reference: of inputs; None: they are not compared.
        shadow_every: how often a micro-batch runs again; None: as memory allows.

    Attributes:
        drift: the latest population stability index.
    """

    def __init__(
        self,
        model: nn.Module,
        agreement: Agreement | None,
        thresholds: Thresholds,
        reference: InputReference | None,
        shadow_every: int | None,
    ) -> None:
        self.model, self.agreement, self.thresholds = model, agreement, thresholds
        self.shadow_every = shadow_every
        self.drift: float | None = None
        self._inputs = None if reference is None else InputWatch(reference)
        self._ties = ties_of(model)
        self._shadow_waits = False
        self._now: dict[str, int] = {}
        self._before: dict[str, int] | None = None
        self._good: dict[str, int] = {}

    def settle(self) -> tuple[str, ...]:
        """Decides behind the first step what is checked; says what is not, and why."""
        if self.shadow_every is not None:
            return ()
        why = shadow.obstacle(self.model) or shadow.lack_of_memory(self.model)
        self.shadow_every = 0 if why else shadow.EVERY
        return (f"no shadow check: {why}",) if why else ()

    def forget(self, step: int) -> None:
        """Training goes on from an earlier step."""
        self._before = None
        self._good = {kind: min(known, step) for kind, known in self._good.items()}
        if self._inputs is not None:
            self._inputs.forget()

    def wants(self, step: int) -> bool:
        """Whether the step's inputs are to run once more."""
        due = bool(self.shadow_every) and step % (self.shadow_every or 1) == 0
        self._shadow_waits = self._shadow_waits or due
        return due

    def count(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Takes a batch of the loop."""
        if self._inputs is not None:
            self._inputs.add(args, kwargs)

    def changed(self) -> bool | None:
        """Whether this rank's trained weights changed since the last time; None: nobody knows."""
        if self.agreement is None:
            return None
        self._now = fingerprints(self.model)
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        mine = {name: self._now[name] for name in trained if name in self._now}
        before, self._before = self._before, mine
        return None if before is None or not mine else mine != before

    def look(
        self, step: int, said: Told, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[Alarm]:
        """What is not in order behind a step, the same on all ranks."""
        when = f"the monitor's record of step {step}"
        found = [*self._ranks(said, step, when), *self._names(step)]
        checked = ["stale_rank", "weights_differ", "broken_tie"]
        if self._inputs is not None:
            drifted = self._input_drift(step, when)
            checked.append("input_drift")
            found += drifted
        finite = all(loss is not None and math.isfinite(loss) for loss in said.losses)
        if self._shadow_waits and finite and shadow.is_due(self.model):
            self._shadow_waits = False
            checked.append("wrong_gradient")
            found += self._shadow(step, args, kwargs, when)
        ill = {alarm.kind for alarm in found}
        self._good |= {kind: step for kind in checked if kind not in ill}
        return found

    def _ranks(self, said: Told, step: int, when: str) -> Iterator[Alarm]:
        if self.agreement is None:
            return
        pairs = zip(self.agreement.ranks, said.changed, strict=True)
        still = [rank for rank, changed in pairs if changed is False]
        if still and True in said.changed:
            ranks = ", ".join(map(str, still))
            text = f"the weights of rank {ranks} have not changed by step {step}, others' have"
            yield self._alarm("stale_rank", step, len(still), 0, text)
        differing = disagreement(self.model, self._now, self.agreement, when)
        if differing is not None:
            yield self._alarm("weights_differ", step, len(differing.ranks), 1, str(differing))

    def _names(self, step: int) -> Iterator[Alarm]:
        changes = changed_ties(self._ties, ties_of(self.model))
        broken = next((change for change in changes if change.broken), None)
        if broken is not None:
            text = f"{broken.other} was one tensor with {broken.name} and is another"
            yield self._alarm("broken_tie", step, 2, 1, text)

    def _input_drift(self, step: int, when: str) -> Iterator[Alarm]:
        assert self._inputs is not None
        numbers = self._inputs.numbers()
        if self.agreement is not None:
            numbers = self.agreement.reduced(numbers, dist.ReduceOp.SUM, when)
        if numbers[0] < _SAMPLES:
            return
        self._inputs.forget()
        drift = self._inputs.drift(numbers, self.thresholds.input_drift)
        self.drift = drift.psi
        if drift.psi > drift.threshold:
            text = (
                f"input {drift.name} is distributed otherwise than in the reference: population "
                f"stability index {drift.psi:.3g} over {int(numbers[0])} samples, threshold "
                f"{drift.threshold:.3g}"
            )
            yield self._alarm("input_drift", step, drift.psi, drift.threshold, text)

    def _shadow(
        self, step: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], when: str
    ) -> Iterator[Alarm]:
        call = args, dict(kwargs)
        if not shadow.has_trained(self.model, call):
            raise UsageError(
                "the shadow check needs the inputs that the model was called with, and it was not "
                "called with those of monitor.step\n"
                "  give monitor.step the model's inputs, or the Monitor shadow_every=0"
            )
        found = shadow.compare(self.model, call, self.agreement, when)
        if found.difference > found.tolerance:
            guilt = f" because of {found.guilt}" if found.guilt else ""
            text = (
                f"{found.where} differs from eager's by {found.difference:.3g}{guilt}, tolerance "
                f"{found.tolerance:g}; model.verify(*inputs) says more"
            )
            yield self._alarm("wrong_gradient", step, found.difference, found.tolerance, text)

    def _alarm(self, kind: str, step: int, observed: float, threshold: float, text: str) -> Alarm:
        return Alarm(kind, step, observed, threshold, self._good.get(kind, 0), text)
