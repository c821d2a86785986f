"""Step time and memory of a rank: fxzero's ZeRO stages against DDP, FSDP2 and DeepSpeed, over gloo.

    python benchmarks/bench_zero.py [--ranks 2] [--model gpt2] [--rounds 7]

Every variant trains the same model on the same batches with AdamW.  All live in the same processes
and are timed in turn, round after round; DeepSpeed is left out where it is not installed.  The peak
is what a rank's tensors and the allocator's record come to; losses are compared with DDP's.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from models import MODELS, Case, build
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fxzero
from fxzero import _torch
from fxzero.allocations import peak_of_allocations
from fxzero.cost import CPU, bucket_bytes
from fxzero.network import route
from fxzero.storages import storage_identity

_RESULTS = Path(__file__).resolve().parent / "results"
_MiB = 2**20
_WARMUP = 3
# Threads of gloo may let go of what a collective has read a moment after it has ended.
_PEAKS = 3
# DeepSpeed's buffers of 5e8 elements are meant for other models; these are as large as our buckets.
_DEEPSPEED_SIZES = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "sub_group_size",
)
_ELEMENTS = bucket_bytes(route(CPU, {"dp": 2}, "dp")) // 1024 * 256
_Held = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Variant:
    """One way to train: a name, and what makes a step, all that it holds and its planned peak."""

    name: str
    make: Callable[[Case], tuple[Callable[[], float], _Held, Callable[[], int | None]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        processes.start_processes(
            _rank, args=(options, directory), nprocs=options.ranks, start_method="spawn"
        )
        ranks = [
            json.loads((Path(directory) / f"{r}.json").read_text()) for r in range(options.ranks)
        ]
    _write(options, ranks)


def _rank(rank: int, options: argparse.Namespace, directory: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", options.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
    outcomes = _compare(options)
    (Path(directory) / f"{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    os._exit(0)  # FSDP2 over gloo may abort while it is torn down


def _compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    steps, found = {}, []
    for variant in _variants():
        case = build(
            options.model, quick=options.quick, dropout=0.0, dtype=torch.float32, device="cpu"
        )
        step, held, plan = variant.make(case)
        losses = [step() for _ in range(_WARMUP)]
        found.append((variant.name, _peak(step, held()), plan(), losses))
        steps[variant.name] = step
        if dist.get_rank() == 0:
            print(f"  {variant.name}", flush=True)
    times = harness.seconds_in_turn(steps, options.rounds)
    return [
        {"name": n, "peak": peak, "planned": planned, "seconds": times[n], "losses": losses}
        for n, peak, planned, losses in found
    ]


def _peak(step: Callable[[], float], held: list[torch.Tensor]) -> int:
    sizes = {}
    for tensor in held:
        local = _torch.local_tensor(tensor)
        sizes[storage_identity(local)] = local.untyped_storage().nbytes()
    peaks = []
    for _ in range(_PEAKS):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            step()
        peaks.append(peak_of_allocations(record))
    return sum(sizes.values()) + min(peaks)


def _variants() -> list[Variant]:
    made = [
        Variant("DDP", _ddp),
        Variant("FSDP2", lambda case: _fsdp(case, True)),
        Variant("FSDP2, no reshard", lambda case: _fsdp(case, False)),
    ]
    if importlib.util.find_spec("deepspeed"):
        made += [
            Variant(f"DeepSpeed zero={zero}", lambda case, zero=zero: _deepspeed(case, zero))
            for zero in (2, 3)
        ]
    for zero in (0, 1, 2, 3, "auto"):
        made.append(Variant(f"fxzero zero={zero}", lambda case, zero=zero: _fxzero(case, zero)))
    return made


def _inputs(case: Case) -> dict[str, torch.Tensor]:
    """Other data on every rank."""
    return {k: v.roll(dist.get_rank() + 1, -1) if v.ndim > 1 else v for k, v in case.inputs.items()}


def _step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[Callable[[], float], _Held]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        loss = model(**inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def held() -> list[torch.Tensor]:
        states = [t for s in optimizer.state.values() for t in s.values()]
        tensors = [*model.parameters(), *model.buffers(), *inputs.values()]
        return tensors + [t for t in states if isinstance(t, torch.Tensor)]

    return step, held


def _ddp(case: Case) -> Any:
    model = nn.parallel.DistributedDataParallel(case.module)
    step, held = _step(model, _inputs(case))
    buckets = sum(p.numel() * p.element_size() for p in model.parameters())

    def everything() -> list[torch.Tensor]:
        # The reducer's buckets, which no Python object shows.
        return [*held(), torch.empty(buckets, dtype=torch.uint8)]

    return step, everything, lambda: None


def _fsdp(case: Case, reshard: bool) -> Any:
    from torch.distributed.fsdp import fully_shard

    inputs = _inputs(case)
    for block in case.blocks(case.module):
        fully_shard(block, reshard_after_forward=reshard)
    fully_shard(case.module, reshard_after_forward=reshard)
    return *_step(case.module, inputs), lambda: None


def _deepspeed(case: Case, zero: int) -> Any:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    import deepspeed

    inputs = _inputs(case)
    adamw = {"lr": 1e-4, "weight_decay": 1e-2, "torch_adam": True}
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # only for its own samples per second
        "optimizer": {"type": "AdamW", "params": adamw},
        "zero_optimization": {"stage": zero, **dict.fromkeys(_DEEPSPEED_SIZES, _ELEMENTS)},
        "zero_allow_untested_optimizer": True,
    }
    engine, optimizer, _, _ = deepspeed.initialize(
        model=case.module, config=settings, dist_init_required=False
    )

    def step() -> float:
        loss = engine(**inputs)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    def everything() -> list[torch.Tensor]:
        # Its flat partitions and states are no parameters of the module.
        return [*inputs.values(), *_tensors_behind(engine.module), *_tensors_behind(optimizer)]

    return step, everything, lambda: None


def _tensors_behind(holder: Any) -> list[torch.Tensor]:
    """All tensors that an object reaches through attributes and containers."""
    seen: set[int] = set()
    pending, found = [holder], []
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
            pending += [vars(value)]
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple, set)):
            pending += value
        elif hasattr(value, "__dict__"):
            pending += vars(value).values()
    return found


def _fxzero(case: Case, zero: Any) -> Any:
    inputs = _inputs(case)
    model = fxzero.compile(case.module, zero=zero, inner="eager")
    return *_step(model, inputs), lambda: model.plan.peak_bytes


def _write(options: argparse.Namespace, ranks: list[list[dict[str, Any]]]) -> None:
    heads = ("variant", "peak MiB", "planned MiB", "time / DDP", "time / FSDP2", "loss differs by")
    rows = [heads]
    first = {row["name"]: row for row in ranks[0]}

    def against(name: str, other: str) -> str:
        pairs = zip(first[name]["seconds"], first[other]["seconds"], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.2f}"

    for index, row in enumerate(ranks[0]):
        name = row["name"]
        peak = max(rank[index]["peak"] for rank in ranks)
        losses = zip(row["losses"], first["DDP"]["losses"], strict=True)
        rows.append(
            (
                name,
                f"{peak / _MiB:.1f}",
                f"{row['planned'] / _MiB:.1f}" if row["planned"] else "",
                against(name, "DDP"),
                against(name, "FSDP2"),
                f"{max(abs(a - b) for a, b in losses):.0e}",
            )
        )
    quick = "-quick" if options.quick else ""
    stem = f"{datetime.date.today().isoformat()}-zero-{options.model}{quick}-{options.ranks}-ranks"
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{stem}.json"
    report = {
        "schema": 1,
        "versions": harness.versions(),
        "machine": harness.machine("cpu"),
        "ranks": ranks,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(harness.markdown(rows))
    for row in rows:
        print("  ".join(f"{cell:>18}" for cell in row))
    print(path)


if __name__ == "__main__":
    sys.exit(main())
