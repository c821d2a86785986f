"""Updates in the backward: the bits of ``optimizer.step()``, without all gradients at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from optimizer_cases import FORMS, bits
from pool import Pool
from torch import Tensor, nn

import fxzero
from fxzero.errors import BudgetError, RuntimeStateError, UsageError
from fxzero.graph import TrainGraph
from fxzero.graph_planner import GraphPlanner
from fxzero.optim import SGD, AdamW, Lion
from fxzero.passes.context import PassContext
from fxzero.passes.postpone_updates import postpone_updates_pass
from fxzero.passes.spec import check_graph
from fxzero.plans import Decisions, Rematerialization
from fxzero.updating import UPDATE

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers, one of them used twice; dropout; a frozen weight, and one that nothing reads."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.frozen, self.unused = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(3))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.frozen.dtype)
        for layer in (*self.layers, self.layers[0]):
            x = nn.functional.dropout(torch.tanh(layer(x)), 0.2, self.training) * self.frozen
        return x.square().mean()


class Step(nn.Module):
    """A model of the zoo that takes no inputs and returns its loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model, self.args, self.kwargs, self.loss = zoo.build(name)

    def forward(self) -> Tensor:
        return self.loss(self.model(*self.args, **self.kwargs))


def compiled(
    model: nn.Module,
    inputs: tuple[Any, ...] = (X,),
    update: str = "backward",
    kind: Any = AdamW,
    numerics: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """A compiled model and its optimizer."""
    numerics = numerics or {}
    options = {"inner": "eager", "optimizer": functools.partial(kind, **numerics)} | options
    model = fxzero.compile(model, inputs, update=update, **options)
    optimizer = kind(model.parameters(), lr=0.01, **numerics)
    if update == "backward":
        model.update_with(optimizer)
    return model, optimizer


def train(model: Any, optimizer: Any, inputs: tuple[Any, ...] = (X,), steps: int = 3) -> list[int]:
    """Steps with a seed each; their peaks."""
    peaks = []

    def step() -> None:
        model(*inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(steps):
        torch.manual_seed(seed)
        peaks.append(fxzero.measure(step).tensor_bytes)
    return peaks


def kept(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Weights and states, as integers."""
    states = [optimizer.state.get(p, {}) for p in model.parameters()]
    values = [value for state in states for _, value in sorted(state.items())]
    return [bits(tensor) for tensor in (*model.parameters(), *values)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("AdamW", "float32"),
        *(
            pytest.param(*given, marks=pytest.mark.slow)
            for given in (
                ("AdamW", "bfloat16 with 24 bits and int8 moments"),
                ("AdamW", "bfloat16 rounded stochastically"),
                ("Lion", "bfloat16 with a whole master"),
                ("SGD", "float32"),
            )
        ),
    ],
)
def test_weights_and_states_are_those_of_a_step(kind: str, form: str) -> None:
    dtype, numerics = FORMS[form]
    make: Any = {"AdamW": AdamW, "Lion": Lion, "SGD": SGD}[kind]
    results = []
    for update in ("step", "backward"):
        torch.manual_seed(0)
        model, optimizer = compiled(Net().to(dtype), update=update, kind=make, numerics=numerics)
        train(model, optimizer)
        results.append(kept(model, optimizer))
    assert same(*results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("unet", None),
        ("gpt2", 0.3),
        *(
            pytest.param(name, share, marks=pytest.mark.exhaustive)
            for name in ("gpt2", "llama", "t5", "unet", "resnet", "mixed_dtype")
            for share in (None, 0.3)
            if (name, share) not in {("unet", None), ("gpt2", 0.3)}
        ),
    ],
)
def test_models_of_many_families_are_trained_alike_within_the_plan(
    name: str, share: float | None
) -> None:
    """Also under a budget between the smallest peak and that without recompute."""
    budget = None
    if share is not None:
        plan = fxzero.plan(Step(name), (), optimizer=AdamW, update="backward", sweep=0)
        least, most = plan.minimum_budget, plan.unplanned_peak_bytes
        budget = int(least + share * (most - least))
    results, peaks = [], {}
    for update in ("step", "backward"):
        limit = budget if update == "backward" else None
        model, optimizer = compiled(Step(name), (), update=update, memory_budget=limit)
        measured = train(model, optimizer, ())
        peaks[update] = model.plan.peak_bytes
        assert 0.95 * model.plan.peak_bytes <= max(measured) <= model.plan.peak_bytes
        results.append(kept(model, optimizer))
    assert same(*results)
    assert peaks["backward"] <= peaks["step"]
    assert budget is None or peaks["backward"] <= budget


@pytest.mark.slow
def test_gradients_never_exist_all_at_once() -> None:
    class Deep(Net):
        def __init__(self) -> None:
            super().__init__(256, 16)
            del self.unused
            self.unused = None

    peaks, gradients, inputs = {}, {}, (torch.randn(2, 256),)
    for update in ("step", "backward"):
        model, optimizer = compiled(Deep(), inputs, update=update)
        peaks[update] = train(model, optimizer, inputs)[-1]
        assert peaks[update] == model.plan.peak_bytes
        gradients[update] = model.plan.states.gradients
    layers = sum(p.nbytes for p in model.layers.parameters())
    assert peaks["backward"] + 0.8 * layers < peaks["step"]
    assert gradients["step"] == layers > 8 * gradients["backward"] > 0
    (_, backward, step) = model.plan.phases
    assert step.peak_bytes < backward.peak_bytes


@pytest.mark.slow
def test_generated_code_updates_too() -> None:
    results = []
    for update in ("step", "backward"):
        torch.manual_seed(0)
        model, optimizer = compiled(Net(), update=update, inner="inductor")
        assert max(train(model, optimizer)) <= model.plan.peak_bytes
        results.append(kept(model, optimizer))
    assert same(*results)


def test_what_the_loss_does_not_reach_stays_as_it_is() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(64, 8), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x).square().mean(), self.right(x).square().mean()

    model, optimizer = compiled(Two())
    before = model.right.weight.detach().clone()
    model(X)[0].backward()
    optimizer.step()
    assert torch.equal(model.right.weight, before)
    assert (
        model.right.weight not in optimizer.state or not optimizer.state[model.right.weight]["step"]
    )
    assert float(optimizer.state[model.left.weight]["step"]) == 1


def test_a_schedule_of_learning_rates_is_followed() -> None:
    results = []
    for update in ("step", "backward"):
        torch.manual_seed(0)
        model, optimizer = compiled(Net(), update=update)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for _ in range(3):
            train(model, optimizer, steps=1)
            schedule.step()
        results.append(kept(model, optimizer))
    assert same(*results)


def test_weights_outside_of_the_model_are_updated_by_step() -> None:
    model, _ = compiled(Net())
    head = nn.Parameter(torch.ones(()))
    optimizer = AdamW([*model.parameters(), head], lr=0.01)
    model.update_with(optimizer)
    (model(X) * head).backward()
    assert head.grad is not None
    assert model.layers[0].weight.grad is None
    optimizer.step()
    assert head.item() < 1


def test_a_weight_is_not_updated_before_it_was_read_for_the_last_time() -> None:
    """A mask without a gradient lets a value be recomputed behind its own gradient."""
    planner = _planner(_Late(), X)
    forward = {n.name: n for n in planner.graph.graph.nodes if not planner.graph.is_backward(n)}
    product = next(n for n in forward.values() if "mm" in n.name)
    late = [n for n in planner.graph.graph.nodes if planner.graph.is_backward(n)][-1]
    decisions = Decisions(recompute=(Rematerialization(product.name, late.name),))
    emitted = planner._carry_out(decisions)
    order = [node.name for node in emitted.split.backward.graph.nodes]
    (again,) = (name for name in order if name.startswith(f"{product.name}_recomputed"))
    weights = [n for n in emitted.split.backward.graph.nodes if n.target is UPDATE]
    (update,) = (n for n in weights if n.args[2] == "weight")
    assert order.index(again) < order.index(update.name)


class _Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.weight
        return ((h.detach() > 0) * self.bias).sum() + h.sum()


def _planner(model: nn.Module, *inputs: Tensor) -> GraphPlanner:
    model, _ = compiled(model, inputs)
    planner = model._fxzero.latest._planner
    return planner.variants[0]


def test_a_read_behind_an_update_breaks_the_law() -> None:
    planner = _planner(_Late(), X)
    graph: TrainGraph = planner.graph.copy()
    update = next(n for n in graph.graph.nodes if n.target is UPDATE)
    weight = update.args[0]
    with graph.graph.inserting_after(update):
        late = graph.graph.call_function(torch.ops.aten.neg.default, (weight,))
    late.meta = {"val": weight.meta["val"].neg(), "partitioner_tag": "is_backward"}
    with pytest.raises(fxzero.errors.GraphLawError, match=r"after .* wrote to it"):
        check_graph(graph, stage="scheduled")
    context = PassContext(updates=True)
    check_graph(postpone_updates_pass(graph, context), stage="scheduled")


def test_verify_compares_gradients_and_updates_nothing() -> None:
    model, optimizer = compiled(Net())
    before = kept(model, optimizer)
    result = model.verify(X)
    assert result.exact
    assert result.measured_bytes <= result.planned_bytes
    assert same(before, kept(model, optimizer))
    train(model, optimizer, steps=1)
    assert not same(before, kept(model, optimizer))


@pytest.mark.slow
def test_a_budget_is_met_that_gradients_would_exceed() -> None:
    inputs = (torch.randn(2, 256),)
    least = {
        update: fxzero.plan(Net(256, 8), inputs, optimizer=AdamW, update=update).minimum_budget
        for update in ("step", "backward")
    }
    between = (least["step"] + least["backward"]) // 2
    with pytest.raises(BudgetError):
        compiled(Net(256, 8), inputs, update="step", memory_budget=between)
    model, optimizer = compiled(Net(256, 8), inputs, memory_budget=between)
    assert max(train(model, optimizer, inputs)) <= between
    assert model.plan.request.update == "backward"


def _second_backward(model: Any, optimizer: Any) -> None:
    model(X).backward()
    model(X).backward()


def _existing(model: Any, optimizer: Any) -> None:
    model.layers[1].weight.grad = torch.zeros(64, 64)
    model(X).backward()


def _asked_for(model: Any, optimizer: Any) -> None:
    torch.autograd.grad(model(X), list(model.layers.parameters()))


def _hook(model: Any, optimizer: Any) -> None:
    model.layers[1].weight.register_hook(lambda gradient: gradient)
    model(X).backward()


def _nobody(model: Any, optimizer: Any) -> None:
    fxzero.compile(model, (X,), inner="eager", optimizer=AdamW, update="backward")(X).backward()


def _clipped(model: Any, optimizer: Any) -> None:
    fxzero.clip_grad_norm_(model, 1.0)


def _no_sync(model: Any, optimizer: Any) -> None:
    with model.no_sync():
        model(X).backward()


def _of_torch(model: Any, optimizer: Any) -> None:
    model.update_with(torch.optim.AdamW(model.parameters()))


def _of_some(model: Any, optimizer: Any) -> None:
    model.update_with(AdamW(model.layers[0].parameters()))


def _not_asked_for(model: Any, optimizer: Any) -> None:
    fxzero.compile(Net(), (X,), inner="eager").update_with(optimizer)


@pytest.mark.parametrize(
    ("misuse", "error", "text"),
    [
        (_second_backward, RuntimeStateError, "second backward would update layers.3.bias once"),
        (_existing, RuntimeStateError, "layers.1.weight has a gradient from before"),
        (_asked_for, RuntimeStateError, "gradient of layers.3.bias is asked for"),
        (_hook, RuntimeStateError, "gradient of layers.1.weight is asked for"),
        (_nobody, RuntimeStateError, r"call model.update_with\(optimizer\)"),
        (_clipped, UsageError, "clipping needs the norm of all gradients"),
        (_no_sync, UsageError, "no_sync adds gradients up"),
        (_of_torch, UsageError, "AdamW can neither update parameters one by one"),
        (_of_some, UsageError, "has not 7 of the model's 9 trained parameters, unused among them"),
        (_not_asked_for, UsageError, 'give fxzero.compile update="backward"'),
    ],
)
def test_misuse_is_refused_and_changes_no_weight(
    misuse: Callable[[Any, Any], None], error: type[Exception], text: str
) -> None:
    model, optimizer = compiled(Net())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=text):
        misuse(model, optimizer)
    if misuse is not _second_backward:
        assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"update": "forward"}, "update: unknown option 'forward'"),
        ({"optimizer": "adamw"}, "needs an optimizer that updates parameters one by one"),
        ({"optimizer": fxzero.optim.Muon}, "needs an optimizer that updates parameters one by one"),
        ({"microbatches": 2}, "microbatches=2 adds them up"),
        ({"pipeline": 2}, "a pipeline adds up those of micro-batches"),
    ],
)
def test_what_cannot_go_together_is_refused(options: dict[str, Any], text: str) -> None:
    given = {"optimizer": AdamW, "update": "backward", **options}
    with pytest.raises(UsageError, match=text):
        fxzero.compile(Net(), (X,), inner="eager", **given)
    given |= {"mesh": {"pp": 2}} if "pipeline" in options else {}
    with pytest.raises(UsageError, match=text):
        fxzero.plan(Net(), (X,), **given)


@pytest.fixture(scope="module")
def pair() -> Any:
    with Pool(2) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_shards_are_updated_as_they_are_reduced(pair: Any, zero: int) -> None:
    for by_step, in_backward in pair.run("optimizer_rank_cases:in_backward", zero=zero):
        (mine, peak, planned), (theirs, less, less_planned) = by_step, in_backward
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(bits(mine[name]), bits(theirs[name])) for name in mine)
        assert less < peak
        # 512 or 4,096 bytes more are measured now and then: see docs/design/next.md.
        assert less <= less_planned + 8 * 512
        assert less_planned < planned
