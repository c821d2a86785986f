"""Time of one operator: measured where a calibration has it, modelled elsewhere.

The model is a roofline (Williams et al., CACM 2009): seconds = launch + max(FLOPs / peak, bytes /
bandwidth). Only ratios between operators matter to the solver; absolute times carry the error of
the hardware description.  Modelled times beside measured ones are scaled to compare with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from fxzero.collectives import is_collective, is_gather, is_reduction, is_wait, ranks_of
from fxzero.randomness import draw, draw_again
from fxzero.storages import tensor_leaves
from fxzero.transfers import TRANSFERS
from fxzero.updating import UPDATE

# Share of its own time that an elementwise operator costs inside a kernel, so that none is free.
_TIE = 0.02
# Where the wrapped operator stands among the arguments.
_WRAPPED: dict[Any, int] = {draw: 0, draw_again: 1}


@dataclass(frozen=True)
class Hardware:
    """A device as the cost model sees it.

    Attributes:
        flops: dense floating-point operations a second by bytes per element (2 or 4).
        bandwidth: bytes a second to and from device memory.
        launch: seconds that any operator takes.
        link: bytes a second between device and host memory, in one direction.
        network: bytes a second that a rank receives from others in a collective.
        latency: seconds that any collective takes.
    """

    name: str
    flops: dict[int, float]
    bandwidth: float
    launch: float
    link: float
    network: float
    latency: float


# On the CPU a copy "to the host" is a copy: it reads and writes the same memory.
CPU = Hardware("cpu", {2: 5e10, 4: 5e10}, 1.0e10, 3e-6, 5.0e9, 1.0e9, 3e-4)
CUDA = Hardware("cuda", {2: 4.0e14, 4: 4.0e13}, 2.0e12, 4e-6, 2.5e10, 2.0e11, 2e-5)


def hardware_for(device: str) -> Hardware:
    """The default description of a device type: "cpu" or "cuda"."""
    return CUDA if device == "cuda" else CPU


@dataclass(frozen=True)
class NodeCost:
    """Modelled price of running a node once."""

    seconds: float
    flops: int


@dataclass(frozen=True)
class CostModel:
    """Prices of operators on one device.

    Attributes:
        hardware: describes the device for operators that were not measured.
        measured: seconds by ``operator_key``.
        scale: what modelled seconds are multiplied by.
        fused: whether elementwise operators run inside the kernels of those that read them.
        exposed: share of its time that a gather costs which runs again beside operators.
    """

    hardware: Hardware
    measured: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0
    fused: bool = False
    exposed: float = 1.0

    def price(self, node: fx.Node) -> NodeCost:
        """Price of running a node once; inputs and views are free."""
        modelled = modelled_cost(node, self.hardware)
        if not modelled.seconds or is_collective(node):
            return modelled
        seconds = modelled.seconds * self.scale
        if self.measured:
            seconds = self.measured.get(operator_key(node), seconds)
        if self.fused and is_elementwise(node):
            seconds = self._inside_a_kernel(node, seconds)
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

    def round_trip(self, tensor: torch.Tensor) -> float:
        """Seconds that a tensor takes to host memory and back, modelled: nothing runs meanwhile."""
        return 2 * transfer_seconds(tensor, self.hardware) * self.scale

    @property
    def source(self) -> str:
        """Where the times come from, for the notes of a plan."""
        if not self.measured:
            return f"step times come from a roofline model of {self.hardware.name}"
        return (
            f"step times come from {len(self.measured)} measured kinds of operators, others from a "
            f"roofline model of {self.hardware.name} times {self.scale:.3g}"
        )


def transfer_seconds(tensor: torch.Tensor, hardware: Hardware) -> float:
    """Seconds that a copy between device and host memory takes, in one direction."""
    return hardware.launch + _size(tensor) / hardware.link


def collective_seconds(node: fx.Node, hardware: Hardware) -> float:
    """Seconds of a collective by itself: a latency, and what a rank receives by its bandwidth.

    On a ring of n ranks, each receives (n - 1) / n of the whole for a gather or a reduce-scatter,
    and twice that for an all-reduce (Thakur et al., IJHPCA 2005).
    """
    received = sum(map(_size, tensor_leaves(node.meta["val"])))
    ranks = ranks_of(node)
    if is_reduction(node):
        received = sum(map(_size, _inputs(node))) * (1 if ranks else 2)
    share = (ranks - 1) / ranks if ranks else 1.0
    return hardware.latency + received * share / hardware.network


def bucket_bytes(hardware: Hardware) -> int:
    """Bytes of a collective whose latency is a tenth of its time."""
    return int(9 * hardware.latency * hardware.network)


def modelled_cost(node: fx.Node, hardware: Hardware) -> NodeCost:
    """Roofline price of one node; inputs and views are free, updates not part of the price."""
    operator = drawn_operator(node) if node.op == "call_function" else None
    if operator is None or makes_view(operator) or is_wait(node) or operator is UPDATE:
        return NodeCost(0.0, 0)
    outputs = tensor_leaves(node.meta.get("val"))
    if operator in TRANSFERS:
        return NodeCost(transfer_seconds(outputs[0], hardware), 0)
    if is_collective(node):
        return NodeCost(collective_seconds(node, hardware), 0)
    flops = count_flops(node)
    traffic = sum(map(_size, (*outputs, *_inputs(node))))
    width = 2 if outputs and outputs[0].element_size() <= 2 else 4
    seconds = hardware.launch + max(flops / hardware.flops[width], traffic / hardware.bandwidth)
    return NodeCost(seconds, flops)


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
    parts = [_describe_argument(a) for a in arguments]
    parts += [f"{name}={_describe_argument(a)}" for name, a in sorted(node.kwargs.items())]
    return f"{drawn_operator(node)}({', '.join(parts)})"


def _describe_argument(argument: Any) -> str:
    if isinstance(argument, (tuple, list)):
        return f"[{', '.join(map(_describe_argument, argument))}]"
    if not isinstance(argument, fx.Node):
        return repr(argument)
    value = argument.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return repr(type(value).__name__)
    strides = "".join(f":{stride}" for stride in value.stride())
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strides}"


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
    packet = operator._overloadpacket if operator is not None else None
    formula = flop_registry.get(packet) or _EXTRA_FORMULAS.get(packet)
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, value = args[_WRAPPED.get(node.target, -1) + 1 :], node.meta["val"]
    return int(formula(*args, **kwargs, out_val=value[1] if node.target is draw else value))


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


_EXTRA_FORMULAS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash_attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _cpu_flash_attention_backward_flops
    ),
}
