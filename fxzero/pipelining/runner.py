"""Runs one rank's part of a schedule: forwards and backwards of its stages, and messages.

A stage's micro-batch is one node of autograd, as a whole model's step is (``runtime.py``); values
that it receives are leaves, whose gradients go back to their makers.  Nothing but the edges into
that node is kept of what it returned.

    F1.0   receive h0; h1 = stage1(h0); send h1
    B1.0   receive dh1; run the node with it; send h0.grad
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fxzero.pipelining.schedules import Action, Kind, Schedule
from fxzero.pipelining.stages import Routes
from fxzero.pipelining.transport import Message, Transport, sent_by

# (stage, micro-batch, leaves and received values) -> results, attached to autograd; and what
# stands for the gradients of weights, if these are computed apart.
RunStage = Callable[
    [int, int, list[torch.Tensor]], tuple[Sequence[torch.Tensor], torch.Tensor | None]
]


@dataclass(frozen=True)
class _InFlight:
    """A micro-batch between a stage's forward and its backward.

    Attributes:
        received: values whose gradients are sent back, by name.
        edges: the results that receive gradients, by name; the loss has none.
        loss: the edge of the loss and its gradient, in the last stage.
        weights: what stands for the gradients of weights, if these are computed apart.
    """

    received: dict[str, torch.Tensor]
    edges: dict[str, GradientEdge]
    loss: tuple[GradientEdge, torch.Tensor] | None
    weights: torch.Tensor | None


class Runner:
    """One step of one rank.

    Args:
        leaves: the flat batch of each micro-batch.
        run_stage: the forward of one stage of this rank.

    Attributes:
        current: what it is doing.
    """

    def __init__(
        self,
        schedule: Schedule,
        routes: Routes,
        transport: Transport,
        leaves: Sequence[Sequence[torch.Tensor]],
        run_stage: RunStage,
    ) -> None:
        self.schedule = schedule
        self.routes = routes
        self.transport = transport
        self.leaves = leaves
        self.run_stage = run_stage
        self.in_flight: dict[tuple[int, int], _InFlight] = {}
        self.waiting: dict[tuple[int, int], torch.Tensor | None] = {}
        self.losses: list[torch.Tensor] = []
        self.most_in_flight: dict[int, int] = {}
        self.current: Action | None = None

    def run(self) -> list[torch.Tensor]:
        """The losses of all micro-batches, each divided by their number; none without a last stage.

        Gradients are added to those of the parameters.
        """
        perform = {
            Kind.FORWARD: self._forward,
            Kind.INPUT_GRADIENT: self._input_gradient,
            Kind.WEIGHT_GRADIENT: self._weight_gradient,
            Kind.BACKWARD: self._backward,
        }
        for action in self.schedule.orders[self.transport.rank]:
            self.current = action
            perform[action.kind](action)
        self.current = None
        self.transport.finish()
        return self.losses

    def _forward(self, action: Action) -> None:
        stage, microbatch = action.stage, action.microbatch
        ports, passed = self.routes.ports[stage], self.routes.passed
        received = {}
        for name in ports.received:
            message = Message(name, False, passed[name].stage, stage, microbatch)
            value = self.transport.receive(message).detach()
            received[name] = value.requires_grad_(passed[name].trains)
        leaves = [self.leaves[microbatch][i] for i in ports.leaves]
        found, weights = self.run_stage(stage, microbatch, [*leaves, *received.values()])
        results = list(found)
        del found
        sent = dict(zip(ports.sent, results, strict=False))
        loss = results[len(ports.sent) :]
        results.clear()
        for message in sent_by(action, self.routes):
            self.transport.send(message, sent[message.value].detach())
        self.losses += [(value / self.schedule.microbatches).detach() for value in loss]
        self.in_flight[stage, microbatch] = _InFlight(
            received={n: value for n, value in received.items() if passed[n].trains},
            edges={n: get_gradient_edge(value) for n, value in sent.items() if passed[n].trains},
            loss=(get_gradient_edge(loss[0]), self._share(loss[0])) if loss else None,
            weights=weights,
        )
        held = sum(of == stage for of, _ in self.in_flight)
        self.most_in_flight[stage] = max(self.most_in_flight.get(stage, 0), held)

    def _share(self, loss: torch.Tensor) -> torch.Tensor:
        """The gradient of the mean with respect to one micro-batch's loss."""
        return torch.full_like(loss, 1.0 / self.schedule.microbatches, requires_grad=False)

    def _backward(self, action: Action) -> None:
        self._input_gradient(action)
        self._weight_gradient(action)

    def _weight_gradient(self, action: Action) -> None:
        weights = self.waiting.pop((action.stage, action.microbatch))
        if weights is not None and weights.requires_grad:
            torch.autograd.backward(weights)

    def _input_gradient(self, action: Action) -> None:
        flight = self.in_flight.pop((action.stage, action.microbatch))
        edges, gradients = list(flight.edges.values()), list[torch.Tensor]()
        for name in flight.edges:
            gradients.append(self._gradient(name, action))
        if flight.loss is not None:
            edge, gradient = flight.loss
            edges.append(edge)
            gradients.append(gradient)
        if edges:
            torch.autograd.backward(edges, gradients)
        gradients.clear()
        self.waiting[action.stage, action.microbatch] = flight.weights
        for message in sent_by(action, self.routes):
            value = flight.received[message.value]
            gradient = value.grad if value.grad is not None else torch.zeros_like(value)
            self.transport.send(message, gradient)

    def _gradient(self, name: str, action: Action) -> torch.Tensor:
        """The sum of what a value's readers send back, the last one's first."""
        total: torch.Tensor | None = None
        for reader in reversed(self.routes.passed[name].readers):
            message = Message(name, True, reader, action.stage, action.microbatch)
            gradient = self.transport.receive(message)
            total = gradient if total is None else total + gradient
        assert total is not None, f"nobody reads {name}, which stage {action.stage} sends"
        return total
