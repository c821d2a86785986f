"""Weights and gradients that travel in 8 or 4 bits: operators, graphs, plans and ranks."""

import pytest
import torch
from torch import nn

import fxzero
from fxzero import cli, messages
from fxzero.capture import capture
from fxzero.collectives import ALL_GATHER, ALL_TO_ALL, REDUCE_SCATTER
from fxzero.errors import UsageError
from fxzero.mesh import Mesh
from fxzero.options import Options
from fxzero.planner import Planner
from fxzero.precision import Precision
from fxzero.quantization import KINDS

_NARROW = Precision(send_weights="int8", send_gradients="int4")


class Chain(nn.Module):
    """Linear layers: weights that are worth it, biases that are not."""

    def __init__(self, layers=3, width=96):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def _decided(zero, precision=_NARROW, **options):
    graph = capture(Chain(), (torch.randn(4, 96),), {}).graph
    sharding = Mesh({"dp": 4}).sharding(zero, precision)
    given = {"recompute": "none", **options}
    return Planner(graph, Options(sharding=sharding, **given), "model").decide()


def _calls(split, *targets):
    nodes = (*split.forward.graph.nodes, *split.backward.graph.nodes)
    return [node for node in nodes if node.target in targets]


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("elements", [32, 100, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_messages_hold_pieces(kind, elements, dtype):
    x = torch.randn(3, elements).to(dtype)
    message = messages.write_message(x.flatten(), 3, kind)
    assert message.numel() == 3 * messages.message_bytes(elements, kind)
    for row, piece in zip(x, message.chunk(3), strict=True):
        assert torch.equal(piece, messages.write_message(row, 1, kind)), "pieces stand alone"
    back = messages.read_message(message, 3, elements, kind, torch.float32).view(3, elements)
    step = {"int8": 1 / 127, "int4": 1 / 7, "fp8": 1 / 8}[kind]
    assert ((back - x.float()).abs() <= 0.51 * step * x.float().abs().max()).all()
    mean = messages.average_message(message, 3, elements, kind, torch.float32)
    torch.testing.assert_close(mean, back.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_operators_of_messages_are_what_torch_expects(kind):
    x = torch.randn(2 * 96)
    message = messages.write_message(x, 2, kind)
    torch.library.opcheck(messages.write_message, (x, 2, kind))
    torch.library.opcheck(messages.read_message, (message, 2, 96, kind, torch.float32))
    torch.library.opcheck(messages.average_message, (message, 2, 96, kind, torch.bfloat16))


@pytest.mark.parametrize("zero", [1, 2, 3, None])
def test_large_weights_and_gradients_travel_as_codes(zero):
    decided = _decided(zero)
    split = decided.emitted.split
    gathers, exchanges = _calls(split, ALL_GATHER), _calls(split, ALL_TO_ALL)
    assert len(_calls(split, messages.AVERAGE)) == 3
    assert len(exchanges) == (3 if zero == 3 else 1), "messages that follow one another are one"
    sent = 3 * 4 * messages.message_bytes(96 * 96 // 4, "int4")
    assert sum(node.meta["val"].numel() for node in exchanges) == sent
    codes = [node for node in gathers if node.meta["val"].dtype == torch.uint8]
    assert len(codes) >= (5 if zero == 3 else 3), "those that the backward gathers again, too"
    assert all(node.meta["val"].numel() < 96 * 200 for node in _calls(split, REDUCE_SCATTER))
    notes = "\n".join(decided.plan.notes)
    assert "3 of 6 weights travel as int8, 27.6 KiB; the others, 1.12 KiB, as they are" in notes
    assert "3 of 6 gradients travel as int4, 14.1 KiB; the others, 1.12 KiB, as they are" in notes


def test_what_is_gathered_again_is_not_kept_as_floats():
    held = _decided(3).emitted.split.forward.graph.find_nodes(op="output")[0].args[0]
    floats = [n for n in held if n.target is messages.READ]
    assert floats == []


def test_nothing_changes_unless_asked_for():
    split = _decided(3, Precision()).emitted.split
    assert not _calls(split, messages.WRITE, ALL_TO_ALL)


def test_a_plan_with_messages_is_carried_out_from_a_file(tmp_path):
    decided = _decided(3)
    decided.plan.save(tmp_path / "plan.json")
    assert fxzero.Plan.load(tmp_path / "plan.json") == decided.plan


def test_the_environment_sends_numbers_as_they_are(monkeypatch):
    monkeypatch.setenv("FXZERO_SKIP", "quantize")
    decided = _decided(3)
    assert not _calls(decided.emitted.split, messages.WRITE)
    assert "pass quantize is switched off by FXZERO_SKIP" in decided.plan.notes


def test_an_unknown_kind_is_named_with_those_there_are():
    with pytest.raises(UsageError, match=r"send_weights.*int8"):
        Precision(send_weights="int7")


def test_the_command_line_knows_the_kinds(capsys):
    assert sorted(cli._KINDS) == sorted(KINDS)
    sent = ("--send-weights", "int8", "--send-gradients", "int4", "--zero", "3", "--devices", "4")
    assert cli.main(["plan", "message_rank_cases:made", *sent]) == 0
    assert "weights travel as int8" in " ".join(capsys.readouterr().out.split())
