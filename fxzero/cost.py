"""Time of one operator: measured where a calibration has it, modelled elsewhere.

The model is a roofline (Williams et al., CACM 2009): seconds = launch + max(FLOPs / speed, bytes /
bandwidth), with the speed that ``utilisation.py`` says, and that of links in ``network.py``. Only
ratios between operators matter to the solver; absolute times carry the error of the hardware
description.  Modelled times beside measured ones are scaled to compare with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from fxzero import _torch
from fxzero.collectives import (
    ALL_TO_ALL,
    group_of,
    is_collective,
    is_gather,
    is_reduction,
    is_wait,
    ranks_of,
)
from fxzero.hardware import Hardware, Link, describe
from fxzero.network import Route, route
from fxzero.randomness import draw, draw_again
from fxzero.storages import tensor_leaves
from fxzero.transfers import TRANSFERS
from fxzero.updating import UPDATE
from fxzero.utilisation import is_attention, speed

# Share of its own time that an elementwise operator costs inside a kernel, so that none is free.
_TIE = 0.02
# Where the wrapped operator stands among the arguments, in graphs and in generated code.
_WRAPPED: dict[Any, int] = {
    draw: 0,
    draw_again: 1,
    _torch.run_and_save_rng_state: 0,
    _torch.run_with_rng_state: 1,
}
# Ranks of a collective that does not say how many take part, along no known dimension.
_MANY = 2**16

# What plans count on that name no hardware.
CPU = describe("cpu")
CUDA = Hardware(
    name="cuda",
    device="cuda",
    peak_flops={"float32": 4.0e13, "bfloat16": 4.0e14, "float16": 4.0e14},
    peak_bandwidth=2.0e12,
    launch=4e-6,
    host=2.5e10,
    node=Link(2.0e11, 0.0),
    network=Link(2.0e11, 0.0),
    startup=2e-5,
)


def hardware_for(device: str) -> Hardware:
    """The default description of a device type: "cpu" or "cuda"."""
    return CUDA if device == "cuda" else CPU


@dataclass(frozen=True)
class NodeCost:
    """Modelled price of running a node once."""

    seconds: float
    flops: int


@dataclass(frozen=True)
class Shares:
    """What a graph for generated code was measured to take, by what its operators' prices come to.

    Attributes:
        code: its code takes of prices that are ``fused``.
        apart: its operators, run one by one, take of prices that are not.
    """

    code: float
    apart: float


@dataclass(frozen=True)
class CostModel:
    """Prices of operators on one device.

    Attributes:
        hardware: describes the device for operators that were not measured.
        measured: seconds by ``operator_key``.
        scale: what modelled seconds are multiplied by.
        fused: whether elementwise operators run inside the kernels of those that read them.
        generated: what such a graph takes, as shares of these prices; None: not measured.
        exposed: share of its time that a gather costs which runs again beside operators.
        mesh: ranks by dimension, as they lie in nodes.
        workspaces: bytes that operators take and give back while they run, by ``operator_key``.
    """

    hardware: Hardware
    measured: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0
    fused: bool = False
    generated: Shares | None = None
    exposed: float = 1.0
    mesh: Mapping[str, int] = field(default_factory=dict)
    workspaces: Mapping[str, int] = field(default_factory=dict)

    def route(self, along: str) -> Route:
        """What ranks along a dimension of the mesh exchange bytes over."""
        return route(self.hardware, self.mesh, along)

    def price(self, node: fx.Node) -> NodeCost:
        """Price of running a node once; inputs and views are free."""
        modelled = modelled_cost(node, self.hardware, self.mesh)
        if not modelled.seconds or is_collective(node):
            return modelled
        seconds = modelled.seconds * self.scale
        if self.measured:
            seconds = self.measured.get(operator_key(node), seconds)
        if self.fused and is_elementwise(node) and not _leaves_its_kernel(node):
            seconds = self._inside_a_kernel(node, seconds)
        if self.generated is not None:
            seconds *= self.generated.code if self.fused else self.generated.apart
        return NodeCost(seconds, modelled.flops)

    def price_again(self, node: fx.Node) -> NodeCost:
        """What a step takes longer if a node runs once more in it."""
        price = self.price(node)
        return replace(price, seconds=price.seconds * self.exposed) if is_gather(node) else price

    def _inside_a_kernel(self, node: fx.Node, alone: float) -> float:
        """Seconds of an operator whose result is not written and read again but used at once.

        What it reads counts as far as it is more than the result, which would be read instead;
        and what it computes, if that takes longer than its memory traffic.
        """
        size = _size(node.meta["val"])
        reads = sum(min(_size(t), t.untyped_storage().nbytes()) for t in _inputs(node))
        second = self.scale / self.hardware.bandwidth
        traffic = self.hardware.launch * self.scale + (reads + size) * second
        return max((reads - size) * second, alone - traffic, _TIE * alone)

    def workspace(self, node: fx.Node) -> int:
        """Bytes that a node takes and gives back while it runs, as far as it was measured."""
        return workspace_of_operator(node, self.workspaces)

    def round_trip(self, tensor: torch.Tensor) -> float:
        """Seconds that a tensor takes to host memory and back, modelled: nothing runs meanwhile."""
        return 2 * transfer_seconds(tensor, self.hardware) * self.scale

    @property
    def overlap(self) -> float:
        """The share of a collective's time that operators beside it hide."""
        return self.hardware.achieved.overlap

    @property
    def source(self) -> str:
        """Where the times come from, for the notes of a plan."""
        if not self.measured:
            return f"step times come from a roofline model of {self.hardware.name}"
        code = ""
        if self.generated is not None:
            share = self.generated.code
            code = f"; code generated for this model takes {share:.3g} of them, measured"
        return (
            f"step times come from {len(self.measured)} measured kinds of operators, others from a "
            f"roofline model of {self.hardware.name} times {self.scale:.3g}{code}"
        )


def workspace_of_operator(node: fx.Node, known: Mapping[str, int]) -> int:
    """Bytes that a node's operator needs while it runs, of those known by ``operator_key``."""
    if not known or node.op != "call_function":
        return 0
    return known.get(operator_key(node), 0)


def transfer_seconds(tensor: torch.Tensor, hardware: Hardware) -> float:
    """Seconds that a copy between device and host memory takes, in one direction."""
    return hardware.launch + _size(tensor) / hardware.host_bandwidth


def collective_seconds(node: fx.Node, hardware: Hardware, mesh: Mapping[str, int]) -> float:
    """Seconds of a collective by itself."""
    along = route(hardware, mesh, group_of(node), ranks_of(node) or _MANY)
    received = sum(map(_size, tensor_leaves(node.meta["val"])))
    if not is_reduction(node):
        return along.gather(received)
    sent = sum(map(_size, _inputs(node)))
    if node.target is ALL_TO_ALL:
        return along.all_to_all(sent)
    return along.gather(sent) if ranks_of(node) else along.all_reduce(sent)


def bucket_bytes(along: Route) -> int:
    """Bytes of a collective whose latency is a tenth of its time."""
    return int(9 * along.latency * along.bandwidth)


def modelled_cost(
    node: fx.Node, hardware: Hardware, mesh: Mapping[str, int] | None = None
) -> NodeCost:
    """Roofline price of one node; inputs and views are free, updates not part of the price."""
    operator = drawn_operator(node) if node.op == "call_function" else None
    if operator is None or makes_view(operator) or is_wait(node) or operator is UPDATE:
        return NodeCost(0.0, 0)
    outputs = tensor_leaves(node.meta.get("val"))
    if operator in TRANSFERS:
        return NodeCost(transfer_seconds(outputs[0], hardware), 0)
    if is_collective(node):
        return NodeCost(collective_seconds(node, hardware, mesh or {}), 0)
    flops = count_flops(node)
    traffic = sum(map(_size, (*outputs, *_inputs(node))))
    # Attention leaves out what a causal mask hides, which its count of operations has.
    work = flops / 2 if is_attention(operator) and _is_causal(node, operator) else flops
    computing = work / speed(node, operator, flops, hardware) if flops else 0.0
    return NodeCost(hardware.launch + max(computing, traffic / hardware.bandwidth), flops)


def _leaves_its_kernel(node: fx.Node) -> bool:
    """Whether a result is written wherever it is computed: a product, a collective reads it, or it
    is what a graph returns."""
    for user in node.users:
        operator = drawn_operator(user)
        if user.op == "output" or is_collective(user) or (operator and _formula(operator)):
            return True
        if operator is not None and makes_view(operator) and _leaves_its_kernel(user):
            return True
    return False


def _is_causal(node: fx.Node, operator: torch._ops.OpOverload) -> bool:
    names = [argument.name for argument in operator._schema.arguments]
    args = node.args[_WRAPPED.get(node.target, -1) + 1 :]
    given = {**dict(zip(names, args, strict=False)), **node.kwargs}
    return given.get("is_causal") is True


def makes_view(operator: torch._ops.OpOverload) -> bool:
    """Whether the operator returns an alias of an argument and computes nothing."""
    if operator is torch.ops.aten._unsafe_view.default:  # its schema does not say so
        return True
    returns = operator._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def operator_key(node: fx.Node) -> str:
    """What the time of an operator depends on: its name, shapes, strides, dtypes, other arguments.

    'aten.mm.default(float32[8, 64]:64:1, float32[64, 64]:1:64)'
    """
    arguments = node.args[_WRAPPED.get(node.target, -1) + 1 :]
    return call_key(drawn_operator(node), arguments, node.kwargs)


def call_key(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """``operator_key`` of a call; arguments are values, or nodes that stand for them."""
    operator, args = unwrapped(operator, args)
    parts = [_describe_argument(a) for a in args]
    parts += [f"{name}={_describe_argument(a)}" for name, a in sorted(kwargs.items())]
    return f"{operator}({', '.join(parts)})"


def unwrapped(operator: Any, args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """The call inside one that keeps or replays randomness; any other call as it is."""
    at = _WRAPPED.get(operator)
    return (operator, args) if at is None else (args[at], args[at + 1 :])


def _describe_argument(argument: Any) -> str:
    if isinstance(argument, (tuple, list)):
        return f"[{', '.join(map(_describe_argument, argument))}]"
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    if isinstance(value, torch.Tensor):
        strides = "".join(f":{stride}" for stride in value.stride())
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strides}"
    return repr(type(value).__name__ if isinstance(argument, fx.Node) else value)


def is_elementwise(node: fx.Node) -> bool:
    """Whether each element of the one result comes from one element of each argument."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.pointwise in target.tags
        and torch.Tag.nondeterministic_seeded not in target.tags
        and isinstance(node.meta.get("val"), torch.Tensor)
    )


def count_flops(node: fx.Node) -> int:
    """Floating-point operations of matrix products, convolutions and attention; 0 for the rest."""
    operator = drawn_operator(node)
    formula = None if operator is None else _formula(operator)
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, value = args[_WRAPPED.get(node.target, -1) + 1 :], node.meta["val"]
    return int(formula(*args, **kwargs, out_val=value[1] if node.target is draw else value))


def _formula(operator: torch._ops.OpOverload) -> Any:
    packet = operator._overloadpacket
    return flop_registry.get(packet) or _EXTRA_FORMULAS.get(packet) or _BY_NAME.get(str(packet))


def drawn_operator(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that the node runs, also through the functions that replay randomness."""
    at = _WRAPPED.get(node.target)
    target = node.target if at is None else node.args[at]
    return target if isinstance(target, torch._ops.OpOverload) else None


def _inputs(node: fx.Node) -> list[torch.Tensor]:
    values = (source.meta.get("val") for source in node.all_input_nodes)
    return [value for value in values if isinstance(value, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cpu_flash_attention_flops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _cpu_flash_attention_backward_flops(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    **__: Any,
) -> int:
    # Five products of the size of the forward's two (Dao et al., 2022).
    return int(2.5 * sdpa_flop_count(query.shape, key.shape, value.shape))


def _grouped_product_flops(left: torch.Tensor, right: torch.Tensor, *_: Any, **__: Any) -> int:
    """Each row meets the matrix of its own group only: no more than one product of the rows."""
    groups = left.shape[0] if left.ndim == right.ndim == 3 else 1
    return groups * 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]


def _grouped_product_backward_flops(
    left: torch.Tensor, right: torch.Tensor, *_: Any, **__: Any
) -> int:
    return 2 * _grouped_product_flops(left, right)


_EXTRA_FORMULAS: dict[Any, Any] = {
    torch.ops.aten._grouped_mm: _grouped_product_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash_attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _cpu_flash_attention_backward_flops
    ),
}
# Operators of libraries that need not be there.
_BY_NAME: dict[str, Any] = {
    "transformers.grouped_mm_fallback": _grouped_product_flops,
    "transformers.grouped_mm_fallback_backward": _grouped_product_backward_flops,
}
