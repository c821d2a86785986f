"""``fxzero plan --check FILE``: the file's options are defaults of the command.

What stands on the command line wins over the file, as it wins over any default.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fxzero.errors import UsageError, unknown_option

if TYPE_CHECKING:
    from fxzero.budget_file import BudgetFile
    from fxzero.plans import Plan


def read_file(context: click.Context, path: Path, planning: Collection[str]) -> BudgetFile:
    """The file at ``path``, and its options as defaults of the command.

    Args:
        planning: the options that decide what is planned.

    Raises:
        UsageError: the file cannot be read, or names options or values that do not exist.
    """
    from fxzero.budget_file import BudgetFile

    if not path.exists():  # --accept may stand further right, and writes it
        return BudgetFile(path)
    file = BudgetFile.read(path)
    known = {
        parameter.name: parameter
        for parameter in context.command.params
        if parameter.name in planning and parameter.name != "memory_budget"
    }
    defaults: dict[str, Any] = {}
    for name, value in (file.plan or {}).items():
        if name not in known:
            raise unknown_option(name, map(str, known), where=f"{path}: plan")
        defaults[name] = _converted(context, known[name], value, f"{path}: plan.{name}")
    if file.limits.memory_budget is not None:
        defaults["memory_budget"] = file.limits.memory_budget
    context.default_map = defaults
    return file


def _converted(context: click.Context, option: click.Parameter, value: Any, where: str) -> Any:
    """A value of the file as the command line would have it; numbers may stand for their text."""
    kind: type = str
    if getattr(option, "is_flag", False):
        kind = bool
    elif isinstance(option.type, click.types.IntParamType):
        kind = int
    if kind is str and type(value) is int:
        value = str(value)
    if type(value) is not kind:
        raise UsageError(f"{where} must be {kind.__name__}, not {type(value).__name__}")
    if isinstance(value, int) and kind is int and value < 1:
        raise UsageError(f"{where}={value} must be positive")
    try:
        return option.type_cast_value(context, value)
    except click.BadParameter as error:
        raise UsageError(f"{where}: {error.message}") from None


def given_options(context: click.Context, planning: Collection[str]) -> dict[str, Any]:
    """The planning options that stand on the command line."""
    names = [str(parameter.name) for parameter in context.command.params]
    return {
        name: context.params[name]
        for name in names
        if name in planning
        and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }


def check_usage(file: BudgetFile | None, *, accept: bool) -> None:
    """Raises UsageError for --check and --accept without what they need."""
    if file is None and accept:
        raise UsageError("--accept is for the file of --check: give both")
    if file is not None and not file.text and not accept:
        raise UsageError(
            f"cannot read {file.path}: no such file, or an empty one\n"
            f"  fxzero plan MODEL --check {file.path} --accept writes it"
        )


def accept_plan(file: BudgetFile, plan: Plan, given: dict[str, Any], *, writes: bool) -> str:
    """The file's text once a plan is accepted.

    Args:
        given: options of the command line, for a file that has none.
        writes: whether the text is to be written, for which the plan must be the file's own.
    """
    if writes and file.plan and given:
        raise UsageError(
            f"--accept beside --{next(iter(given)).replace('_', '-')}: {file.path} has options of "
            "its own\n  change them there, or leave out the option"
        )
    return file.updated(plan, given)
