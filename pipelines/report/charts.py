"""Charts as inline SVG: they follow the page's colours, print sharply and weigh little.

Colours and strokes are classes of the page's style sheet. A chart has a text alternative; its
numbers stand in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from pipelines.verdict import METHOD_TITLES, Line, number
from sgcd_core.metrics import MEASURES

Histogram = NDArray[np.float64]

WIDTH, PANEL_HEIGHT = 300, 110
#: Methods that have a colour; the marks of the others are hollow.
_COLOURED = ("raw", "nyul", "sgcd")
#: Charts tell methods apart by shape as well as by colour; what is not named here is a diamond.
_SHAPES = {
    "raw": "square", "nyul": "triangle", "sgcd": "circle",
    "minmax": "square", "zscore": "triangle", "whitestripe": "circle",
}  # fmt: skip


def histogram_panel(
    label: str,
    before: Histogram,
    after: Histogram | None,
    target: Histogram | None,
    top: float | None = None,
) -> Markup:
    """Shares of intensity before (dashed), after (solid) and at the target (filled).

    Args:
        label: Text alternative.
        before: (bins,), shares over [0, 1]; as `after` and `target`.
        after: None where there is no output.
        target: None without a target.
        top: Share at the upper edge, the same for panels that are compared.
    """
    known = [h for h in (before, after, target) if h is not None]
    top = top or panel_top(known)
    base = PANEL_HEIGHT - 18
    parts = []
    if target is not None:
        line = _polyline(target, top, base)
        parts.append(f'<polygon class="h-target" points="0,{base} {line} {WIDTH},{base}"/>')
    parts.append(f'<polyline class="h-before" points="{_polyline(before, top, base)}"/>')
    if after is not None:
        parts.append(f'<polyline class="h-after" points="{_polyline(after, top, base)}"/>')
    parts.append(f'<line class="axis" x1="0" x2="{WIDTH}" y1="{base}" y2="{base}"/>')
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        parts.append(
            f'<text class="tick" x="{share * WIDTH:g}" y="{base + 14}" '
            f'text-anchor="{anchor}">{share:g}</text>'
        )
    return _svg(label, WIDTH, PANEL_HEIGHT, parts)


def panel_top(found: Sequence[Histogram]) -> float:
    """The highest share but for the darkest bin, which holds whatever lies below the range."""
    return max([float(h[1:].max(initial=0)) for h in found] + [1e-6]) * 1.08


def shortened(name: str) -> str:
    """A site's name in at most 13 letters: its beginning and its end, which tell it from others."""
    return name if len(name) < 14 else f"{name[:6]}…{name[-6:]}"


def _polyline(shares: Histogram, top: float, base: float) -> str:
    at = (np.arange(len(shares)) + 0.5) / len(shares) * WIDTH
    height = base - np.minimum(shares / top, 1) * (base - 4)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(at, height, strict=True))


def measure_chart(lines: Sequence[Line], metric: str) -> Markup:
    """One measure by site: a point for each method's mean, a line for its 95 % interval.

    Points, not bars: similarities crowd near 1, and a bar that does not start at 0 misleads.

    Args:
        lines: Lines of one sequence.
        metric: Key of `MEASURES`.
    """
    rows = [line for line in lines if line.metric == metric]
    methods = [m for m in METHOD_TITLES if any(m in line.by_method for line in rows)]
    ends = [
        end for line in rows for e in line.by_method.values() for end in (e.mean, e.low, e.high)
        if math.isfinite(end)
    ]  # fmt: skip
    low, high = _span(ends)
    left, right, step = 92, WIDTH - 10, 12 * max(1, len(methods)) + 10
    height = step * len(rows) + 22

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = []
    for tick in _ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="0" y2="{height - 18}"/>'
            f'<text class="tick" x="{x(tick):.1f}" y="{height - 4}" text-anchor="middle">'
            f"{tick:.6g}</text>"
        )
    for index, line in enumerate(rows):
        middle = step * index + step / 2
        unseen = " ○" if line.seen is False else ""
        parts.append(
            f'<text x="0" y="{middle + 4:.1f}"><title>{escape(line.site)}</title>'
            f"{escape(shortened(line.site))}{unseen}</text>"
        )
        for place, method in enumerate(methods):
            found = line.by_method.get(method)
            if found is None or not math.isfinite(found.mean):
                continue
            y = middle + (place - (len(methods) - 1) / 2) * 12
            kind = _kind(method)
            if math.isfinite(found.low) and found.high > found.low:
                parts.append(
                    f'<line class="m-{kind}" x1="{x(found.low):.1f}" x2="{x(found.high):.1f}" '
                    f'y1="{y:.1f}" y2="{y:.1f}"/>'
                )
            parts.append(_mark(method, x(found.mean), y))
    return _svg(f"{MEASURES[metric].title} by site: {_words(rows, methods)}", WIDTH, height, parts)


def _words(rows: Sequence[Line], methods: Sequence[str]) -> str:
    """The chart's numbers as a sentence, for those who cannot see it."""
    said = []
    for line in rows:
        values = [
            f"{METHOD_TITLES[m]} {number(line.metric, line.by_method[m].mean)}"
            for m in methods
            if m in line.by_method
        ]
        said.append(f"{line.site}: {', '.join(values)}")
    return "; ".join(said)


def method_mark(method: str) -> Markup:
    """The mark of a method, for a legend."""
    return Markup(f'<svg viewBox="0 0 12 12" aria-hidden="true">{_mark(method, 6, 6)}</svg>')


def _kind(method: str) -> str:
    """The class that gives the method its colour."""
    return method if method in _COLOURED else "other"


def _mark(method: str, x: float, y: float) -> str:
    shape, kind = _SHAPES.get(method, "diamond"), _kind(method)
    if shape == "circle":
        return f'<circle class="m-{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    corners = {
        "square": ((-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)),
        "triangle": ((0, -4.5), (4.5, 3.5), (-4.5, 3.5)),
        "diamond": ((0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="m-{kind}" points="{points}"/>'


def gauge(label: str, value: float, limit: float, top: float, *, at_least: bool) -> Markup:
    """A value on a scale from 0 to `top` with the part that is flagged shaded.

    Args:
        label: Text alternative.
        value: The score.
        limit: Where flagging begins.
        top: End of the scale; a value beyond is drawn at the end.
        at_least: Flagged below the limit; else above it.
    """

    def x(at: float) -> float:
        return min(1.0, max(0.0, at / top)) * (WIDTH - 10) + 5

    start, end = (x(0), x(limit)) if at_least else (x(limit), x(top))
    bad = not (value >= limit if at_least else value <= limit)
    parts = [
        f'<rect class="g-scale" x="5" y="8" width="{WIDTH - 10}" height="4" rx="2"/>',
        f'<rect class="g-flag" x="{start:.1f}" y="8" width="{end - start:.1f}" height="4" rx="2"/>',
        f'<circle class="{"g-bad" if bad else "g-good"}" cx="{x(value):.1f}" cy="10" r="5"/>',
    ]
    return _svg(label, WIDTH, 20, parts)


def matrix_cells(
    names: Sequence[str], histograms: Sequence[Histogram], top: float
) -> list[tuple[str, list[tuple[str, int]]]]:
    """Rows of a table of distances: name, then (text, strength of the colour in percent).

    Args:
        names: Sites.
        histograms: Their mean histograms.
        top: Distance of the strongest colour.
    """
    from sgcd_core.metrics import histogram_distance

    out = []
    for i, name in enumerate(names):
        cells = []
        for j, other in enumerate(histograms):
            value = histogram_distance(histograms[i], other)
            text = "" if i == j else f"{value:.3f}".lstrip("0")
            cells.append((text, round(min(1.0, value / top) * 100)))
        out.append((name, cells))
    return out


def largest_distance(groups: Mapping[str, Sequence[Histogram]]) -> float:
    """The largest distance inside any of the groups; never 0."""
    from sgcd_core.metrics import histogram_distance

    pairs = [histogram_distance(p, q) for group in groups.values() for p in group for q in group]
    return max([*pairs, 1e-6])


def _span(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers inside a range."""
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]


def _svg(label: str, width: float, height: float, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
