"""Lightning over a model of fxzero: losses, weights, checkpoints; refusals."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lightning")
import lightning
from helpers import assert_equal
from integration_cases import ROWS, STEPS, by_lightning, lightning_module, texts
from integration_cases import weights as weights_of
from torch import nn

import fxzero
from fxzero.integrations import LightningStrategy

pytestmark = pytest.mark.slow  # whole trainings


@pytest.fixture(autouse=True, scope="module")
def _nothing_left_behind():
    """Lightning leaves its process group, and the variables that describe it, to the process."""
    with mock.patch.dict(os.environ):
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Else Lightning's strategies for several processes take two, and sums round otherwise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def train(directory, strategy=None, module=None, **given):
    strategy = strategy or LightningStrategy("model", inner="eager")
    return by_lightning(directory, module or lightning_module(), strategy, **given)


@pytest.mark.parametrize(
    "given", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}], ids=["", "accumulates"]
)
def test_losses_and_weights_are_those_of_lightning_alone(tmp_path, given):
    losses, weights, alone = train(tmp_path, "auto", checkpoints=False, **given)
    found, found_weights, trainer = train(tmp_path, checkpoints=False, **given)
    assert len(losses) == STEPS
    assert found == losses
    assert_equal(found_weights, weights)
    validated = [each.callback_metrics["validated"] for each in (alone, trainer)]
    assert validated[0] == validated[1]
    assert trainer.strategy.compiled.plan.fits


def test_a_module_with_a_forward_is_planned_as_a_whole(tmp_path):
    losses, weights, _ = train(tmp_path, "auto", lightning_module(whole=True), checkpoints=False)
    strategy = LightningStrategy(memory_budget="1GiB", inner="eager")
    module = lightning_module(whole=True)
    found, found_weights, _ = train(tmp_path, strategy, module, checkpoints=False)
    assert found == losses
    assert_equal(found_weights, weights)
    assert module.plan.fits


def test_losses_are_those_of_a_plain_loop(tmp_path):
    found, *_ = train(tmp_path, module=lightning_module(0.0), checkpoints=False)
    model = fxzero.compile(lightning_module(0.0).model, inner="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows, losses = texts(ROWS * STEPS // 2), []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.9 ** (step // (STEPS // 2))
        part = [rows[(ROWS * step + i) % len(rows)] for i in range(ROWS)]
        loss = model(**{name: torch.stack([row[name] for row in part]) for name in part[0]}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert found == losses


def test_resumed_training_is_that_of_one_that_was_not_disturbed(tmp_path):
    losses, weights, _ = train(tmp_path)
    saved = tmp_path / "epoch=0.ckpt"
    found, found_weights, trainer = train(tmp_path / "again", resume=saved)
    assert losses[STEPS // 2 :] == found
    assert_equal(found_weights, weights)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**2)
    assert sorted(path.name for path in saved.glob("*/*.json")) == ["manifest.json", "state.json"]
    assert not [path for path in saved.rglob("*") if path.suffix in (".pt", ".bin", ".ckpt")]


def test_weights_are_loaded_to_validate(tmp_path):
    _, _, trainer = train(tmp_path)
    fresh = lightning_module()
    alone = lightning.Trainer(
        strategy=LightningStrategy("model", inner="eager"), accelerator="cpu", devices=1,
        logger=False, enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(texts(8), ROWS)
    (found,) = alone.validate(fresh, loader, str(tmp_path / "epoch=1.ckpt"), verbose=False)
    assert found["validated"] == trainer.callback_metrics["validated"]


class Peaks(lightning.Callback):
    """Measured bytes of each step, from the batch's arrival to the optimizer's end."""

    def __init__(self):
        self.peaks, self.counter = [], None

    def on_train_batch_start(self, trainer, module, *_):
        from fxzero.measurement import StorageCounter, tensors_of

        self.counter = StorageCounter(t for o in trainer.optimizers for t in tensors_of(o))
        self.counter.__enter__()

    def on_train_batch_end(self, *_):
        self.counter.__exit__(None, None, None)
        self.peaks.append(self.counter.peak)


# The loss that Lightning logs, as a step's and as an epoch's, with its weight.
SCALAR_BYTES = 32


def test_the_measured_peak_is_at_most_the_planned(tmp_path):
    peaks = Peaks()
    _, _, trainer = train(tmp_path, checkpoints=False, callbacks=[peaks])
    planned = trainer.strategy.compiled.plan.peak_bytes
    assert len(peaks.peaks) == STEPS
    assert 0.9 * planned < max(peaks.peaks) <= planned + SCALAR_BYTES


@pytest.mark.exhaustive
def test_states_wait_in_host_memory_where_the_plan_has_them(tmp_path):
    def trained(**options):
        module = lightning_module()
        module.configure_optimizers = lambda: fxzero.optim.AdamW(module.parameters(), lr=1e-2)
        options = {"inner": "eager", "optimizer": "fxzero.optim.AdamW", **options}
        strategy = LightningStrategy("model", **options)
        return train(tmp_path, strategy, module, checkpoints=False)

    losses, weights, _ = trained()
    with pytest.raises(fxzero.BudgetError) as caught:
        trained(offload=True, memory_budget=1)
    budget = caught.value.required_bytes
    found, found_weights, trainer = trained(offload=True, memory_budget=budget)
    assert trainer.strategy.compiled.plan.decisions.host_states
    assert found == losses
    assert_equal(found_weights, weights)


class Plain(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch, index):
        return self.head(self.model(batch)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Forward(Plain):
    def forward(self, batch):
        return self.head(self.model(batch)).mean()


class Two(Forward):
    def configure_optimizers(self):
        self.automatic_optimization = False
        return [torch.optim.SGD(part.parameters()) for part in (self.model, self.head)]


def refusal(tmp_path, strategy, module, **given):
    trainer = lightning.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **given,
    )  # fmt: skip
    with pytest.raises(fxzero.UsageError) as caught:
        trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 4), 2))
    return str(caught.value).removeprefix("[FXZ101] ")


def test_a_module_without_what_is_planned_is_refused(tmp_path):
    assert refusal(tmp_path, LightningStrategy(), Plain()) == (
        "Plain has no forward of its own, and forward is what is planned\n"
        "  say what training_step calls: submodule='model' or submodule='head'"
    )
    assert refusal(tmp_path, LightningStrategy("modle"), Plain()) == (
        "Plain has no submodule 'modle'\n  it has: submodule='model' or submodule='head'"
    )
    assert refusal(tmp_path, LightningStrategy("model"), Plain()) == (
        "head.weight is trained, and is not in submodule='model'\n"
        "  one submodule has to have all that is trained"
    )
    assert refusal(tmp_path, LightningStrategy(inner="eager"), Forward()) == (
        "training_step did not call self(...), which is what is planned\n"
        "  call it, or name what is called: LightningStrategy(submodule=...)"
    )
    assert refusal(tmp_path, LightningStrategy(inner="eager"), Two()) == (
        "2 optimizers, and a step is planned for one\n  give one of them several groups of "
        "parameters"
    )


def test_what_lightning_would_do_to_the_model_is_refused():
    with pytest.raises(fxzero.UsageError) as caught:
        lightning.Trainer(strategy=LightningStrategy(), precision="bf16-mixed", accelerator="cpu")
    assert str(caught.value) == (
        "[FXZ101] precision='bf16-mixed' has Lightning change what the model computes in\n"
        "  leave it out, and give the strategy precision=fxzero.Precision(param=torch.bfloat16)"
    )
    with pytest.raises(fxzero.UsageError, match=r"pipeline= trains with model\.step, and Lightn"):
        LightningStrategy(pipeline=2)


def test_a_hyperparameter_that_json_does_not_hold_is_refused(tmp_path):
    module = lightning_module()
    module.save_hyperparameters({"layer": nn.Identity()})
    with pytest.raises(fxzero.UsageError) as caught:
        train(tmp_path, module=module)
    assert str(caught.value) == (
        "[FXZ101] checkpoint.hyper_parameters.layer is Identity, which JSON does not hold, and "
        "checkpoints have no pickles\n"
        "  save_hyperparameters(ignore=...) leaves a hyperparameter out"
    )


@pytest.mark.slow
@pytest.mark.parametrize("zero", [3, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_two_processes_train_as_one(pools, tmp_path, zero):
    task = "integration_cases:lightning_on_ranks"
    answers = pools[2].run(task, directory=str(tmp_path), zero=zero, checkpoints=False)
    module = lightning_module(0.0)
    losses, weights, _ = train(tmp_path, module=module, checkpoints=False, gradient_clip_val=0.5)
    for step, loss in enumerate(losses):
        assert abs(sum(answer[0][step] for answer in answers) / 2 - loss) < 1e-6
    for _, found, validated in answers:
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-4)
        assert validated > 0


@pytest.mark.slow
def test_two_processes_go_on_where_they_were(pools, tmp_path):
    task, given = "integration_cases:lightning_on_ranks", {"zero": 3, "dropout": 0.1}
    whole = pools[2].run(task, directory=str(tmp_path), **given)
    saved = Path(tmp_path, "epoch=0.ckpt")
    again = pools[2].run(task, directory=str(tmp_path / "again"), resume=str(saved), **given)
    for (losses, weights, _), (found, found_weights, _) in zip(whole, again, strict=True):
        assert losses[STEPS // 2 :] == found
        assert_equal(found_weights, weights)
    assert len(weights_of(lightning_module())) == len(whole[0][1])
