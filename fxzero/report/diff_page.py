"""The difference of two Plans as one self-contained HTML page: both timelines on equal axes."""

from __future__ import annotations

from fxzero.plans import Plan
from fxzero.report import charts, wording
from fxzero.report import diff as differences
from fxzero.report.html import areas_data, fill

# More changes of one list would hide those that matter; the text says how many there are.
_MOST_CHANGES = 300


def render(before: Plan, after: Plan) -> str:
    """The page; like a plan's, it needs nothing but itself."""
    sides = [("before", before, charts.timeline(before, after))]
    sides.append(("after", after, charts.timeline(after, before)))
    found = list(differences.changes(before, after))
    gone, new = differences.notes(before, after)
    return fill(
        "diff.html.j2",
        sides=sides,
        summary=_summary(before, after),
        worse=after.peak_bytes > before.peak_bytes or not after.fits,
        equal=before == after,
        other_graph=before.graph_digest != after.graph_digest and differences.OTHER_GRAPH,
        settings=list(differences.settings(before, after)),
        totals=list(differences.totals(before, after)),
        changes=[(title, each[:_MOST_CHANGES], len(each)) for title, each in found],
        gone=gone,
        new=new,
        data={"areas": [a for n, _, t in sides for a in areas_data(t, f"{n}, ")]},
    )


def _summary(before: Plan, after: Plan) -> str:
    """What happened to the peak and to the verdict, in one sentence."""
    if before == after:
        return "the plans are equal"
    more = after.peak_bytes - before.peak_bytes
    peak = f"peak {wording.signed_bytes(more)}" if more else "the same peak"
    if before.fits and not after.fits:
        return f"{peak}: no longer fits"
    if after.fits and not before.fits:
        return f"{peak}: fits now"
    return f"{peak}, {'still fits' if after.fits else 'does not fit, as before'}"
