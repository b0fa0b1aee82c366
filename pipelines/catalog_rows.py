"""Rows as Arrow tables of exactly one schema, and back to what counts: the latest of each key."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.schemas import SCHEMAS, TIME, Table
from sgcd_core.errors import StorageError, UsageError

if TYPE_CHECKING:
    from deltalake import DeltaTable


def to_arrow(schema: Table, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as an Arrow table of exactly this schema.

    Raises:
        StorageError: TABLE-SCHEMA naming the table, the column, what was got and expected.
            Values are never quoted: they may come from a header.
    """
    known = {c.name for c in schema.columns}
    for row in rows:
        unknown = sorted(set(row) - known)
        if unknown:
            raise schema_error(
                schema, f"there is no column {unknown[0]!r}; known are {', '.join(sorted(known))}."
            )
    now = datetime.now(UTC)
    # A microsecond apart, so that rows of one batch keep their order in the table.
    moments = [now + timedelta(microseconds=i) for i in range(len(rows))]
    arrays = []
    for column in schema.columns:
        values = [row.get(column.name) for row in rows]
        if column.now:
            values = [m if v is None else v for m, v in zip(moments, values, strict=True)]
        if column.name in schema.partition_by:
            # Delta stores an empty partition value as missing; say so here, the same everywhere.
            values = [None if v == "" else v for v in values]
        if column.required and any(v is None for v in values):
            raise schema_error(schema, f"column {column.name!r} needs a value in every row.")
        try:
            if any(_loses(value, column.type) for value in values):
                raise pa.ArrowTypeError("a fraction in an integer column")
            arrays.append(pa.array(values, type=column.type, from_pandas=False))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            got = sorted({type(v).__name__ for v in values if v is not None})
            raise schema_error(
                schema, f"column {column.name!r} takes {column.type}, got {', '.join(got)}."
            ) from error
    return pa.table(arrays, schema=schema.arrow)


def _loses(value: Any, kind: pa.DataType) -> bool:
    """Whether Arrow would silently cut a fraction off: it truncates floats in integer columns."""
    if pa.types.is_list(kind):
        return value is not None and any(_loses(item, kind.value_type) for item in value)
    if not pa.types.is_integer(kind) or not hasattr(value, "is_integer"):
        return False
    return not value.is_integer()


def latest(schema: Table, table: pa.Table) -> pa.Table:
    """Of rows in order of appending the last of each key, ordered by key; but those taken back."""
    if table.num_rows == 0:
        return table
    indexed = table.append_column("_row", pa.array(range(table.num_rows), type=pa.int64()))
    last = indexed.group_by(list(schema.key), use_threads=False).aggregate([("_row", "max")])
    kept = table.take(last["_row_max"])
    if schema.counts_by:
        kept = kept.filter(pc.field(schema.counts_by).is_valid())
    return kept.sort_by([(name, "ascending") for name in schema.key])


def oldest_first(table: pa.Table) -> pa.Table:
    """Rows in order of appending; those from before the time was kept come first."""
    return table.take(pc.sort_indices(_stamps(table)))


def _stamps(table: pa.Table) -> pa.ChunkedArray:
    return table["recorded_at"].cast(pa.int64()).fill_null(-(2**62))


def until(table: pa.Table, moment: datetime) -> pa.Table:
    """Of rows in order of appending those recorded up to `moment`, UTC unless it says otherwise.

    The rows of one batch are stamped a microsecond apart; a moment inside a batch takes all of it.
    """
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    limit = pa.scalar(moment, TIME).cast(pa.int64()).as_py()
    stamps = _stamps(table).to_numpy()
    end = int(stamps.searchsorted(limit, side="right"))
    while 0 < end < len(stamps) and stamps[end] == stamps[end - 1] + 1:
        end += 1
    return table.slice(0, end)


def predicate(schema: Table, where: Mapping[str, Any], stored: Container[str]) -> str | None:
    """`where` as SQL for the engine: every value a literal, strings quoted; a list means any of it.

    Columns that are not `stored` are missing in every row.

    Raises:
        UsageError: QUERY-INVALID for an unknown column.
        TypeError: For a value that is no string, number or list of these.
    """
    terms = []
    for name, value in where.items():
        check_columns(schema, [name])
        if isinstance(value, list | tuple | set | frozenset):
            options = [_equals(name, item, stored) for item in value] or ["FALSE"]
            terms.append(f"({' OR '.join(options)})")
        else:
            terms.append(_equals(name, value, stored))
    return " AND ".join(terms) or None


def _equals(name: str, value: Any, stored: Container[str]) -> str:
    if name not in stored:
        return "TRUE" if value is None else "FALSE"
    if value is None:
        return f"{name} IS NULL"
    if isinstance(value, str):
        quoted = value.replace("'", "''")
        return f"{name} = '{quoted}'"
    if isinstance(value, bool | int | float):
        return f"{name} = {value}"
    raise TypeError(f"cannot filter {name} by a {type(value).__name__}")


def conform(schema: Table, stored: pa.Table, columns: Sequence[str] | None = None) -> pa.Table:
    """`stored` with the schema's columns (or some) in order; one it lacks is missing throughout."""
    fields = [f for f in schema.arrow if columns is None or f.name in columns]
    arrays = [
        stored[f.name].cast(f.type)
        if f.name in stored.column_names
        else pa.nulls(stored.num_rows, type=f.type)
        for f in fields
    ]
    return pa.table(arrays, schema=pa.schema(fields))


def find_schema(name: str) -> Table:
    """The table of this name.

    Raises:
        UsageError: QUERY-INVALID with the nearest names.
    """
    if name not in SCHEMAS:
        raise UsageError(
            f"there is no table {name!r}{nearest(name, SCHEMAS)}.", code="QUERY-INVALID",
            hint=f"Tables: {', '.join(SCHEMAS)}.",
        )  # fmt: skip
    return SCHEMAS[name]


def check_columns(schema: Table, names: Iterable[str]) -> None:
    """Raise UsageError (QUERY-INVALID) with the nearest names for a column the table lacks."""
    known = [column.name for column in schema.columns]
    for name in names:
        if name not in known:
            raise UsageError(
                f"there is no column {name!r} in {schema.name}{nearest(name, known)}.",
                code="QUERY-INVALID", hint=f"`sgcd query --schema {schema.name}` lists them all.",
            )  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str:
    """`; nearest: a, b` for a misspelt name, or nothing when no known name is like it."""
    found = get_close_matches(name.lower(), list(known), n=3, cutoff=0.6)
    return f"; nearest: {', '.join(found)}" if found else ""


def check_stored(schema: Table, delta: DeltaTable, uri: str) -> None:
    """Refuse a stored table whose columns have other types than ours, or other partitions."""
    stored = {f.name: pa.field(f).type for f in delta.schema().fields}
    for column in schema.columns:
        if column.name not in stored:
            continue
        got = stored[column.name]
        if not _same_kind(got, column.type):
            raise schema_error(
                schema, f"column {column.name!r} is stored as {got}, expected {column.type}.", uri
            )
    missing = [name for name in schema.key if name not in stored]
    if missing:
        raise schema_error(schema, f"the stored table lacks the column {missing[0]!r}.", uri)


def _same_kind(got: pa.DataType, expected: pa.DataType) -> bool:
    """Whether two types hold the same values, whatever the physical layout."""
    if pa.types.is_list(expected):
        is_list = pa.types.is_list(got) or pa.types.is_large_list(got)
        return bool(is_list) and _same_kind(got.value_type, expected.value_type)
    if pa.types.is_string(expected):
        views = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        return any(check(got) for check in views)
    return bool(got == expected)


def schema_error(schema: Table, message: str, where: str | None = None) -> StorageError:
    """The error for rows or a stored table that do not fit the schema."""
    return StorageError(
        message, code="TABLE-SCHEMA", where=where or f"table {schema.name}",
        hint="The tables are described in docs/catalog.md.",
    )  # fmt: skip
