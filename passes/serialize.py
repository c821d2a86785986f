"""A TrainGraph as plain data that goes to JSON and back: wiring, values, roles, and no code.

``load_graph`` may be given a stranger's file.  Invariant: it raises PlanError or returns a graph,
and runs nothing that the file names: an operator is looked up among those the dispatcher knows, and
every text that ends up in the module's generated Python is an identifier.

    {"nodes": [{"name": "mm", "op": "call_function", "target": "aten.mm.default",
                "args": [{"node": "x"}, {"node": "w"}],
                "value": {"tensor": {"storage": 2, "dtype": "torch.float32", ...}}, ...}, ...],
     "storages": [{"bytes": 2048, "device": "cpu"}, ...], "inputs": [...], "outputs": [...]}

Values are fake tensors; those that shared a storage share one again.
"""

from __future__ import annotations

import dataclasses
import keyword
import math
import operator
from typing import Any

import torch
from torch import fx

from fxzero import _torch, randomness
from fxzero.errors import PlanError
from fxzero.graph import InputRole, OutputRole, TrainGraph
from fxzero.typed_data import read_value

FORMAT = 1

_FUNCTIONS = {
    "operator.getitem": operator.getitem,
    "fxzero.randomness.draw": randomness.draw,
    "fxzero.randomness.draw_again": randomness.draw_again,
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_CONSTANTS: dict[str, dict[str, Any]] = {
    kind.__name__: {str(v): v for v in vars(torch).values() if isinstance(v, kind)}
    for kind in (torch.dtype, torch.layout, torch.memory_format)
}
_MODULE_STACKS = ("nn_module_stack", "fwd_nn_module_stack")
_MARKS = {"stack_trace": str, "partitioner_tag": str, "recomputed_from": str, "rng_state": bool}
_SCALARS = (bool, int, str, type(None))
_LARGEST = 2**60


def dump_graph(graph: TrainGraph) -> dict[str, Any]:
    """The graph as data; raises NotImplementedError for what has no such form (subgraphs)."""
    return _Writer().write(graph)


def load_graph(data: Any) -> TrainGraph:
    """The graph that ``dump_graph`` wrote.

    Raises:
        PlanError: the data is anything else.
    """
    try:
        return _Reader(data).read()
    except PlanError:
        raise
    except (RuntimeError, TypeError, ValueError, SyntaxError, NotImplementedError) as error:
        # What torch says of sizes, devices or names that it cannot have.
        raise PlanError(f"not a graph: {type(error).__name__}: {error}") from error


class _Writer:
    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self.sizes: list[dict[str, Any]] = []

    def write(self, graph: TrainGraph) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "torch_version": torch.__version__,
            "inputs": [dataclasses.asdict(role) for role in graph.inputs],
            "outputs": [dataclasses.asdict(role) for role in graph.outputs],
            "nodes": [self._node(node) for node in graph.graph.nodes],
            "storages": self.sizes,
        }

    def _node(self, node: fx.Node) -> dict[str, Any]:
        meta = {key: node.meta[key] for key in _MARKS if node.meta.get(key) is not None}
        for key in _MODULE_STACKS:
            if stack := node.meta.get(key):
                meta[key] = [[k, str(path), str(kind)] for k, (path, kind) in stack.items()]
        record = {
            "name": node.name,
            "op": node.op,
            "target": _target_name(node),
            "args": [self._encode(value) for value in node.args],
            "kwargs": {key: self._encode(value) for key, value in node.kwargs.items()},
            "meta": meta,
        }
        if "val" in node.meta:
            record["value"] = self._encode(node.meta["val"])
        return record

    def _encode(self, value: Any) -> Any:
        if isinstance(value, _SCALARS) and not isinstance(value, torch.SymInt):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if isinstance(value, torch.Tensor):
            return {"tensor": self._tensor(value)}
        if isinstance(value, (tuple, list)):
            items = [self._encode(item) for item in value]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, slice):
            return {"slice": [self._encode(v) for v in (value.start, value.stop, value.step)]}
        if isinstance(value, dict):
            return {"dict": [[self._encode(k), self._encode(v)] for k, v in value.items()]}
        if isinstance(value, complex):
            return {"complex": [self._encode(value.real), self._encode(value.imag)]}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if type(value).__name__ in _CONSTANTS:
            return {type(value).__name__: str(value)}
        if isinstance(value, torch._ops.OpOverload):
            return {"operator": str(value)}
        raise NotImplementedError(f"no data form for {type(value).__name__} {value!r}")

    def _tensor(self, value: torch.Tensor) -> dict[str, Any]:
        storage = value.untyped_storage()
        number = self.storages.setdefault(storage._cdata, len(self.sizes))
        if number == len(self.sizes):
            self.sizes.append({"bytes": storage.nbytes(), "device": str(value.device)})
        return {
            "storage": number,
            "dtype": str(value.dtype),
            "shape": list(value.shape),
            "stride": list(value.stride()),
            "offset": value.storage_offset(),
        }


def _target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise NotImplementedError(f"no data form for the target of {node.name}: {target!r}")


class _Reader:
    def __init__(self, data: Any) -> None:
        self.data = _typed(data, dict, "graph")
        if self.data.get("format") != FORMAT:
            raise PlanError(f"graph has format {self.data.get('format')!r}, expected {FORMAT}")
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.mode = _torch.FakeTensorMode(allow_fallback_kernels=False)
        self.bases = [self._base(record) for record in _field(self.data, "storages", list)]

    def read(self) -> TrainGraph:
        for record in _field(self.data, "nodes", list):
            self._node(_typed(record, dict, "node"))
        output = next(reversed(self.graph.nodes), None)
        if output is None or len(self.graph.find_nodes(op="output")) != 1 or output.op != "output":
            raise PlanError("a graph needs one output, at its end")
        if len(output.args) != 1 or not isinstance(output.args[0], (tuple, list)):
            raise PlanError("the output must have one argument, a list or tuple")
        if not all(item is None or isinstance(item, fx.Node) for item in output.args[0]):
            raise PlanError("the output's argument must hold nodes, or null for an absent gradient")
        module = fx.GraphModule(self.constants, self.graph)
        inputs = read_value(tuple[InputRole, ...], self.data.get("inputs"), "inputs")
        outputs = read_value(tuple[OutputRole, ...], self.data.get("outputs"), "outputs")
        return TrainGraph(module, inputs, outputs)

    def _base(self, record: Any) -> torch.Tensor:
        size = _natural(_field(record, "bytes", int))
        with self.mode:
            device = torch.device(_field(record, "device", str))
            return torch.empty(size, dtype=torch.uint8, device=device)

    def _node(self, record: dict[str, Any]) -> None:
        name = _identifier(_field(record, "name", str))
        op, target = _field(record, "op", str), _field(record, "target", str)
        args = tuple(self._decode(value) for value in _field(record, "args", list))
        kwargs = {
            _identifier(key): self._decode(value)
            for key, value in _field(record, "kwargs", dict).items()
        }
        node = self.graph.create_node(op, self._target(op, target), args, kwargs, name=name)
        if node.name != name:
            raise PlanError(f"two nodes are called {name!r}, or none can be")
        self.nodes[name] = node
        node.meta = _meta(_field(record, "meta", dict))
        if "value" in record:
            node.meta["val"] = self._decode(record["value"])
        if op == "get_attr":
            value = _typed(node.meta.get("val"), torch.Tensor, f"value of {name}")
            self.constants.setdefault(target, value)

    def _target(self, op: str, name: str) -> Any:
        if op == "call_function":
            return _FUNCTIONS.get(name) or _operator(name)
        if op == "get_attr" and hasattr(fx.GraphModule, _identifier(name)):
            raise PlanError(f"a constant cannot be called {name!r}")
        if op in ("placeholder", "get_attr", "output"):
            return _identifier(name)
        raise PlanError(f"unknown kind of node {op!r}")

    def _decode(self, value: Any) -> Any:
        if isinstance(value, (*_SCALARS, float)):
            return value
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if not isinstance(value, dict) or len(value) != 1:
            raise PlanError(f"not a value: {value!r:.80}")
        ((kind, content),) = value.items()
        if kind in ("tuple", "slice", "complex", "dict"):
            return self._container(kind, [self._decode(v) for v in _typed(content, list, kind)])
        if kind == "tensor":
            return self._tensor(content)
        text = _typed(content, str, kind)
        if kind == "node":
            return _lookup(self.nodes, text, "node made earlier")
        if kind == "operator":
            return _operator(text)
        if kind == "device":
            return torch.device(text)
        if kind == "float" and text in ("inf", "-inf", "nan"):
            return float(text)
        return _lookup(_lookup(_CONSTANTS, kind, "kind of value"), text, kind)

    def _container(self, kind: str, items: list[Any]) -> Any:
        if kind == "tuple":
            return tuple(items)
        if kind == "slice" and len(items) == 3:
            return slice(*items)
        if kind == "complex" and [type(item) for item in items] == [float, float]:
            return complex(*items)
        if kind == "dict" and all(isinstance(i, list) and len(i) == 2 for i in items):
            return {_typed(key, str, "key"): value for key, value in items}
        raise PlanError(f"not a {kind}: {items!r:.80}")

    def _tensor(self, record: Any) -> torch.Tensor:
        number = _natural(_field(record, "storage", int))
        dtype = _lookup(_CONSTANTS["dtype"], _field(record, "dtype", str), "dtype")
        shape = [_natural(size) for size in _field(record, "shape", list)]
        stride = [_natural(step) for step in _field(record, "stride", list)]
        offset = _natural(_field(record, "offset", int))
        if number >= len(self.bases) or len(shape) != len(stride):
            raise PlanError(f"no such tensor: {record!r:.80}")
        items = self.bases[number].numel() // dtype.itemsize
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 not in shape and last >= items:
            raise PlanError(f"tensor larger than its storage: {record!r:.80}")
        with self.mode:
            # as_strided and not a slice, which needs a build of torch that knows the device
            base = self.bases[number].as_strided([items * dtype.itemsize], [1]).view(dtype)
            return base.as_strided(shape, stride, offset)


def _meta(record: dict[str, Any]) -> dict[str, Any]:
    """A node's meta but for its value; everything in it is text or a flag."""
    meta: dict[str, Any] = {}
    for key, value in record.items():
        if key in _MODULE_STACKS:
            entries = read_value(tuple[tuple[str, str, str], ...], value, key)
            meta[key] = {name: (path, kind) for name, path, kind in entries}
        else:
            meta[key] = _typed(value, _lookup(_MARKS, key, "mark of a node"), key)
    return meta


def _operator(name: str) -> torch._ops.OpOverload:
    if (found := _torch.find_operator(name)) is None:
        raise PlanError(
            f"unknown operator {name!r}\n  import the library that registers it, if it is one's own"
        )
    return found


def _identifier(text: str) -> str:
    """``text``, which goes into the module's generated Python."""
    if text.isascii() and text.isidentifier() and not keyword.iskeyword(text):
        return text
    raise PlanError(f"not a name: {text!r:.80}")


def _natural(value: Any) -> int:
    if type(value) is int and 0 <= value < _LARGEST:
        return value
    raise PlanError(f"not a size: {value!r:.80}")


def _field(record: Any, key: str, kind: type) -> Any:
    return _typed(_typed(record, dict, "record").get(key), kind, key)


def _typed(value: Any, kind: type, what: str) -> Any:
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise PlanError(f"{what} must be {kind.__name__}, not {type(value).__name__}")


def _lookup(table: dict[str, Any], key: str, what: str) -> Any:
    if key in table:
        return table[key]
    raise PlanError(f"unknown {what} {key!r:.80}")
