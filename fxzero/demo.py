"""``fxzero demo``: a small GPT learns Python, first with all the memory it wants, then with half.

The model is a plain Hugging Face GPT-2 with random weights and dropout; the text is the source of
Python's standard library, one token a byte, so nothing is downloaded.  Both runs start from one
seed and see the same batches.  A whole training step is measured near the end of each: zero_grad,
forward, backward, optimizer step.
"""

from __future__ import annotations

import gc
import hashlib
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fxzero
from fxzero.errors import UsageError
from fxzero.options import device_memory
from fxzero.plans import Plan
from fxzero.report.wording import recompute_price
from fxzero.units import format_bytes, format_seconds, parse_budget

_REPORT = "fxzero-report"
_VOCABULARY = 256
_LINE_EVERY = 10
_COLUMNS = ("measured peak", "planned peak", "budget", "step time", "first loss", "last loss")
# The first steps allocate, capture and plan; after them every step is like the others.
_WARM_UP = 3
_FEWEST_STEPS = _WARM_UP + 2


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo: activations, not weights, are most of the memory."""

    layers: int = 6
    width: int = 128
    heads: int = 4
    sequence: int = 256
    batch: int = 8
    learning_rate: float = 2e-3
    seed: int = 0
    text_bytes: int = 4 * 2**20
    inner: str = "eager"


@dataclass(frozen=True)
class Trained:
    """What one run came to.

    Attributes:
        losses: one of each step.
        peak_bytes: measured over one whole training step, near the end.
        step_seconds: median of the steps that were neither warm-up nor measured.
        fastest_seconds: the fastest of them, which a busy machine disturbs least.
        weights: hash of the trained weights.
    """

    losses: tuple[float, ...]
    peak_bytes: int
    step_seconds: float
    fastest_seconds: float
    weights: str


@dataclass(frozen=True)
class DemoResult:
    """Both runs, and the plan that the second one followed."""

    eager: Trained
    compiled: Trained
    plan: Plan
    budget_bytes: int
    report: Path

    @property
    def first_difference(self) -> int | None:
        """The first step, counted from 0, at which the losses differ; None: they never do."""
        pairs = zip(self.eager.losses, self.compiled.losses, strict=True)
        return next((step for step, (a, b) in enumerate(pairs) if a != b), None)

    @property
    def broken_promises(self) -> tuple[str, ...]:
        """What did not come out as planned; empty when all is well."""
        measured, planned, budget = (
            self.compiled.peak_bytes,
            self.plan.peak_bytes,
            self.budget_bytes,
        )
        checks = {
            "measured peak exceeds the planned one": measured - planned,
            "measured peak exceeds the budget": measured - budget,
            "planned peak exceeds the budget": planned - budget,
        }
        return tuple(f"{what} by {format_bytes(by)}" for what, by in checks.items() if by > 0)


def run(
    memory_budget: str | None = None,
    steps: int = 12,
    out: Path | str | None = None,
    *,
    config: DemoConfig | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Trains the same GPT twice, eagerly and under a budget, and shows what that cost.

    Args:
        memory_budget: as in ``fxzero.compile``; None: half of the measured peak of the eager step.
        steps: optimizer steps of each run.
        out: where plan.json and plan.html are written; None: ./fxzero-report.

    Raises:
        UsageError: too few steps, a malformed budget, or transformers is not installed.
        BudgetError: the budget is too small for this model.
    """
    if steps < _FEWEST_STEPS:
        raise UsageError(f"steps={steps} is too few to measure anything: give {_FEWEST_STEPS}")
    budget = parse_budget(memory_budget, device_memory("cpu"))
    config = config or DemoConfig()
    console = console or _default_console()
    _require_transformers()
    text = _standard_library(config.text_bytes)
    console.print(_introduction(config, text, steps))

    eager, _ = _train(config, text, steps, _shown(console, "eager", steps))
    gc.collect()  # not a byte of the eager run is left to be counted
    if budget is None:
        budget = eager.peak_bytes // 2
    console.print(_announcement(eager, budget))
    compiled, plan = _train(config, text, steps, _shown(console, "fxzero", steps), budget)
    assert plan is not None

    report = _write_report(plan, Path(out if out is not None else _REPORT))
    result = DemoResult(eager, compiled, plan, budget, report)
    console.print(_table(result))
    for line in _conclusions(result):
        console.print(line)
    return result


def _default_console() -> Console:
    width = None if Console().is_terminal else 100
    return Console(width=width, markup=False, highlight=False)


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UsageError(
            "the demo trains a model of the transformers library, which is not installed\n"
            "  pip install fxzero[examples]"
        ) from None


def _standard_library(most: int) -> torch.Tensor:
    """Source text of Python's own modules, one byte a token."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
    if not text:
        raise UsageError(f"the demo reads Python's standard library, but {folder} holds no *.py")
    return torch.frombuffer(text[:most], dtype=torch.uint8)


def _build(config: DemoConfig) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = GPT2Config(
        vocab_size=_VOCABULARY,
        n_positions=config.sequence,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPT2LMHeadModel(sizes)
    model.loss_type = "ForCausalLM"  # what it is anyhow; said aloud, transformers does not warn
    return model.train()


_Show = Callable[[int, float], None]


def _train(
    config: DemoConfig,
    text: torch.Tensor,
    steps: int,
    shown: AbstractContextManager[_Show],
    budget: int | None = None,
) -> tuple[Trained, Plan | None]:
    """Trains from the configuration's seed: plain PyTorch, or under a budget if one is given."""
    torch.manual_seed(config.seed)
    batches = _batches(config, text)
    model = _build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    if budget is not None:
        model = fxzero.compile(model, memory_budget=budget, inner=config.inner)

    def step(tokens: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    losses: list[float] = []
    seconds: list[float] = []
    peak = 0
    with shown as show:
        for index in range(steps):
            tokens = next(batches)
            start = time.perf_counter()
            if index == steps - 2:
                measured = fxzero.measure(partial(step, tokens))
                peak = measured.peak_bytes
                losses.append(measured.output)
            else:
                losses.append(step(tokens))
                if index >= _WARM_UP:
                    seconds.append(time.perf_counter() - start)
            show(index + 1, losses[-1])
    trained = Trained(
        losses=tuple(losses),
        peak_bytes=peak,
        step_seconds=statistics.median(seconds),
        fastest_seconds=min(seconds),
        weights=_hash(model.parameters()),
    )
    return trained, None if budget is None else model.plan


def _batches(config: DemoConfig, text: torch.Tensor) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(config.seed)
    window = torch.arange(config.sequence)
    while True:
        starts = torch.randint(len(text) - config.sequence, (config.batch, 1), generator=generator)
        yield text[starts + window].long()


def _hash(parameters: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


# What is shown


@contextmanager
def _shown(console: Console, name: str, steps: int) -> Iterator[_Show]:
    """A progress bar on a terminal; elsewhere a line every few steps."""
    if not console.is_terminal:
        yield lambda step, loss: _show_line(console, name, step, steps, loss)
        return
    columns = (
        TextColumn("{task.description:<7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=steps, loss="")
        yield lambda step, loss: progress.update(task, completed=step, loss=f"loss {loss:.3f}")


def _show_line(console: Console, name: str, step: int, steps: int, loss: float) -> None:
    if step == 1 or step % _LINE_EVERY == 0 or step == steps:
        console.print(f"{name:<7} step {step:>{len(str(steps))}} of {steps}  loss {loss:.3f}")


def _introduction(config: DemoConfig, text: torch.Tensor, steps: int) -> str:
    return (
        f"GPT-2, {config.layers} layers of width {config.width}, dropout on, random weights; "
        f"{steps} steps of AdamW on\n{config.batch} x {config.sequence} bytes of Python's standard "
        f"library ({format_bytes(len(text))}), on the CPU with {torch.get_num_threads()} threads"
    )


def _announcement(eager: Trained, budget: int) -> str:
    share = f"{100 * budget / eager.peak_bytes:.0f} %"
    return (
        f"eager needs {format_bytes(eager.peak_bytes)}; once more from the same seed with a budget "
        f"of {format_bytes(budget)} ({share})"
    )


def _table(result: DemoResult) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column("")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    limits = format_bytes(result.plan.peak_bytes), format_bytes(result.budget_bytes)
    for name, trained, planned, budget in (
        ("eager", result.eager, "-", "-"),
        ("fxzero", result.compiled, *limits),
    ):
        table.add_row(
            name,
            format_bytes(trained.peak_bytes),
            planned,
            budget,
            format_seconds(trained.step_seconds),
            f"{trained.losses[0]:.3f}",
            f"{trained.losses[-1]:.3f}",
        )
    return table


def _conclusions(result: DemoResult) -> Iterator[str]:
    yield _equality(result)
    ours, theirs = result.compiled.fastest_seconds, result.eager.fastest_seconds
    yield f"{recompute_price(result.plan)}, modelled"
    yield (
        f"fastest step measured: {format_seconds(ours)}, eager {format_seconds(theirs)} "
        f"({100 * (ours / theirs - 1):+.0f} %)"
    )
    yield from (f"NOT AS PLANNED: {broken}" for broken in result.broken_promises)
    yield f"report: {result.report / 'plan.html'}, {result.report / 'plan.json'}"


def _equality(result: DemoResult) -> str:
    step = result.first_difference
    if step is not None:
        ours, theirs = result.compiled.losses[step], result.eager.losses[step]
        return f"losses DIFFER from step {step + 1} on: {ours!r} where eager has {theirs!r}"
    equal = result.eager.weights == result.compiled.weights
    weights = "and so are the trained weights" if equal else "but the trained weights DIFFER"
    return f"losses are bitwise equal over all {len(result.eager.losses)} steps, {weights}"


def _write_report(plan: Plan, folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plan.save(folder / "plan.json")
        plan.to_html(folder / "plan.html")
    except OSError as error:
        raise UsageError(f"cannot write the report to {folder}: {error.strerror}") from None
    return folder
