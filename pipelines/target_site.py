"""Which site to harmonize to: the one whose own scans resemble each other most.

As in the paper by the mean pairwise Wasserstein distance between the masked intensities of its
scans, taken over its sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.prepare import load_prepared
from pipelines.verdict import person
from sgcd_core.errors import InputError
from sgcd_core.metrics import intensity_quantiles

log = logging.getLogger(__name__)


def suggest_target(catalog: Catalog, lake: Lake, recipe: str) -> list[dict[str, Any]]:
    """Within-site distances of all sites and sequences, the most uniform first.

    Args:
        catalog: The lake's tables.
        lake: Where the prepared scans lie.
        recipe: Digest of the preparation settings.

    Returns:
        Rows with site, sequence, distance (mean pairwise Wasserstein-1 between prepared scans,
        fraction of the intensity range), n (scans) and subjects. A site with one scan has no
        distance (None) and comes last. Test scans are left out.

    Raises:
        InputError: LAKE-EMPTY when no training scan is prepared.
    """
    quantiles: dict[tuple[str, str], list[np.ndarray[Any, np.dtype[np.float64]]]] = {}
    subjects: dict[tuple[str, str], set[str]] = {}
    for scan in catalog.rows("scans").to_pylist():
        if scan["status"] != "ok" or scan["split"] == "test" or scan["site"] is None:
            continue
        try:
            prepared = load_prepared(lake, recipe, scan["scan_id"])
        except InputError as error:
            log.info("suggest-target=skipped scan=%s code=%s", scan["scan_id"], error.code)
            continue
        key = (scan["site"], scan["sequence"])
        quantiles.setdefault(key, []).append(intensity_quantiles(prepared.image, prepared.mask))
        subjects.setdefault(key, set()).add(person(scan))
    if not quantiles:
        raise InputError(
            "no training scan is prepared.", code="LAKE-EMPTY", where=lake.uri,
            hint="Run `sgcd prepare --lake LAKE` first.",
        )  # fmt: skip
    rows = [
        {
            "site": site, "sequence": sequence, "distance": mean_pairwise(np.stack(found)),
            "n": len(found), "subjects": len(subjects[site, sequence]),
        }
        for (site, sequence), found in quantiles.items()
    ]  # fmt: skip
    return sorted(
        rows,
        key=lambda r: (r["distance"] is None, r["distance"] or 0, r["site"], r["sequence"]),
    )


def best_target(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]] | None:
    """The site to tune to, and the sequences in which its own scans could be compared.

    Of the sites with two people in as many sequences as any site has them in, the one with the
    lowest mean distance over these sequences; None when no site has two people in one.

    Args:
        rows: As `suggest_target` returns them.
    """
    measured: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["distance"] is not None and row["subjects"] > 1:
            measured.setdefault(row["site"], {})[row["sequence"]] = row["distance"]
    if not measured:
        return None

    def rank(site: str) -> tuple[int, float, str]:
        found = measured[site]
        return -len(found), sum(found.values()) / len(found), site

    best = min(measured, key=rank)
    return best, sorted(measured[best])


def mean_pairwise(quantiles: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    """Mean over all pairs of the mean absolute difference; (N, K) → number, None for one row.

    Sorting each of the K quantiles over the N scans gives the sum over pairs in N log N: the i-th
    smallest is subtracted i times less often than it is subtracted from.
    """
    n = len(quantiles)
    if n < 2:
        return None
    weights = 2 * np.arange(n) - n + 1
    total = (np.sort(quantiles, axis=0) * weights[:, None]).sum(axis=0)
    return float(total.mean() / (n * (n - 1) / 2))
