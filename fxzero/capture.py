"""Any ``nn.Module`` with example inputs -> one joint forward and backward graph.

Two steps, both upstream's: ``torch.export`` (non-strict: the model's Python runs as it is, so
logging and odd containers do not matter) turns the module into a forward graph over flat
tensors, and AOTAutograd traces that graph with its backward.  Between them weights that are one
tensor under several names become one name.

    model(**batch) -> Output(loss, logits)
    joint(parameters, buffers, inputs, tangents) -> [loss, logits, buffer updates, gradients]

When the model returns a scalar, gradients are expected to flow from scalars only: a large output
such as the logits then costs no tangent.  ``differentiable`` names another set of outputs.
"""

from __future__ import annotations

import copy
import logging
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from fxzero import _torch
from fxzero.decompositions import decompositions_for, restore_eager_operators
from fxzero.errors import CaptureError, DeviceError, UsageError, first_line
from fxzero.garbage import no_collections
from fxzero.graph import TrainGraph
from fxzero.precision import Precision
from fxzero.sharding import is_spread, replaced
from fxzero.storages import storage_identity
from fxzero.structure import Structure, flatten

log = logging.getLogger(__name__)

_PREFIX = "model."
_LIBRARY_ROOTS = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).resolve().parent),
    sysconfig.get_paths()["stdlib"] + "/",
)
# A model of fxzero's own is read like one of the user's: its lines stand in reports.
_MODELS = (str(Path(__file__).resolve().with_name("unet.py")),)


@dataclass(frozen=True)
class Capture:
    """A traced model: the joint graph and the way from Python values to its flat tensors.

    Attributes:
        graph: the joint TrainGraph.
        inputs: structure of (args, kwargs).
        outputs: structure of the model's return value.
        constants: tensors the model made while it was traced, by the graph's buffer name.
        differentiable: positions of outputs for which the graph takes a tangent.
        attached: positions of outputs that require a gradient in eager.
    """

    graph: TrainGraph
    inputs: Structure
    outputs: Structure
    constants: dict[str, torch.Tensor]
    differentiable: tuple[int, ...]
    attached: tuple[int, ...]


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    differentiable: Sequence[int] | None = None,
    inner: str = "eager",
    precision: Precision | None = None,
) -> Capture:
    """Trace ``model(*args, **kwargs)`` and its backward.

    A model on the meta device is traced on fake tensors and costs no memory.  Sharded parameters
    are traced as if they were whole, without being gathered.

    Args:
        differentiable: output positions (among the tensors of the return value, depth first)
            that will receive gradients; None: all scalars, or every floating output without any.
        inner: what will run the graph: "eager" (traced to equal eager bit for bit) or "inductor"
            (traced to the operators that it generates code for).
        precision: the dtype that parameters and floating-point inputs are cast to.

    Raises:
        CaptureError: control flow on tensor values, dynamic shapes, or an operator without a fake
            implementation; the message names the user's line.
        DeviceError: inputs and parameters on different devices.
    """
    leaves, inputs = flatten((args, dict(kwargs or {})))
    check_devices(model, leaves, inputs)
    with whole_parameters(model) as mode:
        leaves = leaves if mode is None else [mode.from_tensor(leaf) for leaf in leaves]
        return _capture(model, leaves, inputs, differentiable, inner, precision or Precision())


@dataclass(frozen=True)
class Exported:
    """A model's forward as a graph over flat tensors, with one name for each weight.

    Attributes:
        model: what was traced, on fake tensors where it is on the meta device.
        leaves: the flat inputs it was traced with.
        names: of the parameters and buffers that the graph may read.
        record: what the trace found out.
    """

    forward: fx.GraphModule
    model: nn.Module
    leaves: list[torch.Tensor]
    names: set[str]
    record: _Record

    @property
    def constants(self) -> dict[str, torch.Tensor]:
        """Tensors that the model made while it was traced."""
        return {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in self.forward.named_buffers()
            if name in self.names and not _belongs_to(self.model, name)
        }


def _capture(
    model: nn.Module,
    leaves: list[torch.Tensor],
    inputs: Structure,
    differentiable: Sequence[int] | None,
    inner: str,
    precision: Precision,
) -> Capture:
    exported = export(model, leaves, inputs, differentiable, precision)
    graph = join(exported.forward, exported.leaves, inner, type(model).__name__)
    record = exported.record
    assert record.outputs is not None
    return Capture(
        graph,
        inputs,
        record.outputs,
        exported.constants,
        record.differentiable,
        record.attached,
    )


def export(
    model: nn.Module,
    leaves: list[torch.Tensor],
    inputs: Structure,
    differentiable: Sequence[int] | None,
    precision: Precision,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> Exported:
    """The forward of a model whose parameters are whole; see ``capture``.

    Args:
        loss: from what the model returns to what the graph does; None: the same.
    """
    model, leaves = _on_fake_tensors(model, leaves)
    traced = _Traced(model, inputs, differentiable, precision, loss)
    with (
        _named_errors(type(model).__name__),
        torch.enable_grad(),
        _torch.keep_annotations(),
        _torch.lazy_modules(),
        no_collections(),
    ):
        exported = torch.export.export(traced, tuple(leaves), strict=False)
        forward = exported.module(check_guards=False)
        _refuse_dynamic_values(forward.graph, type(model).__name__)
        _drop_assertions(forward)
        _register_plain_tensors(forward)
        names = _unify_tied_weights(forward)
        if not traced.record.differentiable:
            raise CaptureError(
                f"{type(model).__name__} returns nothing that requires a gradient\n"
                "  call it under torch.no_grad() for inference, or let a parameter require one"
            )
    return Exported(forward, model, leaves, names, traced.record)


def join(
    forward: fx.GraphModule, leaves: Sequence[torch.Tensor], inner: str, name: str
) -> TrainGraph:
    """The joint graph of an exported forward, or of a stage of one, and of its backward.

    Args:
        name: of the model, for errors.
    """
    with (
        _named_errors(name),
        torch.enable_grad(),
        _torch.keep_annotations(),
        _torch.lazy_modules(),
        no_collections(),
    ):
        if inner == "eager":
            restore_eager_operators(forward)
        joint = _torch.export_joint(forward, leaves, decompositions_for(inner))
    graph = TrainGraph.from_joint(joint, rename=lambda name: name.removeprefix(_PREFIX))
    _refuse_sparse_gradients(graph, name)
    return graph


class _Record:
    """What a trace finds out on the way."""

    outputs: Structure | None = None
    differentiable: tuple[int, ...] = ()
    attached: tuple[int, ...] = ()


class _Traced(nn.Module):
    """The model as a function from flat tensors to flat tensors."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Structure,
        differentiable: Sequence[int] | None,
        precision: Precision,
        loss: Callable[[Any], torch.Tensor] | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.inputs = inputs
        self.wanted = differentiable
        self.precision = precision
        self.loss = loss
        self.record = _Record()

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self.inputs.fill(tuple(map(self.precision.computed, leaves)))
        with _CheckpointMarks():
            result = self.precision.call(self.model, args, kwargs)
            if self.loss is not None:
                result = self.loss(result)
        outputs, self.record.outputs = flatten(result)
        self.record.attached = tuple(
            i for i, t in enumerate(outputs) if t.requires_grad and t.is_floating_point()
        )
        self.record.differentiable = self._choose_differentiable(outputs)
        return tuple(self._separate(outputs, leaves))

    def _separate(
        self, outputs: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Outputs with a tangent get memory of their own: aliases would have none in the graph."""
        held = (*leaves, *self.model.parameters(), *self.model.buffers())
        taken = {storage_identity(tensor) for tensor in held}
        for index, tensor in enumerate(outputs):
            if index not in self.record.differentiable:
                yield tensor.detach()
            else:
                identity = storage_identity(tensor)
                yield tensor.clone() if identity in taken else tensor
                taken.add(identity)

    def _choose_differentiable(self, outputs: Sequence[torch.Tensor]) -> tuple[int, ...]:
        attached = self.record.attached
        if self.wanted is not None:
            return tuple(i for i in attached if i in self.wanted)
        return tuple(i for i in attached if outputs[i].ndim == 0) or attached


class _CheckpointMarks(torch.overrides.TorchFunctionMode):
    """Marks what runs inside ``torch.utils.checkpoint``, whose hooks a graph does not show."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        region = _checkpoint_region(_torch.saved_tensor_hook_in_force())
        if region is None:
            return func(*args, **(kwargs or {}))
        with _torch.annotate(fxzero_checkpoint=region):
            return func(*args, **(kwargs or {}))


def _checkpoint_region(hook: Any) -> int | None:
    if getattr(hook, "__module__", None) != "torch.utils.checkpoint":
        return None
    return id(hook)


def check_devices(model: nn.Module, leaves: Sequence[torch.Tensor], inputs: Structure) -> None:
    """Raises DeviceError if an input lies elsewhere than all the parameters."""
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        return
    (device,) = devices
    for leaf, path in zip(leaves, inputs.paths, strict=True):
        if leaf.device != device and leaf.ndim > 0 and not isinstance(leaf, _torch.FakeTensor):
            raise DeviceError(
                f"input {_argument_name(path)} lies on {leaf.device}, the parameters of "
                f"{type(model).__name__} on {device}\n"
                f'  move it: batch.to("{device}"), or the model: model.to("{leaf.device}")'
            )


def _argument_name(path: str) -> str:
    """'args[0]' or 'input_ids' for a path into (args, kwargs)."""
    if path.startswith("[0]"):
        return "args" + path.removeprefix("[0]")
    return path.removeprefix("[1]['").replace("']", "", 1)


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[_torch.FakeTensorMode | None]:
    """Inside, parameters that are spread over ranks are whole and fake, of the mode that is given.

    None is given where there are no such parameters.
    """
    if not any(map(is_spread, model.parameters())):
        yield None
        return
    mode = _torch.FakeTensorMode(allow_non_fake_inputs=True)

    def whole(parameter: torch.Tensor) -> torch.Tensor:
        with mode:
            return _fake_like(parameter, parameter.device)

    with replaced(model, whole):
        yield mode


def _on_fake_tensors(
    model: nn.Module, leaves: list[torch.Tensor]
) -> tuple[nn.Module, list[torch.Tensor]]:
    """A model on the meta device becomes one on fake CPU tensors, sharing nothing with it."""
    tensors = [*model.parameters(), *model.buffers(), *leaves]
    if not any(t.is_meta for t in tensors) or _torch.fake_mode_of(tensors) is not None:
        return model, leaves
    with _torch.FakeTensorMode(allow_non_fake_inputs=True):
        memo: dict[int, Any] = {id(t): _fake_like(t) for t in tensors}
        return copy.deepcopy(model, memo), [memo[id(leaf)] for leaf in leaves]


def _fake_like(tensor: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """Must run under a FakeTensorMode."""
    fake = torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
    ).requires_grad_(tensor.requires_grad)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _drop_assertions(forward: fx.GraphModule) -> None:
    """Casts assert the dtype that they were traced with, which is part of what a graph is for."""
    for node in forward.graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
    ):
        forward.graph.erase_node(node)


def _register_plain_tensors(forward: fx.GraphModule) -> None:
    """Tensors that the model holds as plain attributes become buffers of the trace."""
    for node in forward.graph.find_nodes(op="get_attr"):
        path, _, attribute = node.target.rpartition(".")
        owner = forward.get_submodule(path)
        value = vars(owner).get(attribute)
        if isinstance(value, torch.Tensor):
            delattr(owner, attribute)
            owner.register_buffer(attribute, value, persistent=False)


def _belongs_to(model: nn.Module, name: str) -> bool:
    """Whether a buffer of the trace is the model's own, and not made while it was traced."""
    if not name.startswith(_PREFIX):
        return False
    path, _, attribute = name.removeprefix(_PREFIX).rpartition(".")
    owner = model.get_submodule(path)
    return any(attribute in table for table in (owner._buffers, owner._parameters, vars(owner)))


def _unify_tied_weights(forward: fx.GraphModule) -> set[str]:
    """One name per tensor: reads of a second name of a weight become reads of its first."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in [
        *forward.named_parameters(remove_duplicate=False),
        *forward.named_buffers(remove_duplicate=False),
    ]:
        names[name] = first.setdefault(id(tensor), name)
    for node in forward.graph.find_nodes(op="get_attr"):
        node.target = names.get(node.target, node.target)
    for name, kept in names.items():
        if name != kept:
            owner, _, attribute = name.rpartition(".")
            delattr(forward.get_submodule(owner), attribute)
    forward.recompile()
    return set(names.values())


def _refuse_dynamic_values(graph: fx.Graph, model: str) -> None:
    """Raises CaptureError at the first value that is, or whose size is, a tensor's content."""
    for node in graph.nodes:
        if any(map(_is_dynamic, pytree.tree_leaves(node.meta.get("val")))):
            raise CaptureError(
                f"cannot trace {model}: the value of a tensor becomes a Python number or a shape "
                f"({node.target})\n  at {user_line(node) or 'an unknown line'}\n  {_ADVICE}"
            )


def _refuse_sparse_gradients(graph: TrainGraph, model: str) -> None:
    """Raises CaptureError for a gradient whose memory depends on the inputs' content."""
    for role, node in graph.result_pairs():
        if role.kind == "gradient" and isinstance(node, fx.Node) and role.of is not None:
            layout = node.meta["val"].layout
            if layout is not torch.strided:
                raise CaptureError(
                    f"cannot plan {model}: the gradient of {role.of.name} is {layout}\n"
                    "  make it dense, for an embedding with sparse=False"
                )


def _is_dynamic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


_ADVICE = (
    "keep it a tensor: torch.where instead of `if`, a mask instead of a boolean index, "
    "or compute it outside the model and pass it in"
)


@contextmanager
def _named_errors(model: str) -> Iterator[None]:
    """Whatever tracing raises becomes a CaptureError that names the user's own line."""
    try:
        yield
    except (CaptureError, DeviceError, UsageError):
        raise
    except Exception as error:
        where = _user_frame(error)
        data_dependent = _caused_by(error, _torch.DATA_DEPENDENT_ERRORS)
        what = (
            "its control flow or a shape depends on the value of a tensor"
            if data_dependent
            else f"{type(error).__name__}: {first_line(error)}"
        )
        advice = (
            _ADVICE
            if data_dependent
            else "run the model eagerly with the same inputs to see whether it works there; if it "
            "does, move the line out of forward"
        )
        raise CaptureError(f"cannot trace {model}: {what}\n  at {where}\n  {advice}") from error


def _caused_by(error: BaseException | None, kinds: tuple[type[Exception], ...]) -> bool:
    while error is not None:
        if isinstance(error, kinds) or type(error).__name__ in ("UserError",):
            return True
        error = error.__cause__ or error.__context__
    return False


def _user_frame(error: BaseException) -> str:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for item in reversed(chain):
        for frame in reversed(traceback.extract_tb(item.__traceback__)):
            if is_user_file(frame.filename):
                return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return "a line outside your code"


def is_user_file(filename: str) -> bool:
    """Whether a source file belongs to the model's author and not to torch, Python or fxzero."""
    return filename in _MODELS or not filename.startswith((*_LIBRARY_ROOTS, "<"))


_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in ([^\n]+)(?:\n *(?!File ")([^\n]+))?')


def user_line(node: fx.Node) -> str | None:
    """'model.py:41 in forward: x = self.w1(x)' for a node: the innermost line of the user's code.

    Read from the trace alone: the file need not be there, or be the one that was traced.
    """
    for frame in reversed(list(_FRAME.finditer(node.meta.get("stack_trace") or ""))):
        path, number, function, code = frame.groups(default="")
        if is_user_file(path):
            return f"{Path(path).name}:{number} in {function}: {code}".removesuffix(": ")
    return None
