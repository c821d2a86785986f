"""Hugging Face's Trainer: the losses, weights and checkpoints of its eager self, under a plan."""

import itertools

import pytest
import torch

pytest.importorskip("accelerate")
import transformers
from helpers import assert_equal
from integration_cases import (
    STEPS,
    arguments,
    batches,
    by_trainer,
    language_model,
    losses_of,
    texts,
)
from integration_cases import weights as weights_of

import fxzero
from fxzero.measurement import StorageCounter

pytestmark = pytest.mark.slow  # whole trainings


def by_stock_trainer(directory, model, **given):
    args = arguments(directory, **given)
    trainer = transformers.Trainer(model=model, args=args, train_dataset=texts())
    trainer.train()
    return losses_of(trainer), weights_of(model), trainer


def by_plain_loop(model, rate=1e-2):
    """Losses and weights of a loop like the Trainer's, without dropout."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    losses = []
    for step, batch in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
        counted = (batch["labels"] != -100).sum()
        loss = model(**batch, num_items_in_batch=counted).loss
        loss.backward()
        fxzero.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, weights_of(model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_and_weights_are_those_of_the_stock_trainer(tmp_path, accumulate):
    given = {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.5, "max_steps": 3}
    losses, weights, stock = by_stock_trainer(tmp_path, language_model(), **given)
    found, found_weights, trainer = by_trainer(tmp_path, given=given)
    assert len(losses) == 3
    assert found == losses
    assert_equal(found_weights, weights)
    norms = [
        [entry["grad_norm"] for entry in each.state.log_history if "grad_norm" in entry]
        for each in (trainer, stock)
    ]
    assert len(norms[0]) == 3
    assert norms[0] == norms[1]
    assert trainer.evaluate(texts(8))["eval_loss"] == stock.evaluate(texts(8))["eval_loss"]


def test_losses_and_weights_are_those_of_plain_loops(tmp_path):
    found, weights, _ = by_trainer(tmp_path, dropout=0.0)
    compiled = fxzero.compile(language_model(0.0), inner="eager")
    for model in (language_model(0.0), compiled):
        losses, expected = by_plain_loop(model)
        assert len(losses) == STEPS
        assert found == losses
        assert_equal(weights, expected)


def test_the_stock_trainer_trains_a_compiled_model_on_one_device(tmp_path):
    losses, weights, _ = by_stock_trainer(tmp_path, language_model(), max_steps=3)
    model = fxzero.compile(language_model(), memory_budget="1GiB", inner="eager")
    found, found_weights, stock = by_stock_trainer(tmp_path, model, max_steps=3)
    assert found == losses
    assert_equal(found_weights, weights)
    assert stock.label_names == ["labels"]
    assert model.plan.fits


# The Trainer's own: the loss of the step, the sum of losses to be logged, the number of labels.
SCALAR_BYTES = 4 + 4 + 8


class Measuring(transformers.TrainerCallback):
    """Counts the bytes of each step, from its beginning to its end."""

    def __init__(self):
        self.peaks, self.counter = [], None

    def on_step_begin(self, args, state, control, model, optimizer, **_):
        known = [*model.parameters(), *model.buffers()]
        known += [t for s in optimizer.state.values() for t in s.values()]
        self.counter = StorageCounter(known)
        self.counter.__enter__()

    def on_step_end(self, *_, **__):
        self.counter.__exit__(None, None, None)
        self.peaks.append(self.counter.peak)


def test_the_measured_peak_is_at_most_the_planned(tmp_path):
    measuring = Measuring()
    _, _, trainer = by_trainer(tmp_path, given={"max_steps": 4}, callbacks=[measuring])
    assert len(measuring.peaks) == 4
    planned = trainer.model.plan.peak_bytes
    assert 0.9 * planned < max(measuring.peaks) <= planned + SCALAR_BYTES
    budget = int(0.9 * planned)
    measuring = Measuring()
    _, _, trainer = by_trainer(
        tmp_path, given={"max_steps": 4}, callbacks=[measuring], memory_budget=budget
    )
    assert trainer.model.plan.peak_bytes <= budget < planned
    assert max(measuring.peaks) <= trainer.model.plan.peak_bytes + SCALAR_BYTES


def test_states_wait_in_host_memory_where_the_plan_has_them(tmp_path):
    given = {"optimizer_cls_and_kwargs": (fxzero.optim.AdamW, {"lr": 1e-2})}
    losses, weights, _ = by_trainer(tmp_path, **given)
    with pytest.raises(fxzero.BudgetError) as caught:
        by_trainer(tmp_path, offload=True, memory_budget=1, **given)
    budget = caught.value.required_bytes
    found, found_weights, trainer = by_trainer(
        tmp_path, offload=True, memory_budget=budget, **given
    )
    assert trainer.model.plan.decisions.host_states
    assert found == losses
    assert_equal(found_weights, weights)


def test_resumed_training_is_that_of_one_that_was_not_disturbed(tmp_path):
    given = {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.5}
    losses, weights, _ = by_trainer(tmp_path, given=given)
    saved = tmp_path / "checkpoint-4"
    found, found_weights, _ = by_trainer(tmp_path / "again", str(saved), given=given)
    assert found == losses  # those of the first steps are in the saved history
    assert_equal(found_weights, weights)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert_equal(weights_of(loaded), weights)
    names = {path.name for path in saved.iterdir()}
    assert {"model.safetensors", "config.json", "fxzero", "random-0.json"} <= names
    assert not {"optimizer.pt", "scheduler.pt", "rng_state.pth"} & names


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    by_stock_trainer(tmp_path, language_model(), max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(fxzero.CheckpointError) as caught:
        by_trainer(tmp_path, str(tmp_path / "checkpoint-1"))
    assert str(caught.value) == (
        f"[FXZ701] {tmp_path / 'checkpoint-1'} has no training state of fxzero\n"
        "  it was saved by another Trainer, or with save_only_model=True: load its weights, and "
        "begin anew"
    )


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    given = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "max_steps": 4, "learning_rate": 1.0,
    }  # fmt: skip
    _, weights, trainer = by_trainer(tmp_path, given=given, eval_dataset=texts(8))
    scores = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(scores) == 2
    assert trainer.evaluate()["eval_loss"] == min(scores)
    best = transformers.AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert_equal(weights_of(best), weights)


_PRECISION = "precision=fxzero.Precision(param=torch.bfloat16)"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"bf16": True}, f"(bf16=True) computes in autocast\n  {{}} {_PRECISION}"),
        (
            {"bf16_full_eval": True},
            "(bf16_full_eval=True) turns the weights into bfloat16 to evaluate\n"
            f"  {{}} {_PRECISION}",
        ),
        (
            {"torch_compile": True},
            "(torch_compile=True) wraps the model in torch.compile\n"
            '  {} inner="inductor" or inner="eager"',
        ),
    ],
)
def test_what_the_trainer_would_do_to_the_model_is_refused(tmp_path, given, text):
    args = arguments(tmp_path, **given)
    with pytest.raises(fxzero.UsageError) as caught:
        fxzero.integrations.Trainer(model=language_model(), args=args)
    text = text.format("leave it out, and give the Trainer")
    assert str(caught.value) == f"[FXZ101] TrainingArguments{text}"


def test_what_cannot_be_is_refused(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(fxzero.UsageError, match=r"pipeline= trains with model\.step, and the Tr"):
        fxzero.integrations.Trainer(model=language_model(), args=args, pipeline=2)
    with pytest.raises(fxzero.UsageError, match="model_init= makes a model for each training"):
        fxzero.integrations.Trainer(model_init=language_model, args=args)
    compiled = fxzero.compile(language_model())
    with pytest.raises(fxzero.UsageError, match="already compiled\n  leave zero out"):
        fxzero.integrations.Trainer(model=compiled, args=args, zero=1)


def test_the_optimizer_of_the_arguments_is_planned_for(tmp_path):
    def planned(**given):
        args = arguments(tmp_path, **given.pop("args", {}))
        trainer = fxzero.integrations.Trainer(model=language_model(), args=args, **given)
        return trainer.model._fxzero.options.optimizer

    assert planned() is torch.optim.AdamW
    assert planned(args={"optim": "sgd"}) is torch.optim.SGD
    momentum = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
    assert planned(optimizer_cls_and_kwargs=momentum) == "sgd-momentum"
    ours = planned(optimizer_cls_and_kwargs=(fxzero.optim.AdamW, {"moments": "int8"}))
    assert (ours.func, ours.keywords) == (fxzero.optim.AdamW, {"moments": "int8"})
    assert planned(optimizer="lion") == "lion"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and weights of one process."""
    losses, weights, trainer = by_trainer(
        tmp_path_factory.mktemp("alone"), dropout=0.0, given={"max_grad_norm": 0.5}
    )
    return losses, weights, trainer.evaluate(texts(8))["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "accumulate"),
    [
        (3, 1),
        pytest.param(0, 1, marks=pytest.mark.exhaustive),
        pytest.param(2, 2, marks=pytest.mark.exhaustive),
    ],
)
def test_two_processes_train_as_one(pools, alone, tmp_path, zero, accumulate):
    directory = str(tmp_path)
    task = "integration_cases:trainer_on_ranks"
    answers = pools[2].run(task, directory=directory, zero=zero, accumulate=accumulate)
    losses, weights, evaluated = alone
    for found, found_weights, _, loss in answers:
        assert len(found) == STEPS
        assert max(abs(a - b) for a, b in zip(found, losses, strict=True)) < 1e-6
        for name, weight in weights.items():
            # AdamW divides by the gradient's size, also where that is next to nothing: a hundredth
            # of the largest update.
            torch.testing.assert_close(found_weights[name], weight, rtol=0, atol=1e-4)
        assert abs(loss - evaluated) < 1e-5
    assert all(a == b for a, b in itertools.pairwise(answer[0] for answer in answers))


@pytest.mark.slow
def test_two_processes_go_on_where_they_were(pools, tmp_path):
    given = {"save_strategy": "steps", "save_steps": 4, "zero": 3, "dropout": 0.1}
    task = "integration_cases:trainer_on_ranks"
    whole = pools[2].run(task, directory=str(tmp_path / "whole"), **given)
    saved = tmp_path / "whole" / "checkpoint-4"
    again = pools[2].run(task, directory=str(tmp_path / "again"), resume=str(saved), **given)
    for (losses, weights, *_), (found, found_weights, *_) in zip(whole, again, strict=True):
        assert found == losses
        assert_equal(found_weights, weights)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again" / f"checkpoint-{STEPS}"
    )
    assert_equal(weights_of(loaded), whole[0][1])
    # One process goes on from what two have saved.
    losses, _, _ = by_trainer(
        tmp_path / "alone", str(saved), given={"max_grad_norm": 0.5}, dropout=0.1
    )
    assert losses[:4] == whole[0][0][:4]
    assert len(losses) == STEPS
