"""The hardware library as a table: what each device has by its datasheet, and how it is linked."""

from __future__ import annotations

from fxzero.hardware import Hardware, describe, names
from fxzero.units import format_bytes

_COLUMNS = ("name", "memory", "bfloat16", "bandwidth", "in a node", "between nodes", "power")


def table() -> str:
    """One line a device, peaks dense, links in one direction."""
    rows = [_COLUMNS, *(_row(describe(name)) for name in names())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = []
    for name, *cells in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def _row(hardware: Hardware) -> tuple[str, ...]:
    return (
        hardware.name,
        "" if hardware.memory is None else format_bytes(hardware.memory),
        f"{hardware.peak_of('bfloat16') / 1e12:.4g} TFLOP/s",
        f"{hardware.peak_bandwidth / 1e9:.4g} GB/s",
        f"{hardware.devices} x {hardware.node.bandwidth / 1e9:.4g} GB/s",
        f"{hardware.network.bandwidth / 1e9:.4g} GB/s",
        "" if hardware.watts is None else f"{hardware.watts:.4g} W",
    )
