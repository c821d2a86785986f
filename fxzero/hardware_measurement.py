"""Measures this machine and writes what was found as a description of hardware.

    fxzero calibrate --hardware-file mine.toml
    torchrun --no-python --nproc-per-node 4 fxzero calibrate --hardware-file mine.toml    links, too

Figures are what operators get, memory for results included, so the table ``achieved`` has ones,
but for attention.  What was not measured is the default, and its ``source`` says so.  Where several
processes run, the first one writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fxzero.cost import hardware_for
from fxzero.errors import UsageError
from fxzero.hardware import Achieved, Hardware
from fxzero.links import Links, is_first, measure_links
from fxzero.options import device_memory
from fxzero.timing import device_description, seconds_of
from fxzero.units import format_bytes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A product is made larger until it takes so long, or has rows and columns as many.
_PRODUCT_SECONDS, _LARGEST_PRODUCT = 0.02, 8192
_BYTES = {"cpu": 2**26, "cuda": 2**29}
_NOT_MEASURED = "assumed, not measured: run it under torchrun with several processes"


def measure_hardware(path: Path) -> str:
    """Writes a description of this machine to a file; a sentence that says what is in it.

    Raises:
        UsageError: the file's name does not end in ".toml", or it cannot be written.
    """
    if path.suffix != ".toml":
        raise UsageError(f"{path}: the name of a description of hardware ends in .toml")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    between = measure_links(device)
    if between is not None and not is_first():
        return ""
    found = replace(_measure_device(device, between), name=path.stem)
    try:
        path.write_text(to_toml(found), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    peaks = ", ".join(
        f"{dtype} {rate / 1e9:.4g} GFLOP/s" for dtype, rate in found.peak_flops.items()
    )
    links = "not measured" if between is None else str(between)
    return (
        f"{device_description(device)}: {format_bytes(found.memory or 0)}, {peaks}, memory "
        f"{found.bandwidth / 1e9:.4g} GB/s, links between processes {links}\nwritten to {path}; "
        f"plan for it with --hardware {path}"
    )


def to_toml(hardware: Hardware) -> str:
    """The text that ``hardware.load`` reads."""
    node, network, got = hardware.node, hardware.network, hardware.achieved
    power = {} if hardware.watts is None else {"watts": hardware.watts}
    tables: dict[str, dict[str, float]] = {
        "memory": {"bytes": hardware.memory or 0, "bandwidth": hardware.peak_bandwidth},
        "compute": {
            "processors": hardware.processors,
            "launch": hardware.launch,
            **hardware.peak_flops,
        },
        "host": {"bandwidth": hardware.host},
        "node": {
            "devices": hardware.devices,
            "bandwidth": node.bandwidth,
            "latency": node.latency,
        },
        "network": {
            "bandwidth": network.bandwidth,
            "latency": network.latency,
            "startup": hardware.startup,
        },
        "power": power,
        "achieved": {
            "matmul": got.matmul,
            "attention": got.attention,
            "memory": got.memory,
            "links": got.links,
            "overlap": got.overlap,
        },
    }
    lines = [f'device = "{hardware.device}"']
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {value!r}" for key, value in table.items())]
        lines.append(f"source = {json.dumps(hardware.sources[name])}")
    return "\n".join([*lines, ""])


def _measure_device(device: str, links: Links | None) -> Hardware:
    usual = hardware_for(device)
    measured = f"measured on {device_description(device)}"
    peaks = {str(dtype).removeprefix("torch."): _product_rate(dtype, device) for dtype in _DTYPES}
    there = _NOT_MEASURED
    if links is not None:
        usual = links.between(usual)
        there = f"{measured}, {links.processes} processes, {links.inside} in a node"
    attention = min(max(_attention_rate(device) / max(peaks.values()), 0.01), 1.0)
    return Hardware(
        name="",
        device=device,
        peak_flops=peaks,
        peak_bandwidth=_memory_rate(device),
        launch=_seconds(lambda: torch.ones(1, device=device).neg_(), device) / 2,
        host=_host_rate(device),
        node=usual.node,
        network=usual.network,
        memory=device_memory(device),
        devices=1 if links is None else links.inside,
        startup=usual.startup,
        achieved=Achieved(attention=round(attention, 3), overlap=usual.achieved.overlap),
        sources={
            "memory": measured,
            "compute": measured,
            "host": measured,
            "node": there,
            "network": there,
            "power": "not measured",
            "achieved": "figures are those achieved; attention: by the fastest dtype's peak",
        },
    )


def _seconds(run: Callable[[], object], device: str) -> float:
    with torch.no_grad():
        return max(seconds_of(run, device), 1e-9)


def _product_rate(dtype: torch.dtype, device: str) -> float:
    size = 256
    while True:
        a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _seconds(partial(torch.matmul, a, b), device)
        if seconds > _PRODUCT_SECONDS or size >= _LARGEST_PRODUCT:
            return 2 * size**3 / seconds
        size *= 2


def _attention_rate(device: str) -> float:
    shape, dtype = (4, 16, 4096, 128), torch.bfloat16
    if device == "cpu":
        shape, dtype = (1, 4, 512, 64), torch.float32
    q, k, v = (torch.rand(shape, device=device).to(dtype) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    batch, heads, length, width = shape
    return 4 * batch * heads * length**2 * width / _seconds(lambda: attend(q, k, v), device)


def _memory_rate(device: str) -> float:
    """By a sum of two tensors: two are read, one is written."""
    a, b = (torch.rand(_BYTES[device] // 4, device=device) for _ in range(2))
    return 3 * a.nbytes / _seconds(lambda: a + b, device)


def _host_rate(device: str) -> float:
    there = torch.rand(_BYTES[device] // 4, device=device)
    here = torch.empty(there.shape, pin_memory=device == "cuda")
    return there.nbytes / _seconds(lambda: here.copy_(there), device)
