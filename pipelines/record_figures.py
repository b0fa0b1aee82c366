"""Figures of an evaluation into the tables: what is new or changed, and what no longer counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from pipelines.catalog import Catalog
from pipelines.catalog_rows import find_schema, to_arrow

Row = Mapping[str, Any]


def record_figures(
    catalog: Catalog, table: str, version: Row, rows: Sequence[Row], mine: Callable[[str], bool],
    lost: Iterable[Row] = (),
) -> bool:  # fmt: skip
    """Make `rows` all that one kind of evaluation says of one version of a model.

    Rows of its measures that it no longer makes (a scan was replaced, a site renamed, a method left
    out) are taken back by a row without a number; those that say the same already stay. What is no
    number (the AP of a tissue that the reference lacks) is no figure, and missing in a mean. So the
    tables show the newest evaluation of each kind, and `…_all` also those before. A scan that the
    store did not give says nothing: its figures, and those of its site, stay as they were.

    Args:
        catalog: The lake's tables.
        table: `metrics` or `site_metrics`.
        version: Holds `model` and `model_version`, those of every row.
        rows: Whole rows.
        mine: Whether a `metric` is one of this kind of evaluation.
        lost: Rows of `scans` that could not be read, see `MethodImages.lost`.

    Returns:
        Whether anything was written.

    Raises:
        StorageError: As `Catalog.append`.
    """
    schema = find_schema(table)
    told = [c.name for c in schema.columns if not c.now]
    whole = [
        {name: None if value != value else value for name, value in row.items()} for row in rows
    ]  # fmt: skip
    now = to_arrow(schema, whole).select(told).to_pylist()
    now = [row for row in now if row[schema.counts_by] is not None]
    where = {name: version[name] for name in ("model", "model_version")}
    old = [r for r in catalog.rows(table, where=where).to_pylist() if mine(r["metric"])]
    by = ("scan_id",) if "scan_id" in schema.key else ("site", "sequence")
    # a figure over all sites has none
    places = {place for scan in lost for place in product(*((scan[name], None) for name in by))}

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in schema.key)

    # as text, in which a number that is none equals itself
    said = {key(row): str([row[name] for name in told]) for row in old}
    stay = {key(row) for row in old if tuple(row[name] for name in by) in places}
    made = {key(row) for row in now} | stay
    changed = [
        row for row in now
        if key(row) not in stay and said.get(key(row)) != str([row[name] for name in told])
    ]  # fmt: skip
    kept = {*schema.key, *schema.partition_by}
    gone = [{name: row[name] for name in kept} for row in old if key(row) not in made]
    return catalog.append(table, [*changed, *gone])


def unread(skipped: Mapping[str, str]) -> set[str]:
    """Of scans that were left out, by code, those that the store did not give."""
    return {
        scan_id for scan_id, code in skipped.items()
        if code == "SCAN-MISSING" or (code.startswith("STORE-") and code != "STORE-DIGEST")
    }  # fmt: skip
