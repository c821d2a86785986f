"""fxzero.optim on a CPU as torch's optimizers: bit for bit in float32, and in how they are used."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import optimizer_cases as cases
import pytest
import torch
from torch import Tensor, nn

from fxzero import UsageError
from fxzero.optim import SGD, AdamW, Lion

SHAPES = ((33, 65), (7,), (64, 256), (), (1,), (3, 5, 7))
ADAMW = [
    {},
    {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
    {"weight_decay": 0.0, "maximize": True},
    {"lr": torch.tensor(0.02)},
]
SGDS = [
    {"momentum": 0.9},
    {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.7, "dampening": 0.4, "maximize": True},
    {"momentum": 0.9, "lr": torch.tensor(0.02)},
    {"momentum": 0.0, "weight_decay": 0.1},
]


def torch_like(ours: Any, parameters: Any, **options: Any) -> Any:
    """torch's optimizer of the same name, with its fused kernels."""
    return getattr(torch.optim, ours.__name__)(parameters, fused=True, **options)


def pair(ours: Any, shapes: Any = SHAPES, **options: Any) -> tuple[Any, Any]:
    """Our optimizer and torch's over equal parameters."""
    mine, theirs = cases.parameters(torch.float32, shapes), cases.parameters(torch.float32, shapes)
    return ours(mine, **options), torch_like(ours, theirs, **options)


def text_of(caught: Any) -> str:
    """An error's text without its code."""
    return str(caught.value).removeprefix("[FXZ101] ")


def owned(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: Any, steps: Any) -> None:
    for step in steps:
        cases.give_gradients([p for p in owned(optimizer) if p.requires_grad], step)
        optimizer.step()


def assert_equal(one: Any, other: Any) -> None:
    """Parameters and states are bitwise equal."""
    for a, b in zip(owned(one), owned(other), strict=True):
        assert torch.equal(a, b)
        ours, theirs = one.state.get(a, {}), other.state.get(b, {})
        for key in ours.keys() & theirs.keys():
            if theirs[key] is not None:
                assert ours[key].dtype == theirs[key].dtype
                assert torch.equal(cases.bits(ours[key]), cases.bits(theirs[key])), key


@pytest.mark.parametrize(
    ("kind", "options"), [*((AdamW, o) for o in ADAMW), *((SGD, o) for o in SGDS)]
)
def test_float32_is_bitwise_torchs(kind: Any, options: dict[str, Any]) -> None:
    ours, theirs = pair(kind, **options)
    for step in range(6):
        train(ours, [step])
        train(theirs, [step])
        assert_equal(ours, theirs)


@pytest.mark.parametrize(("kind", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9})])
def test_groups_have_options_of_their_own(kind: Any, options: dict[str, Any]) -> None:
    made = []
    for make in (kind, lambda groups, **o: torch_like(kind, groups, **o)):
        first, second, third = (cases.parameters(torch.float32, SHAPES[:i]) for i in (2, 3, 1))
        groups = [
            {"params": first, "lr": 0.1, "weight_decay": 0.2},
            {"params": second, "maximize": True},
            {"params": third, "lr": 0.0},
        ]
        made.append(make(groups, lr=0.01, **options))
        train(made[-1], range(4))
    assert_equal(*made)


def _one_cycle(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)


def _lambda(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@pytest.mark.parametrize("make", [_one_cycle, _lambda])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamW, {}),
        (AdamW, {"lr": torch.tensor(0.01)}),
        (SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_schedulers_change_the_learning_rate(make: Any, kind: Any, options: Any) -> None:
    options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
    ours, theirs = pair(kind, **copy.deepcopy(options))
    if "lr" in options:
        theirs.param_groups[0]["lr"] = options["lr"].clone()
    schedulers = make(ours), make(theirs)
    for step in range(6):
        for optimizer, scheduler in zip((ours, theirs), schedulers, strict=True):
            train(optimizer, [step])
            scheduler.step()
        assert float(ours.param_groups[0]["lr"]) == float(theirs.param_groups[0]["lr"])
        assert_equal(ours, theirs)


def test_a_closure_computes_the_loss_of_the_step() -> None:
    losses = []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        optimizer = kind(model.parameters(), lr=0.1, **({"fused": True} if kind != AdamW else {}))

        def closure(model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(4)])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize(("kind", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9})])
def test_parameters_without_gradients_wait(kind: Any, options: dict[str, Any]) -> None:
    ours, _ = pair(kind, **options)
    # In one group each: torch's fused SGD fails where only some have a momentum.
    groups = [{"params": [p]} for p in cases.parameters(torch.float32, SHAPES)]
    theirs = torch_like(kind, groups, **options)
    for step in range(7):
        for optimizer in (ours, theirs):
            parameters = owned(optimizer)
            cases.give_gradients(parameters, step)
            for number, parameter in enumerate(parameters):
                if (step + number) % 3 == 0:
                    parameter.grad = None
            optimizer.step()
        assert_equal(ours, theirs)
    counts = {int(ours.state[p]["step"]) for p in owned(ours)}
    assert counts == {4, 5}


def test_a_step_without_any_gradient_changes_nothing() -> None:
    ours, _ = pair(AdamW)
    before = [p.detach().clone() for p in owned(ours)]
    ours.step()
    train(ours, [0])
    after = [p.detach().clone() for p in owned(ours)]
    ours.zero_grad()
    assert all(p.grad is None for p in owned(ours))
    ours.step()
    assert all(map(torch.equal, after, owned(ours)))
    assert not any(map(torch.equal, before, after))
    assert all(ours.state[p]["step"] == 1 for p in owned(ours))


@pytest.mark.parametrize("moments", [None, "bfloat16", "int8"])
def test_parameters_may_have_no_elements(moments: str | None) -> None:
    for shapes in (((0, 64),), ((0, 64), (3, 64), (0,))):
        parameters = cases.parameters(torch.float32, shapes)
        optimizer = AdamW(parameters, moments=moments)
        train(optimizer, range(2))
        assert all(optimizer.state[p]["step"] == 2 for p in parameters)
        assert [optimizer.state[p]["exp_avg"].shape for p in parameters] == list(shapes)


def test_zero_grad_may_keep_gradients_in_place() -> None:
    ours, theirs = pair(AdamW)
    for optimizer in (ours, theirs):
        train(optimizer, [0])
        optimizer.zero_grad(set_to_none=False)
        assert all(not p.grad.any() for p in owned(optimizer))
        optimizer.step()
    assert_equal(ours, theirs)


def test_frozen_parameters_are_left_alone_until_they_are_trained() -> None:
    ours, theirs = pair(AdamW)
    for optimizer in (ours, theirs):
        frozen = owned(optimizer)[::2]
        for parameter in frozen:
            parameter.requires_grad_(False)
        train(optimizer, range(3))
        assert all(p not in optimizer.state for p in frozen)
        for parameter in frozen:
            parameter.requires_grad_(True)
        train(optimizer, range(3, 6))
    assert_equal(ours, theirs)
    assert {int(ours.state[p]["step"]) for p in owned(ours)} == {3, 6}


def test_groups_may_be_added_while_training() -> None:
    made = []
    for kind in (AdamW, lambda p: torch_like(AdamW, p)):
        first, second = (cases.parameters(torch.float32, shapes) for shapes in (SHAPES, SHAPES[:2]))
        optimizer = kind(first)
        train(optimizer, range(2))
        optimizer.add_param_group({"params": second, "lr": 0.05})
        train(optimizer, range(2, 5))
        made.append(optimizer)
    assert_equal(*made)


def _channels_last(seed: int) -> nn.Parameter:
    weight = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(weight.to(memory_format=torch.channels_last))


def _transposed(seed: int) -> nn.Parameter:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(weight.t())


@pytest.mark.parametrize("make", [_channels_last, _transposed])
@pytest.mark.parametrize("same", [True, False], ids=["own layout", "another layout"])
@pytest.mark.parametrize("moments", [None, "bfloat16"])
def test_parameters_and_gradients_may_have_any_layout(
    make: Any, same: bool, moments: str | None
) -> None:
    strided, plain = make(0), nn.Parameter(make(0).detach().contiguous())
    one, other = (AdamW([p], lr=0.1, moments=moments) for p in (strided, plain))
    for step in range(3):
        gradient = make(step).detach()
        strided.grad = gradient.clone() if same else gradient.contiguous()
        plain.grad = gradient.contiguous()
        one.step()
        other.step()
    assert torch.equal(strided, plain)
    assert torch.equal(one.state[strided]["exp_avg"], other.state[plain]["exp_avg"])
    assert one.state[strided]["exp_avg"].stride() == strided.stride()


def test_a_part_of_another_tensor_is_refused() -> None:
    part = nn.Parameter(torch.randn(4, 8)[:, :5])
    part.grad = torch.ones(4, 5)
    with pytest.raises(UsageError) as caught:
        AdamW([part]).step()
    assert text_of(caught) == (
        "a parameter of shape [4, 5] and strides [8, 1] is part of another tensor's memory\n"
        "  give the optimizer the whole tensor, or a contiguous one"
    )


def test_a_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UsageError) as caught:
        AdamW(embedding.parameters()).step()
    assert text_of(caught) == (
        "the gradient of a parameter of shape [5, 3] is sparse\n"
        "  make its nn.Embedding with sparse=False, or use torch.optim.SparseAdam for it"
    )


KINDS: dict[Any, dict[str, Any]] = {AdamW: {"lr": 0.01}, SGD: {"lr": 0.1}, Lion: {"lr": 0.01}}


def _through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", cases.FORMS)
def test_every_form_trains_and_goes_on_from_its_state_bit_for_bit(kind: Any, form: str) -> None:
    dtype, numerics = cases.FORMS[form]
    options = {**KINDS[kind], **numerics, "seed": 5}
    target = [p.detach().float() * 0.5 for p in cases.parameters(dtype)]

    def steps(optimizer: Any, count: int) -> float:
        for _ in range(count):
            for p, goal in zip(owned(optimizer), target, strict=True):
                p.grad = (p.detach().float() - goal).to(dtype)
            optimizer.step()
        pairs = zip(owned(optimizer), target, strict=True)
        return sum(float((p.detach().float() - goal).square().sum()) for p, goal in pairs)

    one = kind(cases.parameters(dtype), **options)
    before, after = steps(one, 0), steps(one, 10)
    assert after < before
    state = _through_a_file(one.state_dict())
    other = kind(cases.parameters(dtype), **{**options, "lr": 1.0})
    with torch.no_grad():
        for mine, theirs in zip(owned(other), owned(one), strict=True):
            mine.copy_(theirs)
    other.load_state_dict(state)
    steps(one, 5)
    steps(other, 5)
    assert_equal(one, other)
    for a, b in zip(owned(one), owned(other), strict=True):
        assert one.state[a].keys() == other.state[b].keys()


@pytest.mark.parametrize("form", cases.FORMS)
def test_states_take_the_bytes_that_their_form_says(form: str) -> None:
    dtype, numerics = cases.FORMS[form]
    optimizer = AdamW(cases.parameters(dtype), **numerics)
    train(optimizer, [0])
    for parameter in owned(optimizer):
        kept = [v for k, v in optimizer.state[parameter].items() if k != "step"]
        expected = optimizer._numerics.form(parameter).state_bytes(parameter.numel(), 2)
        assert sum(v.nbytes for v in kept) == expected
    arenas = [update.arena for update in optimizer._updates]
    stored = sum(t.nbytes for arena in arenas for t in arena.tensors.values())
    whole = [optimizer._numerics.form(p).state_bytes(p.numel(), 2) for p in owned(optimizer)]
    assert stored == sum(whole)


def test_states_go_from_torch_and_back() -> None:
    ours, theirs = pair(AdamW, lr=0.1)
    train(theirs, range(3))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    with torch.no_grad():
        for mine, other in zip(owned(ours), owned(theirs), strict=True):
            mine.copy_(other)
    train(ours, range(3, 5))
    train(theirs, range(3, 5))
    assert_equal(ours, theirs)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for group in theirs.param_groups:
        group["fused"] = True
    train(ours, range(5, 7))
    train(theirs, range(5, 7))
    assert_equal(ours, theirs)


def test_a_state_of_torchs_sgd_is_one_of_ours() -> None:
    ours, theirs = pair(SGD, momentum=0.9, dampening=0.2)
    train(theirs, range(3))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    with torch.no_grad():
        for mine, other in zip(owned(ours), owned(theirs), strict=True):
            mine.copy_(other)
    train(ours, range(3, 5))
    train(theirs, range(3, 5))
    assert_equal(ours, theirs)


def test_a_state_of_other_numerics_is_refused() -> None:
    parameters = cases.parameters(torch.float32, ((4, 64),))
    narrow, wide = AdamW(parameters, moments="int8"), AdamW(parameters)
    train(narrow, [0])
    train(wide, [0])
    with pytest.raises(UsageError) as caught:
        AdamW(parameters).load_state_dict(narrow.state_dict())
    assert text_of(caught) == (
        "the state of a parameter of shape [4, 64] has exp_avg, exp_avg_scale, exp_avg_sq, "
        "exp_avg_sq_scale, step; this optimizer keeps exp_avg, exp_avg_sq, step\n"
        "  load it into an optimizer with the same master_bits and moments"
    )
    with pytest.raises(UsageError) as caught:
        AdamW(parameters, moments="int8").load_state_dict(wide.state_dict())
    assert text_of(caught) == (
        "the state of a parameter of shape [4, 64] has exp_avg, exp_avg_sq, step; this optimizer "
        "keeps exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, step\n"
        "  load it into an optimizer with the same master_bits and moments"
    )
    halves = [AdamW(cases.parameters(torch.bfloat16), master_bits=bits) for bits in (24, 32)]
    train(halves[0], [0])
    with pytest.raises(UsageError) as caught:
        halves[1].load_state_dict(halves[0].state_dict())
    assert text_of(caught) == (
        "low_bits of a parameter of shape [33, 128] is torch.int8 [33, 128] in the state, "
        "torch.bfloat16 [33, 128] in this optimizer\n"
        "  load it into an optimizer with the same master_bits and moments"
    )
    lion = Lion(parameters)
    train(lion, [0])
    with pytest.raises(UsageError, match="has exp_avg, step; this optimizer keeps"):
        AdamW(parameters).load_state_dict(lion.state_dict())


def test_a_refused_state_leaves_the_optimizer_as_it_is() -> None:
    ours, theirs = pair(AdamW)
    train(ours, range(2))
    train(theirs, range(2))
    state = ours.state_dict()
    state["state"] = {n: {**s, "exp_avg": torch.zeros(2, 2)} for n, s in state["state"].items()}
    with pytest.raises(UsageError, match=r"torch.float32 \[2, 2\] in the state"):
        ours.load_state_dict(state)
    train(ours, [2])
    train(theirs, [2])
    assert_equal(ours, theirs)


def test_moments_of_amsgrad_are_refused() -> None:
    parameters = cases.parameters(torch.float32, ((4,),))
    theirs = torch.optim.AdamW(parameters, amsgrad=True)
    train(theirs, [0])
    with pytest.raises(UsageError, match="has exp_avg, exp_avg_sq, max_exp_avg_sq, step; this"):
        AdamW(parameters).load_state_dict(theirs.state_dict())


def test_low_bits_that_a_state_lacks_are_zero() -> None:
    one = AdamW(cases.parameters(torch.bfloat16), master_bits=16)
    train(one, range(2))
    other = AdamW(cases.parameters(torch.bfloat16))
    other.load_state_dict(one.state_dict())
    assert all(not cases.bits(s["low_bits"]).any() for s in other.state.values())
    assert all(s["step"] == 2 for s in other.state.values())


def test_a_state_does_not_change_while_another_optimizer_uses_it() -> None:
    one, _ = pair(AdamW)
    train(one, range(2))
    other = AdamW(cases.parameters(torch.float32, SHAPES))
    other.load_state_dict(one.state_dict())
    train(one, range(2, 4))
    assert all(state["step"] == 2 for state in other.state.values())
    assert all(state["step"] == 4 for state in one.state.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("form", ["float32", "bfloat16 with 24 bits and int8 moments"])
def test_optimizers_can_be_copied_and_pickled(copied: Any, form: str) -> None:
    dtype, numerics = cases.FORMS[form]
    one = AdamW(cases.parameters(dtype), seed=7, **numerics)
    train(one, range(2))
    other = copied(one)
    assert not {id(p) for p in owned(one)} & {id(p) for p in owned(other)}
    train(one, range(2, 4))
    train(other, range(2, 4))
    assert_equal(one, other)
    assert all(state["step"] == 4 for state in other.state.values())


def test_a_pickle_has_each_state_once() -> None:
    one = AdamW(cases.parameters(torch.float32, ((64, 64),) * 20))
    train(one, [0])
    assert len(pickle.dumps(one)) < 3.1 * 20 * 64 * 64 * 4


def test_hooks_see_steps_and_states() -> None:
    seen: list[str] = []
    ours, _ = pair(AdamW)
    ours.register_step_pre_hook(lambda *_: seen.append("before"))
    ours.register_step_post_hook(lambda *_: seen.append("after"))
    train(ours, [0])
    assert seen == ["before", "after"]
    ours.register_load_state_dict_pre_hook(
        lambda _, state: {**state, "state": {n: s for n, s in state["state"].items() if n}}
    )
    ours.register_load_state_dict_post_hook(
        lambda o: seen.extend(str(int(s["step"])) for s in o.state.values())
    )
    ours.load_state_dict(ours.state_dict())
    assert seen[2:].count("1") == len(SHAPES) - 1


def test_grad_scaler_hands_its_scale_over() -> None:
    ours, theirs = pair(AdamW)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for step in range(6):
        for optimizer, scaler in zip((ours, theirs), scalers, strict=True):
            cases.give_gradients(owned(optimizer), step)
            scaler.scale(torch.ones(()))
            for parameter in owned(optimizer):
                parameter.grad *= scaler.get_scale()
            if step == 3:
                owned(optimizer)[2].grad.view(-1)[5] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        assert_equal(ours, theirs)
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert all(state["step"] == 5 for state in ours.state.values())
    for optimizer in (ours, theirs):  # without a scaler again
        train(optimizer, [6])
    assert_equal(ours, theirs)


def test_grad_scaler_may_have_unscaled_gradients_before() -> None:
    ours, theirs = pair(AdamW)
    for optimizer in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        cases.give_gradients(owned(optimizer), 0)
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(owned(optimizer), 0.1)
        scaler.step(optimizer)
    assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (AdamW, {"lr": -1.0}, "lr=-1.0 must be a finite number, at least 0"),
        (AdamW, {"eps": float("nan")}, "eps=nan must be a finite number, at least 0"),
        (SGD, {"weight_decay": -0.1}, "weight_decay=-0.1 must be a finite number, at least 0"),
        (Lion, {"betas": (0.9, 1.0)}, "betas=(0.9, 1.0) must be two numbers, at least 0 and below"),
        (AdamW, {"betas": (0.9,)}, "betas=(0.9,) must be two numbers, at least 0 and below 1"),
        (
            SGD,
            {"nesterov": True, "momentum": 0.0},
            "nesterov=True needs momentum above 0 and dampening=0, not momentum=0.0 and "
            "dampening=0.0",
        ),
        (AdamW, {"master_bits": 20}, "master_bits=20 must be 16, 24 or 32"),
        (
            AdamW,
            {"master_bits": 24, "stochastic_rounding": True},
            "master_bits=24 keeps the bits that stochastic_rounding=True would round away\n"
            "  leave one of them out",
        ),
        (
            Lion,
            {"moments": "int4"},
            "moments='int4' must be one of float32, bfloat16, int8, or None",
        ),
        (
            SGD,
            {"backend": "tritn"},
            "backend: unknown option 'tritn'; did you mean 'triton'?\n  known: auto, torch, triton",
        ),
    ],
)
def test_options_that_cannot_be_right_are_refused(kind: Any, options: Any, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        kind(cases.parameters(torch.float32), **options)
    assert text_of(caught).startswith(text)


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (AdamW, {"lr": -1.0}, "lr=-1.0 must be a finite number, at least 0"),
        (AdamW, {"betas": (2.0, 0.9)}, "betas=(2.0, 0.9) must be two numbers"),
        (SGD, {"nesterov": True, "dampening": 0.5}, "nesterov=True needs momentum above 0"),
    ],
)
def test_options_of_a_group_are_checked_as_well(kind: Any, options: Any, text: str) -> None:
    groups = [{"params": cases.parameters(torch.float32), **options}]
    with pytest.raises(UsageError) as caught:
        kind(groups)
    assert text_of(caught).startswith(text)
