"""The most bytes that a rank holds in a step, found by playing its part on fake tensors.

What a rank holds depends on how many micro-batches its stages have in flight, on what waits for
weight gradients, and on what the functions that run hold themselves.  So the rank's actions are
played in their order with these very functions, on tensors without memory (``fxzero/rehearsal.py``
counts them).  Weights, their gradients and optimizer states, and the batch, are there throughout.

    F0.0 F0.1 B0.0 ...    what two forwards left, and the first backward beside it

Messages count as ``Mailbox`` keeps them: what was sent until it is certain that it was read, what
comes from where it is let in, early if it was sent before what is waited for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxzero import _torch
from fxzero.generated import without_kernels
from fxzero.passes.partition import Split
from fxzero.pipelining.schedules import Action, Kind, Schedule
from fxzero.pipelining.stages import Routes
from fxzero.pipelining.transport import Mailbox, Message, sent_by
from fxzero.rehearsal import Counter, example_of
from fxzero.runtime import Executable


@dataclass(frozen=True)
class Part:
    """A stage as its rank runs it.

    Attributes:
        split: the graphs of a micro-batch that adds to gradients.
        executable: the functions that run them.
        workspaces: bytes that operators need besides while they run, by ``cost.operator_key``.
    """

    split: Split
    executable: Executable
    workspaces: Mapping[str, int]


@dataclass(frozen=True)
class Step:
    """What a rank holds, in bytes: the most while it computes something, and behind it."""

    during: int
    after: int


def rehearse_rank(
    schedule: Schedule,
    rank: int,
    routes: Routes,
    parts: Mapping[int, Part],
    static_bytes: int,
    device: str,
) -> tuple[Step, ...]:
    """What the rank holds in each of its forwards and backwards.

    Sizes are exact: that CUDA's allocator rounds them up is not counted.

    Raises whatever generated code does that cannot run on fake tensors.

    Args:
        parts: of each of the rank's stages.
        static_bytes: what lives throughout.
        device: "cpu" or "cuda", which the rank runs on.
    """
    workspaces = {key: size for part in parts.values() for key, size in part.workspaces.items()}
    counter = Counter(granularity=1, device=device, workspaces=workspaces)
    with _torch.FakeTensorMode(allow_non_fake_inputs=True), counter:
        play = _Play(schedule, rank, routes, parts)
        counter.restart(static_bytes)
        steps = []
        for action in schedule.orders[rank]:
            play.perform(action)
            steps.append(Step(counter.peak, counter.current))
            counter.restart(counter.current)
    return tuple(steps)


class _Play:
    """A rank's stages on fake tensors."""

    def __init__(
        self, schedule: Schedule, rank: int, routes: Routes, parts: Mapping[int, Part]
    ) -> None:
        self.schedule, self.rank, self.routes, self.parts = schedule, rank, routes, parts
        self.static = {stage: _static(part.split) for stage, part in parts.items()}
        self.existing = {
            stage: [example_of(node) for node in part.split.backward_inputs()[1]]
            for stage, part in parts.items()
        }
        self.executables = {
            stage: _without_kernels(part.executable) for stage, part in parts.items()
        }
        self.mail = Mailbox(schedule, routes, rank)
        self.saved: dict[tuple[int, int], list[Any]] = {}
        self.received: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.waiting: dict[tuple[int, int], list[Any]] = {}

    def perform(self, action: Action) -> None:
        """One action, as ``Runner`` does it; of frozen stages only what they pass on."""
        if action.stage not in self.parts:
            self._pass_on(action)
            return
        if action.kind is Kind.FORWARD:
            self._forward(action)
        if action.kind in (Kind.INPUT_GRADIENT, Kind.BACKWARD):
            self._input_gradient(action)
        if action.kind in (Kind.WEIGHT_GRADIENT, Kind.BACKWARD):
            self._weight_gradient(action)

    def _forward(self, action: Action) -> None:
        stage, key = action.stage, (action.stage, action.microbatch)
        split, ports = self.parts[stage].split, self.routes.ports[stage]
        names = iter(ports.received)
        count = len(ports.leaves)
        received, arguments = [], []
        for role, value in zip(split.inputs, self.static[stage], strict=True):
            if role.kind != "input" or role.index < count:
                arguments.append(value)
                continue
            name = next(names)
            message = Message(name, False, self.routes.passed[name].stage, stage, action.microbatch)
            received.append(self.mail.receive(message))
            arguments.append(received[-1])
        results = self.executables[stage].forward(arguments)
        outputs, self.saved[key] = results[: split.output_count], results[split.output_count :]
        self.received[key] = received
        results.clear()
        self._send(action, dict(zip(ports.sent, outputs, strict=False)))

    def _pass_on(self, action: Action) -> None:
        if action.kind is Kind.FORWARD:
            passed = (self.routes.passed[name] for name in self.routes.ports[action.stage].sent)
            self._send(action, {v.name: torch.empty(v.shape, dtype=v.dtype) for v in passed})

    def _input_gradient(self, action: Action) -> None:
        stage, key = action.stage, (action.stage, action.microbatch)
        split, executable = self.parts[stage].split, self.executables[stage]
        tangents = []
        sent = self.routes.ports[stage].sent
        for output, node in zip(split.tangents, split.backward_inputs()[2], strict=True):
            if output < len(sent):
                tangents.append(self._gradient(sent[output], action))
            else:
                tangents.append(example_of(node))
        arguments = [*self.saved.pop(key), *self.existing[stage], *tangents]
        if executable.halves is not None:
            gradients, self.waiting[key] = executable.halves.begin(arguments)
        else:
            gradients = dict(enumerate(executable.backward(arguments)))
        tangents.clear()  # autograd holds what it was given until it returns
        inputs = [gradients.get(at) for at in split.input_gradients]
        del self.received[key]
        received = self.routes.ports[stage].received
        trained = [name for name in received if self.routes.passed[name].trains]
        self._send(action, dict(zip(trained, inputs, strict=False)))

    def _weight_gradient(self, action: Action) -> None:
        halves = self.executables[action.stage].halves
        if halves is not None:
            halves.finish(self.waiting.pop((action.stage, action.microbatch)))

    def _gradient(self, name: str, action: Action) -> torch.Tensor:
        """The sum of what a value's readers send back."""
        found = [
            self.mail.receive(Message(name, True, reader, action.stage, action.microbatch))
            for reader in reversed(self.routes.passed[name].readers)
        ]
        return functools.reduce(torch.add, found)

    def _send(self, action: Action, values: Mapping[str, Any]) -> None:
        for message in sent_by(action, self.routes):
            value = values.get(message.value)
            if value is not None:
                self.mail.send(message, value)


def _static(split: Split) -> list[torch.Tensor]:
    """Examples of all that the forward takes."""
    return [example_of(node) for node in split.forward.graph.find_nodes(op="placeholder")]


def _without_kernels(executable: Executable) -> Executable:
    """The same for fake tensors."""
    forward, halves = without_kernels(executable.forward), executable.halves
    if halves is None:
        backward = without_kernels(executable.backward)
        return replace(executable, forward=forward, backward=backward)
    first, second = map(without_kernels, (halves.first, halves.second))
    halves = replace(halves, first=first, second=second)
    return replace(executable, forward=forward, backward=halves.whole, halves=halves)
