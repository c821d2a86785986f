"""``torch.compile(model, backend="fxzero", options={...})``: recompute for any Dynamo graph.

Dynamo captures, AOTAutograd traces the joint graph and keeps its run-time wrappers; fxzero
decides what to recompute and cuts the joint graph.  With graph breaks every piece is planned for
itself, and the budget holds for each piece while it runs: only ``fxzero.compile`` sees the whole
step.

    options: memory_budget, optimizer, recompute, objective, inner, strict, plan_dir
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxzero import _torch
from fxzero.decompositions import decompositions_for
from fxzero.errors import BackendOptionError, UsageError, unknown_option
from fxzero.execution import BoxedFunction
from fxzero.fallback import Attempt, or_as_eager
from fxzero.graph import InputRole, OutputRole, TrainGraph
from fxzero.graph_planner import Decided
from fxzero.headroom import use_headroom
from fxzero.inner import Code, compile_graph, generate
from fxzero.options import Options, check_options, device_of
from fxzero.passes.partition import Split
from fxzero.planner import Planner

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]

_KNOWN = (
    "memory_budget",
    "optimizer",
    "recompute",
    "objective",
    "inner",
    "strict",
    "offload",
    "plan_dir",
)
_WHOLE_MODEL = ("mesh", "zero", "pipeline", "precision", "loss_fn", "plan")
_A_PIECE = "one piece of a model with graph breaks: the budget is this piece's alone"


def fxzero(
    gm: fx.GraphModule,
    example_inputs: Sequence[torch.Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Compiled:
    """The backend that ``torch.compile`` looks up by name.

    Args:
        mode: not used; torch's modes choose among Inductor's settings.
        options: as the module says; ``plan_dir`` names a directory that gets one plan file a graph.

    Raises:
        BackendOptionError: an option that needs the whole model.
        UsageError, BudgetError: as ``fxzero.compile``.
    """
    if mode is not None:
        raise UsageError(f"mode={mode!r}: this backend has no modes; pass options={{...}}")
    checked, plan_dir = _check(dict(options or {}), device_of(list(example_inputs)))
    parameters = [isinstance(value, nn.Parameter) for value in example_inputs]
    partial = (_A_PIECE,) if _torch.is_partial_graph(gm) else ()

    def attempt(options: Options, unapplied: tuple[str, ...]) -> Attempt[tuple[_Piece, Compiled]]:
        piece = _Piece(options, parameters, (*partial, *unapplied))
        compiled = _torch.aot_backend(
            gm,
            example_inputs,
            partition=piece.partition,
            forward_compiler=lambda graph, _: piece.function_of(graph, backward=False),
            backward_compiler=lambda graph, _: piece.function_of(graph, backward=True),
            decompositions=decompositions_for(options.inner),
        )
        decided = piece.decided
        seconds = 0.0 if decided is None else decided.plan.step_seconds
        confined = decided is not None and bool(decided.apart)
        return Attempt((piece, compiled), seconds, confined)

    piece, compiled = or_as_eager(checked, attempt)
    if piece.decided is not None:
        log.info("%s", piece.decided.plan)
        if plan_dir is not None:
            plan_dir.mkdir(parents=True, exist_ok=True)
            piece.decided.plan.save(_first_free(plan_dir))
    return compiled


def _check(options: dict[str, Any], device: str) -> tuple[Options, Path | None]:
    for name, value in options.items():
        if name in _WHOLE_MODEL and value not in (None, 0, False):
            raise BackendOptionError(
                f"options[{name!r}] needs the whole model, and a backend sees one graph of it\n"
                f"  call fxzero.compile(model, {name}={value!r}) instead of torch.compile"
            )
        if name not in (*_KNOWN, *_WHOLE_MODEL):
            raise unknown_option(name, _KNOWN, where='torch.compile(backend="fxzero")')
    plan_dir = options.get("plan_dir")
    given = {name: options[name] for name in _KNOWN if name in options and name != "plan_dir"}
    # Nobody knows the optimizer of a model that torch.compile was given.
    checked = replace(check_options(device=device, **given), offload_states=False)
    return checked, Path(plan_dir) if plan_dir else None


class _Piece:
    """One Dynamo graph on its way through AOTAutograd.

    Attributes:
        decided: what was planned; None of a graph without a backward.
    """

    def __init__(
        self, options: Options, parameters: list[bool], unapplied: tuple[str, ...]
    ) -> None:
        self.options = options
        self.parameters = parameters
        self.unapplied = unapplied
        self.decided: Decided | None = None
        self.made: list[tuple[list[str], BoxedFunction]] = []

    def function_of(self, graph: fx.GraphModule, *, backward: bool) -> BoxedFunction:
        """The function of a graph that ``partition`` returned, or of one without a backward."""
        for names, function in self.made:
            if names == _node_names(graph):
                return function
        return compile_graph(graph, self.options.inner, backward=backward)

    def partition(
        self, joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Called by AOTAutograd with the joint graph; returns forward and backward."""
        graph = self._with_roles(joint, num_fwd_outputs)
        planner = Planner(
            graph,
            self.options,
            "torch.compile graph",
            writes_buffers=False,
            unapplied=self.unapplied,
        )
        self.decided = self._within_budget(planner, planner.decide(), graph)
        split = _with_absent_gradients(self.decided.emitted.split, graph)
        return split.forward, split.backward

    def _within_budget(self, planner: Planner, decided: Decided, graph: TrainGraph) -> Decided:
        """What the code that runs needs, which is generated here if it is to keep to a budget."""
        budget = self.options.memory_budget
        if self.options.inner == "eager" or budget is None:
            return decided

        def code_of(candidate: Decided, limit: int | None) -> Code:
            split = _with_absent_gradients(candidate.emitted.split, graph)
            rehearse = functools.partial(planner.rehearse, candidate)
            return generate(split, self.options.inner, limit=limit, rehearse=rehearse)

        made = use_headroom(planner, decided, budget, code_of)
        split, code = made.decided.emitted.split, made.code
        # AOTAutograd copies the backward before it asks for its function.
        names = (_node_names(split.forward), _node_names(split.backward))
        self.made = list(zip(names, (code.forward, code.backward), strict=True))
        return made.decided

    def _with_roles(self, joint: fx.GraphModule, num_fwd_outputs: int) -> TrainGraph:
        """Roles by position: AOTAutograd owns the meaning, we only need kinds and sizes."""
        placeholders = list(joint.graph.find_nodes(op="placeholder"))
        kinds = [_torch.describe_input(node)[0] for node in placeholders]
        roles = []
        for index, (node, kind) in enumerate(zip(placeholders, kinds, strict=True)):
            if not isinstance(node.meta.get("val"), torch.Tensor):
                raise UsageError(
                    f"input {node.name} is a symbolic size, and plans are made for fixed sizes\n"
                    "  compile with torch.compile(..., dynamic=False)"
                )
            parameter = index < len(self.parameters) and self.parameters[index]
            roles.append(InputRole("parameter" if parameter else kind, node.name, index))
        (output,) = joint.graph.find_nodes(op="output")
        results = list(output.args[0])
        mutated = _torch.mutated_input_positions(joint)
        outputs = [
            OutputRole("mutation", index=i, of=roles[mutated[i]])
            if i in mutated
            else OutputRole("output", index=i)
            for i in range(num_fwd_outputs)
        ]
        outputs += [
            OutputRole("gradient" if value is not None else "absent", of=roles[i])
            for i, value in enumerate(results[num_fwd_outputs:])
        ]
        return TrainGraph(joint, tuple(roles), tuple(outputs))


def _node_names(graph: fx.GraphModule) -> list[str]:
    return [node.name for node in graph.graph.nodes]


def _with_absent_gradients(split: Split, graph: TrainGraph) -> Split:
    """AOTAutograd wants one result per input, None where there is no gradient."""
    backward = _torch.copy_module(split.backward)
    (output,) = backward.graph.find_nodes(op="output")
    found = iter(output.args[0])
    roles = [role for role in graph.outputs if role.kind in ("gradient", "absent")]
    output.args = (tuple(next(found) if r.kind == "gradient" else None for r in roles),)
    backward.recompile()
    return replace(split, backward=backward)


def _first_free(directory: Path) -> Path:
    paths = (directory / f"graph-{number}.json" for number in itertools.count())
    return next(path for path in paths if not path.exists())
