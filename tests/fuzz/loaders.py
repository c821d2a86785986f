"""Every loader of files from outside, with valid files to damage.

A loader is given a folder and loads what is in it; now and then it goes on to what users do next
with what was accepted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import click
import graphs
import torch
from synthetic import gpt_plan
from torch import nn

from fxzero import checkpoint, hardware
from fxzero.budget_file import BudgetFile
from fxzero.calibration import Calibration, calibration_path, cost_model
from fxzero.calibration import load as read_calibration
from fxzero.capture import capture
from fxzero.checking import read_file
from fxzero.cli import _planning
from fxzero.cli import plan as plan_command
from fxzero.configurations import build_configuration
from fxzero.cost import Shares
from fxzero.errors import UsageError
from fxzero.links import Links
from fxzero.options import Options
from fxzero.passes.pipeline import PASSES
from fxzero.passes.reproducer import write_reproducer
from fxzero.passes.runner import replay
from fxzero.planner import Planner
from fxzero.plans import Plan
from fxzero.report import diff, diff_page

Files = dict[str, bytes]


@dataclass(frozen=True)
class Loader:
    """A loader.

    Attributes:
        share: of all inputs, by weight.
        valid: folders of files that it accepts.
        load: given a damaged folder, and whether to go on.
        seconds: the most that it may take.
        names_file: whether its errors must.
        reads: what it reads besides; a file that its user names may be a link to anywhere.
        further: how often what is accepted is used.
        folders: whether files in the folder become links, pipes and the like, too.
        signs: whether the manifest is made to fit most of the damaged folders.
    """

    name: str
    share: int
    valid: Callable[[], list[Files]]
    load: Callable[[Path, bool], object]
    seconds: float = 2.0
    names_file: bool = True
    reads: tuple[str, ...] = ()
    further: float = 0.3
    folders: bool = True
    signs: bool = False


def _files(write: Callable[[Path], object]) -> Files:
    with tempfile.TemporaryDirectory() as made:
        write(Path(made))
        return {p.name: p.read_bytes() for p in Path(made).iterdir()}


# Plans.


@cache
def _planner() -> Planner:
    torch.manual_seed(0)
    graph = capture(graphs.Tiny(), (torch.randn(2, 4),)).graph
    return Planner(graph, Options(inner="eager", optimizer="adamw"), "tiny")


@cache
def _tiny_plan() -> Plan:
    return _planner().within(_planner().smallest().plan.minimum_budget).decide().plan


class Sum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


@cache
def _pipeline_plan() -> Plan:
    import fxzero
    from fxzero.forecast import plan

    layers = (nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
    model = nn.Sequential(*layers, nn.Flatten(0), Sum())
    asked = fxzero.Pipeline(stages=2, microbatches=4)
    return plan(model, (torch.randn(8, 8),), devices=2, pipeline=asked)


def _plans() -> list[Files]:
    made = (gpt_plan(recomputed=3), _tiny_plan(), _pipeline_plan())
    return [{"plan.json": plan.to_json().encode()} for plan in made]


def _tiny_plans() -> list[Files]:
    return [{"plan.json": _tiny_plan().to_json().encode()}]


def _load_plan(folder: Path, further: bool) -> None:
    plan = Plan.load(folder / "plan.json")
    if not further:
        return
    str(plan)
    plan.to_html(folder / "plan.html")
    with contextlib.suppress(UsageError):  # a plan need not have a timeline to draw
        plan.to_trace(folder / "plan.trace")
    plan.to_memory_viz(folder / "plan.pickle")
    str(plan.card())
    str(diff.diff(gpt_plan(), plan))
    diff_page.render(plan, gpt_plan())
    assert Plan.from_json(plan.to_json()).hash == plan.hash


def _load_and_replay_plan(folder: Path, _: bool) -> None:
    _planner().replay(Plan.load(folder / "plan.json"))


# TOML.


def _budgets() -> list[Files]:
    file = BudgetFile(Path("budget.toml"))
    text = file.updated(gpt_plan(), {"model": "gpt2", "batch": 8, "zero": "3", "offload": True})
    limits = text.replace("[limits]", '[limits]\nstep_seconds = 2.5\nmemory_budget = "90%"')
    return [{"budget.toml": text.encode()}, {"budget.toml": limits.encode()}]


def _load_budget(folder: Path, further: bool) -> None:
    path = folder / "budget.toml"
    if not further:
        BudgetFile.read(path)
        return
    file = read_file(click.Context(plan_command), path, _planning())
    if file.text:
        file.updated(gpt_plan(), {})


def _hardware() -> list[Files]:
    library = Path(hardware.__file__).parent / "devices"
    names = ("h100-sxm-80gb", "cpu", "l4")
    return [{"device.toml": (library / f"{name}.toml").read_bytes()} for name in names]


def _load_hardware(folder: Path, _: bool) -> None:
    found = hardware.describe(folder / "device.toml")
    assert found.assumptions()
    assert found.usable is None or found.usable > 0


# Caches.


def _calibrations() -> list[Files]:
    times = {"aten.mm float32[8, 8] float32[8, 8]": 1e-5, "aten.relu float32[8]": 2e-6}
    name = calibration_path("cpu").name
    workspaces = {"aten.mm float32[8, 8] float32[8, 8]": 4096}
    links = Links(2, 2, 1e9, 1e-4, 0.5)
    measured = replace(
        Calibration.empty("cpu", 1), operators=times, workspaces=workspaces, scale=1.5
    )
    made = [
        replace(measured, generated={"ab" * 32: Shares(0.8, 1.2)}),
        replace(measured, processes=2, links=links),
    ]
    return [{name: json.dumps(asdict(each)).encode()} for each in made]


def _load_calibration(folder: Path, _: bool) -> None:
    if os.environ.get("FXZERO_CACHE") != str(folder):
        os.environ["FXZERO_CACHE"] = str(folder)
    cost_model("cpu")  # does without what cannot be read
    read_calibration(calibration_path("cpu"))


# Configurations.

_SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 64, "max_position_embeddings": 32, "dtype": "bfloat16",
    "architectures": None, "auto_map": {"AutoModel": "planted.Model"}, "_name_or_path": "x",
}  # fmt: skip
_CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64,
     "n_positions": 32, "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"},
    {"model_type": "llama", **_SMALL, "num_key_value_heads": 1, "rope_theta": 10000.0,
     "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    {"model_type": "bert", **_SMALL, "hidden_act": "gelu", "type_vocab_size": 2},
    {"model_type": "t5", **_SMALL, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2,
     "is_encoder_decoder": True},
    {"model_type": "vit", **_SMALL, "image_size": 32, "patch_size": 16, "num_channels": 3,
     "num_labels": 4},
    {"model_type": "mixtral", **_SMALL, "num_local_experts": 2, "num_experts_per_tok": 1},
    {"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64,
     "vocab_size": 64, "sinusoidal_pos_embds": True, "max_position_embeddings": 64},
    {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
     "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64,
     "is_encoder_decoder": True, "max_position_embeddings": 32},
    {"model_type": "encoder-decoder", "is_encoder_decoder": True,
     "encoder": {"model_type": "bert", **_SMALL},
     "decoder": {"model_type": "bert", **_SMALL, "is_decoder": True}},
    {"model_type": "fxzero-unet", "image_size": 16, "image_channels": 3, "channels": [32, 64],
     "blocks": 1, "attention_sizes": [8], "dropout": 0.1},
)  # fmt: skip


def _configurations() -> list[Files]:
    return [{"config.json": json.dumps(data).encode()} for data in _CONFIGURATIONS]


def _load_configuration(folder: Path, further: bool) -> None:
    dtype = torch.float32 if further else None
    build_configuration(folder / "config.json", batch=2, seq=None, dtype=dtype)


# Checkpoints.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))


@cache
def _trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def _checkpoints() -> list[Files]:
    model, optimizer = _trained()
    extra = {"epoch": 1, "best": float("inf"), "order": [3, 1, 2]}
    with tempfile.TemporaryDirectory() as root:
        paths = (
            checkpoint.save(root, model, optimizer, step=1, extra=extra),
            checkpoint.save(root, model, step=2),
        )
        return [{p.name: p.read_bytes() for p in path.iterdir()} for path in paths]


def _load_checkpoint(folder: Path, further: bool) -> None:
    model, optimizer = _trained()
    checkpoint.load(folder, model, optimizer if further else None)


def _verify_checkpoint(folder: Path, further: bool) -> None:
    checkpoint.verify(folder)
    if further:
        checkpoint.latest(folder.parent)


def sign(folder: Path) -> None:
    """Makes a manifest's lengths and checksums those of the files that there are."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        for name in manifest["files"]:
            content = (folder / name).read_bytes() if (folder / name).is_file() else b""
            digest = hashlib.sha256(content).hexdigest()
            manifest["files"][name] = {"bytes": len(content), "sha256": digest}
        path.write_text(json.dumps(manifest))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # what there is instead of a manifest stays


def _weights() -> list[Files]:
    model, _ = _trained()
    export = functools.partial(checkpoint.export_safetensors, model)
    return [_files(functools.partial(export, file_bytes=size)) for size in (10**6, 50)]


def _load_weights(folder: Path, _: bool) -> None:
    checkpoint.load_safetensors(_trained()[0], folder)


# Reproducers.


def _reproducers() -> list[Files]:
    context = graphs.recompute(("native_dropout", "native_layer_norm_backward"))
    made = []
    for each in (context, graphs.recompute()):
        with tempfile.TemporaryDirectory() as root:
            path = write_reproducer(Path(root), graphs.tiny(), each, PASSES, KeyError("lost"))
            made.append({p.name: p.read_bytes() for p in path.iterdir()})
    return made


def _replay(folder: Path, _: bool) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        replay(folder)


# A file that its user names may be a link to anywhere.
_LINKED = ("secrets",)

LOADERS = (
    Loader("plan", 16, _plans, _load_plan, reads=_LINKED, further=0.2),
    Loader(
        "plan, replayed", 12, _tiny_plans, _load_and_replay_plan, names_file=False, reads=_LINKED
    ),
    Loader("budget.toml", 14, _budgets, _load_budget, reads=_LINKED),
    Loader("hardware.toml", 12, _hardware, _load_hardware, reads=_LINKED),
    Loader("calibration", 6, _calibrations, _load_calibration, reads=(*_LINKED, "/proc/cpuinfo")),
    Loader("config.json", 11, _configurations, _load_configuration, seconds=10.0, reads=_LINKED),
    Loader("checkpoint, verified", 6, _checkpoints, _verify_checkpoint),
    Loader("checkpoint, loaded", 11, _checkpoints, _load_checkpoint, signs=True, further=0.7),
    Loader("weights", 8, _weights, _load_weights, reads=_LINKED),
    Loader("reproducer", 4, _reproducers, _replay),
)


def random_text(random: Random) -> bytes:
    """What never was a document."""
    return random.randbytes(random.choice((0, 1, 10, 1000)))
