"""The ``fxzero`` command.

Results go to stdout, log and errors to stderr.  Exit codes: 0 fits or fine, 1 a verification
failed, 2 usage, 3 does not fit, 4 a bug of ours.  ``FXZERO_DEBUG=1`` adds tracebacks.  Nothing here
imports torch before a command runs.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fxzero import __version__
from fxzero.errors import BudgetError, FxzeroError, InternalError
from fxzero.garbage import no_collections

if TYPE_CHECKING:
    from fxzero.budget_file import BudgetFile
    from fxzero.plans import Plan

_OK, _NOT_VERIFIED, _USAGE, _DOES_NOT_FIT, _BUG, _INTERRUPTED = 0, 1, 2, 3, 4, 130
_DTYPES = ["float32", "bfloat16", "float16", "float64"]
_KINDS = ["int8", "int4", "fp8"]  # those of quantization.py, which imports torch
_Command = TypeVar("_Command", bound=Callable[..., Any])


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; the console script's entry point."""
    if args is None:
        atexit.register(gc.freeze)  # what is left ends with the process: nobody looks through it
        # torch's profiler, which measures memory, would write two lines for every recording.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        return cli.main(args, prog_name="fxzero", standalone_mode=False) or _OK
    except click.ClickException as error:
        error.show()
        return _USAGE
    except click.Abort:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _OK
    except Exception as error:
        return _report(error)


def _report(error: Exception) -> int:
    """One clear message on stderr."""
    if os.environ.get("FXZERO_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, FxzeroError) and not isinstance(error, InternalError):
        click.echo(f"fxzero: {error}", err=True)
        return _DOES_NOT_FIT if isinstance(error, BudgetError) else _USAGE
    click.echo(f"fxzero: {type(error).__name__}: {error}", err=True)
    click.echo("  this is a bug of fxzero; please report it", err=True)
    if reproducer := getattr(error, "reproducer", None):
        click.echo(f"  with {reproducer}, which `fxzero replay` runs again", err=True)
    elif os.environ.get("FXZERO_DEBUG") != "1":
        click.echo("  with the traceback that FXZERO_DEBUG=1 shows", err=True)
    return _BUG


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Plan, explain and check the memory of a PyTorch training step.

    MODEL is a preset (gpt2, llama-3-8b, vit-base, ...), a path to a Hugging Face config.json, or
    package.module:factory, a function that returns a module and its example inputs.
    """


def _model_options(command: _Command) -> _Command:
    """MODEL and everything that decides what is planned."""
    for decorate in reversed(
        [
            click.argument("model"),
            click.option("--batch", type=int, help="Examples per step.  [default: 1]"),
            click.option("--seq", type=int, help="Tokens per example.  [default: up to 1024]"),
            click.option(
                "--dtype",
                type=click.Choice(_DTYPES),
                help="Of the weights.  [default: the configuration's]",
            ),
            click.option(
                "--memory-budget", metavar="SIZE", help='Such as "22GiB".  [default: no limit]'
            ),
            click.option(
                "--optimizer",
                default="adamw",
                show_default=True,
                metavar="NAME",
                help='Of torch, or such as "fxzero.optim.AdamW", or its bytes for a parameter: 12 '
                "are a float32 copy and two moments.",
            ),
            click.option(
                "--recompute",
                type=click.Choice(["auto", "none", "full"]),
                default="auto",
                show_default=True,
            ),
            click.option(
                "--objective",
                type=click.Choice(["time", "flops"]),
                default="time",
                show_default=True,
                help="What to spend least of.",
            ),
            click.option(
                "--offload",
                is_flag=True,
                help="Saved values and states of fxzero.optim may wait in host memory.",
            ),
            click.option("--accumulate", is_flag=True, help="The step finds gradients to add to."),
            click.option(
                "--update",
                type=click.Choice(["step", "backward"]),
                default="step",
                show_default=True,
                help="Where the optimizer updates weights.",
            ),
            click.option("--devices", type=click.IntRange(1), help="How many train together."),
            click.option(
                "--hardware",
                metavar="NAME",
                help="What each of them is: a name that `fxzero hardware` lists, or the path of a "
                "TOML file. Its memory is then the budget.",
            ),
            click.option("--mesh", metavar="DIMS", help='Such as "dp_replicate=8,dp_shard=16".'),
            click.option(
                "--zero",
                type=click.Choice(["0", "1", "2", "3", "auto"]),
                default="auto",
                show_default=True,
                help="What is sharded over the devices.",
            ),
            click.option(
                "--send-weights",
                type=click.Choice(_KINDS),
                help="What gathers of weights move.  [default: the numbers themselves]",
            ),
            click.option(
                "--send-gradients",
                type=click.Choice(_KINDS),
                help="The same for reductions of gradients.",
            ),
            click.option(
                "--pipeline",
                metavar="STAGES",
                help='Into how many stages to cut the model, or "auto": if that is faster.',
            ),
            click.option(
                "--schedule", metavar="NAME", help="Of the pipeline, such as zb1p.  [default: 1f1b]"
            ),
            click.option(
                "--microbatches", type=click.IntRange(1), help="Into how many to cut the batch."
            ),
        ]
    ):
        command = decorate(command)
    return command


@contextlib.contextmanager
def _results_alone() -> Iterator[None]:
    """Inside, what libraries print by themselves (HiGHS has such a line) goes to stderr."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


@_results_alone()
@no_collections()
def _make_plan(
    model: str,
    batch: int | None,
    seq: int | None,
    dtype: str | None,
    pipeline: str | None,
    schedule: str | None,
    microbatches: int | None,
    send_weights: str | None,
    send_gradients: str | None,
    optimizer: str,
    **options: Any,
) -> Plan:
    from fxzero.hardware import describe
    from fxzero.precision import Precision
    from fxzero.sources import load_model

    if options["hardware"] is not None:  # what is wrong with it is said before anything is loaded
        options["hardware"] = describe(options["hardware"])
    asked = _pipeline(pipeline, schedule, microbatches)
    source = load_model(model, batch=batch, seq=seq, dtype=dtype)
    if "transformers" in sys.modules:  # its advice on configurations is not about the plan
        sys.modules["transformers"].logging.set_verbosity_error()
    from fxzero.forecast import plan

    return plan(
        source.model,
        source.args,
        kwargs=source.kwargs,
        name=source.name,
        pipeline=asked,
        optimizer=_name_or_number(optimizer),
        precision=Precision(send_weights=send_weights, send_gradients=send_gradients),
        **options,
    )


def _name_or_number(optimizer: str) -> str | float:
    """An optimizer's name, or its bytes for a parameter."""
    try:
        return float(optimizer)
    except ValueError:
        return optimizer


def _pipeline(stages: str | None, schedule: str | None, microbatches: int | None) -> Any:
    """What the options that are about pipelines come to."""
    from fxzero.errors import UsageError
    from fxzero.pipelining.request import Pipeline

    details: dict[str, Any] = {"schedule": schedule, "microbatches": microbatches}
    given = {name: value for name, value in details.items() if value is not None}
    if stages is None or stages == "auto":
        if given:
            name = next(iter(given))
            raise UsageError(f"--{name} is of a pipeline: give --pipeline STAGES")
        return stages
    if not stages.isdecimal():
        raise UsageError(f'--pipeline {stages}: give the number of stages, or "auto"')
    return Pipeline(stages=int(stages), **given)


def _code(plan: Plan) -> int:
    return _OK if plan.fits else _DOES_NOT_FIT


def _read_budget_file(context: click.Context, _: click.Parameter, path: Path | None) -> Any:
    from fxzero.checking import read_file

    return None if path is None else read_file(context, path, _planning())


def _card_path(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix not in (".md", ".json"):
        raise click.BadParameter(f"{path} must end in .md or .json")
    return path


def _planning() -> set[str]:
    """The names of the options that decide what is planned."""
    return {str(parameter.name) for parameter in explain.params}


@cli.command()
@_model_options
@click.option("--json", type=click.Path(path_type=Path), help="Write the plan to this file.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page to this file.")
@click.option(
    "--card",
    type=click.Path(path_type=Path),
    callback=_card_path,
    help="Write a model card's section to this file, .md or .json.",
)
@click.option(
    "--memory-viz", type=click.Path(path_type=Path), help="Write a file for pytorch.org/memory_viz."
)
@click.option("--trace", type=click.Path(path_type=Path), help="Write a trace for Perfetto.")
@click.option(
    "--sweep",
    type=click.IntRange(0, 1000),
    is_flag=False,
    flag_value=12,
    default=0,
    metavar="[N]",
    help="Step time for N budgets besides.  [default without N: 12]",
)
@click.option("--accept", is_flag=True, help="Write what is planned to the --check file.")
@click.option(
    "--check",
    type=click.Path(path_type=Path),
    is_eager=True,
    callback=_read_budget_file,
    help="Exit with 3 if the model outgrew this budget.toml, whose options are defaults here.",
)
def plan(
    json: Path | None,
    html: Path | None,
    memory_viz: Path | None,
    trace: Path | None,
    card: Path | None,
    check: BudgetFile | None,
    accept: bool,
    **options: Any,
) -> int:
    """Report the memory of a training step, and what to recompute so that it fits."""
    from fxzero.checking import check_usage

    check_usage(check, accept=accept)
    made = _make_plan(**options)
    views = (json, made.save), (html, made.to_html), (memory_viz, made.to_memory_viz)
    for path, write in (*views, (trace, made.to_trace)):
        if path:
            _write(path, write)
    if card:
        _write(card, made.card().save)
    if check is not None:
        return _check(check, made, accept=accept)
    click.echo(str(made))
    return _code(made)


def _check(file: BudgetFile, made: Plan, *, accept: bool) -> int:
    """Prints whether a plan is within a file's limits, or writes it to the file."""
    from fxzero.checking import accept_plan, given_options
    from fxzero.report.check import exceeded, render

    given = given_options(click.get_current_context(), _planning())
    updated = accept_plan(file, made, given, writes=accept)
    if accept:
        _write(file.path, lambda path: path.write_text(updated, encoding="utf-8"))
        return _OK
    click.echo(render(file, made, updated))
    return _DOES_NOT_FIT if exceeded(file, made) else _OK


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None
    click.echo(f"wrote {path}", err=True)


@cli.command()
@_model_options
def explain(**options: Any) -> int:
    """List every saved, recomputed or offloaded value: bytes, module, source line, reason."""
    from fxzero.explanation import explain_plan

    made = _make_plan(**options)
    click.echo(explain_plan(made))
    return _code(made)


@cli.command()
@click.argument("model")
@click.option("--hardware", required=True, metavar="NAME", help="As in `fxzero plan`.")
@click.option("--devices", required=True, type=click.IntRange(1), help="How many there are.")
@click.option(
    "--global-batch",
    type=click.IntRange(1),
    help="Examples of a step of all devices.  [default: --batch for each]",
)
@click.option(
    "--goal",
    type=click.Choice(["time", "devices", "batch", "cost"]),
    default="time",
    show_default=True,
    help="The fastest step, the fewest devices that fit, the largest batch that fits without "
    "adding gradients up, or the cheapest step on any number of devices.",
)
@click.option("--price", type=float, help="Of a device-hour.")
@click.option("--batch", type=int, help="Of the smallest micro-batch.  [default: 1]")
@click.option("--seq", type=int, help="Tokens per example.  [default: up to 1024]")
@click.option("--dtype", type=click.Choice(_DTYPES), help="[default: the configuration's]")
@click.option("--memory-budget", metavar="SIZE", help="[default: the device's, less a reserve]")
@click.option(
    "--optimizer",
    multiple=True,
    metavar="NAME",
    help="As in `fxzero plan`; several: any of them.  [default: adamw]",
)
@click.option(
    "--zero", type=click.Choice(["0", "1", "2", "3", "auto"]), default="auto", show_default=True
)
@click.option("--offload", is_flag=True, help="Saved values may wait in host memory.")
@click.option("--send-codes", is_flag=True, help="Collectives may move codes of 8 or 4 bits.")
@click.option("--rows", type=click.IntRange(1), default=12, show_default=True, help="Ways to list.")
@click.option("--json", type=click.Path(path_type=Path), help="Write all ways to this file.")
def search(
    model: str,
    batch: int | None,
    seq: int | None,
    dtype: str | None,
    optimizer: tuple[str, ...],
    rows: int,
    json: Path | None,
    **options: Any,
) -> int:
    """Rank the ways to train on many devices: which fits, how fast, and why others are slower."""
    from fxzero.cluster.search import search as search_ways
    from fxzero.hardware import describe
    from fxzero.report.search import render, to_json
    from fxzero.sources import load_model

    options["hardware"] = describe(options["hardware"])
    source = load_model(model, batch=batch, seq=seq, dtype=dtype)
    found = search_ways(
        source.model,
        source.args,
        kwargs=source.kwargs,
        name=source.name,
        optimizer=list(optimizer) or "adamw",
        **options,
    )
    click.echo(render(found, rows))
    if json:
        _write(json, lambda path: path.write_text(to_json(found)))
    return _OK if found.fits else _DOES_NOT_FIT


@cli.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Write a page to this file.")
def diff(before: Path, after: Path, html: Path | None) -> None:
    """Show what changed between two plan files."""
    from fxzero.plans import Plan
    from fxzero.report.diff import diff as differences
    from fxzero.report.diff_page import render

    plans = Plan.load(before), Plan.load(after)
    click.echo(differences(*plans))
    if html:
        _write(html, lambda path: path.write_text(render(*plans)))


@cli.command()
def hardware() -> None:
    """List the devices that plans can be made for, by the names that --hardware takes."""
    from fxzero.report.hardware import table

    click.echo(table())


@cli.command()
def passes() -> None:
    """List the passes in the order in which they run."""
    from fxzero.passes.pipeline import describe

    click.echo(describe())


@cli.command()
@click.argument("model", metavar="package.module:factory")
@click.option("--memory-budget", metavar="SIZE", help='Such as "22GiB".  [default: no limit]')
@click.option(
    "--inner", type=click.Choice(["inductor", "eager"]), help="[default: what is present]"
)
@click.option("--json", type=click.Path(path_type=Path), help="Write the report to this file.")
def verify(model: str, memory_budget: str | None, inner: str | None, json: Path | None) -> int:
    """Run a compiled step against eager PyTorch: loss, gradients, randomness, buffers, peak.

    Names the pass and the line of the model where they begin to differ, and values that are not
    finite.  Exits with 1 if anything is wrong.
    """
    import fxzero
    from fxzero.sources import load_factory

    source = load_factory(model)
    example = None if source.kwargs else source.args  # keywords are captured at the first call
    compiled = fxzero.compile(source.model, example, memory_budget=memory_budget, inner=inner)
    result = compiled.verify(*source.args, **source.kwargs)
    click.echo(str(result))
    if json:
        _write(json, lambda path: path.write_text(result.to_json()))
    return _OK if result.ok else _NOT_VERIFIED


@cli.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
def replay(directory: Path) -> None:
    """Run a failed pass again from the DIRECTORY that its error names."""
    from fxzero.passes.runner import replay as run_again

    click.echo(run_again(directory))


@cli.command()
@click.argument("model", required=False)
@click.option("--batch", type=int, help="Examples per step.  [default: 1]")
@click.option("--seq", type=int, help="Tokens per example.  [default: up to 1024]")
@click.option("--dtype", type=click.Choice(_DTYPES), help="[default: the configuration's]")
@click.option(
    "--inner",
    type=click.Choice(["inductor", "eager"]),
    default="inductor",
    show_default=True,
    help="Whether to time the code that Inductor generates for a step, too: one compilation.",
)
@click.option(
    "--hardware-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Measure this machine itself, and write a description of it for --hardware; under "
    "torchrun its links, too.",
)
def calibrate(model: str | None, hardware_file: Path | None, inner: str, **options: Any) -> None:
    """Measure every operator of MODEL on this device; later plans use the times."""
    if model is None and hardware_file is None:
        raise click.UsageError("Missing argument 'MODEL', or --hardware-file.")
    if hardware_file is not None:
        from fxzero.hardware_measurement import measure_hardware

        if said := measure_hardware(hardware_file):
            click.echo(said)
    if model is not None:
        from fxzero.model_calibration import calibrate_model
        from fxzero.sources import load_model

        click.echo(str(calibrate_model(load_model(model, **options), inner)))


@cli.command()
def doctor() -> None:
    """Show versions, devices and compilers, and whether this torch is supported."""
    from fxzero.report.environment import describe_environment

    click.echo(describe_environment())


@cli.command()
@click.option("--memory-budget", metavar="SIZE", help="[default: one that is tight for the model]")
@click.option("--steps", type=int, default=12, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write plan and page to this folder.")
def demo(memory_budget: str | None, steps: int, out: Path | None) -> None:
    """Plan and train a small model under a byte budget."""
    from fxzero.demo import run

    run(memory_budget=memory_budget, steps=steps, out=out)
