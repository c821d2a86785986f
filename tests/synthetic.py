"""Plans made by hand, for tests of reports and of the command line: no tracing, no solver."""

from __future__ import annotations

import dataclasses
from typing import Any

from fxzero.plans import (
    SCHEMA_VERSION,
    Alternative,
    CurvePoint,
    Decisions,
    ModelSummary,
    Peak,
    Phase,
    Plan,
    Rank,
    Rematerialization,
    Request,
    Track,
    Value,
)

MiB = 2**20
_LINES = {
    "ln_1": "modeling_gpt2.py:281 in forward: hidden_states = self.ln_1(hidden_states)",
    "attn": "modeling_gpt2.py:224 in forward: attn_output, _ = attention_interface(query, key)",
    "mlp.act": "modeling_gpt2.py:245 in forward: hidden_states = self.act(hidden_states)",
    "mlp.c_fc": "modeling_gpt2.py:244 in forward: hidden_states = self.c_fc(hidden_states)",
}
_HEAD = "modeling_gpt2.py:712 in forward: logits = self.lm_head(hidden_states[:, slice_indices, :])"


def gpt_plan(*, budget: int | None = 5120 * MiB, recomputed: int = 10, **changes: Any) -> Plan:
    """A 12-layer GPT at batch 8 x 1024, with the MLPs of the first layers recomputed."""
    fixed = [
        _value("transformer.wte.weight", 147 * MiB, "parameter", ""),
        _value("transformer.wte.weight gradient", 147 * MiB, "gradient", ""),
        _value("transformer.wte.weight state", 294 * MiB, "optimizer", ""),
    ]
    for layer in range(12):
        for part, size in (("attn.c_attn", 7), ("attn.c_proj", 2), ("mlp.c_fc", 9)):
            name = f"transformer.h.{layer}.{part}"
            fixed.append(_value(f"{name}.weight", size * MiB, "parameter", name))
            fixed.append(_value(f"{name}.weight", 2 * size * MiB, "optimizer", name))
    cheap = [_activation(i, "mlp.act", f"mul_{4 * i + 3}", 96) for i in range(12)]
    saved = [
        *(_activation(i, "mlp.c_fc", f"addmm_{4 * i + 2}", 96) for i in range(12)),
        *(_activation(i, "ln_1", f"native_layer_norm_{2 * i}", 24) for i in range(12)),
        *(_activation(i, "attn", f"scaled_dot_product_{i}", 24) for i in range(12)),
    ]
    kept = [
        *saved,
        *(_as(v, "saved", "needed by mul in backward", 0.0) for v in cheap[recomputed:]),
    ]
    logits = Value("mm", 1571 * MiB, "float32[8, 1024, 50257]", "lm_head", _HEAD, "temporary")
    alive = tuple(sorted([*fixed, *kept, logits], key=lambda value: -value.bytes))
    breakdown: dict[str, int] = {}
    for value in alive:
        breakdown[value.role] = breakdown.get(value.role, 0) + value.bytes
    peak = sum(breakdown.values())
    step = 1.9 + 0.008 * recomputed
    plan = Plan(
        schema_version=SCHEMA_VERSION,
        fxzero_version="0.1.0",
        torch_version="2.13.0",
        model=ModelSummary(
            name="gpt2",
            parameters=124_439_808,
            parameter_bytes=497_759_232,
            trainable_bytes=497_759_232,
            buffer_bytes=0,
            inputs=("int64[8, 1024]", "int64[8, 1024]"),
            nodes=1423,
        ),
        request=Request(
            memory_budget=budget,
            optimizer="adamw",
            optimizer_bytes_per_parameter=8.0,
            recompute="auto",
            objective="time",
            inner="inductor",
            offload=False,
            device="cpu",
            mesh={},
            zero="auto",
        ),
        status="optimal",
        gap=0.0,
        peak_bytes=peak,
        minimum_budget=peak - 400 * MiB,
        unplanned_peak_bytes=peak + recomputed * 96 * MiB,
        step_seconds=step,
        recompute_seconds=0.008 * recomputed,
        recompute_flops=recomputed * 25_165_824 * 8,
        transfer_seconds=0.0,
        communication_seconds=0.0,
        exposed_seconds=0.0,
        host_bytes=0,
        decisions=Decisions(
            saved=tuple(value.name for value in kept),
            recompute=tuple(
                Rematerialization(value.name, f"{value.name}_backward")
                for value in cheap[:recomputed]
            ),
        ),
        peak=Peak(
            bytes=peak,
            phase="backward",
            node="_log_softmax_backward_data",
            source=_HEAD,
            alive=alive,
        ),
        ranks=(Rank(0, peak, breakdown),),
        phases=(
            Phase("forward", peak - 120 * MiB),
            Phase("backward", peak, step / 2),
            Phase("optimizer step", 1980 * MiB, step),
        ),
        saved=tuple(kept),
        recomputed=tuple(
            _as(value, "recomputed", "elementwise, one kernel", 0.008)
            for value in cheap[:recomputed]
        ),
        offloaded=(),
        alternatives=(
            Alternative('memory_budget="4GiB"', 3900 * MiB, 1.9, True),
            Alternative('recompute="full"', 2600 * MiB, 2.51, True),
            Alternative('optimizer="sgd"', peak - 732 * MiB, 1.9, True),
        ),
        curve=(
            CurvePoint(peak - 400 * MiB, 2.5, 0.6, 10**12),
            CurvePoint(peak + recomputed * 96 * MiB, 1.9, 0.0, 0),
        ),
        timeline=(_track(breakdown, step),),
        graph_digest="0123456789abcdef",
        notes=(
            "buffers that inductor fuses away are counted: the measured peak may be lower",
            "times are modelled for this CPU, from 41 GFLOP/s and 11 GiB/s measured at start",
        ),
        passes=("recompute", "schedule"),
    )
    return dataclasses.replace(plan, **changes)


def _value(name: str, size: int, role: str, module: str) -> Value:
    return Value(name, size, f"float32[{size // 4}]", module, "", role)


def _activation(layer: int, part: str, name: str, mebibytes: int) -> Value:
    width = mebibytes * MiB // (8 * 1024 * 4)
    return Value(
        name=name,
        bytes=mebibytes * MiB,
        shape=f"float32[8, 1024, {width}]",
        module=f"transformer.h.{layer}.{part}",
        source=_LINES[part],
        role="saved",
        reason=f"input of a matmul, 2.{layer} ms to compute again",
    )


def _as(value: Value, role: str, reason: str, seconds: float) -> Value:
    return dataclasses.replace(value, role=role, reason=reason, seconds=seconds)


def _track(breakdown: dict[str, int], step: float) -> Track:
    """Saved values that come and go, the logits in the middle, gradients, the optimizer's step."""
    half = 140
    at = range(2 * half + 1)
    rising = [min(i, 2 * half - i) for i in at]
    bumps = [(i % 3) * 30 * MiB for i in at]
    bumps[half] = breakdown["temporary"]
    bytes_of = {role: (breakdown[role],) for role in ("parameter", "optimizer")}
    bytes_of["saved"] = (*(breakdown["saved"] * up // half for up in rising), 0)
    bytes_of["temporary"] = (*bumps, 90 * MiB)
    bytes_of["gradient"] = (*(0 if i < half else breakdown["gradient"] for i in at), 147 * MiB)
    seconds = tuple(round(step * i / (2 * half), 6) for i in (*at, 2 * half))
    return Track(0, seconds, bytes_of)
