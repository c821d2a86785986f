"""``fxzero.plan``: the Plan of training that nobody runs yet."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

from torch import nn

from fxzero.attention import unmasked
from fxzero.capture import capture
from fxzero.errors import BudgetError, UsageError
from fxzero.garbage import no_collections
from fxzero.hardware import describe
from fxzero.mesh import planned_mesh
from fxzero.microbatches import Batch, loss_of
from fxzero.options import Options, call_arguments, check_options, model_device
from fxzero.pipelining.automatic import choose_pipeline
from fxzero.pipelining.forecast import Forecaster, Setting
from fxzero.pipelining.request import Pipeline, check_pipeline, ranks_along
from fxzero.planner import Planner
from fxzero.plans import Plan


def plan(
    model: nn.Module,
    example_inputs: Any = (),
    *,
    kwargs: dict[str, Any] | None = None,
    memory_budget: object = None,
    optimizer: object = "adamw",
    recompute: Any = "auto",
    objective: str = "time",
    inner: str = "eager",
    offload: bool = False,
    strict: bool = False,
    zero: Any = "auto",
    pipeline: Any = None,
    mesh: Any = None,
    devices: int | None = None,
    hardware: Any = None,
    precision: Any = None,
    loss_fn: Any = None,
    microbatches: int | str = 1,
    accumulate: bool = False,
    update: str = "step",
    sweep: int = 0,
    name: str | None = None,
) -> Plan:
    """A Plan for training ``model`` on one device or many, without running it.

    A model on the meta device is planned without allocating anything.

    Args:
        example_inputs: tuple of positional arguments, one tensor, or a dict of keyword arguments.
        kwargs: more keyword arguments of the model.
        memory_budget: "22GiB", bytes, "90%" of the device, or None for no limit.
        optimizer: name, class of torch.optim or fxzero.optim (options by ``functools.partial``), or
            bytes of state per parameter.
        offload: whether saved values may wait for the backward in host memory, and states of
            ``fxzero.optim`` for the optimizer's step.
        zero: the ZeRO stage, 0 to 3, or "auto".
        pipeline: a ``fxzero.Pipeline`` or a number of stages, for which the inputs are the batch of
            one pipeline.  Or "auto": whatever takes the least time and fits, without a pipeline or
            with one, which gets the inputs of all its ranks (those of one pipeline, if the mesh has
            a "pp").
        mesh: ranks by dimension, such as ``{"dp": 64}`` or "dp=64", or a DeviceMesh; no process has
            to run.
        devices: number of ranks, all along "dp" if there is no ``mesh``.
        hardware: what each of them is: a name such as "h100-sxm-80gb" (`fxzero hardware` lists
            them), or the path of a TOML file that describes it.  Without a ``memory_budget`` the
            budget is its memory, less a reserve.  None: the device that the model is on.
        precision: a ``fxzero.Precision``.
        loss_fn: from the model's output to the loss; pipelines of models that return none need it.
        microbatches: into how many parts pipelines cut the batch, if ``pipeline`` does not say.
        accumulate: whether the step finds gradients that it adds to, as the second of several
            micro-batches does.
        update: where the optimizer updates weights: in its "step" or, each as soon as its gradient
            is there, in the "backward".
        sweep: for how many budgets besides to find the step time, for ``Plan.pareto``.

    Returns:
        A Plan; ``plan.fits`` is False and ``plan.status`` "infeasible" when nothing fits.

    Raises:
        UsageError, CaptureError, DeviceError: see ``fxzero.compile``.
    """
    args, keywords = call_arguments(example_inputs, kwargs)
    described = None if hardware is None else describe(hardware)
    device = model_device(model) if described is None else described.device
    request = check_pipeline(pipeline)
    ranks = planned_mesh(mesh, devices, device, ranks_along(request))
    options = check_options(
        device=device,
        memory_budget=memory_budget,
        optimizer=optimizer,
        recompute=recompute,
        objective=objective,
        inner=inner,
        strict=strict,
        offload=offload,
        zero=zero,
        precision=precision,
        mesh=ranks,
        microbatches=microbatches,
        update=update,
        pipeline=request,
        hardware=described,
    )
    if accumulate and options.updates:
        raise UsageError('update="backward" keeps no gradients that accumulate=True could add to')
    # What names hardware is for another machine, whose attention is that of its kernels.
    on_cuda = described is not None and described.device == "cuda"
    called = name or type(model).__name__
    with unmasked(model, keywords) if on_cuda else nullcontext():
        if request is None:
            return without_pipeline(
                model, args, keywords, options, called, accumulates=accumulate, sweep=sweep
            )
        batch, loss = Batch.of(args, keywords), functools.partial(loss_of, loss_fn=loss_fn)
        forecaster = Forecaster(model, loss, options, called)
        if isinstance(request, Pipeline):
            count = request.microbatches_of(batch, ranks.sizes.get("pp", 1), options.microbatches)
            return forecaster.plan(Setting(request, batch, count, ranks, options))
        return choose_pipeline(
            forecaster,
            batch,
            ranks,
            lambda: without_pipeline(model, args, keywords, options, called),
        )


@no_collections()
def without_pipeline(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    name: str,
    **given: Any,
) -> Plan:
    """The plan for the budget, or the smallest where nothing fits."""
    captured = capture(model, args, kwargs, inner=options.inner, precision=options.precision)
    planner = Planner(captured.graph, options, name, **given)
    try:
        return planner.decide().plan
    except BudgetError:
        return planner.smallest().plan
