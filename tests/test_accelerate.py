"""Accelerate's loop over a model of fxzero: losses, weights, accumulation, going on; refusals."""

import pytest
import torch

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import assert_equal
from integration_cases import STEPS, batches, by_accelerate, language_model
from integration_cases import weights as weights_of

import fxzero

pytestmark = pytest.mark.slow  # whole trainings


def by_plain_loop(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in batches():
        loss = model(**batch).loss
        loss.backward()
        fxzero.clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, weights_of(model)


def test_losses_and_weights_are_those_of_plain_loops():
    found, weights, same, _ = by_accelerate(language_model(0.0))
    assert same  # prepare returned the model itself
    for model in (language_model(0.0), fxzero.compile(language_model(0.0), inner="eager")):
        losses, expected = by_plain_loop(model)
        assert len(losses) == STEPS
        assert found == losses
        assert_equal(weights, expected)


def test_accumulation_is_that_of_an_eager_model():
    found, weights, *_ = by_accelerate(language_model(0.0), accumulate=2)
    losses, expected, *_ = by_accelerate(language_model(0.0), accumulate=2, compiled=False)
    assert len(losses) == 2 * STEPS
    assert found == losses
    assert_equal(weights, expected)


def test_training_goes_on_where_it_was(tmp_path):
    losses, weights, *_ = by_accelerate(language_model(0.1), checkpoints=tmp_path)
    rest, found, *_ = by_accelerate(language_model(0.1), checkpoints=tmp_path)
    assert losses[STEPS // 2 :] == rest
    assert_equal(found, weights)


def refusal(**settings):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, **settings)
    with pytest.raises(fxzero.UsageError) as caught:
        fxzero.integrations.compile_for(accelerator, language_model())
    return str(caught.value)


def test_what_accelerate_would_do_to_the_model_is_refused():
    assert refusal(mixed_precision="bf16") == (
        "[FXZ101] mixed_precision='bf16' wraps the model in Accelerate's autocast, and plans count "
        "other dtypes\n  leave it out, and give precision=fxzero.Precision(param=torch.bfloat16)"
    )
    assert refusal(dynamo_backend="eager") == (
        "[FXZ101] dynamo_backend='eager' wraps the model in torch.compile, and fxzero generates "
        'code itself\n  leave it out, and give inner="inductor" or inner="eager"'
    )


def test_processes_that_accelerate_does_not_know_of_are_refused(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(fxzero.UsageError) as caught:
        fxzero.integrations.compile_for(accelerator, language_model())
    assert str(caught.value) == (
        "[FXZ101] 2 processes were started, and the accelerator has 1\n  without CUDA devices it "
        "connects them with Accelerator(cpu=True), or TrainingArguments(use_cpu=True)"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "accumulate"), [pytest.param(3, 1, marks=pytest.mark.exhaustive), (2, 2)]
)
def test_two_processes_train_as_one(pools, zero, accumulate):
    task = "integration_cases:accelerate_on_ranks"
    answers = pools[2].run(task, zero=zero, accumulate=accumulate)
    expected, weights, *_ = by_accelerate(language_model(0.0), accumulate=accumulate)
    for losses, found, same, refused in answers:
        assert same
        assert len(losses) == accumulate * STEPS
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-6
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-4)
        assert refused == (
            "[FXZ101] accelerator.save_state writes the first rank's shards alone, as a pickle\n"
            "  fxzero.checkpoint.save(directory, model, optimizer, step=...) writes all of them"
        )


@pytest.mark.slow
def test_two_processes_go_on_where_they_were(pools, tmp_path):
    given = {"zero": 3, "checkpoints": str(tmp_path)}
    whole = pools[2].run("integration_cases:accelerate_on_ranks", **given)
    again = pools[2].run("integration_cases:accelerate_on_ranks", **given)
    for (losses, weights, *_), (rest, found, *_) in zip(whole, again, strict=True):
        assert losses[STEPS // 2 :] == rest
        assert_equal(found, weights)
