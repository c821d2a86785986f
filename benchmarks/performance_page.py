"""Writes docs/performance.md from the newest result of each kind; the last step of `make bench`.

    python benchmarks/performance_page.py [--results DIR] [--output FILE]

A result is ``results/<date>-<kind>.md``, and ``.json`` beside it with versions and the machine. The
page has the first table of each.  A kind that nothing is written about stands at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_ROWS = 30
_RESULT = re.compile(r"(\d{4}-\d\d-\d\d)-(.+)\.md")


@dataclass(frozen=True)
class Section:
    """What the page says about results of kinds that match a pattern, and no earlier one's."""

    pattern: str
    title: str
    script: str
    text: str


_SECTIONS = (
    Section(
        r"optimizer-.*",
        "Optimizers' steps",
        "bench_optimizer.py",
        "Milliseconds of a step on one thread, 40 million parameters, and of torch's fused AdamW.",
    ),
    Section(
        r"prediction-.*",
        "Plans against measurements",
        "bench_prediction.py",
        "Peaks by the allocator, scratch memory of operators included, and medians of step times, "
        "after the operators of each model were calibrated. Dropout is on.",
    ),
    Section(
        r".*-(cpu|cuda)",
        "Memory and time of one model",
        "bench_memory.py",
        "Forward and backward, side by side in one process. Peaks count parameters and inputs. "
        "Time is the median of interleaved rounds as a ratio to eager's. "
        '"WRONG": gradients with dropout disagree with finite differences under the same seed.',
    ),
    Section(
        r"solver-.*",
        "The solver alone",
        "bench_solver.py",
        "Every peak that torch's memory budgets, or checkpointing per block, reach on a graph is "
        "given to fxzero as its budget; ratios are their recompute price over fxzero's, by one "
        "table of prices. `lost` counts peaks at which fxzero pays more.",
    ),
    Section(
        r"checkmate",
        "Checkmate's problem",
        "bench_checkmate.py",
        "Extra cost in percent of the step's FLOPs, one node a layer. The optimum is that of "
        "Checkmate's integer program where it was proven.",
    ),
    Section(
        r"zero-.*",
        "Sharded over two processes",
        "bench_zero.py",
        "Forward, backward and AdamW over gloo on one machine, with DeepSpeed, DDP and FSDP2 in "
        "the same run. Two runs of the same row differ by up to 0.1.",
    ),
    Section(
        r"generated-code-.*",
        "Generated code against DDP",
        "../tests/test_distributed.py",
        "How far losses and parameters are from eager DDP's after five steps.",
    ),
    Section(
        r"pipeline-matrix",
        "Pipelines, all schedules",
        "bench_pipeline_matrix.py",
        "The largest difference of a loss, gradient or weight from accumulation on one device.",
    ),
    Section(
        r"pipeline-.*",
        "Pipelines, time",
        "bench_pipeline.py",
        "Two processes over gloo on one machine, a GPT-2 with a heavy head.",
    ),
    Section(
        r"forecast",
        "Plans against what runs",
        "bench_forecast.py",
        "Settings drawn with a seed. The models are small: calls of operators and gloo's threads "
        "are not in the modelled time.",
    ),
    Section(
        r"published",
        "A run that others published, in the model",
        "bench_published.py",
        "Nothing here was run: what the model of a device says of a run by torchtitan on H100s, "
        "with no constant fitted to it.",
    ),
    Section(
        r"search",
        "Searches against full plans",
        "bench_search.py",
        "Ways to train GPT-2 on 8 L4s, by the search's estimate and planned in full. Nothing ran.",
    ),
    Section(
        r"messages",
        "Fewer bytes between ranks",
        "bench_messages.py",
        "Final loss of a small GPT-2 whose weights or gradients travel as codes.",
    ),
    Section(
        r"training-parity.*",
        "Loss with optimizers of fewer bytes",
        "bench_training.py",
        "A small GPT-2 after 300 steps on this project's own source.",
    ),
    Section(
        r"update",
        "Updates in the backward",
        "bench_update.py",
        "Peak and time of a whole step with float32 AdamW.",
    ),
    Section(
        r"monitor",
        "What the monitor costs",
        "bench_monitor.py",
        "Steps with a monitor at its defaults beside steps without.",
    ),
)
_UNKNOWN = Section(r".*", "More", "README.md", "")
_NO_GPU = "No result of a GPU is among them, and ratios on a CPU do not carry over to one."
_SOME_GPU = "Tables of a GPU are named so; ratios on a CPU do not carry over to one."
_INTRODUCTION = """# Performance

Written by `benchmarks/performance_page.py` from `benchmarks/results/`, at the end of `make bench`;
do not edit it. Each table is the newest of its kind; tables of more than {rows} rows are in their
files alone.

**What it was measured on.** {machines}. {gpu} Rows of one table were measured in one run; rows of
two tables cannot be compared. How each is measured stands in
[benchmarks/README.md]({up}/README.md).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=_HERE / "results")
    parser.add_argument("--output", type=Path, default=_HERE.parent / "docs" / "performance.md")
    arguments = parser.parse_args()
    arguments.output.write_text(page(arguments.results), encoding="utf-8")
    print(f"wrote {arguments.output}")


def page(results: Path) -> str:
    """The page, as it lies in docs/."""
    newest = newest_of_each_kind(results)
    up = os.path.relpath(_HERE, _HERE.parent / "docs")
    parts = [_introduction(newest.values(), up)]
    for section in (*_SECTIONS, _UNKNOWN):
        kinds = [kind for kind in newest if re.fullmatch(section.pattern, kind)]
        if kinds:
            parts.append(_heading(section, up))
        parts += [_result(kind, newest.pop(kind), up) for kind in kinds]
    return "\n".join(parts)


def newest_of_each_kind(results: Path) -> dict[str, Path]:
    """Paths of tables by kind; a later date wins."""
    found = {}
    for path in sorted(results.glob("*.md")):
        if match := _RESULT.fullmatch(path.name):
            found[match[2]] = path
    return dict(sorted(found.items()))


def _introduction(paths: Iterable[Path], up: str) -> str:
    documents = [_document(path) for path in paths]
    known = [document["machine"] for document in documents if "machine" in document]
    machines = sorted({f"{m['cpu']}, {m['cores']} cores" for m in known})
    gpu = _SOME_GPU if any(m.get("accelerator") for m in known) else _NO_GPU
    return _INTRODUCTION.format(rows=_ROWS, machines="; ".join(machines), up=up, gpu=gpu)


def _heading(section: Section, up: str) -> str:
    text = f"{section.text}\n" if section.text else ""
    link = f"[{Path(section.script).name}]({up}/{section.script})"
    return f"## {section.title}\n\n{text}Script: {link}.\n"


def _result(kind: str, path: Path, up: str) -> str:
    versions = _document(path).get("versions", {})
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "python") if name in versions
    )
    date = path.name[:10]
    link = f"**{kind}**, {date}{', ' + named if named else ''} ([file]({up}/results/{path.name}))"
    table = _first_table(path.read_text(encoding="utf-8"))
    return f"{link}\n\n{table}"


def _first_table(text: str) -> str:
    """The first table of a file, unless it has too many rows."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith("|")), len(lines))
    end = next((i for i, line in enumerate(lines[begin:], begin) if not line.startswith("|")), None)
    table = lines[begin:end]
    return "\n".join([*table, ""]) if len(table) <= _ROWS + 2 else ""


def _document(path: Path) -> dict[str, Any]:
    """What lies beside a table: versions and the machine; {} if nothing is known of them."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    main()
