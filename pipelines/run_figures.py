"""The pictures of an evaluation, for its run in MLflow: the report's own numbers, as files."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines import figures
from pipelines.evaluate import EvaluationSummary
from pipelines.lake import Lake
from pipelines.report.cohort import site_histograms
from pipelines.report.pages import some_histograms
from pipelines.report.source import load_source
from sgcd_core.metrics import histogram_distance


def run_figures(lake: Lake, found: EvaluationSummary) -> dict[str, bytes]:
    """PNG by name: measures, histograms and distances of the sites, for each sequence.

    Args:
        lake: Where scans and results lie.
        found: What was evaluated.
    """
    lines = found.summary.lines
    drawn = {
        f"measures_{sequence}": figures.measures(lines, sequence=sequence)
        for sequence in sorted({line.sequence for line in lines})
    }
    source = load_source(lake, found.model, found.version)
    for sequence, means in site_histograms(source, some_histograms(source)).items():
        pairs = {site: (before, after) for site, (before, after, _) in means.sites.items()}
        drawn[f"histograms_{sequence}"] = figures.histograms(pairs, means.target, sequence=sequence)
        extra = [] if means.target is None else [means.target]
        names = [*pairs, *([f"{source.target} (target)"] if extra else [])]
        if len(names) > 1:
            before = _matrix([*(b for b, _ in pairs.values()), *extra])
            after = _matrix([*(a for _, a in pairs.values()), *extra])
            drawn[f"distances_{sequence}"] = figures.distance_matrix(
                names, before, after, sequence=sequence
            )
    return drawn


def _matrix(histograms: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.array([[histogram_distance(p, q) for q in histograms] for p in histograms])
