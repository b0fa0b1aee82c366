"""The pictures of an evaluation, for its run in MLflow: the report's own, as files."""

from __future__ import annotations

import base64

from pipelines import figures
from pipelines.catalog import Catalog
from pipelines.evaluate import EvaluationSummary
from pipelines.lake import Lake
from pipelines.report_pictures import draw_pictures


def run_figures(lake: Lake, found: EvaluationSummary, recipe: str) -> dict[str, bytes]:
    """PNG by name: measures, histograms and distances of the sites, for each sequence.

    Args:
        lake: Where scans and results lie.
        found: What was evaluated.
        recipe: Digest of the preparation settings.
    """
    catalog, lines = Catalog(lake), found.summary.lines
    drawn = {
        f"measures_{sequence}": figures.measures(lines, sequence=sequence)
        for sequence in sorted({line.sequence for line in lines})
    }
    chosen = {"model": found.model, "model_version": found.version}
    scans, results = catalog.rows("scans"), catalog.rows("results", where=chosen)
    _, histograms, matrices = draw_pictures(
        lake, recipe, scans.to_pylist(), results.to_pylist(), found.target
    )
    for what, pictures in (("histograms", histograms), ("distances", matrices)):
        for sequence, address in pictures:
            drawn[f"{what}_{sequence}"] = base64.b64decode(address.partition("base64,")[2])
    return drawn
