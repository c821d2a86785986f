"""Hugging Face's Trainer under a memory budget, on one device or many.

pip install fxzero[integrations]
python trainer.py --memory-budget 60MiB
torchrun --nproc_per_node 2 trainer.py --zero 3
python trainer.py --steps 40 --resume             # goes on, on any number of processes
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

import fxzero


def text(seq: int) -> list[dict[str, torch.Tensor]]:
    """A module of the standard library as rows of bytes."""
    source = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_bytes()
    rows = torch.frombuffer(bytearray(source), dtype=torch.uint8).long().split(seq)[:-1]
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT with Hugging Face's Trainer.")
    parser.add_argument("--memory-budget", metavar="SIZE", help='such as "60MiB"; default: none')
    parser.add_argument("--zero", type=int, default=2, help="0, 1, 2 or 3: what ranks share")
    parser.add_argument("--inner", choices=["inductor", "eager"], help="default: what is present")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/trainer")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    given = parser.parse_args()

    config = GPT2Config(vocab_size=256, n_positions=128, n_embd=128, n_layer=4, n_head=4)
    arguments = TrainingArguments(
        given.output,
        max_steps=given.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        logging_steps=1,
        save_steps=10,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = fxzero.integrations.Trainer(
        model=GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=text(128),
        memory_budget=given.memory_budget,
        zero=given.zero,
        inner=given.inner,
    )
    trainer.train(resume_from_checkpoint=given.resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(trainer.model.plan)


if __name__ == "__main__":
    main()
