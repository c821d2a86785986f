"""fxzero.compile beside torch.compile: parts compiled before, all of it compiled after."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxzero

STEPS = 3
BACKEND = "aot_eager"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)))

    def forward(self, x, target):
        return F.mse_loss(F.dropout(self.blocks(x), 0.5, self.training), target)


def build():
    torch.manual_seed(0)
    return Net(), torch.randn(4, 8), torch.randn(4, 8)


@pytest.fixture(autouse=True)
def _no_dynamo_from_other_tests():
    torch._dynamo.reset()


def losses(call, model, x, target):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(0)
    found = []
    for _ in range(STEPS):
        value = call(x, target)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(value.item())
    return found


@pytest.fixture(scope="module")
def eager():
    model, *given = build()
    return losses(model, model, *given)


def replaced(model):
    model.blocks[0] = torch.compile(model.blocks[0], backend=BACKEND)
    return fxzero.compile(model, inner="eager"), model


def in_place(model):
    model.blocks[0].compile(backend=BACKEND)
    return fxzero.compile(model, inner="eager"), model


def around(model):
    return torch.compile(fxzero.compile(model, inner="eager"), backend=BACKEND), model


def around_in_place(model):
    fxzero.compile(model, inner="eager").compile(backend=BACKEND)
    return model, model


def backend_around(model):
    compiled = fxzero.compile(model, inner="eager")
    return torch.compile(compiled, backend="fxzero", options={"inner": "eager"}), model


def function_around(model):
    fxzero.compile(model, inner="eager")
    return torch.compile(lambda x, target: 1.0 * model(x, target), backend=BACKEND), model


@pytest.mark.parametrize(
    "combine", [replaced, in_place, around, around_in_place, backend_around, function_around]
)
def test_both_compile_and_the_plan_is_what_runs(combine, eager):
    model, *given = build()
    call, model = combine(model)
    assert losses(call, model, *given) == eager
    assert model.plan.peak_bytes > 0


def test_a_whole_graph_around_a_compiled_model_is_refused():
    model, *given = build()
    fxzero.compile(model, inner="eager")
    call = torch.compile(model, backend=BACKEND, fullgraph=True)
    reason = "a model of fxzero.compile runs its own graphs: leave fullgraph=True out"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        call(*given)


def test_what_torch_compile_returned_is_refused():
    model, *_ = build()
    with pytest.raises(fxzero.UsageError) as caught:
        fxzero.compile(torch.compile(model))
    assert str(caught.value) == (
        "[FXZ101] the model is what torch.compile returned, which would run in place of a plan\n"
        "  give fxzero.compile the model itself; submodules may be compiled"
    )


def test_without_gradients_the_model_itself_is_compiled():
    model, *given = build()
    model.eval()
    with torch.no_grad():
        expected = model(*given)
        call = torch.compile(fxzero.compile(model, inner="eager"), backend=BACKEND, fullgraph=True)
        assert torch.equal(call(*given), expected)


def test_a_compiled_model_has_the_signature_of_its_own_forward():
    model, *_ = build()
    own = inspect.signature(type(model).forward)
    assert inspect.signature(type(fxzero.compile(model)).forward) == own
    assert list(inspect.signature(model.forward).parameters) == ["x", "target"]
