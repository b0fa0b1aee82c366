"""What an evaluation measured, beside the model card of the model it measured."""

from __future__ import annotations

from typing import Any

from pipelines.evaluate import EvaluationSummary
from pipelines.lake import Lake
from pipelines.verdict import METHOD_TITLES, SITE_DISTANCE, Estimate, number
from sgcd_core.io.store import Store, join
from sgcd_core.metrics import MEASURES
from sgcd_core.model_card import FIGURES, rows_table
from sgcd_core.words import counted

_SEEN = {True: "yes", False: "no", None: "-"}


def write_figures(lake: Lake, found: EvaluationSummary, code_version: str) -> str:
    """Write `FIGURES.md` into the model's folder, in place of an earlier one; its address.

    The model's own files, which are digested, are not touched.

    Raises:
        StorageError: The store cannot be written.
    """
    uri = join(lake.model(found.model, found.version), FIGURES)
    Store().write_bytes(uri, figures_markdown(found, code_version).encode())
    return uri


def figures_markdown(found: EvaluationSummary, code_version: str) -> str:
    """The verdict and its tables; the same evaluation always gives the same text."""
    parts = [
        f"# Figures: {found.model}, version {found.version}",
        f"By `sgcd evaluate`, program {code_version}. {counted(found.pairs, 'scan')} of test "
        "subjects compared with the same subject's scan at the target, which served for nothing "
        "else. Means over subjects, 95 % bootstrap intervals in brackets; inside the brain.",
    ]
    if found.skipped:
        parts.append(f"{counted(len(found.skipped), 'scan')} could not be compared.")
    if found.verdict:
        parts.append("\n".join(f"- {sentence}" for sentence in found.verdict))
    if found.summary.lines:
        parts.append("## Against the truth\n\n" + rows_table(_lines(found)))
    distances = [row for row in found.site_rows if row["metric"] == SITE_DISTANCE]
    if distances:
        parts.append(
            "## Distance of a site's mean histogram to the target's\n\n"
            + rows_table([_distance(row) for row in distances])
        )
    return "\n\n".join(parts) + "\n"


def _lines(found: EvaluationSummary) -> list[dict[str, Any]]:
    return [
        {
            "site": line.site, "sequence": line.sequence, "seen in training": _SEEN[line.seen],
            "measure": f"{MEASURES[line.metric].title} ({MEASURES[line.metric].unit})",
            "subjects": line.n,
            **{
                METHOD_TITLES.get(method, method): _estimate(line.metric, value)
                for method, value in line.by_method.items()
            },
        }
        for line in found.summary.lines
    ]  # fmt: skip


def _estimate(metric: str, value: Estimate) -> str:
    mean, low, high = (number(metric, part) for part in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def _distance(row: dict[str, Any]) -> dict[str, Any]:
    after = Estimate(row["after"], row["low"], row["high"])
    return {
        "site": row["site"], "sequence": row["sequence"], "seen in training": _SEEN[row["seen"]],
        "method": METHOD_TITLES.get(row["method"], row["method"]),
        "before": number(SITE_DISTANCE, row["before"]), "after": _estimate(SITE_DISTANCE, after),
        "subjects": row["n"],
    }  # fmt: skip
