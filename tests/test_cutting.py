"""Cutting forward graphs into stages: the same operators, in the same order, on the same values."""

from __future__ import annotations

import pytest
import torch
import zoo
from helpers import tiers
from pipeline_cases import build
from torch import nn

from fxzero.errors import UsageError
from fxzero.pipelining.planning import named_cuts
from fxzero.pipelining.stages import Exports
from fxzero.precision import Precision


def exports_of(name):
    model, args, kwargs, loss = zoo.build(name)
    return Exports(model, args, kwargs, loss=loss, precision=Precision())


def export(model, *args):
    return Exports(model, args, {}, loss=lambda output: output, precision=Precision())


def run(parts, leaves):
    """The model's outputs, one stage after the other."""
    known = {}
    for part in parts:
        ports = part.ports
        given = [leaves[i] for i in ports.leaves] + [known[name] for name in ports.received]
        results = part.module(*given)
        known.update(zip(ports.sent, results, strict=False))
    return results[len(ports.sent) :]


# The loss of no_loss draws labels from a generator that goes on.
@pytest.mark.parametrize(
    "name",
    tiers(
        [n for n in zoo.CASES if n != "no_loss"],
        quick=("rand_ops",),
        exhaustive=("llama_bf16", "vit", "mixtral", "dict_output", "dataclass_output", "logging"),
    ),
)
def test_stages_compute_what_the_model_does(name):
    """Wherever it is cut; buffers and random numbers too."""
    exports = exports_of(name)
    row, leaves = exports.row, exports.exported.leaves
    forward = exports.exported.forward
    start = {key: value.clone() for key, value in forward.state_dict().items()}
    torch.manual_seed(0)
    expected, drawn = forward(*leaves), torch.get_rng_state()
    after = {key: value.clone() for key, value in forward.state_dict().items()}
    for share in (0.0, 0.2, 0.5):
        places = [int((share + i) / 4 * len(row.cuts)) for i in range(4)]
        parts = row.cut(sorted({row.cuts[at] for at in places}))
        forward.load_state_dict(start)
        torch.manual_seed(0)
        found = run(parts, leaves)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, forward.state_dict().values(), after.values()))
        every = [node for part in parts for node in part.module.graph.nodes]
        ran = [node.name for node in every if node.op == "call_function"]
        assert all(ran.count(node.name) == 1 for node in row.work)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gpt2", 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", 4), ("bert", 3))),
    ],
)
def test_blocks_of_transformers_pass_one_tensor_on(name, layers):
    """Masks, positions and rotary tables are made in each stage; the batch is everywhere."""
    model, args, kwargs, loss = build(name)
    exports = Exports(model, args, kwargs, loss=loss, precision=Precision())
    blocks = [n for n, m in model.named_modules() if n.rpartition(".")[2].isdecimal()]
    assert len(blocks) >= layers
    for block in blocks[1:]:
        (cut,) = named_cuts(exports, [block])
        (value,) = exports.row.values_across(cut)
        assert value.meta["val"].ndim == 3


class Skips(nn.Module):
    """The first value is read by the last layer, too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        first = self.a(x)
        second = self.b(first.relu())
        return (self.c(second.relu()) + first).sum()


def test_a_value_that_skips_a_stage_goes_straight_to_its_readers():
    exports = export(Skips(), torch.randn(2, 4))
    row = exports.row
    assert [node.name for node in row.work][:5] == [
        "linear",
        "relu",
        "linear_1",
        "relu_1",
        "linear_2",
    ]
    stages = exports.cut((2, 4))
    ports, passed = stages.routes.ports, stages.routes.passed
    assert [p.sent for p in ports] == [("linear", "relu"), ("relu_1",), ()]
    assert [p.received for p in ports] == [(), ("relu",), ("linear", "relu_1")]
    assert {name: (p.stage, p.readers, p.bytes, p.trains) for name, p in passed.items()} == {
        "linear": (0, (2,), 32, True),
        "relu": (0, (1,), 32, True),
        "relu_1": (1, (2,), 32, True),
    }
    assert row.bytes_across(2) == 64
    assert stages.routes.owners["c.weight"] == (2,)


class Writes(nn.Module):
    """A value that is read before and written after it was read."""

    def __init__(self, write):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.write = write

    def forward(self, x):
        first = self.a(x)
        view = first[:, :2]
        second = self.b(first)
        self.write(first, second)
        return (view * 3).sum() + second.sum()


@pytest.mark.parametrize("write", [torch.Tensor.add_, lambda a, b: torch._foreach_add_([a], [b])])
def test_no_cut_between_a_value_and_a_write_to_it(write):
    exports = export(Writes(write), torch.randn(2, 4))
    row = exports.row
    names = [node.name for node in row.work]
    write = next(i for i, name in enumerate(names) if "add_" in name)
    assert not {*range(1, write + 1)} & {*row.cuts}
    assert write + 1 in row.cuts
    with pytest.raises(UsageError, match=r"cannot be cut before its operators \[1\]"):
        row.cut((1,))
    expected = exports.exported.forward(*exports.exported.leaves)
    found = run(row.cut((write + 1,)), exports.exported.leaves)
    assert all(map(torch.equal, found, expected))


def test_statistics_stay_with_their_layer():
    """A batch norm that runs twice writes the same buffers twice."""
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm, nn.Linear(4, 1))
    exports = Exports(model, (torch.randn(8, 4),), {}, loss=torch.sum, precision=Precision())
    owned = [node.name for node in exports.row.work]
    first, second = (i for i, name in enumerate(owned) if name.startswith("batch_norm"))
    assert not {*range(first + 1, second + 1)} & {*exports.row.cuts}


class Queue(nn.Module):
    """A buffer that is written through a view, and read later on."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("queue", torch.zeros(4, 4))

    def forward(self, x):
        hidden = self.a(x)
        self.queue[:2] = hidden[:2].detach()
        return (self.b(hidden) @ self.queue).sum()


def test_uses_of_a_written_buffer_stay_together():
    """Each rank has its own copy of it."""
    row = export(Queue(), torch.randn(2, 4)).row
    reads = [
        i for i, n in enumerate(row.work) if "queue" in str([s.target for s in n.all_input_nodes])
    ]
    assert len(reads) >= 2
    assert not {*range(min(reads) + 1, max(reads) + 1)} & {*row.cuts}


def test_casts_of_weights_are_made_where_they_are_read():
    model, args, kwargs, loss = build("tied")
    precision = Precision(param=torch.bfloat16)
    exports = Exports(model, args, kwargs, loss=loss, precision=precision)
    middle = exports.row.cuts[len(exports.row.cuts) // 2]
    stages = exports.cut((middle,))
    weights = {name for name, _ in model.named_parameters()}
    assert {len(owners) for n, owners in stages.routes.owners.items() if n in weights} == {1, 2}
    sizes = [value.bytes for value in stages.routes.passed.values()]
    assert sum(sizes) < 2**20
    assert all(value.dtype == torch.bfloat16 for value in stages.routes.passed.values())


def test_modules_as_cuts():
    exports = exports_of("gpt2")
    cuts = named_cuts(exports, ["transformer.h.1", "transformer.h.3"])
    assert cuts == tuple(sorted(cuts))
    with pytest.raises(
        UsageError, match=r"transformer\.h\.3, transformer\.h\.1 do not run in this"
    ):
        named_cuts(exports, ["transformer.h.3", "transformer.h.1"])
    with pytest.raises(UsageError, match=r"Pipeline\.cuts.*transformer\.h\.9"):
        named_cuts(exports, ["transformer.h.9"])
    with pytest.raises(UsageError, match=r"cannot be cut before transformer\.wte, where it"):
        named_cuts(exports, ["transformer.wte"])


def test_inputs_with_gradients_are_refused():
    with pytest.raises(UsageError, match="requires a gradient, which no stage returns"):
        export(Skips(), torch.randn(2, 4, requires_grad=True))
