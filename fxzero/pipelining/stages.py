"""A model as stages that are traced each with its backward, and what passes between them.

    model -> forward graph with the loss -> row of operators -> stages -> a joint graph for each

A value that stages hand on is an output of the stage that makes it and an input of those that read
it.  If a gradient flows through it, each reader sends one back, and the maker adds them up in the
order in which autograd would: the last reader's first.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxzero import _torch
from fxzero.capture import Capture, Exported, check_devices, export, join, whole_parameters
from fxzero.errors import UsageError
from fxzero.graph import describe
from fxzero.pipelining.cutting import Ports, Row, Stage, memory_of
from fxzero.pipelining.regions import has_effect, inline_grad_regions
from fxzero.pipelining.schedules import Schedule
from fxzero.precision import Precision
from fxzero.structure import Structure, flatten

_ATEN = torch.ops.aten
_IN_ROWS = torch.contiguous_format
Loss = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Passed:
    """A value that one stage makes and others read.

    Attributes:
        stage: who makes it.
        readers: who reads it, in order.
        trains: whether gradients of it are sent back.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stage: int
    readers: tuple[int, ...]
    trains: bool

    @property
    def bytes(self) -> int:
        """What one message of it takes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class Exports:
    """A model's forward and loss over one micro-batch, ready to be cut.

    Args:
        loss: from what the model returns to the scalar that is trained.

    Raises:
        UsageError: the loss is no scalar, or an input requires a gradient.
        CaptureError, DeviceError: see ``fxzero.capture.capture``.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        loss: Loss,
        precision: Precision,
    ) -> None:
        leaves, inputs = flatten((args, kwargs))
        check_inputs(leaves, inputs)
        check_devices(model, leaves, inputs)
        self.name = type(model).__name__
        with whole_parameters(model) as mode, warnings.catch_warnings():
            # Gradients of what a loss_fn brings along would be lost.
            warnings.filterwarnings("error", message=".*requires gradient. but it's not properly")
            leaves = leaves if mode is None else [mode.from_tensor(leaf) for leaf in leaves]
            self.exported: Exported = export(model, leaves, inputs, None, precision, loss)
        inline_grad_regions(self.exported.forward)
        self.exported.forward.graph.eliminate_dead_code(has_effect)
        self.row = Row(self.exported.forward)

    def cut(self, cuts: Sequence[int]) -> Stages:
        """The stages between cuts."""
        return Stages(self, tuple(cuts), self.row.cut(cuts))

    @cached_property
    def digest(self) -> str:
        """Equal where the same graph was traced: what cuts are positions in."""
        text = hashlib.sha256()
        for node in self.exported.forward.graph.nodes:
            value = describe(node.meta.get("val"))
            text.update(f"{node.op} {node.name} {node.target} {value}\n".encode())
        return text.hexdigest()[:16]

    @cached_property
    def trained(self) -> frozenset[str]:
        """Names of the values through which gradients flow from the loss to a parameter."""
        forward, leaves = self.exported.forward, self.exported.leaves
        mode = _torch.fake_mode_of(leaves) or _torch.FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.enable_grad():
            given = [
                leaf if isinstance(leaf, _torch.FakeTensor) else mode.from_tensor(leaf)
                for leaf in leaves
            ]
            interpreter = _Attached(forward, mode)
            (loss,) = interpreter.run(*given)
        reached, pending = set[Any](), [loss.grad_fn]
        while pending:
            function = pending.pop()
            if function is not None and function not in reached:
                reached.add(function)
                pending += [source for source, _ in function.next_functions]
        functions = interpreter.functions.items()
        return frozenset(name for name, function in functions if function in reached)


class _Attached(fx.Interpreter):
    """Remembers how autograd knows each value; the module's tensors are not written to."""

    def __init__(self, module: fx.GraphModule, mode: _torch.FakeTensorMode) -> None:
        super().__init__(module)
        self.mode = mode
        self.functions: dict[str, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        is_real = isinstance(value, torch.Tensor) and not isinstance(value, _torch.FakeTensor)
        return self.mode.from_tensor(value) if is_real else value

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op == "call_function" and value.requires_grad:
            self.functions[n.name] = value.grad_fn
        return value


@dataclass(frozen=True)
class Routes:
    """What each stage reads and passes on.

    Attributes:
        cuts: where stages begin in the row of operators, but for the first.
        ports: of each stage.
        passed: by name, what goes from one stage to others.
        owners: for each parameter and buffer, by the model's names, the stages that read it.
        weight_bytes: of all those that a stage reads, by stage.
        loss: the dtype of what the last stage returns.
    """

    cuts: tuple[int, ...]
    ports: tuple[Ports, ...]
    passed: Mapping[str, Passed]
    owners: Mapping[str, tuple[int, ...]]
    weight_bytes: tuple[int, ...]
    loss: torch.dtype


def check_inputs(leaves: Sequence[torch.Tensor], inputs: Structure) -> None:
    """Raises UsageError for an input that requires a gradient."""
    for leaf, path in zip(leaves, inputs.paths, strict=True):
        if leaf.requires_grad:
            raise UsageError(
                f"input {path} of a pipeline requires a gradient, which no stage returns\n"
                "  detach it, or compile without a pipeline"
            )


class Stages:
    """A model's stages, which hold all of its weights."""

    def __init__(self, exports: Exports, cuts: tuple[int, ...], parts: tuple[Stage, ...]) -> None:
        self.exports = exports
        self.parts = parts
        ports = tuple(part.ports for part in parts)
        passed: dict[str, Passed] = {}
        owners: dict[str, tuple[int, ...]] = {}
        for index, part in enumerate(parts):
            for node in part.results[: len(part.ports.sent)]:
                value, name = node.meta["val"], node.name
                readers = tuple(i for i, other in enumerate(ports) if name in other.received)
                trains, shape = name in exports.trained, tuple(value.shape)
                passed[name] = Passed(name, shape, value.dtype, index, readers, trains)
            for node in part.module.graph.find_nodes(op="get_attr"):
                name = str(node.target).removeprefix("model.")
                owners[name] = (*owners.get(name, ()), index)
        loss = parts[-1].results[-1].meta["val"].dtype
        weight_bytes = tuple(_weight_bytes(part.module) for part in parts)
        self.routes = Routes(cuts, ports, passed, owners, weight_bytes, loss)

    def trains(self, index: int) -> bool:
        """Whether any gradient comes to a stage; one of frozen weights may have none."""
        return any(node.name in self.exports.trained for node in self.parts[index].results)

    def capture(self, index: int, inner: str) -> Capture:
        """A stage with its backward, as a function of its leaves and of what it receives."""
        part, exported = self.parts[index], self.exports.exported
        module = _torch.copy_module(part.module)
        trained = _finish(module, self.exports.trained)
        received = [self._example(name) for name in part.ports.received]
        leaves = [*(exported.leaves[i] for i in part.ports.leaves), *received]
        graph = join(module, leaves, inner, f"stage {index} of {self.exports.name}")
        results = [node.meta["val"] for node in part.results]
        return Capture(
            graph,
            flatten((tuple(leaves), {}))[1],
            flatten(tuple(torch.empty(0) for _ in results))[1],
            exported.constants,
            trained,
            trained,
        )

    def _example(self, name: str) -> torch.Tensor:
        """What stands for a received value in a trace."""
        passed, leaves = self.routes.passed[name], self.exports.exported.leaves
        device = leaves[0].device if leaves else torch.device("cpu")
        with _torch.fake_mode_of(leaves) or contextlib.nullcontext():
            example = torch.empty(passed.shape, dtype=passed.dtype, device=device)
        return example.requires_grad_(passed.trains)


def _finish(module: fx.GraphModule, trained: frozenset[str]) -> tuple[int, ...]:
    """Gives results memory of their own, in rows; returns the positions of those with a gradient.

    What is sent lies in rows, as what is received does.
    """
    (output,) = module.graph.find_nodes(op="output")
    memory = memory_of(module.graph)
    results: list[fx.Node] = []
    taken: set[fx.Node] = set()
    for node in output.args[0]:
        base = memory[node]
        own = base.op == "call_function" and base not in taken
        taken.add(base)
        with module.graph.inserting_before(output):
            if not own or not node.meta["val"].is_contiguous():
                results.append(_call(node, _ATEN.clone.default, memory_format=_IN_ROWS))
            elif node.name not in trained:
                results.append(_call(node, _ATEN.detach.default))
            else:
                results.append(node)
    trains = tuple(i for i, node in enumerate(output.args[0]) if node.name in trained)
    output.args = (tuple(results),)
    module.recompile()
    return trains


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under all of their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(module.named_buffers(remove_duplicate=False)), **dict(parameters)}


def _weight_bytes(module: fx.GraphModule) -> int:
    """Bytes of the parameters and buffers that a stage reads."""
    tensors = tensors_of(module)
    names = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    return sum(tensors[name].nbytes for name in names if name in tensors)


def _call(node: fx.Node, target: Any, **options: Any) -> fx.Node:
    made = node.graph.call_function(target, (node,), options)
    made.meta = dict(node.meta)
    return made


def shared_weights(routes: Routes, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """For weights that stages of several ranks read, by name, these ranks."""
    found = {}
    for name, owners in routes.owners.items():
        ranks = tuple(sorted({schedule.placement[stage] for stage in owners}))
        if len(ranks) > 1:
            found[name] = ranks
    return found
