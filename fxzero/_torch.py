"""The only file that touches private torch names.

Everything else imports what it needs from here, so a torch release that moves a name breaks one
file.  ``tests/test_torch_contract.py`` states what each function must do on a supported torch
(2.11 to 2.13).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DATA_DEPENDENT_ERRORS",
    "NO_FAKE_ERRORS",
    "FakeTensor",
    "FakeTensorMode",
    "run_and_save_rng_state",
    "run_with_rng_state",
]

DATA_DEPENDENT_ERRORS: tuple[type[Exception], ...] = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)

Strides = tuple[int, ...]

# An operator without a fake implementation, or one that fakes cannot represent.
NO_FAKE_ERRORS: tuple[type[Exception], ...] = (
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


def flatten_one_level(
    value: Any,
) -> tuple[list[Any], list[str], Callable[[Sequence[Any]], Any]] | None:
    """Children, their key names and a rebuild function of a pytree container; None if not one."""
    children_with_path, spec = pytree.tree_flatten_with_path(
        value, is_leaf=lambda item: item is not value
    )
    if spec.is_leaf():
        return None
    names = [pytree.keystr(path) for path, _ in children_with_path]
    children = [child for _, child in children_with_path]
    return children, names, lambda items: pytree.tree_unflatten(list(items), spec)


def export_joint(
    module: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    decompositions: dict[Any, Callable[..., Any]] | None,
) -> fx.GraphModule:
    """Joint forward and backward graph of a module that takes and returns flat tensors.

    Placeholders and outputs carry ``meta["desc"]`` (read them with ``describe_input`` and
    ``describe_output``); nodes traced for the backward carry ``is_backward_node``.
    """
    with contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(
            stack, module, tuple(inputs), decompositions=decompositions
        )
        graph_module: fx.GraphModule = joint.graph_module
        return graph_module


def describe_input(node: fx.Node) -> tuple[str, str | int]:
    """What a placeholder is: ("parameter" | "buffer", name) or ("input" | "tangent", i).

    The number is the position among the module's inputs, or among its outputs for a tangent.
    """
    from torch._functorch._aot_autograd import descriptors

    desc = node.meta["desc"]
    if isinstance(desc, descriptors.TangentAOTInput):
        return "tangent", getattr(desc.output, "idx", -1)
    return _module_input(desc) or ("input", -1)


def describe_outputs(joint: fx.GraphModule) -> list[tuple[str, Any]]:
    """What each output of a joint graph is.

    ("output", i), ("mutation", input description), ("gradient", input description), or
    ("absent", None) where an input has no gradient.
    """
    (output,) = joint.graph.find_nodes(op="output")
    return [_describe_output_desc(desc) for desc in output.meta["desc"]]


def _describe_output_desc(desc: Any) -> tuple[str, Any]:
    from torch._functorch._aot_autograd import descriptors

    if desc is None:
        return "absent", None
    if isinstance(desc, descriptors.PlainAOTOutput):
        return "output", desc.idx
    if isinstance(desc, descriptors.InputMutationAOTOutput):
        return "mutation", _module_input(desc.mutated_input)
    if isinstance(desc, descriptors.GradAOTOutput):
        return "gradient", _module_input(desc.grad_of)
    raise TypeError(f"a joint graph with an output of unknown meaning: {desc!r}")


def _module_input(desc: Any) -> tuple[str, str | int] | None:
    """What a descriptor says of an input that the module itself has; None for any other."""
    from torch._functorch._aot_autograd import descriptors

    if isinstance(desc, descriptors.ParamAOTInput):
        return "parameter", desc.target
    if isinstance(desc, descriptors.BufferAOTInput):
        return "buffer", desc.target
    if isinstance(desc, descriptors.PlainAOTInput):
        return "input", desc.idx
    return None


def is_backward_node(node: fx.Node) -> bool:
    """Whether a joint graph's node was traced while the backward ran."""
    return node.meta.get("partitioner_tag") == "is_backward"


def backward_keeps_graph() -> bool:
    """Inside a backward: whether the caller asked for ``retain_graph=True``."""
    keeps: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return keeps


def parameter_to_add_to(node: Any) -> torch.Tensor | None:
    """Inside a backward: the leaf to whose ``.grad`` autograd will add, if it does only that.

    None if the backward does not run the node (``torch.autograd.grad``), if it is no leaf's, and if
    hooks of the leaf ask for its gradient.  Hooks on the node itself are not seen.
    """
    if not adds_to_leaf(node):
        return None
    leaf: torch.Tensor = node.variable
    hooks = leaf._backward_hooks, getattr(leaf, "_post_accumulate_grad_hooks", None)
    return None if any(hooks) else leaf


def adds_to_leaf(node: Any) -> bool:
    """Inside a backward: whether it will run the node, and that adds to a leaf's ``.grad``."""
    if type(node).__name__ != "AccumulateGrad":
        return False
    try:
        runs: bool = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # under torch.autograd.grad leaves cannot be asked about
        return False
    return runs


def saved_tensor_hook_in_force() -> Any:
    """The innermost saved-tensor pack hook, or None.  ``torch.utils.checkpoint`` installs one."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks else None


def as_eager(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator without the Python kernels that replace its own while tracing."""

    @functools.wraps(operator)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisablePythonDispatcher():
            return operator(*args, **kwargs)

    return run


def keep_annotations() -> contextlib.AbstractContextManager[Any]:
    """Traces made inside keep the marks of ``annotate``."""
    from torch.fx import traceback

    return traceback.preserve_node_meta()


def lazy_modules() -> contextlib.AbstractContextManager[Any]:
    """Graph modules made inside write their Python code only when somebody calls them."""
    from torch.fx._lazy_graph_module import _use_lazy_graph_module

    return _use_lazy_graph_module(True)


@contextlib.contextmanager
def annotate(**marks: Any) -> Iterator[None]:
    """Nodes traced inside carry ``marks`` in ``meta["custom"]``; outside a trace, nothing."""
    from torch.fx import traceback

    with traceback.annotate(marks):
        yield


def make_graph_module(root: Any, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule that writes its Python code only when somebody calls it."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """The same nodes under the same names, to rewrite; values and attributes are shared."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return make_graph_module(module, graph)


def spread_tensor(
    part: torch.Tensor,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    shape: torch.Size,
    stride: tuple[int, ...],
) -> DTensor:
    """A DTensor over a rank's part as it is; ``from_local`` would move it to the mesh's device."""
    spec = DTensorSpec(mesh, tuple(placements), TensorMeta(shape, stride, part.dtype))
    return DTensor(part, spec, requires_grad=False)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's part on this rank, without a node of autograd; other tensors as they are."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def fused_adamw(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    firsts: Sequence[torch.Tensor],
    seconds: Sequence[torch.Tensor],
    step: torch.Tensor,
    *,
    betas: tuple[float, float],
    **settings: Any,
) -> None:
    """One step of AdamW for tensors of one dtype, in place, by all of its settings; ``step`` is 1
    in the first."""
    lists = (list(tensors) for tensors in (weights, gradients, firsts, seconds))
    given: list[Any] = [*lists, [], [step] * len(weights)]
    torch._fused_adamw_(*given, beta1=betas[0], beta2=betas[1], amsgrad=False, **settings)


def fused_sgd(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    buffers: Sequence[torch.Tensor],
    *,
    first_step: bool,
    **settings: Any,
) -> None:
    """One step of SGD with momentum for tensors of one dtype, in place, by all of its settings."""
    given = list(weights), list(gradients), list(buffers)
    torch._fused_sgd_(*given, is_first_step=first_step, **settings)


def scale_all(tensors: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiplies tensors by a scalar, in place."""
    torch._foreach_mul_(list(tensors), factor)


def add_numbers(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> None:
    """Adds a number to each tensor, in place; numbers travel with launches, not by a copy."""
    torch._foreach_add_(list(tensors), list(numbers))


def is_capturing() -> bool:
    """Whether operators on CUDA go into a graph now."""
    # Builds without CUDA have no function to ask.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copies each source to its target."""
    torch._foreach_copy_(list(targets), list(sources))


def default_store() -> Any:
    """The store that the default process group met over."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def default_timeout() -> timedelta:
    """How long collectives of the default process group wait."""
    from torch.distributed.distributed_c10d import _get_default_group

    group = _get_default_group()
    timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
    return timeout


def gather_options(timeout: timedelta) -> Any:
    """What ``group.allgather`` takes to wait for so long."""
    from torch._C._distributed_c10d import AllgatherOptions

    options = AllgatherOptions()
    options.timeout = timeout
    return options


def reduce_options(timeout: timedelta, how: Any) -> Any:
    """What ``group.allreduce`` takes to wait for so long, and to reduce by a ``ReduceOp``."""
    from torch._C._distributed_c10d import AllreduceOptions

    options = AllreduceOptions()
    options.timeout, options.reduceOp = timeout, how
    return options


def set_timeout(group: Any, timeout: timedelta) -> None:
    """Lets collectives of a process group wait for so long."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timeout, group)


def groups_of_this_process() -> int:
    """How many process groups it is in; a part of the names of those that their members make."""
    from torch.distributed.distributed_c10d import _world

    return len(_world.pg_names)


def has_symmetric_memory() -> bool:
    """Whether ranks on CUDA devices of this machine can map each other's memory."""
    if not (torch.distributed.is_available() and torch.cuda.is_available()):
        return False
    return importlib.util.find_spec("torch.distributed._symmetric_memory") is not None


def symmetric_memory(size: int, device: torch.device, group: Any) -> list[torch.Tensor]:
    """Zeros of every rank of a group, uint8 [size], as this rank sees them, its own among them.

    All ranks call it; when it returns, the memory of all is zero.
    """
    from torch.distributed import _symmetric_memory

    own = _symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    own.zero_()
    torch.cuda.synchronize(device)
    handle = _symmetric_memory.rendezvous(own, group)
    ranks = range(handle.world_size)
    memories = [handle.get_remote_tensor(rank, [size], torch.uint8) for rank in ranks]
    memories[handle.rank] = own
    return memories


def fake_mode_of(tensors: Sequence[Any]) -> FakeTensorMode | None:
    """The mode that made the first fake tensor among ``tensors``."""
    for tensor in tensors:
        if isinstance(tensor, FakeTensor):
            mode: FakeTensorMode = tensor.fake_mode
            return mode
    return None


def find_operator(name: str) -> torch._ops.OpOverload | None:
    """The operator called "aten.mm.default"; None unless the dispatcher knows it.

    Looking one up runs no code: TorchScript's own operators (``aten::save``, ``prim::Print``),
    which would run at once even on fake tensors, are not the dispatcher's.
    """
    try:
        namespace, packet, overload = name.split(".")
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except (ValueError, AttributeError):
        return None
    if isinstance(found, torch._ops.OpOverload) and torch._C._dispatch_has_kernel(found.name()):
        return found
    return None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor owns real memory: not fake, not meta, not a wrapper around another."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and tensor.device.type != "meta"
        and not torch._is_functional_tensor(tensor)
    )


class TransparentDispatchMode(TorchDispatchMode):
    """A dispatch mode that compiled code runs under instead of falling back to eager."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


def profiled_memory(profiler: Any) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What a memory profile has recorded, in the order of time.

    Returns:
        allocations: when (ns) how many bytes were allocated, or freed if negative.
        operators: when one of torch's operators began and ended, called by another or not.
    """
    events = profiler.profiler.kineto_results.events()
    allocations = ((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    operators = (
        (e.start_ns(), e.end_ns())
        for e in events
        if "::" in e.name() and not e.name().startswith("autograd::")
    )
    return sorted(allocations, key=lambda item: item[0]), sorted(operators)


def is_compiled_callable(value: Any) -> bool:
    """Whether calling ``value`` runs code compiled by ``torch.compile``."""
    if isinstance(value, torch.nn.Module) and value._compiled_call_impl is not None:
        return True
    return hasattr(value, "_torchdynamo_orig_callable") or is_optimized_module(value)


def is_optimized_module(value: Any) -> bool:
    """Whether ``value`` is what ``torch.compile`` returned for a module."""
    return isinstance(value, torch._dynamo.eval_frame.OptimizedModule)


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


def is_partial_graph(module: fx.GraphModule) -> bool:
    """Whether Dynamo cut this graph off at a graph break."""
    reason = getattr(module, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def mutated_input_positions(joint: fx.GraphModule) -> dict[int, int]:
    """Output position -> input position, for outputs of a joint graph that are updated inputs."""
    from torch._functorch._aot_autograd import descriptors

    (output,) = joint.graph.find_nodes(op="output")
    inputs = [node.meta["desc"] for node in joint.graph.find_nodes(op="placeholder")]
    return {
        position: inputs.index(desc.mutated_input)
        for position, desc in enumerate(output.meta["desc"])
        if isinstance(desc, descriptors.InputMutationAOTOutput)
    }


def aot_backend(
    module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    *,
    partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]],
    forward_compiler: Callable[..., Any],
    backward_compiler: Callable[..., Any],
    decompositions: dict[Any, Callable[..., Any]],
) -> Callable[..., Any]:
    """Runs a Dynamo graph through AOTAutograd with our partition and compilers.

    The compilers return functions over one list of arguments, which they empty.
    """
    from torch._dynamo.backends.common import aot_autograd

    def boxed(compiler: Callable[..., Any]) -> Callable[..., Any]:
        def compile_boxed(graph: fx.GraphModule, example_inputs: Any) -> Any:
            function = compiler(graph, example_inputs)
            function._boxed_call = True
            return function

        return compile_boxed

    backend: Callable[..., Any] = aot_autograd(
        fw_compiler=boxed(forward_compiler),
        bw_compiler=boxed(backward_compiler),
        inference_compiler=boxed(forward_compiler),
        partition_fn=partition,
        decompositions=decompositions,
    )
    compiled: Callable[..., Any] = backend(module, inputs)
    return compiled
