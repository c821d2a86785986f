"""A small language model and its data, trained by other libraries' loops and by plain ones."""

import copy
import os
import tempfile

import torch
from torch.utils.data import DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

import fxzero

STEPS, ROWS, SEQ = 6, 4, 16
_CONFIG = {"vocab_size": 64, "n_positions": SEQ, "n_embd": 32, "n_layer": 2, "n_head": 2,
           "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip


def language_model(dropout=0.1):
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return GPT2LMHeadModel(GPT2Config(**_CONFIG, **rates)).train()


def texts(rows=ROWS * STEPS):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(64, (rows, SEQ), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def batches(rows=ROWS, count=STEPS):
    every = texts(rows * count)
    for step in range(count):
        part = every[step * rows : (step + 1) * rows]
        yield {name: torch.stack([row[name] for row in part]) for name in part[0]}


def weights(model):
    """Copies of the whole weights by name."""
    return {name: copy.deepcopy(_whole(p)) for name, p in model.named_parameters()}


def _whole(parameter):
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def arguments(directory, **given):
    settings = {"max_steps": STEPS, "per_device_train_batch_size": ROWS, "use_cpu": True,
                "logging_steps": 1, "disable_tqdm": True, "report_to": "none", "seed": 3,
                "save_strategy": "no", "learning_rate": 1e-2,
                "train_sampling_strategy": "sequential"}  # fmt: skip
    return TrainingArguments(str(directory), **(settings | given))


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_trainer(directory, resume=None, dropout=0.1, given=None, **options):
    """Losses of each step, final weights and the trainer."""
    trainer = fxzero.integrations.Trainer(
        model=language_model(dropout),
        args=arguments(directory, **(given or {})),
        train_dataset=texts(),
        inner="eager",
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses_of(trainer), weights(trainer.model), trainer


def as_launched():
    """Makes this process of a pool look like one that torchrun started."""
    rank, world = (str(f()) for f in (torch.distributed.get_rank, torch.distributed.get_world_size))
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def trainer_on_ranks(directory, zero, resume=None, accumulate=1, dropout=0.0, **given):
    """Losses, final weights and the plan's peak of a rank of two, each with half of a batch."""
    as_launched()
    rows = ROWS // torch.distributed.get_world_size()
    given |= {"per_device_train_batch_size": rows // accumulate, "max_grad_norm": 0.5}
    given["gradient_accumulation_steps"] = accumulate
    losses, found, trainer = by_trainer(directory, resume, dropout, given, zero=zero)
    return losses, found, trainer.model.plan.peak_bytes, trainer.evaluate(texts(8))["eval_loss"]


def by_accelerate(model, accumulate=1, checkpoints=None, **options):
    """Losses and weights of a loop of Accelerate over this process' part of the batches."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    if options.pop("compiled", True):
        model = fxzero.integrations.compile_for(accelerator, model, inner="eager", **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = ROWS // accumulate // accelerator.num_processes
    # With a generator of its own, beginning to load draws no numbers of those for dropout.
    own = torch.Generator()
    loader = torch.utils.data.DataLoader(texts(), batch_size=rows, generator=own)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, done = [], 0
    if checkpoints is not None and fxzero.checkpoint.latest(checkpoints):
        done = fxzero.checkpoint.load(checkpoints, model, optimizer).step
        loader = accelerator.skip_first_batches(loader, done * accumulate)
    for batch in loader:
        with accelerator.accumulate(prepared):
            loss = prepared(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                fxzero.clip_grad_norm_(model, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        done += accelerator.sync_gradients
        if checkpoints is not None and done == STEPS // 2 and accelerator.sync_gradients:
            fxzero.checkpoint.save(checkpoints, model, optimizer, step=done)
    return losses, weights(model), prepared is model, accelerator


def accelerate_on_ranks(zero, accumulate=1, checkpoints=None):
    as_launched()
    options = {"accumulate": accumulate, "checkpoints": checkpoints, "zero": zero}
    *found, accelerator = by_accelerate(language_model(0.0), **options)
    refused = ""
    with tempfile.TemporaryDirectory() as directory:
        try:
            accelerator.save_state(directory)
        except fxzero.UsageError as error:
            refused = str(error)
    return *found, refused


def lightning_module(dropout=0.1, whole=False):
    """The language model in a LightningModule, which calls it, or which is it (``whole``)."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = language_model(dropout)
            self.losses = []

        def training_step(self, batch, index):
            loss = (self(**batch) if whole else self.model(**batch)).loss
            self.losses.append(loss.item())
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, index):
            self.log("validated", (self(**batch) if whole else self.model(**batch)).loss)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    if whole:
        Module.forward = lambda self, **batch: self.model(**batch)
    return Module()


def by_lightning(directory, module, strategy, resume=None, epochs=2, checkpoints=True, **given):
    """Losses of this process, final weights and the trainer; an epoch is half of the batches."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    torch.manual_seed(4)
    rank, world = given.pop("place", (0, 1))
    train, validation = (
        torch.utils.data.DataLoader(
            rows, ROWS // world, sampler=DistributedSampler(rows, world, rank, shuffle=False)
        )
        for rows in (texts(ROWS * STEPS // 2), texts(8))
    )
    saving = ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        strategy=strategy, accelerator="cpu", max_epochs=epochs, logger=False,
        callbacks=[*given.pop("callbacks", []), *([saving] if checkpoints else [])],
        enable_checkpointing=checkpoints,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        devices=world, use_distributed_sampler=False, **given,
    )  # fmt: skip
    trainer.fit(module, train, validation, ckpt_path=resume)
    return module.losses, weights(module), trainer


def lightning_on_ranks(directory, zero, resume=None, dropout=0.0, **given):
    as_launched()
    world = torch.distributed.get_world_size()
    strategy = fxzero.integrations.LightningStrategy("model", zero=zero, inner="eager")
    given |= {"place": (torch.distributed.get_rank(), world), "gradient_clip_val": 0.5}
    module = lightning_module(dropout)
    losses, found, trainer = by_lightning(directory, module, strategy, resume, **given)
    return losses, found, trainer.callback_metrics["validated"].item()
