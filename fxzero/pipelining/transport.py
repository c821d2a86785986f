"""Messages between the ranks of a pipeline: values forwards, their gradients backwards.

Who sends what to whom follows from the schedule alone, so each rank knows in which order every
other one sends to it.  Between two ranks messages arrive in the order in which they were sent; one
that is asked for early is kept until it is read.  Sending waits for nobody.

    rank 0:  F0.0 -> h0     F0.1 -> h0'                      B0.0 <- dh0
    rank 1:              F1.0 <- h0   B1.0 -> dh0    F1.1 <- h0' ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fxzero.failures import Transfer, TransferError
from fxzero.pipelining.line import Line
from fxzero.pipelining.schedules import Action, Kind, Schedule
from fxzero.pipelining.stages import Passed, Routes

# How many messages of each rank may be on their way before they are asked for.
_AHEAD = 1


@dataclass(frozen=True)
class Message:
    """A value, or the gradient of one, of one micro-batch, from stage to stage."""

    value: str
    is_gradient: bool
    source: int
    target: int
    microbatch: int


def sent_by(action: Action, routes: Routes) -> list[Message]:
    """What a stage sends when the action is done."""
    here, microbatch = action.stage, action.microbatch
    ports, passed = routes.ports[here], routes.passed
    if action.kind is Kind.FORWARD:
        pairs = [(name, reader) for name in ports.sent for reader in passed[name].readers]
        return [Message(name, False, here, reader, microbatch) for name, reader in pairs]
    if action.kind is Kind.WEIGHT_GRADIENT:
        return []
    values = [passed[name] for name in ports.received if passed[name].trains]
    return [Message(value.name, True, here, value.stage, microbatch) for value in values]


class Unread:
    """What was sent to other ranks, until it is certain that they have read it.

    A message is read by an action that needs it; that has happened when its rank has sent what it
    sends later.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.placement = schedule.placement
        self.place: dict[tuple[bool, int, int], int] = {}
        for order in schedule.orders:
            for place, action in enumerate(order):
                if action.kind is not Kind.WEIGHT_GRADIENT:
                    backward = action.kind is not Kind.FORWARD
                    self.place[backward, action.stage, action.microbatch] = place
        self.items: dict[int, list[tuple[int, Any]]] = {}

    def add(self, message: Message, item: Any) -> None:
        """Something to keep until the message is read."""
        read_at = self.place[message.is_gradient, message.target, message.microbatch]
        self.items.setdefault(self.placement[message.target], []).append((read_at, item))

    def heard(self, message: Message) -> list[Any]:
        """What is certain to have been read when this message has come."""
        rank = self.placement[message.source]
        now = self.place[message.is_gradient, message.source, message.microbatch]
        items = self.items.pop(rank, [])
        self.items[rank] = [entry for entry in items if entry[0] > now]
        return [item for read_at, item in items if read_at <= now]


class Mailbox:
    """One rank's messages in one step, however they travel."""

    def __init__(self, schedule: Schedule, routes: Routes, rank: int) -> None:
        self.placement, self.rank = schedule.placement, rank
        self.passed: Mapping[str, Passed] = routes.passed
        self.here: dict[Message, torch.Tensor] = {}
        self.unread = Unread(schedule)
        self.expected: dict[int, deque[Message]] = {}
        self.coming: dict[int, deque[tuple[Message, Any, torch.Tensor]]] = {}
        for source, order in enumerate(schedule.orders):
            messages = (m for action in order for m in sent_by(action, routes))
            mine = deque(m for m in messages if self.placement[m.target] == rank)
            if mine and source != rank:
                self.expected[source], self.coming[source] = mine, deque()

    def send(self, message: Message, tensor: torch.Tensor) -> None:
        """Sends without waiting; the tensor must not be written to afterwards."""
        target = self.placement[message.target]
        if target == self.rank:
            self.here[message] = tensor
            return
        tensor = tensor.contiguous()
        self.unread.add(message, (message, self._start_sending(message, tensor), tensor))

    def receive(self, message: Message) -> torch.Tensor:
        """Waits for a message."""
        source = self.placement[message.source]
        while message not in self.here:
            self._await_next(source)
        if source != self.rank:
            for sent in self.unread.heard(message):
                self._wait(*sent)
            self._expect(source, _AHEAD)
        return self.here.pop(message)

    def finish(self) -> None:
        """Waits until all that was sent has left."""
        for items in self.unread.items.values():
            for _, sent in items:
                self._wait(*sent)
            items.clear()

    def _await_next(self, source: int) -> None:
        self._expect(source, 1)
        message, work, tensor = self.coming[source].popleft()
        self._wait(message, work, tensor)
        self.here[message] = tensor

    def _expect(self, source: int, count: int) -> None:
        """Lets the next messages of a rank come in."""
        expected, coming = self.expected[source], self.coming[source]
        while expected and len(coming) < count:
            message = expected.popleft()
            value = self.passed[message.value]
            tensor = self._buffer(value)
            coming.append((message, self._start_receiving(message, tensor), tensor))

    def _buffer(self, value: Passed) -> torch.Tensor:
        """Where a message will be."""
        return torch.empty(value.shape, dtype=value.dtype)

    def _start_sending(self, message: Message, tensor: torch.Tensor) -> Any:
        """What ``_wait`` takes."""

    def _start_receiving(self, message: Message, tensor: torch.Tensor) -> Any:
        """What ``_wait`` takes."""

    def _wait(self, message: Message, work: Any, tensor: torch.Tensor) -> None:
        """Returns when a message is there, or has left."""


class Transport(Mailbox):
    """Messages between processes."""

    def __init__(
        self, schedule: Schedule, routes: Routes, line: Line, device: torch.device
    ) -> None:
        super().__init__(schedule, routes, line.rank)
        self.line, self.device = line, device

    def _buffer(self, value: Passed) -> torch.Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device=self.device)

    def _start_sending(self, message: Message, tensor: torch.Tensor) -> Any:
        line, target = self.line, self.placement[message.target]
        try:
            return dist.isend(tensor, line.members[target], group=line.between(self.rank, target))
        except RuntimeError as error:
            raise self._failed(message, tensor, error) from error

    def _start_receiving(self, message: Message, tensor: torch.Tensor) -> Any:
        line, source = self.line, self.placement[message.source]
        try:
            return dist.irecv(tensor, line.members[source], group=line.between(source, self.rank))
        except RuntimeError as error:
            raise self._failed(message, tensor, error) from error

    def _wait(self, message: Message, work: Any, tensor: torch.Tensor) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._failed(message, tensor, error) from error

    def _failed(self, message: Message, tensor: torch.Tensor, error: RuntimeError) -> TransferError:
        source, target = self.placement[message.source], self.placement[message.target]
        name = f"the gradient of {message.value}" if message.is_gradient else message.value
        transfer = Transfer(
            f"{'send' if source == self.rank else 'receive'} of {name} from stage {message.source} "
            f"to stage {message.target} for micro-batch {message.microbatch}",
            tensor.nbytes,
            "pp",
            [self.line.members[source], self.line.members[target]],
        )
        return TransferError(transfer, error)
