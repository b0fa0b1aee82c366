"""Tables and plots of the ablations, from their results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ablation_list import (
    ABLATIONS,
    EVALUATIONS,
    STARTS,
    STEPS,
    VARIANTS,
    WALKS,
    Ablation,
)

from pipelines.figures import COLOURS, INK, MUTED, as_png, new_figure, plain_axes
from pipelines.verdict import number
from sgcd_core.metrics import MEASURES, bootstrap_interval

Row = dict[str, Any]
Results = Mapping[str, Row | None]
Group = tuple[str, bool]
GROUPS: tuple[Group, ...] = (("T1w", True), ("T1w", False), ("T2w", True), ("T2w", False))
NONE = "—"


def group_title(group: Group) -> str:
    """`T1w, seen` or the like."""
    return f"{group[0]}, {'seen' if group[1] else 'unseen'}"


def values(result: Row | None, metric: str) -> dict[tuple[str, str, str], float]:
    """A metric by subject, site and sequence."""
    return {
        (row["subject"], row["site"], row["sequence"]): row["value"]
        for row in (result or {}).get("rows", ())
        if row["metric"] == metric
    }


def mean(result: Row | None, metric: str, group: Group, only: Iterable[Any] | None = None) -> float:
    """Mean of a metric over subjects' means, of one sequence at seen or unseen sites; else NaN.

    Args:
        result: Of one row.
        metric: Key of `MEASURES`.
        group: Sequence, and whether the sites were in training.
        only: Keys of `values` to keep.
    """
    seen = {(r["subject"], r["site"], r["sequence"]) for r in (result or {}).get("rows", ())
            if (r["sequence"], r["seen"]) == group}  # fmt: skip
    kept = seen if only is None else seen & set(only)
    by_subject: dict[str, list[float]] = {}
    for key, value in values(result, metric).items():
        if key in kept:
            by_subject.setdefault(key[0], []).append(value)
    return float(np.mean([np.mean(v) for v in by_subject.values()])) if by_subject else np.nan


def difference(result: Row | None, other: Row | None) -> str:
    """Mean difference of PSNR on the same scans, with its interval over subjects."""
    mine, theirs = values(result, "psnr"), values(other, "psnr")
    keys = sorted(mine.keys() & theirs.keys())
    if not keys:
        return NONE
    gaps = [mine[key] - theirs[key] for key in keys]
    low, high = bootstrap_interval(gaps, [key[0] for key in keys])
    return f"{np.mean(gaps):+.2f} ({low:+.2f} to {high:+.2f})"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def runs_table(results: Results) -> str:
    """What each variant was, what it took, and its PSNR in dB beside the row it differs from."""
    head = ["row", "what", "start", "steps", "seconds", "evaluations",
            *map(group_title, GROUPS), "against", "PSNR, dB more"]  # fmt: skip

    def cells(ablation: Ablation) -> list[str]:
        result = results.get(ablation.name)
        first = [f"`{ablation.name}`", ablation.title]
        if result is None or "error" in result:
            why = "not run" if result is None else result["error"]
            return [*first, why, *[NONE] * (len(head) - 3)]
        steps = f"{result['steps']} + {result['tune_steps']}" if result["steps"] else NONE
        seconds = f"{result['train_seconds']:.0f} + {result['tune_seconds']:.0f}"
        other = ablation.against
        return [
            *first, result["start"] or NONE, steps, seconds if result["steps"] else NONE,
            str(result["evaluations"]), *(_cell(mean(result, "psnr", g), "psnr") for g in GROUPS),
            f"`{other}`" if other else NONE,
            difference(result, results.get(other)) if other else NONE,
        ]  # fmt: skip

    return _table(head, map(cells, VARIANTS))


def _cell(value: float, metric: str) -> str:
    return NONE if np.isnan(value) else number(metric, value)


def scores_table(results: Results) -> str:
    """The other measures of every variant, T1w seen / T1w unseen / T2w seen / T2w unseen."""
    metrics = [name for name in MEASURES if name != "psnr"]
    head = ["row", *(f"{MEASURES[m].title}: {group_title(g)}" for m in metrics for g in GROUPS)]
    return _table(head, (
        [f"`{a.name}`", *(_cell(mean(results.get(a.name), m, g), m)
                          for m in metrics for g in GROUPS)]
        for a in VARIANTS
    ))  # fmt: skip


def evaluations_table(results: Results) -> str:
    """PSNR by t_0 and network evaluations of Stage 2, mean of the four groups."""
    rows = [
        [str(t), *(_overall(results.get(f"evaluations-t{t}-n{n}")) for n in STEPS)] for t in STARTS
    ]
    return _table(["t_0, evaluations:", *map(str, STEPS)], rows)


def inversion_table(results: Results) -> str:
    """PSNR by t_0, T_f and T_r, mean of the four groups."""
    rows = [
        [str(t), *(_overall(results.get(f"inversion-t{t}-f{a}-r{b}")) for a, b in WALKS)]
        for t in STARTS
    ]
    return _table(["t_0; T_f, T_r:", *(f"{a}, {b}" for a, b in WALKS)], rows)


def overall(result: Row | None, only: Iterable[Any] | None = None) -> float:
    """PSNR, the four groups alike."""
    found = [mean(result, "psnr", group, only) for group in GROUPS]
    return float(np.mean(found))


def _overall(result: Row | None) -> str:
    return _cell(overall(result), "psnr")


def chart(results: Results) -> bytes:
    """Bars of PSNR by variant, seen and unseen sites side by side, a panel a sequence. PNG."""
    shown = [a for a in VARIANTS if values(results.get(a.name), "psnr")]
    figure = new_figure(9.5, 1.2 + 0.34 * len(shown))
    panels = figure.subplots(1, 2, sharey=True)
    at = np.arange(len(shown))[::-1]
    for axes, sequence in zip(panels, ("T1w", "T2w"), strict=True):
        for seen, colour, shift in ((True, COLOURS["after"], 0.2), (False, COLOURS["nyul"], -0.2)):
            heights = [mean(results[a.name], "psnr", (sequence, seen)) for a in shown]
            axes.barh(at + shift, heights, 0.36, color=colour,
                      label=f"sites {'seen' if seen else 'not seen'} in training")  # fmt: skip
        plain_axes(axes)
        axes.set_title(sequence, fontsize=9, color=INK)
        axes.set_xlabel("PSNR to the subject's scan at the target, dB", fontsize=8)
        pairs = [(a.name, (sequence, seen)) for a in shown for seen in (True, False)]
        low = min(mean(results[name], "psnr", group) for name, group in pairs)
        axes.set_xlim(left=max(0.0, np.floor(low) - 1))
    panels[0].set_yticks(at, [f"{a.name}" for a in shown])
    panels[0].legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.04))
    return as_png(figure)


def evaluations_chart(results: Results) -> bytes:
    """PSNR against network evaluations of Stage 2, a line for each t_0. PNG."""
    figure = new_figure(6.4, 3.8)
    axes = figure.subplots()
    colours = ("#0072b2", "#e69f00", "#009e73", "#d55e00")
    for t, colour, marker in zip(STARTS, colours, "o^sD", strict=True):
        line = [overall(results.get(f"evaluations-t{t}-n{n}")) for n in STEPS]
        axes.plot(STEPS, line, color=colour, marker=marker, ms=5, lw=1.4, label=f"t₀ = {t}")
    few = {key for a in EVALUATIONS for key in values(results.get(a.name), "psnr")}
    for name, style in (("raw", ":"), ("matched", "--")):
        height = overall(results.get(name), few)
        if not np.isnan(height):
            axes.axhline(height, color=MUTED, ls=style, lw=1, label=ABLATIONS[name].title)
    axes.set_xscale("log", base=2)
    axes.set_xticks(STEPS, [str(n) for n in STEPS])
    axes.set_xlabel("network evaluations", fontsize=8)
    axes.set_ylabel("PSNR, dB, mean of both sequences, seen and unseen", fontsize=8)
    axes.legend(fontsize=7, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.01))
    plain_axes(axes)
    return as_png(figure)
