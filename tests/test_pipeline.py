"""Pipelines in real processes over gloo, against accumulation on one device."""

from __future__ import annotations

import copy

import pytest
import torch
from pipeline_cases import (
    Mlp,
    build,
    by_accumulation,
    by_pipeline,
    differences,
    saved_and_loaded,
)
from pool import Pool
from torch import nn

import fxzero
from fxzero.errors import UsageError
from fxzero.microbatches import Batch
from fxzero.pipelining.schedules import NAMES
from fxzero.sharding import stand_in

pytestmark = [pytest.mark.timeout(300)]

MODELS = ("gpt2", "tied", "llama", "unet", "t5", "vit", "mlp")
MICROBATCHES = 4


@pytest.fixture(scope="module")
def expected():
    """What one device computes, once for each model."""
    known = {}

    def of(name, **given):
        key = name, *given.items()
        if key not in known:
            known[key] = by_accumulation(name, MICROBATCHES, **given)
        return known[key]

    return of


@pytest.fixture(scope="module")
def pool():
    with Pool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four():
    with Pool(4) as four:
        yield four


def run(pool, name, schedule, **given):
    return pool.run(
        "pipeline_cases:by_pipeline",
        timeout=280,
        name=name,
        schedule=schedule,
        microbatches=MICROBATCHES,
        **given,
    )


@pytest.mark.parametrize(
    ("name", "stages", "schedule"),
    [
        ("mlp", 2, "zbv"),
        *(
            pytest.param("mlp", 2, name, marks=pytest.mark.slow)
            for name in ("1f1b", "gpipe", "dualpipev")
        ),
        pytest.param("unet", 3, "interleaved1f1b", marks=pytest.mark.slow),
        pytest.param("tied", 4, "zb1p", marks=pytest.mark.slow),
    ],
)
def test_stages_on_one_rank_compute_what_the_model_does(expected, name, stages, schedule):
    given = {"schedule": schedule, "microbatches": MICROBATCHES, "stages": stages}
    answer = by_pipeline(name, **given)
    assert differences([answer], expected(name)) <= (1e-7 if name == "tied" else 0.0)
    assert answer[3] == answer[4]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MODELS if name != "mlp"),
    ],
)
def test_two_ranks_compute_what_one_device_does(pool, expected, name, schedule):
    answers = run(pool, name, schedule)
    assert differences(answers, expected(name)) <= 1e-6
    for *_, seen, scheduled in answers:
        assert seen == scheduled


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["zb1p", "interleavedzb", "zbv", "dualpipev"])
def test_each_piece_runs_once_a_micro_batch(pool, schedule):
    """Forward, gradients of inputs, gradients of weights: of every stage that has any."""
    given = {"name": "mlp", "schedule": schedule, "microbatches": MICROBATCHES}
    answers = pool.run("pipeline_cases:pieces_that_run", **given)
    pieces = ("forward", "input gradients", "weight gradients")
    stages = [stage for _, mine in answers for stage in mine]
    assert sorted(stages) == list(range(2 if schedule == "zb1p" else 4))
    for runs, mine in answers:
        assert any(mine.values())
        expected = {(stage, piece) for stage in mine for piece in pieces}
        expected -= {(stage, "weight gradients") for stage, size in mine.items() if not size}
        assert runs == dict.fromkeys(expected, MICROBATCHES)


@pytest.mark.slow
def test_generated_code_in_stages(pool, expected):
    """The first stage has no input gradients to compute apart."""
    answers = run(pool, "mlp", "zb1p", options={"inner": "inductor"})
    assert differences(answers, expected("mlp")) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "schedule"), [("gpt2", "1f1b"), ("unet", "interleavedzb"), ("t5", "zbv")]
)
def test_two_ranks_train_any_family(pool, expected, name, schedule):
    """Tied weights, skips over stages, two towers; clipping over all stages."""
    answers = run(pool, name, schedule, clip=0.05, first=True)
    assert differences(answers, expected(name, clip=0.05)) <= 1e-6
    assert not {n for n in answers[0][2] if n in answers[1][2]} - SHARED


SHARED = {
    "transformer.wte.weight",
    "lm_head.weight",
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "schedule"),
    [("mlp", "zb1p"), ("tied", "1f1b"), ("unet", "zbv"), ("unet", "interleaved1f1b")],
)
def test_a_rank_needs_what_is_planned(pool, name, schedule):
    """In flight, waiting for weight gradients, on their way, and with weights that others share.

    Where the most is needed in the first backward of a stage, as with U-Nets, the plan has all of
    its gradients there, which are made one by one.
    """
    given = {"name": name, "schedule": schedule, "microbatches": MICROBATCHES}
    for measured, planned, _ in pool.run("pipeline_cases:measured_peak", **given):
        least = 0.994 * planned if name == "unet" else planned - 256
        assert least <= measured <= planned


@pytest.mark.slow
def test_a_gradient_that_came_is_held_until_its_backward_ends(pool):
    """Weights are large beside messages, so the most is needed late in a backward."""
    given = {"name": "wide", "schedule": "1f1b", "microbatches": MICROBATCHES}
    for measured, planned, _ in pool.run("pipeline_cases:measured_peak", **given):
        assert planned - 256 <= measured <= planned


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["zb1p", pytest.param("1f1b", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("wide", "gpt2"))]
)
def test_beside_data_parallelism_a_rank_needs_what_is_planned(four, name, schedule):
    """But for what gloo's threads allocate, which is no tensor of anybody's."""
    given = {"name": name, "schedule": schedule, "microbatches": MICROBATCHES}
    given["sizes"] = {"pp": 2, "dp": 2}
    for zero in (0, 1, 2, 3):
        answers = four.run("pipeline_cases:measured_without_workspaces", zero=zero, **given)
        for measured, planned, _ in answers:
            assert 0.95 * planned <= measured <= planned, zero


@pytest.mark.slow
def test_a_budget_holds_for_all_that_is_in_flight(pool):
    given = {"name": "gpt2 of 2 layers", "schedule": "1f1b", "microbatches": MICROBATCHES}
    free = pool.run("pipeline_cases:measured_peak", **given)
    budget = int(0.8 * free[0][1])
    tight = pool.run("pipeline_cases:measured_peak", budget=budget, **given)
    assert [losses for *_, losses in tight] == [losses for *_, losses in free]
    for measured, planned, _ in tight:
        assert 0.95 * planned <= measured <= planned <= budget
    with pytest.raises(AssertionError, match=r"\[FXZ102\] no plan fits memory_budget=1\.00 MiB"):
        pool.run("pipeline_cases:measured_peak", budget=2**20, **given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "schedule", "first"),
    [
        pytest.param(0, "zb1p", False, marks=pytest.mark.exhaustive),
        pytest.param(1, "1f1b", True, marks=pytest.mark.exhaustive),
        pytest.param(2, "zb1p", False, marks=pytest.mark.exhaustive),
        (3, "zbv", True),
    ],
)
def test_pipelines_beside_each_other_share_the_work_of_sharding(
    four, expected, zero, schedule, first
):
    """Two pipelines of two ranks with the same data; in one case cut at the first step."""
    given = {"sizes": {"pp": 2, "dp": 2}, "options": {"zero": zero}, "first": first}
    answers = run(four, "mlp", schedule, clip=0.05, **given)
    assert differences(answers, expected("mlp", clip=0.05)) <= 1e-6
    assert answers[0][2].keys() == answers[1][2].keys() != answers[2][2].keys()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipev"])
def test_fewer_micro_batches_than_stages(pool, schedule):
    given = {"name": "mlp", "schedule": schedule, "microbatches": 1}
    answers = pool.run("pipeline_cases:by_pipeline", **given)
    assert differences(answers, by_accumulation("mlp", 1)) <= 1e-6


def test_a_stage_without_parameters():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(4, 8), nn.GELU(), nn.Softmax(1), nn.Linear(8, 1), nn.Flatten(0)
    )
    eager, x = copy.deepcopy(layers), torch.randn(4, 4)
    asked = fxzero.Pipeline(cuts=("1", "3"), microbatches=2, schedule="zb1p")
    model = fxzero.compile(layers, x, pipeline=asked, loss_fn=torch.Tensor.mean, inner="eager")
    assert [stage.weight_bytes for stage in model.plan.pipeline.stages] == [160, 0, 36]
    assert model.step(x) == pytest.approx(eager(x).mean().item(), abs=1e-6)
    eager(x).mean().backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "zero"),
    [
        pytest.param(name, zero, marks=pytest.mark.exhaustive)
        for name in ("tied", "gpt2")
        for zero in (1, 2, 3)
    ],
)
def test_budgets_of_pipelines_that_share_the_work_of_sharding(four, expected, name, zero):
    """Every rank keeps to its plan, and so to the budget, with the weights of one device.

    The stage of ZeRO is given, so that a rank can only recompute to need less.
    """
    given = {"sizes": {"pp": 2, "dp": 2}, "name": name, "schedule": "1f1b", "zero": zero}
    given |= {"microbatches": MICROBATCHES}
    free = four.run("pipeline_cases:measured_peak", timeout=280, **given)
    assert all(measured <= planned for measured, planned, _ in free)
    budget = int(0.85 * max(planned for _, planned, _ in free))
    tight = four.run("pipeline_cases:measured_peak", timeout=280, budget=budget, **given)
    for measured, planned, losses in tight:
        assert measured <= planned <= budget
        assert losses == pytest.approx(free[0][2], abs=1e-6)
    if (name, zero) == ("gpt2", 1):  # gradients of earlier steps are parts, beside whole ones
        found = four.run(
            "pipeline_cases:measured_peak", timeout=280, budget=budget, zeroes=False, **given
        )
        assert all(measured <= planned <= budget for measured, planned, _ in found)
        assert [planned for _, planned, _ in found] != [planned for _, planned, _ in tight]
    options = {"zero": zero, "memory_budget": budget, "recompute": "auto"}
    ours = run(four, name, "1f1b", sizes=given["sizes"], first=True, options=options)
    assert differences(ours, expected(name)) <= 1e-6


@pytest.mark.slow
def test_ranks_choose_together_whether_to_pipeline(pool, expected):
    """What fits without a pipeline has none; else each rank's rows are trained together."""
    model, args, _, _ = build("mlp")
    half = next(Batch.of(args, {}).cut(2))[0]
    options = {"devices": 2, "zero": 0, "inner": "eager", "optimizer": "sgd"}
    needed = fxzero.plan(model, half, **options).minimum_budget
    choices = pool.run("pipeline_cases:by_choice", name="mlp", budget=2 * needed)
    assert [pipeline for *_, pipeline in choices] == [None, None]
    answers = pool.run("pipeline_cases:by_choice", name="mlp", budget=needed - 2048)
    chosen = answers[0][3]
    assert chosen.ranks == 2
    assert differences(answers, by_accumulation("mlp", chosen.microbatches)) <= 1e-6


def test_what_a_pipeline_refuses():
    model, args, _, _ = build("mlp")
    with pytest.raises(UsageError, match="cannot be cut into 999 stages: it has"):
        fxzero.compile(Mlp(), args, pipeline=999, inner="eager")
    compiled = fxzero.compile(model, pipeline=2, inner="eager")
    with pytest.raises(UsageError, match=r"call model\.step"):
        compiled(*args)
    with pytest.raises(UsageError, match="cannot be copied: copy it, then compile"):
        copy.deepcopy(compiled)
    with pytest.raises(
        UsageError, match=r"a scalar loss, but the model returned a tensor \[1, 4\]"
    ):
        fxzero.compile(torch.nn.Linear(4, 4), torch.randn(4, 4), pipeline=2, inner="eager")
    weight = torch.ones(1, requires_grad=True)
    given = {"loss_fn": lambda output: output * weight.sum(), "inner": "eager"}
    with pytest.raises(fxzero.CaptureError, match="requires gradient"):
        fxzero.compile(Mlp(), args, pipeline=2, **given)
    with pytest.raises(UsageError, match=r"outside of torch\.no_grad"), torch.no_grad():
        compiled.step(*args)
    with torch.no_grad():
        assert torch.equal(compiled(*args), model(*args))
    with pytest.raises(UsageError, match="stages=0 must be a number, at least 1"):
        fxzero.Pipeline(stages=0)
    with pytest.raises(UsageError, match="2 cuts make 3 stages, not 2"):
        fxzero.Pipeline(stages=2, cuts=("layers.1", "layers.2"))
    with pytest.raises(UsageError, match=r"schedule.*did you mean"):
        fxzero.Pipeline(schedule="1fb1")
    with pytest.raises(UsageError, match="a batch of 16 has no 3 micro-batches"):
        fxzero.compile(Mlp(), args, pipeline=fxzero.Pipeline(2, microbatches=3), inner="eager")


@pytest.mark.slow
def test_ranks_of_a_pipeline_have_the_same_batch(pool):
    texts = pool.run("pipeline_cases:different_batches")
    assert texts[0] == texts[1]
    first, zero, one, advice = texts[0].splitlines()
    assert first.startswith("[FXZ601] ranks of one pipeline were given different batches")
    assert zero.startswith("  rank 0: a batch with the hash ")
    assert one.startswith("  rank 1: a batch with the hash ")
    assert advice.endswith("give all ranks of a pipeline the same batch; other data lies along dp")
    assert pool.run("pipeline_cases:different_batches", sizes={"dp": 2}) == ["trained"] * 2


@pytest.mark.slow
def test_weights_of_overlapping_groups_of_ranks(four):
    """T5 shares embeddings and position biases; ranks are in different numbers of groups."""
    groups = [(0, 1), (0, 3), (1, 2), (1, 2, 3)]
    sums = {(0, 1): 11, (0, 3): 1001, (1, 2): 110, (1, 2, 3): 1110}
    answers = four.run("pipeline_cases:sums_over_some", ranks=4, groups=groups)
    for rank, found in enumerate(answers):
        assert found == {places: total for places, total in sums.items() if rank in places}


@pytest.mark.slow
def test_a_loss_of_another_dtype(pool):
    for dtype, loss, expected in pool.run("pipeline_cases:loss_of_another_dtype"):
        assert dtype == "torch.bfloat16"
        assert loss == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
def test_a_dead_rank_is_named(tmp_path):
    with Pool(2) as two:
        two.run("pipeline_cases:killed_in_a_step", directory=str(tmp_path), dying=(0, 1))
    text = (tmp_path / "told").read_text()
    assert text.startswith("[FXZ602] step 2: a collective of rank 0 failed: ")
    assert "no word within 1 s from rank 1: gone" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "given"),
    [
        (2, {"failing": 1, "last": True, "pass_": "forward", "runs": 2, "schedule": "1f1b"}),
        (2, {"failing": 0, "last": False, "pass_": "backward", "runs": 3, "schedule": "zb1p"}),
        (4, {"failing": 3, "last": True, "pass_": "forward", "runs": 1, "zero": 3}),
        pytest.param(
            4,
            {"failing": 1, "last": False, "pass_": "backward", "runs": 2, "zero": 2},
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_an_error_of_one_rank_is_told_to_all(ranks, given):
    """At once, whether they wait for a message of its or for its part of a collective."""
    sizes = {"pp": 2, "dp": 2} if ranks == 4 else None
    with Pool(ranks) as some:
        answers = some.run("pipeline_cases:one_rank_raises", timeout=90, sizes=sizes, **given)
        exits = some.leave()
    failing, pass_, runs = given["failing"], given["pass_"], given["runs"]
    stage = 0 if failing < ranks // 2 else 1
    raised = f"ValueError: the {pass_} met a value it cannot take"
    for rank, (told, seconds) in enumerate(answers):
        assert seconds < 20
        first, *rest = told
        if rank == failing:
            assert first == raised
            assert rest.pop(0).startswith(f"rank {failing} failed in step 2, in the ")
        else:
            assert f"rank {failing} failed in step 2, in the " in first
            assert f" of stage {stage} for micro-batch {runs}: {raised}\n" in first
            assert "(torchrun --max-restarts)\n  torch says: [" in first
        (again,) = rest
        assert again.startswith(f"PeerError: [FXZ602] step 3: rank {failing} failed in step 2, in ")
    assert exits == [0] * ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_a_budget_that_does_not_fit_is_refused_on_every_rank(pool, four, ranks):
    """When the model is compiled, or in its first step; also where some ranks alone need more."""
    given = {"sizes": {"pp": 2, "dp": 2}, "zero": 3} if ranks == 4 else {}
    some = four if ranks == 4 else pool
    task = "pipeline_cases:refused_budget"
    for first in (True, False):
        answers = some.run(task, budget=2**14, first=first, **given)
        for kind, text, _ in answers:
            assert kind == "BudgetError"
            assert text.startswith("[FXZ102] no plan fits memory_budget=16.0 KiB")
    required = [needed for _, _, needed in answers]
    assert min(required) < max(required)
    for budget in (min(required) - 1, min(required)):
        answers = some.run(task, budget=budget, first=False, **given)
        refusal = f"[FXZ102] no plan fits memory_budget={budget / 2**10:.1f} KiB ({budget} bytes)"
        for own, (kind, text, needed) in zip(required, answers, strict=True):
            if own > budget:
                assert (kind, needed) == ("BudgetError", own)
                assert text.startswith(refusal)
            else:
                assert kind == "DivergenceError"
                assert f": BudgetError: {refusal}" in text
    assert some.run(task, budget=2**20, **given) == [("trained", "", None)] * ranks


@pytest.mark.slow
def test_ranks_may_change_shapes_together(pool):
    model, (x, labels), _, _ = build("mlp")
    for rows in (16, 8, 16):
        model(x[:rows], labels[:rows]).backward()
    for kept, told in pool.run("pipeline_cases:other_shapes"):
        for name, gradient in kept.items():
            assert torch.allclose(gradient, model.get_parameter(name).grad, atol=1e-6)
        assert [text.splitlines()[0] for text in told] == [
            "[FXZ601] ranks were given different steps; no collective was started"
        ] * 2
        assert "rank 1: [FXZ101] input" in told[1]
        assert "requires a gradient" in told[1]


def test_weights_of_some_stages_are_not_exported_as_a_model(tmp_path):
    model, *_ = build("mlp")
    model.layers[0][0].weight = stand_in(model.layers[0][0].weight)
    with pytest.raises(UsageError, match="the stages of this model are on several ranks"):
        fxzero.checkpoint.export_safetensors(model, tmp_path)
    assert not any(tmp_path.iterdir())


class Noise(nn.Module):
    """Noise that is drawn without gradients, added at first and taken away at last."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        with torch.no_grad():
            noise = torch.randn_like(x)
        kept = self.a(x).detach() + noise
        return (self.c(self.b(kept - noise)) + self.a(x) * 0).square().mean()


class Average(Noise):
    """A buffer that is written without gradients, and through a view."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        hidden = self.a(x)
        with torch.no_grad():
            self.average.copy_(self.average * 0.9 + hidden.mean(0) * 0.1)
        self.average[:2] = hidden[0, :2].detach()
        return self.c(self.b(hidden) @ self.average.outer(self.average)).square().mean()


class Shapes(Noise):
    """Values that depend on what is trained, and do not let gradients through."""

    def forward(self, x):
        hidden = self.a(x)
        ones, chosen = torch.ones_like(hidden), hidden > 0
        middle = self.b(hidden.detach() if self.training else hidden)
        return (self.c(middle) * ones * chosen).square().mean()


def frozen(model, names):
    for name in names:
        getattr(model, name).requires_grad_(False)
    return model


@pytest.mark.parametrize("schedule", [pytest.param("1f1b", marks=pytest.mark.slow), "zb1p"])
@pytest.mark.parametrize(
    ("make", "cuts"),
    [
        (Noise, ("b", "c")),
        (Average, ()),
        pytest.param(Shapes, ("b", "c"), marks=pytest.mark.slow),
        pytest.param(lambda: Shapes().eval(), ("b", "c"), marks=pytest.mark.slow),
        (lambda: frozen(Noise(), ("b",)), ("b", "c")),
        pytest.param(
            lambda: frozen(Shapes().eval(), ("a", "b")), ("b", "c"), marks=pytest.mark.slow
        ),
        pytest.param(lambda: frozen(Average(), ("a",)), (), marks=pytest.mark.slow),
    ],
)
def test_what_models_do_besides_layers(make, cuts, schedule):
    """Also gradients that eager leaves at None, and stages in which nothing is trained."""
    torch.manual_seed(0)
    eager = make()
    model = copy.deepcopy(eager)
    asked = fxzero.Pipeline(None if cuts else 2, schedule, microbatches=2, cuts=cuts)
    compiled = fxzero.compile(model, pipeline=asked, inner="eager", recompute="none")
    x = torch.randn(4, 8)
    for seed in range(2):
        torch.manual_seed(seed)
        shares = []
        for part in x.split(2):
            shares.append(eager(part) / 2)
            shares[-1].backward()
        torch.manual_seed(seed)
        assert torch.allclose(compiled.step(x), torch.stack(shares).sum(), atol=1e-7)
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-7), name
    for ours, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_a_second_step_adds_to_gradients_and_other_shapes_are_cut_alike():
    model, args, _, _ = build("mlp")
    eager, *_ = build("mlp")
    compiled = fxzero.compile(model, pipeline=fxzero.Pipeline(3, microbatches=2), inner="eager")
    for _ in range(2):
        compiled.step(*args)
        eager(*args).backward()
    small = tuple(value[:8] for value in args)
    compiled.step(*small)
    eager(*small).backward()
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert "trains stage 0, 1, 2" in compiled.plan.notes[-1]
    assert len(compiled.plan.pipeline.stages) == 3


@pytest.mark.slow
def test_a_checkpoint_loads_with_other_stages_and_without_any(pool, four, tmp_path):
    """Tied weights are on two ranks; what one rank lacks another has."""
    given = {"name": "tied of 2 layers", "root": str(tmp_path), "microbatches": 4}
    task = "pipeline_cases:saved_and_loaded"
    saved = pool.run(task, load=False, schedule="1f1b", **given)
    again = pool.run(task, load=True, schedule="1f1b", **given)
    other = pool.run(task, load=True, schedule="zbv", **given)
    alone = saved_and_loaded(str(tmp_path), "tied of 2 layers", load=True)
    sharded = four.run(task, load=True, schedule="zb1p", sizes={"pp": 2, "dp": 2}, **given)
    state = {name: value for have, _ in saved for name, value in have.items()}
    for have, losses in (*again, *other, alone, *sharded):
        assert all(torch.equal(value, state[name]) for name, value in have.items())
        assert losses == pytest.approx(saved[0][1], abs=1e-5)
    assert [losses for _, losses in again] == [losses for _, losses in saved]
    assert alone[0].keys() == state.keys()
