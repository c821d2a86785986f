"""Draws the pictures of docs/residency.md from plans of one small model.

    python docs/images/residency.py

``residency-budgets.svg``: the model under three budgets.  ``residency-gathers.svg``: the same step
on eight devices that share its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fxzero
from fxzero.report.wording import in_reading_order
from fxzero.units import format_bytes

_COLOURS = {
    "parameter": "#3566a8",
    "gradient": "#8a66c4",
    "optimizer": "#2a9a8d",
    "input": "#97a1ac",
    "saved": "#e58f35",
    "recomputed": "#cfab38",
    "temporary": "#cf605b",
    "output": "#b5749f",
    "tangent": "#9b744f",
    "gathered": "#3fa0bd",
}
_WIDTH, _HEIGHT, _GAP, _TOP = 250, 200, 30, 48


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = 128, depth: int = 6) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


def main() -> None:
    folder = Path(__file__).resolve().parent
    (folder / "residency-budgets.svg").write_text(budgets(), encoding="utf-8")
    (folder / "residency-gathers.svg").write_text(gathers(), encoding="utf-8")


def budgets() -> str:
    """No budget, one between, and the smallest."""
    inputs = (torch.randn(1024, 128),)
    free = fxzero.plan(Net(), inputs)
    middle = (free.peak_bytes + free.minimum_budget) // 2
    plans = [free] + [
        fxzero.plan(Net(), inputs, memory_budget=budget) for budget in (middle, free.minimum_budget)
    ]
    return _draw(["no budget", "a budget between", "the smallest budget"], plans)


def gathers() -> str:
    """What eight devices that share the weights keep of those that they gather."""
    inputs = (torch.randn(128, 128),)
    keeping, again = (fxzero.plan(Net(), inputs, devices=8, zero=zero) for zero in (2, 3))
    middle = (keeping.peak_bytes + again.peak_bytes) // 2
    mixed = fxzero.plan(Net(), inputs, devices=8, zero="auto", memory_budget=middle)
    return _draw(
        ["zero=2: kept", 'zero="auto": some of each', "zero=3: gathered again"],
        [keeping, mixed, again],
    )


def _draw(titles: Sequence[str], plans: Sequence[fxzero.Plan]) -> str:
    """One area for each plan, on the same axes."""
    tracks = [plan.timeline[0] for plan in plans]
    highest = 1.05 * max(max(track.totals) for track in tracks)
    longest = max(track.seconds[-1] for track in tracks)
    roles = in_reading_order({role for track in tracks for role in track.bytes})
    width = len(plans) * (_WIDTH + _GAP) - _GAP + 20
    height = _TOP + _HEIGHT + 56
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, (title, plan, track) in enumerate(zip(titles, plans, tracks, strict=True)):
        left = 10 + index * (_WIDTH + _GAP)
        xs = [left + _WIDTH * at / longest * 0.97 for at in track.seconds]
        ends = [*xs[1:], xs[-1] + _WIDTH * 0.03]
        base = [0] * len(xs)
        for role in roles:
            above = [low + size for low, size in zip(base, track.of(role), strict=True)]
            if above != base:
                points = _outline(xs, ends, base, above, highest)
                parts.append(f'<polygon points="{points}" fill="{_COLOURS[role]}"/>')
            base = above
        parts += [
            f'<text x="{left}" y="18" font-weight="bold">{title}</text>',
            f'<text x="{left}" y="36">peak {format_bytes(plan.peak_bytes)}, '
            f"step {plan.step_seconds * 1e3:.1f} ms</text>",
            _line(left, _TOP + _HEIGHT, left + _WIDTH, _TOP + _HEIGHT, "#59616a"),
        ]
        if budget := plan.request.memory_budget:
            y = _TOP + _HEIGHT * (1 - budget / highest)
            parts.append(_line(left, y, left + _WIDTH, y, "#a3211a"))
        turn = next(phase.start for phase in plan.phases if phase.name == "backward")
        x = left + _WIDTH * turn / longest * 0.97
        parts.append(_line(x, _TOP, x, _TOP + _HEIGHT, "#59616a", dashed=True))
        parts.append(f'<text x="{left}" y="{_TOP + _HEIGHT + 16}">forward</text>')
        parts.append(f'<text x="{x + 3:.1f}" y="{_TOP + _HEIGHT + 16}">backward</text>')
    x = 10
    for role in roles:
        if any(any(track.of(role)) for track in tracks):
            y = height - 18
            parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{_COLOURS[role]}"/>')
            parts.append(f'<text x="{x + 14}" y="{y + 10}">{role}</text>')
            x += 30 + round(6.2 * len(role))
    return "\n".join([*parts, "</svg>", ""])


def _outline(
    xs: Sequence[float],
    ends: Sequence[float],
    lower: Sequence[int],
    upper: Sequence[int],
    highest: float,
) -> str:
    """A band's corners: along its top in steps, and back along its bottom."""
    top = [point for x, end, y in zip(xs, ends, upper, strict=True) for point in ((x, y), (end, y))]
    low = [point for x, end, y in zip(xs, ends, lower, strict=True) for point in ((x, y), (end, y))]
    corners = [(x, _TOP + _HEIGHT * (1 - y / highest)) for x, y in [*top, *reversed(low)]]
    kept = [
        c for i, c in enumerate(corners) if not 0 < i < len(corners) - 1 or not _flat(corners, i)
    ]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in kept)


def _flat(corners: Sequence[tuple[float, float]], i: int) -> bool:
    """Whether a corner lies on the line between its neighbours, at one height."""
    return corners[i - 1][1] == corners[i][1] == corners[i + 1][1]


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="4 3"' if dashed else ""
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" '
        f'stroke="{colour}" stroke-width="1.5"{dashes}/>'
    )


if __name__ == "__main__":
    main()
