"""The only file that touches private torch names, but for Inductor's (``_inductor.py``).

Everything else imports what it needs from here, so a torch release that moves a name breaks one
file.  ``tests/test_torch_contract.py`` states what each function must do on a supported torch
(2.11 to 2.13).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
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
