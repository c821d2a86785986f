"""What every function of fxzero/_torch.py must do, stated on the torch that is installed."""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from fxzero import _torch

aten = torch.ops.aten


class Net(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.mean += 1
        hidden = torch.tanh(self.up(x))
        return hidden.sum(), hidden.detach()


X = torch.ones(2, 4)


def joint() -> fx.GraphModule:
    exported = torch.export.export(Net(), (X,), strict=False).module(check_guards=False)
    return _torch.export_joint(exported, [X], {})


def plain_graph(*operators: Any) -> fx.GraphModule:
    """A graph that applies operators to one input."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    with _torch.FakeTensorMode():
        value = x.meta["val"] = torch.empty(2, 4)
        for operator, *rest in operators:
            x = graph.call_function(operator, (x, *rest))
            value = x.meta["val"] = operator(value, *rest)
    graph.output((x,))
    return fx.GraphModule({}, graph)


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ([1, 2], ["[0]", "[1]"]),
        ((1, 2), ["[0]", "[1]"]),
        ({"b": 1, "a": 2}, ["['b']", "['a']"]),
        (Point(1, 2), [".x", ".y"]),
        (collections.OrderedDict(a=1, b=2), ["['a']", "['b']"]),
    ],
)
def test_flatten_one_level_takes_a_container_apart_and_builds_one_like_it(
    value: Any, names: list[str]
) -> None:
    found = _torch.flatten_one_level(value)
    assert found is not None
    children, paths, build = found
    assert sorted(paths) == sorted(names)
    assert sorted(children) == [1, 2]
    assert build(children) == value
    assert type(build(children)) is type(value)


@pytest.mark.parametrize("leaf", [1, "text", X, object()])
def test_flatten_one_level_leaves_leaves_alone(leaf: object) -> None:
    assert _torch.flatten_one_level(leaf) is None


def test_flatten_one_level_stops_after_one_level() -> None:
    children, *_ = _torch.flatten_one_level([[1], (2,)]) or ([],)
    assert children == [[1], (2,)]


def test_a_joint_graph_says_what_its_inputs_are() -> None:
    described = [_torch.describe_input(n) for n in joint().graph.find_nodes(op="placeholder")]
    assert described == [
        ("parameter", "up.weight"),
        ("parameter", "up.bias"),
        ("parameter", "unused.weight"),
        ("parameter", "unused.bias"),
        ("buffer", "mean"),
        ("input", 0),
        ("tangent", 0),
    ]


def test_a_joint_graph_says_what_its_outputs_are() -> None:
    gradients = [("gradient", ("parameter", f"up.{name}")) for name in ("weight", "bias")]
    described = _torch.describe_outputs(joint())
    assert described[:3] == [("mutation", ("buffer", "mean")), ("output", 0), ("output", 1)]
    assert described[3:5] == gradients
    (output,) = joint().graph.find_nodes(op="output")
    assert output.args[0][5:] in ((None, None, None, None), [None] * 4)


def test_a_joint_graph_marks_what_runs_in_the_backward() -> None:
    nodes = {n.target: n for n in joint().graph.nodes if n.op == "call_function"}
    assert _torch.is_backward_node(nodes[aten.tanh_backward.default])
    assert not _torch.is_backward_node(nodes[aten.tanh.default])


def test_mutated_inputs_of_a_joint_graph_are_known_by_position() -> None:
    assert _torch.mutated_input_positions(joint()) == {0: 4}


def test_an_operator_as_eager_is_traced_as_its_own_kernel() -> None:
    operator = torch.ops.aten.upsample_bilinear2d.vec

    class Resample(nn.Module):
        def __init__(self, run: Callable[..., Tensor]) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.run = run

        def forward(self, image: Tensor) -> tuple[Tensor]:
            return (self.run(image * self.scale, [6, 6], False, None).sum(),)

    def targets(run: Callable[..., Tensor]) -> set[str]:
        joint = _torch.export_joint(Resample(run), [torch.randn(1, 1, 3, 3)], {})
        return {str(node.target) for node in joint.graph.nodes}

    assert "aten.upsample_bilinear2d_backward.default" in targets(_torch.as_eager(operator))
    assert "aten.upsample_bilinear2d_backward.default" not in targets(operator)


def test_a_joint_graph_takes_decompositions() -> None:
    def tanh(x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(2 * x) - 1

    exported = torch.export.export(Net(), (X,), strict=False).module(check_guards=False)
    graph = _torch.export_joint(exported, [X], {aten.tanh.default: tanh}).graph
    targets = [node.target for node in graph.nodes]
    assert aten.tanh.default not in targets
    assert aten.sigmoid.default in targets


@pytest.mark.parametrize("keep", [True, False])
def test_a_backward_knows_whether_its_graph_is_kept(keep: bool) -> None:
    seen = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            seen.append(_torch.backward_keeps_graph())
            return gradient

    Ask.apply(X.clone().requires_grad_()).sum().backward(retain_graph=keep)
    assert seen == [keep]


def test_a_backward_knows_the_leaves_that_autograd_only_adds_to() -> None:
    leaves = [X.clone().requires_grad_() for _ in range(4)]
    plain, hooked, watched, other = leaves
    hooked.register_hook(lambda gradient: None)
    watched.register_post_accumulate_grad_hook(lambda leaf: None)
    seen: list[list[Tensor | None]] = []
    runs: list[list[bool]] = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, number: int, *tensors: Tensor) -> Tensor:
            return tensors[0] * number

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
            nodes = [node for node, _ in ctx.next_functions]
            runs.append([_torch.adds_to_leaf(node) for node in nodes])
            seen.append([_torch.parameter_to_add_to(node) for node in nodes])
            return None, *gradients * 6

    def result() -> Tensor:
        return Ask.apply(2, *leaves, X, plain * 1).sum()

    result().backward()
    result().backward(inputs=[other])
    torch.autograd.grad(result(), leaves)
    everything, some, nothing = seen
    assert everything[0] is plain
    assert everything[1:3] == [None, None]
    assert everything[3] is other
    assert everything[4:] == [None, None]
    assert some[:3] == [None, None, None]
    assert some[3] is other
    assert nothing == [None] * 6
    assert runs == [[True] * 4 + [False] * 2, [False] * 3 + [True] + [False] * 2, [False] * 6]


def test_the_hook_in_force_inside_a_checkpoint_is_checkpoints() -> None:
    seen = []

    def region(x: Tensor) -> Tensor:
        seen.append(_torch.saved_tensor_hook_in_force())
        return x * 2

    assert _torch.saved_tensor_hook_in_force() is None
    checkpoint(region, X.clone().requires_grad_(), use_reentrant=False)
    assert seen[0].__module__ == "torch.utils.checkpoint"
    assert _torch.saved_tensor_hook_in_force() is None


def test_annotations_reach_the_nodes_of_an_export_and_its_joint_graph() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with _torch.annotate(mark="here"):
                x = torch.tanh(self.up(x))
            return torch.exp(x).sum()

    with _torch.keep_annotations():
        exported = torch.export.export(Marked(), (X,), strict=False).module(check_guards=False)
        graph = _torch.export_joint(exported, [X], {}).graph
    marks = {n.target: (n.meta.get("custom") or {}).get("mark") for n in graph.nodes}
    assert marks[aten.tanh.default] == "here"
    assert marks[aten.exp.default] is None


def test_annotate_outside_a_trace_does_nothing() -> None:
    with _torch.annotate(mark="here"):
        assert torch.equal(X + 1, X + 1)


def test_make_graph_module_makes_a_module_that_runs() -> None:
    made = _torch.make_graph_module({}, plain_graph((aten.tanh.default,)).graph)
    assert isinstance(made, fx.GraphModule)
    assert torch.equal(made(X)[0], X.tanh())


def test_copy_module_copies_nodes_and_shares_values() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = X
    graph.output((graph.call_function(torch.ops.aten.tanh.default, (x,)),))
    module = fx.GraphModule({}, graph)
    copied = _torch.copy_module(module)
    assert [n.name for n in copied.graph.nodes] == [n.name for n in module.graph.nodes]
    assert not set(copied.graph.nodes) & set(module.graph.nodes)
    assert next(iter(copied.graph.nodes)).meta["val"] is X
    assert torch.equal(copied(X)[0], X.tanh())


def test_local_tensor_is_the_part_of_this_rank_and_other_tensors_themselves() -> None:
    assert _torch.local_tensor(X) is X
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, part = init_device_mesh("cpu", (1,)), torch.ones(2, 3)
        spread = nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False))
        assert type(_torch.local_tensor(spread)) is Tensor
        assert _torch.local_tensor(spread).data_ptr() == part.data_ptr()
    finally:
        dist.destroy_process_group()


def test_a_spread_tensor_lies_where_its_part_is() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, part = init_device_mesh("cpu", (1,)), torch.ones(2, 3, dtype=torch.bfloat16)
        expected = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
        shape, stride = torch.Size((2, 3)), (3, 1)
        spread = _torch.spread_tensor(part, mesh, [Shard(0)], shape, stride)
        assert type(spread) is DTensor
        assert (spread.shape, spread.stride(), spread.dtype) == (shape, stride, part.dtype)
        assert (spread.placements, spread.device_mesh) == (expected.placements, mesh)
        assert _torch.local_tensor(spread).data_ptr() == part.data_ptr()
        elsewhere = _torch.spread_tensor(part.to("meta"), mesh, [Shard(0)], shape, stride)
        assert _torch.local_tensor(elsewhere).is_meta
    finally:
        dist.destroy_process_group()


def test_groups_of_a_process_are_those_it_is_in() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert _torch.groups_of_this_process() == 1
        dist.new_group([0], use_local_synchronization=True)
        assert _torch.groups_of_this_process() == 2
    finally:
        dist.destroy_process_group()
    assert _torch.groups_of_this_process() == 0


def test_the_default_store_is_that_of_the_group() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        before = store.num_keys()
        _torch.default_store().set("key", "value")
        assert store.num_keys() == before + 1
    finally:
        dist.destroy_process_group()


def test_groups_wait_as_long_as_they_are_told() -> None:
    """The default timeout is the user's; torch gives that of other groups a value of its own."""
    asked = timedelta(seconds=7)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=asked)
    try:
        assert _torch.default_timeout() == asked
        group = dist.new_group([0], use_local_synchronization=True)
        _torch.set_timeout(group, timedelta(seconds=8))
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=8)
        mine, every = torch.ones(2), [torch.zeros(2)]
        group.allgather([every], [mine], _torch.gather_options(asked)).wait()
        assert torch.equal(every[0], mine)
        group.allreduce([mine], _torch.reduce_options(asked, dist.ReduceOp.MAX)).wait()
    finally:
        dist.destroy_process_group()
    for options in (
        _torch.gather_options(asked),
        _torch.reduce_options(asked, dist.ReduceOp.MAX),
    ):
        assert options.timeout == asked


def test_symmetric_memory_is_only_where_a_cuda_device_is() -> None:
    assert _torch.has_symmetric_memory() is torch.cuda.is_available()


@pytest.mark.cuda
def test_symmetric_memory_is_zeros_that_belong_to_the_ranks_of_a_group() -> None:
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        (memory,) = _torch.symmetric_memory(4096, device, dist.group.WORLD)
        assert (memory.dtype, memory.numel(), memory.device) == (torch.uint8, 4096, device)
        assert memory.data_ptr() % 128 == 0
        assert not memory.any()
        memory.fill_(3)
        assert (memory == 3).all()
    finally:
        dist.destroy_process_group()


def test_fake_mode_of_finds_the_mode_of_the_first_fake() -> None:
    with _torch.FakeTensorMode() as mode:
        fake = torch.empty(2)
    assert isinstance(fake, _torch.FakeTensor)
    assert _torch.fake_mode_of([X, None, fake]) is mode
    assert _torch.fake_mode_of([X]) is None


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("aten.mm.default", True),
        ("aten.add.Tensor", True),
        ("aten.mm", False),
        ("aten.nothing.default", False),
        ("aten.save.default", False),
        ("nowhere.mm.default", False),
        ("os.system", False),
    ],
)
def test_find_operator_knows_the_dispatchers_operators_alone(name: str, known: bool) -> None:
    found = _torch.find_operator(name)
    assert (str(found) == name) is known
    assert (found is None) is not known


def test_is_plain_refuses_what_owns_no_memory() -> None:
    with _torch.FakeTensorMode():
        fake = torch.empty(2)
    assert _torch.is_plain(X)
    assert _torch.is_plain(nn.Parameter(X))
    assert _torch.is_plain(nn.Buffer(X))
    assert not _torch.is_plain(fake)
    assert not _torch.is_plain(X.to("meta"))
    functional = torch._to_functional_tensor(X)
    assert not _torch.is_plain(functional)


def test_a_transparent_mode_sees_operators_and_compiled_code_runs_under_it() -> None:
    seen = []

    class See(_torch.TransparentDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    backend_calls = []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        backend_calls.append(1)
        return module

    torch._dynamo.reset()
    call = torch.compile(lambda x: torch.tanh(x), backend=backend)
    call(X)
    with See():
        call(X)
    assert aten.tanh.default in seen
    assert backend_calls == [1]


def test_what_torch_compile_returned_is_known() -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1

    module, in_place = Net(), Net()
    in_place.compile(backend="eager")
    assert _torch.is_compiled_callable(torch.compile(function, backend="eager"))
    assert _torch.is_compiled_callable(torch.compile(module, backend="eager"))
    assert _torch.is_compiled_callable(in_place)
    assert not _torch.is_compiled_callable(module)
    assert not _torch.is_compiled_callable(function)
    assert _torch.is_optimized_module(torch.compile(module, backend="eager"))
    assert not _torch.is_optimized_module(in_place)
    assert not _torch.is_optimized_module(torch.compile(function, backend="eager"))


def test_a_graph_that_dynamo_cut_off_is_partial() -> None:
    partial = []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        partial.append(_torch.is_partial_graph(module))
        return module

    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=backend)(X)
    assert partial == [False]
    torch.compile(broken, backend=backend)(X)
    assert partial[1] is True


def test_aot_backend_hands_over_the_joint_graph_and_runs_boxed_functions() -> None:
    seen: dict[str, Any] = {}

    def partition(graph: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any) -> Any:
        from torch._functorch.partitioners import default_partition

        seen["outputs"] = num_fwd_outputs
        seen["tangents"] = [
            n.name for n in graph.graph.find_nodes(op="placeholder") if "tangents" in n.name
        ]
        return default_partition(graph, inputs, num_fwd_outputs=num_fwd_outputs)

    def compiler(graph: fx.GraphModule, inputs: Any) -> Any:
        def run(arguments: list[Any]) -> Any:
            taken = list(arguments)
            arguments.clear()
            return graph(*taken)

        return run

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        return _torch.aot_backend(
            module,
            inputs,
            partition=partition,
            forward_compiler=compiler,
            backward_compiler=compiler,
            decompositions={},
        )

    torch._dynamo.reset()
    x = X.clone().requires_grad_()
    torch.compile(lambda x: torch.tanh(x).sum(), backend=backend)(x).backward()
    assert seen == {"outputs": 1, "tangents": ["tangents_1"]}
    torch.testing.assert_close(x.grad, 1 - X.tanh() ** 2)


def _raises(function: Any) -> type[BaseException]:
    with _torch.FakeTensorMode(), pytest.raises(Exception) as caught:  # noqa: PT011
        function(torch.ones(3))
    return caught.type


def test_values_that_decide_what_runs_raise_a_data_dependent_error() -> None:
    assert issubclass(_raises(lambda x: bool(x.sum() > 0)), _torch.DATA_DEPENDENT_ERRORS)
    assert issubclass(_raises(lambda x: x[x > 0]), _torch.DATA_DEPENDENT_ERRORS)
    assert all(issubclass(kind, Exception) for kind in _torch.NO_FAKE_ERRORS)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_fused_kernels_are_those_of_torchs_optimizers(name: str) -> None:
    weight, gradient = torch.ones(5), torch.arange(5.0)
    expected = nn.Parameter(weight.clone())
    expected.grad = gradient.clone()
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2, "maximize": True}
    if name == "AdamW":
        options |= {"betas": (0.8, 0.9), "eps": 1e-6}
        moments = [torch.zeros(5)], [torch.zeros(5)]
        _torch.fused_adamw([weight], [gradient], *moments, torch.tensor(1.0), **options)
    else:
        options |= {"momentum": 0.9, "dampening": 0.0, "nesterov": True}
        _torch.fused_sgd([weight], [gradient], [torch.zeros(5)], first_step=True, **options)
    getattr(torch.optim, name)([expected], fused=True, **options).step()
    assert torch.equal(weight, expected.detach())


def test_numbers_are_added_to_tensors_exactly() -> None:
    numbers = [2**47 + 1, -3, 0]
    tensor = torch.tensor([1, 1, 2**40])
    _torch.add_numbers(tensor.unbind(), numbers)
    assert tensor.tolist() == [2**47 + 2, -2, 2**40]


def test_nothing_is_captured_outside_of_a_capture() -> None:
    assert not _torch.is_capturing()


def test_lists_of_tensors_are_scaled_and_copied() -> None:
    tensors, targets = [torch.ones(2), torch.full((3,), 2.0)], [torch.zeros(2), torch.zeros(3)]
    _torch.scale_all(tensors, torch.tensor(0.5))
    _torch.copy_all(targets, tensors)
    assert [tensor.tolist() for tensor in targets] == [[0.5] * 2, [1.0] * 3]


def test_every_public_function_is_stated_here() -> None:
    functions = [
        name
        for name, value in vars(_torch).items()
        if inspect.isfunction(value) and value.__module__ == _torch.__name__ and name[0] != "_"
    ]
    source = "".join(
        file.read_text() for file in Path(__file__).parent.glob("test_torch_contract*")
    )
    assert [name for name in functions if f"_torch.{name}" not in source] == []


def test_lazy_modules_write_no_code_until_they_are_called() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with _torch.lazy_modules():
        traced = make_fx(double)(torch.ones(2))
    assert traced._needs_recompile()
    assert traced(torch.ones(2)).tolist() == [2.0, 2.0]
