"""`sgcd status`: what is done, failed and set aside, and how to go on."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray_jobs.context import open_lake, quoted
from ray_jobs.outcome import Outcome, table


def run(args: Any) -> Outcome:
    """Count scans, prepared volumes, models and results; name the next command."""
    from pipelines.catalog import Catalog
    from pipelines.training_data import prepared_ids
    from ray_jobs.models import models

    lake = open_lake(args.lake)
    catalog = Catalog(lake)
    scans = catalog.rows("scans").to_pylist()
    ready = prepared_ids(lake, "")  # under whatever recipe
    results = catalog.rows("results").to_pylist()
    have = models(lake)
    lines = _scans(scans, ready) + _models(have) + _results(results)
    here = quoted(args.lake)
    targets = sorted(name for name in have if name.startswith("target-"))
    if not scans:
        follow = f"sgcd index SOURCE --lake {here}"
    elif not ready:
        follow = f"sgcd prepare --lake {here}"
    elif "global" not in have:
        follow = f"sgcd train --lake {here}"
    elif not targets:
        follow = f"sgcd suggest-target --lake {here}"
    else:
        follow = f"sgcd harmonize --lake {here} --model {quoted(targets[-1])} --only-new"
    counts = Counter(row["status"] for row in results)
    usable = sum(scan["status"] == "ok" for scan in scans)
    text = (
        f"{len(scans)} scans ({usable} usable), {len(ready)} prepared, {len(have)} models, "
        f"{len(results)} results"
    )
    text += (
        f" ({', '.join(f'{n} {status}' for status, n in counts.most_common())})" if counts else ""
    )
    data = {
        "scans": len(scans), "usable": usable, "prepared": len(ready), "models": have,
        "results": dict(counts),
    }  # fmt: skip
    return Outcome(text, next=follow, lines=lines, data=data)


def _scans(scans: list[dict[str, Any]], ready: set[str]) -> list[str]:
    groups: dict[tuple[str, str], Counter[str]] = {}
    for scan in scans:
        count = groups.setdefault((scan["site"] or "-", scan["sequence"] or "-"), Counter())
        count["scans"] += 1
        count["usable"] += scan["status"] == "ok"
        count["prepared"] += scan["scan_id"] in ready
    names = ("scans", "usable", "prepared")
    rows = [[*key, *(count[name] for name in names)] for key, count in sorted(groups.items())]
    return [*table(["site", "sequence", *names], rows), ""] if rows else []


def _models(have: dict[str, list[int]]) -> list[str]:
    rows = [[name, ", ".join(map(str, versions))] for name, versions in sorted(have.items())]
    return [*table(["model", "versions"], rows), ""] if rows else []


def _results(results: list[dict[str, Any]]) -> list[str]:
    count = Counter(
        (f"{row['model']}@{row['model_version']}", row["status"], row["code"] or "-")
        for row in results
    )
    rows = [[*key, n] for key, n in sorted(count.items())]
    return [*table(["model", "status", "code", "scans"], rows), ""] if rows else []
