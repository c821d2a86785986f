"""States of an optimizer side by side in memory, and where each parameter's begin.

    arena of exp_avg, float32    | layer1.weight | layer1.bias | layer2.weight | ...
    arena of low, int16          | layer1.weight | layer1.bias | ...

An arena has the parameters of one form on one device.  ``optimizer.state`` holds views into it, of
the parameter's shape and spread over ranks as it is, so that checkpoints see what they know from
any optimizer; states that were put there from elsewhere are copied in at the next step.  16 low
bits are seen as a bfloat16: neither gloo nor NCCL moves an int16.  An arena may lie in host memory,
numbers of steps excepted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fxzero import _torch
from fxzero.errors import UsageError
from fxzero.optim.forms import Form
from fxzero.transfers import HOST_ZEROS, TO_HOST

LOW, SCALE = "low_bits", "_scale"
_SAME = "  load it into an optimizer with the same master_bits and moments"
# Of places in arenas that kernels read, in elements.
ALIGNMENT = 256
State = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """A parameter in an arena.

    Attributes:
        group: number of its ``param_groups``.
        place: where its states begin, in elements.
        elements: of this rank's part.
        index: of its first element among all of the optimizer's, as if none was cut.
        row: its number in the arena.
        contiguous: whether its memory is in the order of its indices.
    """

    parameter: Tensor
    group: int
    place: int
    elements: int
    index: int
    row: int
    contiguous: bool

    @property
    def address(self) -> int:
        """Of this rank's part, the memory that the model reads."""
        return int(local(self.parameter).data_ptr())

    @property
    def weight(self) -> Tensor:
        """This rank's part as one dimension, the same memory."""
        return flat(local(self.parameter))


@dataclass(frozen=True)
class Arena:
    """States of all parameters of one form.

    Attributes:
        moments: names of the moments, which are the keys of ``tensors`` beside those of low bits
            and scales.
        tensors: the arenas by what they hold, one-dimensional.
        steps: float32 [members], how many steps each has had.
        views: what ``optimizer.state`` has of each member.
        on_host: whether the tensors are in host memory.
    """

    form: Form
    moments: tuple[str, ...]
    members: tuple[Member, ...]
    tensors: Mapping[str, Tensor]
    steps: Tensor
    views: tuple[State, ...]
    on_host: bool = False

    @property
    def device(self) -> torch.device:
        """That of the parameters."""
        return self.steps.device

    def divisor(self, name: str) -> int:
        """Elements of the model for one of the tensor of a name."""
        return self.form.quantum if name.endswith(SCALE) else 1

    @property
    def pairs(self) -> Iterator[tuple[Member, State]]:
        """Members with their views."""
        return zip(self.members, self.views, strict=True)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    part: Tensor = _torch.local_tensor(tensor)
    return part


def flat(tensor: Tensor) -> Tensor:
    """A tensor as one dimension in the order of its memory, without a copy.

    Raises:
        UsageError: its memory has holes.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    if _is_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    raise UsageError(
        f"a parameter of shape {list(tensor.shape)} and strides {list(tensor.stride())} is part of "
        "another tensor's memory\n  give the optimizer the whole tensor, or a contiguous one"
    )


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda x: x[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def first_indices(parameters: Sequence[Tensor]) -> dict[int, int]:
    """By ``id``: where the elements of each one's part begin if all lie one after the other."""
    whole = whole_indices(parameters)
    return {id(p): whole[id(p)] + _offset(p) for p in parameters}


def whole_indices(parameters: Iterable[Tensor]) -> dict[int, int]:
    """By ``id``: where each parameter's elements begin if all lie one after the other, whole."""
    found, index = {}, 0
    for parameter in parameters:
        found[id(parameter)] = index
        index += -(-parameter.numel() // 8) * 8
    return found


def _offset(parameter: Tensor) -> int:
    """Where this rank's part begins in the whole parameter; far off where it is not one run."""
    if not isinstance(parameter, DTensor):
        return 0
    cut = [i for i, p in enumerate(parameter.placements) if not isinstance(p, Replicate)]
    if not cut:
        return 0
    if len(cut) > 1 or parameter.placements[cut[0]] != Shard(0):
        return -(2**62)
    mesh = parameter.device_mesh
    rows = -(-parameter.shape[0] // mesh.size(cut[0]))
    first = min(mesh.get_local_rank(cut[0]) * rows, parameter.shape[0])
    return int(first * math.prod(parameter.shape[1:]))


def mark_written(members: Iterable[Member]) -> None:
    """Tells autograd of weights that were written where it does not see it.

    A backward that has saved older values of them then raises instead of being wrong.
    """
    written = [m.parameter for m in members]
    parts = [local(p) for p in written if isinstance(p, DTensor)]
    torch.autograd.graph.increment_version([*written, *parts])


def gradient_of(member: Member, given: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient, in the order of the parameter's memory.

    Raises:
        UsageError: a sparse gradient.
    """
    gradient = local(given)
    if gradient.layout is not torch.strided:
        raise UsageError(
            f"the gradient of a parameter of shape {list(member.parameter.shape)} is sparse\n"
            "  make its nn.Embedding with sparse=False, or use torch.optim.SparseAdam for it"
        )
    if member.contiguous and gradient.is_contiguous():
        return gradient
    weight = local(member.parameter)
    if gradient.stride() == weight.stride():
        return gradient
    ordered = torch.empty_strided(
        weight.shape, weight.stride(), dtype=gradient.dtype, device=gradient.device
    )
    return ordered.copy_(gradient)


def build(
    form: Form,
    moments: tuple[str, ...],
    parameters: list[tuple[int, Tensor]],
    index: Mapping[int, int],
    alignment: int,
    on_host: bool = False,
) -> Arena:
    """An arena of zeros for parameters, given with the numbers of their groups.

    Args:
        index: by ``id``, where their elements begin among all.
        alignment: elements that each one's place is a multiple of.
        on_host: whether the states lie in host memory.
    """
    members, size = [], 0
    for row, (group, parameter) in enumerate(parameters):
        _check_memory(parameter, form)
        elements = local(parameter).numel()
        straight = local(parameter).is_contiguous()
        first = index[id(parameter)]
        members.append(Member(parameter, group, size, elements, first, row, straight))
        size += -(-elements // alignment) * alignment
    device = local(parameters[0][1]).device
    tensors = {}
    for name, dtype in _kept(form, moments).items():
        count = size // form.quantum if name.endswith(SCALE) else size
        tensors[name] = (
            HOST_ZEROS(count, dtype, device)
            if on_host
            else torch.zeros(count, dtype=dtype, device=device)
        )
    steps = torch.zeros(len(members), device=device)
    views = tuple(
        {"step": steps[m.row]} | {name: _view(name, t, m, form) for name, t in tensors.items()}
        for m in members
    )
    return Arena(form, moments, tuple(members), tensors, steps, views, on_host)


def _check_memory(parameter: Tensor, form: Form) -> None:
    """Raises a UsageError if a parameter's memory is not one that can be updated."""
    part = local(parameter)
    flat(part)
    if form.quantum and math.prod(part.shape[1:]) % form.quantum:
        raise UsageError(
            f"{form.quantum} neighbours of a parameter of shape {list(parameter.shape)} share a "
            f"scale of 8-bit moments, but it is cut into rows of {math.prod(part.shape[1:])}\n"
            '  cut it along its first dimension, or give it moments="bfloat16"'
        )


def _kept(form: Form, moments: tuple[str, ...]) -> dict[str, torch.dtype]:
    """Dtypes of what is kept for each parameter besides the number of its steps."""
    kept = {} if form.low is None else {LOW: form.low}
    for name in moments:
        dtype = form.moments
        if form.quantum:
            dtype = torch.int8 if name == moments[0] else torch.uint8
            kept[name + SCALE] = torch.float32
        kept[name] = dtype
    return kept


def _seen(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state for those that move it."""
    return torch.bfloat16 if dtype == torch.int16 else dtype


def _view(name: str, tensor: Tensor, member: Member, form: Form) -> Tensor:
    """A parameter's part of an arena, in its shape; scales have one column for each quantum."""
    parameter, part = member.parameter, local(member.parameter)
    tensor = tensor.view(_seen(tensor.dtype))
    if not name.endswith(SCALE):
        inner = tensor.as_strided(part.shape, part.stride(), member.place)
        return _spread(inner, parameter, parameter.shape, parameter.stride())
    rows, columns = _shape_of_scales(part.shape, form)
    start = member.place // form.quantum
    inner = tensor[start : start + rows * columns].view(rows, columns)
    whole = torch.Size(_shape_of_scales(parameter.shape, form))
    return _spread(inner, parameter, whole, (whole[1], 1))


def _spread(part: Tensor, parameter: Tensor, shape: torch.Size, stride: Any) -> Tensor:
    """A rank's part as a tensor that is spread as the parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    return _torch.spread_tensor(part, mesh, placements, shape, tuple(stride))


def on_host(state: Any) -> Any:
    """A copy of one of a parameter's states in host memory."""
    if not isinstance(state, Tensor):
        return state
    copy = TO_HOST(local(state))
    return _spread(copy, state, state.shape, state.stride())


def adopt(arena: Arena, member: Member, state: State | None) -> None:
    """Copies a state that was loaded or set from elsewhere into the arena; None: that of no step.

    States of parameters that are cut over ranks may be whole.

    Raises:
        UsageError: it was made by an optimizer that keeps other things.
    """
    given = {name: value for name, value in (state or {}).items() if value is not None}
    check_state(member.parameter, arena.form, arena.moments, given)
    for name, view in arena.views[member.row].items():
        if name == "step":
            # torch's SGD does not count; what has a momentum has had a step.
            view.fill_(float(local(torch.as_tensor(given.get(name, min(len(given), 1))))))
        elif name in given:
            local(view).copy_(_part(given[name], view))
        else:
            local(view).zero_()


def check_state(parameter: Tensor, form: Form, moments: tuple[str, ...], state: State) -> None:
    """Raises a UsageError if a parameter's state is not what an optimizer of this form keeps.

    An empty one is that of no step, and low bits that are missing are zero.
    """
    kept, given = _kept(form, moments), {n: s for n, s in state.items() if s is not None}
    shape = list(parameter.shape)
    if given and not kept.keys() - {LOW} <= given.keys() <= {"step", *kept}:
        raise UsageError(
            f"the state of a parameter of shape {shape} has {', '.join(sorted(given))}; this "
            f"optimizer keeps {', '.join(sorted({'step', *kept}))}\n{_SAME}"
        )
    for name in kept.keys() & given.keys():
        value, dtype = given[name], _seen(kept[name])
        expected = _shape_of_scales(shape, form) if name.endswith(SCALE) else shape
        may_be_cast = name != LOW and value.is_floating_point() and dtype.is_floating_point
        if list(value.shape) != expected or not (may_be_cast or value.dtype == dtype):
            raise UsageError(
                f"{name} of a parameter of shape {shape} is {value.dtype} {list(value.shape)} in "
                f"the state, {dtype} {expected} in this optimizer\n{_SAME}"
            )


def _shape_of_scales(shape: Sequence[int], form: Form) -> list[int]:
    return [shape[0], math.prod(shape[1:]) // form.quantum]


def _part(value: Tensor, own: Tensor) -> Tensor:
    """This rank's part of a loaded state that may be whole."""
    if isinstance(own, DTensor) and not isinstance(value, DTensor):
        # Without a source everyone cuts what it has, and nothing is sent.
        value = distribute_tensor(
            value.to(local(own).device), own.device_mesh, own.placements, src_data_rank=None
        )
    return local(value)
