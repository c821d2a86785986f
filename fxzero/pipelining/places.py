"""Places where a model is cut: those that pass few bytes, and those that people name.

bytes across    64K 64K 8K 8K 64K 256K 64K 8K ...
narrow          ........^^..............^....
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxzero.errors import UsageError, unknown_option
from fxzero.pipelining.profile import Profile
from fxzero.pipelining.stages import Exports

# More units than that make the choice of cuts slower and no better.
_UNITS = 160


def narrow_cuts(prices: Profile, bytes_across: dict[int, int]) -> list[int]:
    """Places to cut, in order: those that pass the least bytes, spread over the time of the row."""
    if len(bytes_across) < _UNITS:
        return sorted(bytes_across)
    total = prices.times(0, prices.operators).total
    best: dict[int, int] = {}
    for cut, size in sorted(bytes_across.items()):
        share = int(_UNITS * prices.times(0, cut).total / total)
        if share not in best or size < bytes_across[best[share]]:
            best[share] = cut
    return sorted(best.values())


def named_cuts(exports: Exports, names: Sequence[str]) -> tuple[int, ...]:
    """The cuts before the first operators of some submodules.

    Raises:
        UsageError: a module that runs no operator, or before which the model cannot be cut.
    """
    row = exports.row
    first = _first_operators(exports)
    cuts = []
    for name in names:
        if name not in first:
            raise unknown_option(name, sorted(first), where="Pipeline.cuts")
        if first[name] not in row.cuts:
            raise UsageError(
                f"Pipeline.cuts: {exports.name} cannot be cut before {name}, where it begins or "
                "where memory is written to later on\n  name a module further down"
            )
        cuts.append(first[name])
    if cuts != sorted(set(cuts)):
        raise UsageError(f"Pipeline.cuts: {', '.join(names)} do not run in this order")
    return tuple(cuts)


def hinted_cuts(exports: Exports) -> tuple[int, ...]:
    """Where a model of transformers says that it may be cut.

    Its ``pp_plan`` names modules; one that is a list may be cut before each of its parts.
    """
    plan = getattr(exports.exported.model, "pp_plan", None) or {}
    first = _first_operators(exports)
    found = {
        at
        for name, at in first.items()
        if name in plan or (name.rpartition(".")[0] in plan and name.rpartition(".")[2].isdecimal())
    }
    return tuple(sorted(found & set(exports.row.cuts)))


def _first_operators(exports: Exports) -> dict[str, int]:
    """For each module, the position of the first operator that runs in it."""
    first: dict[str, int] = {}
    for position, node in enumerate(exports.row.work):
        for module in modules_of(node):
            first.setdefault(module, position)
    return first


def modules_of(node: fx.Node) -> list[str]:
    """The modules that an operator runs in, by their names in the model, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return [path.removeprefix("model.") for path in paths if path.startswith("model.")]


def module_at(node: fx.Node) -> str:
    """The innermost module that an operator runs in; "" for the model itself."""
    return next(iter(reversed(modules_of(node))), "")
