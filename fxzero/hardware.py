"""Descriptions of devices and of how they are linked, for plans of hardware that nobody has rented.

A description is a TOML file: one of ``devices/``, known by its name, or a user's own.

    [memory]                      [node]                         [achieved]
    bytes = 85_520_809_984        devices = 8                    matmul = 0.80
    bandwidth = 3.35e12           bandwidth = 450e9              ...
    source = "datasheet"          latency = 1.9e-6               source = "measured by ..."

Figures are those of datasheets, dense and in one direction; what programs get of them is a share
that the table ``achieved`` names, and every table says where its figures come from.  Loading is
strict: a description has all keys, no others, and numbers that a device can have.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fxzero.documents import parse_toml, read_text
from fxzero.errors import UsageError
from fxzero.units import format_bytes

_LIBRARY = Path(__file__).parent / "devices"
_MAX_FILE_BYTES = 2**16  # those of the library have about 2 KiB
_DEVICES = ("cpu", "cuda")
# Left free of a device's memory: for CUDA's context and NCCL's buffers, and for fragmentation.
_RESERVED_BYTES, _RESERVED_SHARE = 2**30, 0.05
# What runs at the speed of another dtype where a device has none for it.
_INSTEAD = {"fp8": "float16", "bfloat16": "float32", "float16": "float32", "tf32": "float32"}


@dataclass(frozen=True)
class Link:
    """What connects a device with others.

    Attributes:
        bandwidth: bytes a second that a device sends while it receives as many.
        latency: seconds from one device to the next.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Achieved:
    """Shares of the datasheet's figures that programs get, from 0 to 1.

    Attributes:
        matmul: of the peak, in large products of matrices.
        attention: of the peak, in fused attention.
        memory: of the memory's bandwidth.
        links: of the bandwidth to the host and to other devices.
        overlap: of a collective's time, what operators that run beside it hide; less than 1 where
            both need the same cores or memory.
    """

    matmul: float = 1.0
    attention: float = 1.0
    memory: float = 1.0
    links: float = 1.0
    overlap: float = 1.0


@dataclass(frozen=True)
class Hardware:
    """A device and its links, as datasheets give them.

    Attributes:
        device: "cpu" or "cuda", as torch calls it.
        peak_flops: dense floating-point operations a second by dtype: "float32", "tf32",
            "bfloat16", "float16", "fp8".
        peak_bandwidth: bytes a second to and from device memory.
        launch: seconds that any operator takes.
        host: bytes a second between device and host memory, in one direction.
        node: between devices of a node.
        network: between devices of different nodes.
        memory: bytes of the device; None: not known.
        processors: parts that each compute a tile of a product; 1: products are of one piece.
        devices: how many a node has.
        startup: seconds that any collective takes besides.
        watts: what a device takes at most; None: not known.
        sources: where the figures come from, by table of the file.
    """

    name: str
    device: str
    peak_flops: Mapping[str, float]
    peak_bandwidth: float
    launch: float
    host: float
    node: Link
    network: Link
    memory: int | None = None
    processors: int = 1
    devices: int = 2**20
    startup: float = 0.0
    watts: float | None = None
    achieved: Achieved = field(default_factory=Achieved)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that operators move to and from device memory."""
        return self.peak_bandwidth * self.achieved.memory

    @property
    def host_bandwidth(self) -> float:
        """Bytes a second that copies move between device and host memory."""
        return self.host * self.achieved.links

    def peak_of(self, dtype: str) -> float:
        """The datasheet's operations a second in a dtype, or in what serves in its place."""
        while dtype not in self.peak_flops:
            dtype = _INSTEAD.get(dtype, "float32")
        return self.peak_flops[dtype]

    @property
    def usable(self) -> int | None:
        """Bytes of memory for a training step, less what is reserved; None: not known."""
        if self.memory is None:
            return None
        fixed = _RESERVED_BYTES if self.device == "cuda" else 0
        return max(int(self.memory * (1 - _RESERVED_SHARE)) - fixed, 1)

    def assumptions(self) -> tuple[str, ...]:
        """Sentences for the notes of a plan: what its times and its budget rest on."""
        got, peak = self.achieved, self.peak_of("bfloat16")
        speeds = (
            f"{self.name} is taken to reach {got.matmul:.0%} of {peak / 1e12:.4g} TFLOP/s bfloat16 "
            f"in large products, {got.attention:.0%} in attention, {got.memory:.0%} of "
            f"{self.peak_bandwidth / 1e12:.3g} TB/s of memory, and {got.links:.0%} of its links: "
            f"{_devices(self.devices)} in a node at {self.node.bandwidth / 1e9:.4g} GB/s, "
            f"{self.network.bandwidth / 1e9:.4g} GB/s a device between nodes"
        )
        if self.memory is None:
            return (speeds,)
        reserve = format_bytes(self.memory - (self.usable or 0))
        return (
            speeds,
            f"without a budget, {reserve} of {format_bytes(self.memory)} of memory are left for "
            "the device's context, communication libraries and fragmentation",
        )


def _devices(count: int) -> str:
    return f"{count} devices" if count > 1 else "1 device"


def describe(hardware: object) -> Hardware:
    """The description that a user means.

    Args:
        hardware: a name of the library, the path of a TOML file, or a ``Hardware``.

    Raises:
        UsageError: nobody knows the name, or the file is no description.
    """
    if isinstance(hardware, Hardware):
        return hardware
    if not isinstance(hardware, (str, Path)):
        raise UsageError(f"hardware={hardware!r} must be a name, or the path of a TOML file")
    text = str(hardware)
    if text.lower() in names():
        return _known(text.lower())
    if text.endswith(".toml") or os.sep in text:
        return load(Path(text))
    similar = [name for name in names() if text and text.lower() in name]
    nearest = similar or difflib.get_close_matches(text.lower(), names(), n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UsageError(
        f"no hardware {text!r}{hint}\n"
        f"  known: {', '.join(names())}\n"
        "  or write path/to/description.toml (`fxzero calibrate --hardware-file` makes one)"
    )


@cache
def names() -> tuple[str, ...]:
    """Of the library's descriptions."""
    return tuple(sorted(path.stem for path in _LIBRARY.glob("*.toml")))


@cache
def _known(name: str) -> Hardware:
    return load(_LIBRARY / f"{name}.toml")


@dataclass(frozen=True)
class _Number:
    """What a number of a description may be."""

    what: str
    low: float
    high: float
    whole: bool = False
    optional: bool = False

    def read(self, value: object, where: str) -> Any:
        """The number; raises UsageError for anything else, infinities and NaN included."""
        kinds = (int,) if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise UsageError(f"{where} must be {self}, not {_short(value)}")
        if not self.low <= value <= self.high:
            raise UsageError(f"{where} = {_short(value)} must be {self}")
        return value if self.whole else float(value)

    def __str__(self) -> str:
        kind = "a whole number of " if self.whole else ""
        return f"{kind}{self.what}, {self.low:g} to {self.high:g}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


_FLOPS = _Number("operations a second", 1e6, 1e19)
_OTHER_FLOPS = _Number("operations a second", 1e6, 1e19, optional=True)
_RATE = _Number("bytes a second", 1e5, 1e16)
_SECONDS = _Number("seconds", 0.0, 1.0)
_SHARE = _Number("a share", 0.01, 1.0)
_DTYPES = ("float32", "tf32", "bfloat16", "float16", "fp8")
_TABLES: dict[str, dict[str, _Number]] = {
    "memory": {"bytes": _Number("bytes", 2**20, 2**50, whole=True), "bandwidth": _RATE},
    "compute": {
        "processors": _Number("processors", 1, 2**16, whole=True),
        "launch": _SECONDS,
        **{dtype: _FLOPS if dtype == "float32" else _OTHER_FLOPS for dtype in _DTYPES},
    },
    "host": {"bandwidth": _RATE},
    "node": {
        "devices": _Number("devices", 1, 2**20, whole=True),
        "bandwidth": _RATE,
        "latency": _SECONDS,
    },
    "network": {"bandwidth": _RATE, "latency": _SECONDS, "startup": _SECONDS},
    "power": {"watts": _Number("watts", 0.1, 1e6, optional=True)},
    "achieved": {
        **dict.fromkeys(("matmul", "attention", "memory", "links"), _SHARE),
        "overlap": _Number("a share", 0.0, 1.0, optional=True),
    },
}


def load(path: Path) -> Hardware:
    """The description in a TOML file.

    Raises:
        UsageError: names the file, the key, and what is expected there.
    """
    data = _read(path)
    _check_keys(data, {"device", *_TABLES}, {"device", *_TABLES}, str(path))
    if data["device"] not in _DEVICES:
        raise UsageError(f'{path}: device must be "cpu" or "cuda", not {_short(data["device"])}')
    found = {name: _read_table(data[name], name, path) for name in _TABLES}
    memory, compute, node, network = (
        found[name] for name in ("memory", "compute", "node", "network")
    )
    return Hardware(
        name=path.stem,
        device=data["device"],
        peak_flops={dtype: compute[dtype] for dtype in _DTYPES if dtype in compute},
        peak_bandwidth=memory["bandwidth"],
        launch=compute["launch"],
        host=found["host"]["bandwidth"],
        node=Link(node["bandwidth"], node["latency"]),
        network=Link(network["bandwidth"], network["latency"]),
        memory=memory["bytes"],
        processors=compute["processors"],
        devices=node["devices"],
        startup=network["startup"],
        watts=found["power"].get("watts"),
        achieved=Achieved(
            **{n: found["achieved"][n] for n in _TABLES["achieved"] if n in found["achieved"]}
        ),
        sources={name: table["source"] for name, table in found.items()},
    )


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path, _MAX_FILE_BYTES, UsageError)
    return parse_toml(text, str(path), UsageError)


def _read_table(table: object, name: str, path: Path) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {name} must be a table, [{name}], not {_short(table)}")
    numbers = _TABLES[name]
    needed = {key for key, number in numbers.items() if not number.optional} | {"source"}
    _check_keys(table, {*numbers, "source"}, needed, f"{path}: [{name}]")
    source = table["source"]
    if not isinstance(source, str) or not source.strip():
        raise UsageError(f"{path}: {name}.source must say where the figures come from")
    values = {
        key: number.read(table[key], f"{path}: {name}.{key}")
        for key, number in numbers.items()
        if key in table
    }
    return {**values, "source": source}


def _check_keys(table: Mapping[str, Any], known: set[str], needed: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise UsageError(
                f"{where}: unknown key {_short(key)}{hint}\n  known: {', '.join(sorted(known))}"
            )
    if missing := sorted(needed - set(table)):
        raise UsageError(f"{where}: missing {', '.join(missing)}")
