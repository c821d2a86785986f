"""The only file that touches Inductor, of which hardly a name is public.

``tests/test_torch_contract_inductor.py`` states what each function must do on a supported torch
(2.11 to 2.13).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxzero._torch import fake_mode_of

Strides = tuple[int, ...]


def has_compiler(device: str) -> bool:
    """Whether Inductor can generate code for "cpu" (a C++ compiler) or "cuda" (triton)."""
    if device == "cuda":
        return importlib.util.find_spec("triton") is not None
    from torch._inductor import config

    candidates = config.cpp.cxx
    names = candidates if isinstance(candidates, (tuple, list)) else (candidates,)
    return any(name and shutil.which(name) for name in (*names, os.environ.get("CXX", "")))


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """The table that graphs for Inductor are traced with; random operators stay what eager runs."""
    import torch._inductor.lowering  # the table's max_pool2d uses it without importing it
    from torch._inductor.decomposition import select_decomp_table

    return {
        operator: function
        for operator, function in select_decomp_table().items()
        if torch.Tag.nondeterministic_seeded not in getattr(operator, "tags", ())
    }


# Inductor keeps a freed buffer for a later one of its size, however long that takes.  Nor does it
# know that what one of our operators for collectives reads is in use until the wait for it.
_INDUCTOR_OPTIONS = {"fallback_random": True, "allow_buffer_reuse": False}
# It looks for the order of the smallest peak, which ends each collective where it starts.
_IN_ORDER = {"reorder_for_peak_memory": False}
# A score that no pair of kernels without a value between them reaches: those, far apart in the
# planned order, would run at once and hold all their results.
_NEVER_SIDE_BY_SIDE = {"score_fusion_memory_threshold": 10**18}
# It would copy what convolutions read and write into another layout, and back where a graph keeps
# that of its results: on a CPU more memory, and no less time.
_LAYOUTS_AS_TRACED = {"layout_optimization": False}


def compile_with_inductor(
    module: fx.GraphModule,
    replace_target: Callable[[Any], Any],
    *,
    backward: bool,
    kept: int | None = None,
    given: Sequence[Strides | None] | None = None,
    side_by_side: bool = True,
    in_order: bool = False,
) -> Callable[[list[Any]], list[Any]]:
    """A boxed function that Inductor generated for a graph of aten operators.

    Random operators run as eager's do, so that the random stream stays eager's.

    Args:
        replace_target: what stands for an operator that Inductor does not know.
        kept: how many of the first results have the strides of the graph; None: all.
        given: strides of the first arguments, where they are not those of the graph.
        side_by_side: whether operators that read the same values may be fused; it saves time, and
            takes memory where they are far apart.
        in_order: whether kernels keep the order of the graph.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner, record_original_output_strides

    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        nodes[node] = graph.node_copy(node, nodes.__getitem__)
        nodes[node].target = replace_target(node.target)
    copied = fx.GraphModule(module, graph)
    inputs = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    (output,) = graph.find_nodes(op="output")
    visible = list(range(len(output.args[0])))[:kept]
    output.meta["user_visible_output_idxs"] = visible
    copied.meta["fxzero_visible"] = visible  # Inductor's cache does not look at nodes' metadata
    record_original_output_strides(copied)
    values = pytree.tree_leaves([node.meta.get("val") for node in graph.nodes])
    fake_mode = fake_mode_of(values)
    for position, strides in enumerate(given or ()):
        inputs[position] = _with_strides(inputs[position], strides, fake_mode)
    options: dict[str, Any] = dict(_INDUCTOR_OPTIONS)
    options |= {} if side_by_side else _NEVER_SIDE_BY_SIDE
    options |= _IN_ORDER if in_order else {}
    if kept is None and given is None and not any(getattr(v, "is_cuda", False) for v in values):
        options |= _LAYOUTS_AS_TRACED
    with (
        tracing(TracingContext(fake_mode)),
        config.patch(options),
        torch.no_grad(),
    ):
        compiled: Any = compile_fx_inner(copied, inputs, is_backward=backward)

    def run(arguments: list[Any]) -> list[Any]:
        return list(compiled(arguments))

    run.__generated__ = compiled  # type: ignore[attr-defined]
    return run


def _with_strides(value: Any, strides: Strides | None, fake_mode: Any) -> Any:
    if strides is None or strides == value.stride():
        return value
    with fake_mode:
        return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)


def strides_of_results(function: Any) -> list[Strides | None]:
    """Those of what a function that Inductor generated returns; none of other functions."""
    compiled = getattr(function, "__generated__", None)
    strides = (None if compiled is None else compiled.output_strides) or []
    return [None if found is None else tuple(map(int, found)) for found in strides]


def generated_code(function: Any) -> tuple[str, dict[str, Any]] | None:
    """The source that Inductor generated for a function, and its constants; None if it did not."""
    compiled = getattr(function, "__generated__", None)
    return None if compiled is None else (compiled.source_code, compiled.constants or {})


def extern_kernels() -> Any:
    """What generated code calls the operators of torch by that write into given tensors."""
    from torch._inductor.select_algorithm import extern_kernels

    return extern_kernels
