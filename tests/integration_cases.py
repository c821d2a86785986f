"""A small language model and its data, trained by other libraries' loops and by plain ones."""

import copy
import os

import torch
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
