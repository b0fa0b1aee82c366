"""`sgcd status`: what is done, failed and set aside, and how to go on."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ray_jobs.context import open_lake, quoted
from ray_jobs.outcome import Outcome, table
from sgcd_core.errors import REPLACED, ModelError
from sgcd_core.words import counted

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.catalog import Catalog


def run(args: Any) -> Outcome:
    """Count scans, prepared volumes, models and results; name the next command."""
    import pyarrow.compute as pc

    from pipelines.aliases import aliases
    from pipelines.catalog import Catalog
    from pipelines.plan import LABELS, labels_differ
    from pipelines.training_data import prepared_ids
    from ray_jobs.models import models

    lake = open_lake(args.lake)
    catalog = Catalog(lake)
    scans = catalog.rows("scans", columns=("scan_id", *LABELS, "status", "code"))
    scans = scans.filter(~pc.field("code").isin([REPLACED]))
    ready = prepared_ids(lake, "")  # under whatever recipe
    groups = _groups(scans, ready)
    rows = catalog.rows(
        "results", columns=("scan_id", "model", "model_version", "status", "code", *LABELS)
    )
    at = pc.index_in(rows["scan_id"], scans["scan_id"].combine_chunks())
    rows, at = rows.filter(at.is_valid()), at.drop_null()
    relabelled = pc.sum(labels_differ(scans.take(at), rows)).as_py() or 0
    results = _counted(rows)
    have = models(lake)
    named = {name: aliases(lake, name) for name in have}
    lines = _scans(groups) + _models(have, named) + _results(results)
    if relabelled:
        lines += [f"{relabelled} results are under labels that were corrected since: harmonize", ""]
    here = quoted(args.lake)
    targets = sorted(name for name in have if name.startswith("target-"))
    if not scans.num_rows:
        follow = f"sgcd index SOURCE --lake {here}"
    elif not ready:
        follow = f"sgcd prepare --lake {here}"
    elif "global" not in have:
        follow = f"sgcd train --lake {here}"
    elif not targets:
        follow = f"sgcd suggest-target --lake {here}"
    else:
        follow = _with_model(catalog, targets, named, here)
    counts: Counter[str] = Counter()
    for (_, status, _), number in results.items():
        counts[status] += number
    usable = sum(count["usable"] for count in groups.values())
    text = (
        f"{counted(scans.num_rows, 'scan')} ({usable} usable), {len(ready)} prepared, "
        f"{counted(len(have), 'model')}, {counted(counts.total(), 'result')}"
    )
    text += (
        f" ({', '.join(f'{n} {status}' for status, n in counts.most_common())})" if counts else ""
    )
    data = {
        "scans": scans.num_rows, "usable": usable, "prepared": len(ready), "models": have,
        "aliases": named, "results": dict(counts), "relabelled": relabelled,
    }  # fmt: skip
    return Outcome(text, next=follow, lines=lines, data=data)


def _with_model(
    catalog: Catalog, targets: list[str], named: dict[str, dict[str, int]], here: str
) -> str:
    """What is left to do with a target model, a champion where there is one; "" for nothing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from pipelines.plan import plan
    from pipelines.report.write import INDEX, report_name
    from ray_jobs.models import meta_of, resolve
    from sgcd_core.io.store import Store, join

    champions = [name for name in targets if "champion" in named[name]]
    asked = f"{champions[-1]}@champion" if champions else targets[-1]
    words = f"--lake {here} --model {quoted(asked)}"
    try:
        name, version = resolve(catalog.lake, asked)
        learned = meta_of(catalog.lake, name, version).get("sequences")
    except ModelError:  # damaged: the command will say how
        return f"sgcd harmonize {words} --only-new"
    if plan(catalog, name, version, known=learned, only_new=True).todo.num_rows:
        return f"sgcd harmonize {words} --only-new"
    evaluated = _evaluated(catalog, name, version)
    results = catalog.rows(
        "results", where={"model": name, "model_version": version},
        columns=("status", "recorded_at"),
    )  # fmt: skip
    made = results.filter(pc.is_in(results["status"], pa.array(["ok", "flagged"])))
    newest = pc.max(made["recorded_at"]).as_py()
    if newest is not None and (evaluated is None or evaluated < newest):
        return f"sgcd evaluate {words}"
    store, page = Store(), join(catalog.lake.report(report_name(name, version)), INDEX)
    if not store.exists(page):
        return f"sgcd report {words}"
    # A store that tells whole seconds must not make a page older than what it shows.
    old = evaluated is not None and store.modified(page) < evaluated.replace(microsecond=0)
    return f"sgcd report {words}" if old else ""


def _evaluated(catalog: Catalog, name: str, version: int) -> datetime | None:
    """When the last evaluation of this version of this model that came to its end began."""
    runs = catalog.rows(
        "runs", where={"command": "evaluate"}, columns=("status", "started_at", "summary")
    )
    return max(
        (row["started_at"] for row in runs.to_pylist()
         if row["status"] in ("ok", "partial") and _of_model(row["summary"], name, version)),
        default=None,
    )  # fmt: skip


def _of_model(summary: str | None, name: str, version: int) -> bool:
    """Whether a run's summary is of this version of this model."""
    import json

    body = json.loads(summary or "{}")
    return bool((body.get("model"), body.get("version")) == (name, version))


def _groups(scans: pa.Table, ready: set[str]) -> dict[tuple[str, str], dict[str, int]]:
    """Scans, usable and prepared ones, by site and sequence."""
    import pyarrow as pa
    import pyarrow.compute as pc

    prepared = pc.is_in(scans["scan_id"], value_set=pa.array(ready, pa.string()))
    flags = {"scans": pa.array([1] * scans.num_rows, pa.int64()),
             "usable": pc.equal(scans["status"], "ok"), "prepared": prepared}  # fmt: skip
    keys = {name: pc.fill_null(scans[name], "-") for name in ("site", "sequence")}
    sums = pa.table(keys | flags).group_by(list(keys)).aggregate([(n, "sum") for n in flags])
    return {
        (row["site"], row["sequence"]): {name: int(row[f"{name}_sum"] or 0) for name in flags}
        for row in sums.sort_by([(name, "ascending") for name in keys]).to_pylist()
    }


def _counted(results: pa.Table) -> dict[tuple[str, str, str], int]:
    """Results by model, status and code."""
    keys = ["model", "model_version", "status", "code"]
    counted = results.group_by(keys).aggregate([([], "count_all")]).to_pylist()
    found = {
        (f"{row['model']}@{row['model_version']}", row["status"], row["code"] or "-"): row[
            "count_all"
        ]
        for row in counted
    }
    return dict(sorted(found.items()))


def _scans(groups: dict[tuple[str, str], dict[str, int]]) -> list[str]:
    rows = [[*key, *count.values()] for key, count in groups.items()]
    header = ["site", "sequence", "scans", "usable", "prepared"]
    return [*table(header, rows), ""] if rows else []


def _models(have: dict[str, list[int]], named: dict[str, dict[str, int]]) -> list[str]:
    rows = [
        [
            name, ", ".join(map(str, versions)),
            ", ".join(f"{alias}: {n}" for alias, n in sorted(named[name].items())) or "-",
        ]
        for name, versions in sorted(have.items())
    ]  # fmt: skip
    return [*table(["model", "versions", "aliases"], rows), ""] if rows else []


def _results(results: dict[tuple[str, str, str], int]) -> list[str]:
    rows = [[*key, n] for key, n in results.items()]
    return [*table(["model", "status", "code", "scans"], rows), ""] if rows else []
