"""A run that others published, in the model: Llama 3.1 8B on 8 or 128 H100, by torchtitan.

    python benchmarks/bench_published.py [--devices 8] [--layers 32] [--own]

The job: FSDP (ZeRO-3), local batch 2, sequence 8192, weights kept in float32, computed in bfloat16,
gradients reduced in float32, AdamW, torch.compile, of each block every second matrix product and
the attention saved and all else recomputed.  torchtitan publishes tokens a second and the most that
torch's allocator had reserved; the plan counts what is alive.  Both are here:

    alive       the plan's peak
    one pool    what the allocator keeps of the device for these graphs (``fxzero.allocator``)
    reserved    the same with FSDP2's streams: what is gathered, and gradients, from pools of their
                own; this is what the published figure is of

``--own`` plans the job once more without that policy: with no more memory than it has, and in no
more time.  No constant is fitted to the published rows; what is assumed of the hardware stands with
its sources in ``fxzero/devices/h100-96gb-hbm2e.toml``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import fxzero
from fxzero.allocator import reserved_bytes
from fxzero.attention import unmasked
from fxzero.capture import capture
from fxzero.collectives import is_collective, is_gather
from fxzero.graph_planner import Decided
from fxzero.hardware import Hardware, describe
from fxzero.mesh import planned_mesh
from fxzero.options import check_options
from fxzero.passes.listing import module_of
from fxzero.planner import Planner
from fxzero.plans import ModelStates
from fxzero.sources import load_model
from fxzero.timeline import Alive
from fxzero.utilisation import is_attention

BATCH, SEQ = 2, 8192
HARDWARE = "h100-96gb-hbm2e"
GIB = 2**30
# Tokens a second on a device, GiB: torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables
# 1 and 3, rows "FSDP + torch.compile".
PUBLISHED = {8: (6667, 77.0), 128: (6514, 62.0)}
# What torch.optim.AdamW's default on CUDA (foreach) and clip_grad_norm_ read and write, each in
# copies of the parameters: decay 2, moments 3, 2 and 4, denominator 6, update 4; norm 1, scaling 2.
_UPDATE_COPIES, _CLIP_COPIES = 21, 3
_RESULTS = Path(__file__).resolve().parent / "results"
# Of a block's weights as they are gathered, in bfloat16.
_BLOCK_BYTES = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)


class Loss(nn.Module):
    """Returns the loss alone, as a loop does that drops the logits before its backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs).loss


class EverySecondProduct:
    """torchtitan's selective checkpointing by operator, which starts anew in each block."""

    def __init__(self) -> None:
        self.products: dict[str, int] = {}

    def __call__(self, node: fx.Node) -> str | None:
        block = _block(node)
        if block is None:
            return None
        if node.target is torch.ops.aten.mm.default:
            self.products[block] = self.products.get(block, 0) + 1
            return "save" if self.products[block] % 2 else "recompute"
        sources = [node, *node.all_input_nodes] if "getitem" in node.name else [node]
        if any(is_attention(source.target) for source in sources):
            return "save"
        # What a block returns is what the next one is computed again from.
        leaves = any(_module(user) and _block(user) != block for user in node.users)
        return "save" if leaves else "recompute"


def _module(node: fx.Node) -> str:
    return module_of(node) if node.op == "call_function" else ""


def _block(node: fx.Node) -> str | None:
    found = re.search(r"layers\.(\d+)", _module(node))
    return found and found[1]


@dataclass(frozen=True)
class Job:
    """The published job, traced once.

    Attributes:
        layers: of 32; fewer for a test.
    """

    devices: int
    layers: int = 32

    def decide(self, recompute: Any, budget: int | None = None) -> Decided:
        source = load_model("llama-3-8b", batch=BATCH, seq=SEQ, dtype="float32")
        del source.model.model.layers[self.layers :]
        source.model.config.num_hidden_layers = self.layers
        precision = fxzero.Precision(
            param=torch.bfloat16, reduce=torch.float32, master=torch.float32
        )
        options = check_options(
            device="cuda",
            memory_budget=budget,
            optimizer="adamw",
            recompute=recompute,
            inner="inductor",
            zero=3,
            precision=precision,
            mesh=planned_mesh(None, self.devices, "cuda", None),
            hardware=describe(HARDWARE),
        )
        model = Loss(source.model)
        with unmasked(model, source.kwargs):
            traced = capture(model, (), source.kwargs, inner="inductor", precision=precision)
        planner = Planner(traced.graph, options, "Llama 3.1 8B")
        decided = planner.decide()
        return decided if recompute == "auto" else _by_block(planner, decided)


def _by_block(planner: Planner, decided: Decided) -> Decided:
    """The same with FSDP2's collectives: one for each block, the next one's beside operators."""
    decisions = replace(decided.plan.decisions, bucket_bytes=_BLOCK_BYTES, in_flight=1)
    replayed = planner.replay(replace(decided.plan, decisions=decisions))
    return planner.restate(replayed)


def update_seconds(states: ModelStates, hardware: Hardware) -> float:
    """Clipping and the optimizer's step, as bytes over bandwidth."""
    moved = _UPDATE_COPIES * states.parameters + _CLIP_COPIES * states.gradients
    return moved / hardware.bandwidth


def stream_of(entry: Alive) -> str:
    """Which of FSDP2's streams asks for a storage: results of collectives have their own."""
    node = entry.node
    if node is None or node.op != "call_function" or not is_collective(node):
        return "compute"
    return "gather" if is_gather(node) else "reduce"


def row_of(decided: Decided) -> dict[str, Any]:
    plan, timeline = decided.plan, decided.emitted.timeline
    update = update_seconds(plan.states, describe(HARDWARE))
    pools = reserved_bytes(timeline.allocations, stream_of)
    seconds = plan.step_seconds + update
    return {
        "alive_gib": plan.peak_bytes / GIB,
        "one_pool_gib": sum(reserved_bytes(timeline.allocations).values()) / GIB,
        "reserved_gib": sum(pools.values()) / GIB,
        "pools_gib": {name: size / GIB for name, size in sorted(pools.items())},
        "step_seconds": plan.step_seconds,
        "update_seconds": update,
        "recompute_seconds": plan.recompute_seconds,
        "exposed_seconds": plan.exposed_seconds,
        "tokens_per_second": BATCH * SEQ / seconds,
        "status": plan.status,
        "peak_at": plan.peak.node,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, choices=PUBLISHED, nargs="+", default=[8])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--own", action="store_true")
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for devices in options.devices:
        job = Job(devices, options.layers)
        decided = job.decide(EverySecondProduct())
        rows[f"{devices} devices, every second product saved"] = policy = row_of(decided)
        print(policy, file=sys.stderr, flush=True)
        if options.own:
            own = job.decide("auto", decided.plan.peak_bytes)
            rows[f"{devices} devices, fxzero's plan, no more memory"] = row_of(own)
            print(row_of(own), file=sys.stderr, flush=True)
    text = table(rows)
    print(text)
    if options.layers == 32:
        path = options.output / f"{datetime.date.today()}-published"
        path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| job | alive GiB | one pool | reserved | published | tokens/s | published |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        speed, memory = PUBLISHED[int(name.split()[0])]
        published = "published" if "saved" in name else ""
        there = f"{memory:.1f} ({row['reserved_gib'] / memory - 1:+.1%})" if published else ""
        then = f"{speed:,} ({row['tokens_per_second'] / speed - 1:+.1%})" if published else ""
        lines.append(
            f"| {name} | {row['alive_gib']:.1f} | {row['one_pool_gib']:.1f} "
            f"| {row['reserved_gib']:.1f} | {there} | {row['tokens_per_second']:,.0f} | {then} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
