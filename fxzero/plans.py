"""The Plan: every decision of a compilation and every number that justifies it, as one document.

Solvers write a Plan, passes carry it out, reports are views of it.  It is a tree of frozen
dataclasses that goes to JSON and back without loss, holds no tensor and no code, and is
therefore safe to load from a stranger: ``Plan.load`` reads data and checks every field.

All sizes are bytes, all times seconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fxzero.documents import naming, parse_json, read_text
from fxzero.errors import PlanError
from fxzero.typed_data import LARGEST, read_value

if TYPE_CHECKING:
    from fxzero.report.card import Card

SCHEMA_VERSION = 8
# That of Llama 3 8B has 0.35 MB.  For a byte of JSON, Python may take 30 of memory.
_MAX_FILE_BYTES = 2**25
TURN_KINDS = ("F", "I", "W", "B")
STATUSES = ("optimal", "feasible", "infeasible", "timeout")


@dataclass(frozen=True)
class ModelSummary:
    """What was planned: the model's class, its sizes, and the inputs it was traced with."""

    name: str
    parameters: int
    parameter_bytes: int
    trainable_bytes: int
    buffer_bytes: int
    inputs: tuple[str, ...]
    nodes: int


@dataclass(frozen=True)
class Request:
    """What the user asked for, enough to plan again.

    Attributes:
        mesh: ranks by dimension; empty on one device.
        zero: "0" to "3" or "auto".
        accumulate: whether the step finds gradients and adds to them.
        update: where the optimizer updates weights, in its "step" or in the "backward".
        hardware: the name of the description that was planned for; None: none was given.
    """

    memory_budget: int | None
    optimizer: str
    optimizer_bytes_per_parameter: float
    recompute: str
    objective: str
    inner: str
    offload: bool
    device: str
    mesh: dict[str, int]
    zero: str
    accumulate: bool = False
    update: str = "step"
    hardware: str | None = None


@dataclass(frozen=True)
class Value:
    """A tensor storage in the report.

    Attributes:
        name: its node in the graph, or its user's name from ``fxzero.name``.
        bytes: size of the storage.
        shape: "float32[8, 64]" of the tensor that made it.
        module: qualified module that made it, "" when unknown.
        source: "model.py:41 in forward: x = self.w1(x)", "" when unknown.
        role: "parameter", "buffer", "gradient", "optimizer", "input", "output", "saved",
            "recomputed", "gathered", "fetched", "offloaded", "temporary", "rng state" or "tangent".
        reason: why it is where it is, for saved, recomputed and offloaded values.
        seconds: modelled time of computing it again (0 when it cannot be), or of its transfers.
        first, last: between which instants of the plan's only track it is there; -1: at none of
            them, or not known.
    """

    name: str
    bytes: int
    shape: str
    module: str
    source: str
    role: str
    reason: str = ""
    seconds: float = 0.0
    first: int = -1
    last: int = -1


@dataclass(frozen=True)
class Rematerialization:
    """Compute forward node ``node`` again right before backward node ``before``."""

    node: str
    before: str


@dataclass(frozen=True)
class Fetch:
    """Fetch the value of forward node ``node`` from the host right before backward ``before``."""

    node: str
    before: str


@dataclass(frozen=True)
class Decisions:
    """What the passes carry out.

    Attributes:
        saved: forward nodes whose storage lives from the forward to the backward.
        recompute: the nodes that run again, gathers among them, in execution order.
        offload: the fetches of values that the forward copies to the host, in execution order.
        bucket_bytes: up to how many bytes collectives are merged; 0: none are.
        in_flight: how many collectives of a kind run beside operators; 0: all are waited for at
            once.
        host_states: parameters whose optimizer state is in host memory between steps.
    """

    saved: tuple[str, ...] = ()
    recompute: tuple[Rematerialization, ...] = ()
    offload: tuple[Fetch, ...] = ()
    bucket_bytes: int = 0
    in_flight: int = 0
    host_states: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peak:
    """The instant with the most bytes.

    Attributes:
        phase: "forward", "backward" or "optimizer step".
        node: the operation running then, "" between operations.
        source: its line in the user's code.
        alive: everything alive then, largest first; the sizes sum to ``bytes``.
    """

    bytes: int
    phase: str
    node: str
    source: str
    alive: tuple[Value, ...]

    @property
    def breakdown(self) -> dict[str, int]:
        """Bytes by role, largest first."""
        sizes: dict[str, int] = {}
        for value in self.alive:
            sizes[value.role] = sizes.get(value.role, 0) + value.bytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Rank:
    """One device: its peak and the peak's breakdown by role, which sums to it."""

    index: int
    peak_bytes: int
    breakdown: dict[str, int]


@dataclass(frozen=True)
class ModelStates:
    """What a rank has of the model's states, as the ZeRO paper counts them (Rajbhandari, 2020).

    Each kind at its most, which is not at one instant: stage 1 frees what it gathered of a layer
    when it has made that layer's gradients.

    Attributes:
        parameters: whole where the step keeps what it gathers for the backward, as stages 1 and 2
            do, else the rank's part.
        gradients: whole where they are reduced when the backward has ended, else the rank's part;
            with updates in the backward the most that are there at once.
        optimizer: its state on the device.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Phase:
    """The peak of one part of the step: "forward", "backward", "optimizer step".

    Ranks of a pipeline have a "forward and backward".

    Attributes:
        start: modelled seconds from the start of the step.
    """

    name: str
    peak_bytes: int
    start: float = 0.0


@dataclass(frozen=True)
class Track:
    """What a rank holds over the step: instants that keep the highest of every stretch.

    Attributes:
        rank: along "pp"; 0 without a pipeline, where all ranks are alike.
        seconds: the modelled time of each instant.  The last one is the optimizer's step, which
            takes no time in the model.
        bytes: by role, at each instant; a single number where it is the same at all of them.
    """

    rank: int
    seconds: tuple[float, ...]
    bytes: dict[str, tuple[int, ...]]

    def of(self, role: str) -> tuple[int, ...]:
        """The bytes of a role at each instant."""
        found = self.bytes.get(role, (0,))
        return found * len(self.seconds) if len(found) == 1 else found

    @property
    def totals(self) -> tuple[int, ...]:
        """All bytes at each instant."""
        return tuple(map(sum, zip(*map(self.of, self.bytes), strict=True)))


@dataclass(frozen=True)
class CurvePoint:
    """A plan that one could have: its peak and what its step costs.

    Attributes:
        recompute_seconds: of recompute, and of transfers if the plan may offload.
    """

    peak_bytes: int
    step_seconds: float
    recompute_seconds: float
    recompute_flops: int


@dataclass(frozen=True)
class Alternative:
    """Another thing one could write, and its outcome."""

    change: str
    peak_bytes: int
    step_seconds: float
    fits: bool


@dataclass(frozen=True)
class PipelineStage:
    """A part of the model that one rank of a pipeline trains.

    Attributes:
        rank: where, along "pp".
        begins: the module that its first operator runs in, "" for the model itself.
        weight_bytes: of the parameters and buffers that it reads, whole.
        in_flight: the most micro-batches between its forward and the end of its input gradient.
        forward_seconds, input_seconds, weight_seconds: modelled, of one micro-batch: forward,
            gradients of what it received (recompute included), gradients of weights.
        sent_bytes: what a micro-batch passes on to later stages.
    """

    rank: int
    begins: str
    weight_bytes: int
    in_flight: int
    forward_seconds: float
    input_seconds: float
    weight_seconds: float
    sent_bytes: int


@dataclass(frozen=True)
class Turn:
    """One computation of a rank, in seconds from the start of the step.

    Attributes:
        kind: "F" forward, "I" gradients of inputs, "W" of weights, "B" both.
    """

    rank: int
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class PipelinePlan:
    """How stages of a model train side by side.

    Attributes:
        bubble: the share of all ranks' time in which they wait, from 0 to 1.
        turns: who computes what when, by their start.
    """

    schedule: str
    microbatches: int
    bubble: float
    stages: tuple[PipelineStage, ...]
    turns: tuple[Turn, ...]

    @property
    def ranks(self) -> int:
        """How many ranks the stages lie on."""
        return 1 + max(stage.rank for stage in self.stages)

    @property
    def end(self) -> float:
        """When the last turn ends."""
        return max((turn.end for turn in self.turns), default=0.0)

    def is_further(self, turn: Turn) -> bool:
        """Whether a turn is of another stage than the first of its rank."""
        return any(stage.rank == turn.rank for stage in self.stages[: turn.stage])


@dataclass(frozen=True)
class Plan:
    """A complete plan.

    Attributes:
        status: "optimal", "feasible" (with ``gap``), "infeasible" or "timeout".
        gap: proven relative distance from the optimum of the objective; None when not known.
        peak_bytes: planned peak of everything the step keeps on the device.
        minimum_budget: the smallest budget for which a plan is found.
        unplanned_peak_bytes: the peak without any recompute.
        step_seconds: modelled time of forward and backward, recompute and all transfers included.
        recompute_seconds, recompute_flops: the part that is recompute, without collectives.
        transfer_seconds: the part that is copying to and from the host.
        communication_seconds: time of all collectives; most of it may pass beside operators.
        exposed_seconds: the part of the step in which operators wait for collectives.
        host_bytes: most bytes that offloaded values and optimizer state take in host memory at
            once.
        graph_digest: which graph the decisions belong to.
        curve: what ``pareto()`` returns.
        timeline: bytes by role over modelled seconds: one track, or one for each rank that trains
            a part of a pipeline.
        pipeline: its stages and their schedule; None: there is no pipeline.
        notes: what could not be applied, and assumptions that the numbers rest on.
        states: what a rank has of parameters, gradients and optimizer state; None: a pipeline.
    """

    schema_version: int
    fxzero_version: str
    torch_version: str
    model: ModelSummary
    request: Request
    status: str
    gap: float | None
    peak_bytes: int
    minimum_budget: int
    unplanned_peak_bytes: int
    step_seconds: float
    recompute_seconds: float
    recompute_flops: int
    transfer_seconds: float
    communication_seconds: float
    exposed_seconds: float
    host_bytes: int
    decisions: Decisions
    peak: Peak
    ranks: tuple[Rank, ...]
    phases: tuple[Phase, ...]
    saved: tuple[Value, ...]
    recomputed: tuple[Value, ...]
    offloaded: tuple[Value, ...]
    alternatives: tuple[Alternative, ...]
    curve: tuple[CurvePoint, ...]
    timeline: tuple[Track, ...]
    graph_digest: str
    notes: tuple[str, ...] = ()
    passes: tuple[str, ...] = field(default=())
    pipeline: PipelinePlan | None = None
    states: ModelStates | None = None

    @property
    def fits(self) -> bool:
        """Whether the planned peak stays within the budget that was asked for."""
        budget = self.request.memory_budget
        return self.status != "infeasible" and (budget is None or self.peak_bytes <= budget)

    def pareto(self) -> tuple[CurvePoint, ...]:
        """Peak against step time, from the smallest peak that is found to no recompute at all.

        No point is beaten in both.  There are more of them between the ends when the plan was made
        with ``sweep``.
        """
        return self.curve

    @property
    def peak_of_graphs(self) -> int:
        """Peak of forward and backward without the optimizer's state, in bytes."""
        state = self.ranks[0].breakdown.get("optimizer", 0)
        return max(p.peak_bytes for p in self.phases if p.name != "optimizer step") - state

    @property
    def hash(self) -> str:
        """Hash of the whole document: equal on every rank that runs the same plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The document as JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads a document; raises PlanError for anything that is not a whole Plan."""
        data = parse_json(text, "a plan", PlanError)
        if not isinstance(data, dict) or "schema_version" not in data:
            raise PlanError("not a plan: no schema_version")
        if data["schema_version"] != SCHEMA_VERSION:
            raise PlanError(
                f"plan has schema_version {data['schema_version']!r}, this fxzero reads "
                f"{SCHEMA_VERSION}\n  plan the model again with `fxzero plan`"
            )
        plan = read_value(cls, data, "plan")
        assert isinstance(plan, Plan)
        if plan.status not in STATUSES:
            raise PlanError(f"plan.status is {plan.status!r}, expected one of {STATUSES}")
        for index, track in enumerate(plan.timeline):
            _check_track(track, f"plan.timeline[{index}]")
        if plan.pipeline is not None:
            _check_pipeline(plan.pipeline)
        return plan

    def save(self, path: str | Path) -> None:
        """Writes the JSON document."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a JSON document written by ``save``.

        Raises:
            PlanError: names the file, which is missing, too large, or not a plan.
        """
        path = Path(path)
        text = read_text(path, _MAX_FILE_BYTES, PlanError)
        with naming(path, PlanError):
            return cls.from_json(text)

    def to_html(self, path: str | Path) -> None:
        """Writes one self-contained HTML page."""
        from fxzero.report.html import render

        Path(path).write_text(render(self))

    def card(
        self,
        *,
        steps: int | None = None,
        tokens_per_step: int | None = None,
        dollars_per_device_hour: float | None = None,
        watts: float | None = None,
        grams_co2_per_kwh: float | None = None,
        power_usage_effectiveness: float = 1.0,
    ) -> Card:
        """A model card's section on training, as Markdown (``str``) and JSON (``to_json``).

        Without an argument, what follows from it stays marked as to be filled in.

        Args:
            steps: how many the training takes.
            tokens_per_step: of all ranks together.
            watts: of one device; None: what the description of the hardware says.
            power_usage_effectiveness: energy of the whole data centre by that of its machines.

        Raises:
            UsageError: a number is not positive.
        """
        from fxzero.report.card import Training, make_card

        training = Training(
            steps=steps,
            tokens_per_step=tokens_per_step,
            dollars_per_device_hour=dollars_per_device_hour,
            watts=watts,
            grams_co2_per_kwh=grams_co2_per_kwh,
            power_usage_effectiveness=power_usage_effectiveness,
        )
        return make_card(self, training)

    def to_memory_viz(self, path: str | Path) -> None:
        """Writes a snapshot that pytorch.org/memory_viz opens, as torch's allocator would."""
        from fxzero.report.memory_viz import write

        write(self, Path(path))

    def to_trace(self, path: str | Path) -> None:
        """Writes a trace for Perfetto or chrome://tracing: what runs when, and its memory."""
        from fxzero.report.trace import render

        Path(path).write_text(render(self))

    def __str__(self) -> str:
        from fxzero.report.terminal import render

        return render(self)


def _check_track(track: Track, where: str) -> None:
    count = len(track.seconds)
    if not count or not track.bytes:
        raise PlanError(f"{where} has no instant or no role")
    # Written so that it does not hold for what is no number.
    if not all(a <= b < LARGEST for a, b in itertools.pairwise((0.0, *track.seconds))):
        raise PlanError(f"{where}.seconds must ascend from 0")
    for role, sizes in track.bytes.items():
        if len(sizes) not in (1, count):
            raise PlanError(f"{where}.bytes.{role} must have {count} items, not {len(sizes)}")
        if min(sizes) < 0:
            raise PlanError(f"{where}.bytes.{role} must not be negative")


def _check_pipeline(pipeline: PipelinePlan) -> None:
    stages = len(pipeline.stages)
    if not stages:
        raise PlanError("plan.pipeline has no stage")
    for index, stage in enumerate(pipeline.stages):
        if not 0 <= stage.rank < stages:
            where = f"plan.pipeline.stages[{index}]"
            raise PlanError(f"{where}.rank is {stage.rank}, of at most {stages} ranks")
    for index, turn in enumerate(pipeline.turns):
        where = f"plan.pipeline.turns[{index}]"
        if not (0 <= turn.rank < pipeline.ranks and 0 <= turn.stage < stages):
            raise PlanError(f"{where} is of stage {turn.stage} on rank {turn.rank}: there is none")
        if turn.kind not in TURN_KINDS or not 0 <= turn.start <= turn.end < LARGEST:
            raise PlanError(f"{where} is {turn.kind!r} from {turn.start} s to {turn.end} s")
