"""Figures of an evaluation into the tables: what is new or changed, and what no longer counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.catalog import Catalog
from pipelines.catalog_rows import find_schema, to_arrow

Row = Mapping[str, Any]


def record_figures(
    catalog: Catalog, table: str, version: Row, rows: Sequence[Row], mine: Callable[[str], bool]
) -> bool:
    """Make `rows` all that one kind of evaluation says of one version of a model.

    Rows of its measures that it no longer makes (a scan was replaced, a site renamed, a method left
    out) are taken back by a row without a number; those that say the same already stay. So the
    tables show the newest evaluation of each kind, and `…_all` also those before.

    Args:
        catalog: The lake's tables.
        table: `metrics` or `site_metrics`.
        version: Holds `model` and `model_version`, those of every row.
        rows: Whole rows.
        mine: Whether a `metric` is one of this kind of evaluation.

    Returns:
        Whether anything was written.

    Raises:
        StorageError: As `Catalog.append`.
    """
    schema = find_schema(table)
    told = [c.name for c in schema.columns if not c.now]
    now = to_arrow(schema, rows).select(told).to_pylist()
    where = {name: version[name] for name in ("model", "model_version")}
    old = [r for r in catalog.rows(table, where=where).to_pylist() if mine(r["metric"])]

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in schema.key)

    # as text, in which a number that is none equals itself
    said = {key(row): str([row[name] for name in told]) for row in old}
    changed = [row for row in now if said.get(key(row)) != str([row[name] for name in told])]
    made = {key(row) for row in now}
    kept = {*schema.key, *schema.partition_by}
    gone = [{name: row[name] for name in kept} for row in old if key(row) not in made]
    return catalog.append(table, [*changed, *gone])
