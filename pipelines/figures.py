"""Pictures of scans and numbers as PNG bytes. Colours are told apart without colour vision."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.verdict import METHOD_TITLES, Estimate, Line
from sgcd_core.metrics import MEASURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Image = NDArray[np.float32]

#: Intensity drawn white: vessels and enhancing lesions lie above 1, white matter just below it.
WHITE = 1.2
INK = "#1f2933"
MUTED = "#7b8794"
#: Okabe & Ito's palette.
COLOURS = {
    "before": "#b0bac5", "after": "#0072b2", "target": "#d55e00",
    "raw": "#7b8794", "nyul": "#e69f00", "sgcd": "#0072b2", "minmax": "#cc79a7",
    "zscore": "#009e73", "whitestripe": "#56b4e9", "histogram": "#1f2933",
}  # fmt: skip


MARKERS = {
    "raw": "s", "nyul": "^", "sgcd": "o", "minmax": "v", "zscore": "P", "whitestripe": "X",
}  # fmt: skip


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display and no pyplot state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as the bytes of a PNG."""
    out = io.BytesIO()
    # Without the software's name and version the bytes are the same on every machine.
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def plain_axes(axes: Any) -> None:
    """Only the lines that carry information."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8)


def three_planes(image: Image) -> Image:
    """Middle sagittal, coronal and axial slices side by side, (rows, columns), front and top up.

    Args:
        image: float32, (X, Y, Z), RAS+, [0, 1].
    """
    x, y, z = (n // 2 for n in image.shape)
    # A little off the midline: the sagittal plane between the hemispheres shows no cortex.
    x = min(image.shape[0] - 1, x + image.shape[0] // 10)
    planes = [np.rot90(image[x]), np.rot90(image[:, y]), np.rot90(image[:, :, z])]
    height = max(p.shape[0] for p in planes)
    padded = []
    for plane in planes:
        missing = height - plane.shape[0]
        padded.append(np.pad(plane, ((missing // 2, missing - missing // 2), (1, 1))))
    return np.concatenate(padded, axis=1).astype(np.float32)


def contact_sheet(rows: Sequence[tuple[str, Image, Image]]) -> bytes:
    """Input, output and their difference, one scan a row, three planes each.

    Args:
        rows: Label, prepared scan and harmonized scan; float32, (X, Y, Z), RAS+, [0, 1]. The
            difference is output less input, from -0.5 (blue) to 0.5 (red).
    """
    figure = new_figure(11.0, 1.25 * max(1, len(rows)) + 0.3)
    grid = figure.subplots(max(1, len(rows)), 3, squeeze=False)
    for axes, (label, before, after) in zip(grid, rows, strict=False):
        grey = {"cmap": "gray", "vmin": 0, "vmax": WHITE}
        axes[0].imshow(three_planes(before), **grey)
        axes[1].imshow(three_planes(after), **grey)
        axes[2].imshow(three_planes(after - before), cmap="RdBu_r", vmin=-0.5, vmax=0.5)
        axes[0].text(
            -0.02, 0.5, label, va="center", ha="right", fontsize=7, color=INK,
            transform=axes[0].transAxes,
        )  # fmt: skip
    for axes, title in zip(grid[0], ("input", "output", "output less input"), strict=True):
        axes.set_title(title, fontsize=9, color=INK)
    for axes in grid.flat:
        axes.set_axis_off()
    return as_png(figure, dpi=100)


def outlines(rows: Sequence[tuple[str, Image, Image, Image, Image]]) -> bytes:
    """A region outlined on input and output, in the axial slice that holds most of it.

    Args:
        rows: Label, input, the region found on it, output, the region found on that; volumes
            (X, Y, Z) RAS+, float32 in [0, 1] and bool.
    """
    figure = new_figure(6.4, 3.4 * max(1, len(rows)))
    grid = figure.subplots(max(1, len(rows)), 2, squeeze=False)
    for axes, (label, before, found, after, again) in zip(grid, rows, strict=False):
        level = int(np.asarray(found).sum(axis=(0, 1)).argmax())
        for axis, image, region, title in zip(
            axes, (before, after), (found, again), ("input", "output"), strict=True
        ):
            axis.imshow(np.rot90(image[:, :, level]), cmap="gray", vmin=0, vmax=WHITE)
            edge = np.rot90(np.asarray(region[:, :, level], np.float32))
            if edge.any():
                axis.contour(edge, levels=[0.5], colors=[COLOURS["target"]], linewidths=1.0)
            axis.set_title(f"{label}, {title}", fontsize=8, color=INK, loc="left")
    for axes in grid.flat:
        axes.set_axis_off()
    return as_png(figure)


def histograms(
    sites: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    target: NDArray[np.float64] | None,
    *,
    sequence: str,
) -> bytes:
    """Mean masked histogram of each site before and after, with the target's behind.

    Args:
        sites: Site → (before, after), each (bins,), shares over [0, 1].
        target: The target's mean histogram, (bins,), or None.
        sequence: For the title.
    """
    columns = min(3, max(1, len(sites)))
    lines = -(-max(1, len(sites)) // columns)
    figure = new_figure(3.2 * columns, 2.0 * lines + 0.5)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(sites) :]:
        axes.set_axis_off()
    for axes, (site, (before, after)) in zip(grid.flat, sites.items(), strict=False):
        at = (np.arange(len(before)) + 0.5) / len(before)
        if target is not None:
            axes.fill_between(at, target, color=COLOURS["target"], alpha=0.22, lw=0, label="target")
        axes.plot(at, before, color=MUTED, lw=1.3, ls=(0, (4, 2)), label="before")
        axes.plot(at, after, color=COLOURS["after"], lw=1.6, label="after")
        axes.set_title(site, fontsize=9, color=INK, loc="left")
        axes.set_yticks([])
        axes.set_xlim(0, 1)
        plain_axes(axes)
        axes.spines["left"].set_visible(False)
    figure.supxlabel(f"{sequence} intensity inside the brain, prepared scan", fontsize=8, color=INK)
    if sites:
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper right", ncols=3, fontsize=8, frameon=False
        )
    return as_png(figure)


def measures(lines: Sequence[Line], *, sequence: str) -> bytes:
    """Each measure by site and method: a point for the mean, a line for the 95 % interval.

    Points, not bars: similarities crowd near 1, and a bar that does not start at 0 misleads.
    """
    kept = [line for line in lines if line.sequence == sequence]
    metrics = [m for m in MEASURES if any(line.metric == m for line in kept)]
    figure = new_figure(3.1 * max(1, len(metrics)), 2.7)
    grid = figure.subplots(1, max(1, len(metrics)), squeeze=False)[0]
    for axes, metric in zip(grid, metrics, strict=False):
        rows = [line for line in kept if line.metric == metric]
        methods = [m for m in METHOD_TITLES if any(m in line.by_method for line in rows)]
        for number, method in enumerate(methods):
            shift = (number - (len(methods) - 1) / 2) * 0.5 / max(1, len(methods))
            found = [(i + shift, line.by_method.get(method)) for i, line in enumerate(rows)]
            points = [(x, e) for x, e in found if e is not None and np.isfinite(e.mean)]
            axes.errorbar(
                [x for x, _ in points],
                [e.mean for _, e in points],
                _spread([e for _, e in points]),
                fmt=MARKERS.get(method, "D"), color=COLOURS.get(method, MUTED), markersize=6,
                elinewidth=1.4, label=METHOD_TITLES[method],
            )  # fmt: skip
        measure = MEASURES[metric]
        unit = "" if measure.unit == "1" else f", {measure.unit}"
        better = "higher is closer" if measure.higher_is_better else "lower is closer"
        axes.set_title(f"{measure.title}{unit}\n{better}", fontsize=8, color=INK, loc="left")
        names = [line.site + ("" if line.seen is not False else "\n(unseen)") for line in rows]
        axes.set_xticks(range(len(rows)), names, rotation=0 if len(rows) < 4 else 35)
        axes.set_xlim(-0.5, len(rows) - 0.5)
        axes.margins(y=0.12)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        plain_axes(axes)
    figure.suptitle(sequence, x=0.01, ha="left", fontsize=10, color=INK)
    if metrics:
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper right", ncols=len(labels), fontsize=8, frameon=False
        )
    return as_png(figure)


def _spread(found: Sequence[Estimate]) -> NDArray[np.float64]:
    """Lengths of the interval below and above each mean, (2, N)."""
    ends = [[e.mean - e.low for e in found], [e.high - e.mean for e in found]]
    return np.maximum(np.array(ends, np.float64), 0)


def distance_matrix(
    names: Sequence[str],
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    *,
    sequence: str,
) -> bytes:
    """Distances between the sites' mean histograms before and after, on one colour scale.

    Args:
        names: Sites, in the order of the matrices.
        before: (N, N), fraction of the intensity range.
        after: (N, N).
        sequence: For the title.
    """
    side = 1.1 + 0.5 * len(names)
    figure = new_figure(2 * side + 0.6, side + 0.5)
    grid = figure.subplots(1, 2)
    top = max(float(before.max()), float(after.max()), 1e-6)
    for axes, matrix, title in zip(grid, (before, after), ("before", "after"), strict=True):
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=top)
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0, labelsize=8, colors=INK)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{sequence} {title}", fontsize=9, color=INK, loc="left")
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                colour = "white" if value > 0.6 * top else INK
                text = f"{value:.3f}".lstrip("0")
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    return as_png(figure)
