"""The catalog: append-only Delta tables in the lake, read as the latest row of each key.

Only one process (the driver) appends; a batch's transaction id makes a repeated append a no-op.
No table is ever updated or merged: on an object store appends all commit, merges conflict.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.lake import Lake
from pipelines.schemas import SCHEMAS, Table
from sgcd_core.errors import StorageError
from sgcd_core.io.store import Store, local_path

if TYPE_CHECKING:
    import pandas as pd
    from deltalake import DeltaTable

#: A table's version: a number, a moment, or the latest.
AsOf = int | datetime | None

_TRIES = 12


class Catalog:
    """The tables of one lake. Holds no connection; cheap to build.

    Args:
        lake: Where the tables lie.
    """

    def __init__(self, lake: Lake) -> None:
        self.lake = lake

    def append(self, table: str, rows: Sequence[Mapping[str, Any]], txn: str | None = None) -> bool:
        """Append `rows`; with `txn`, at most once for that id whoever repeats it.

        Args:
            table: A name in `SCHEMAS`.
            rows: Column → value. Columns left out are missing, times marked `now` are filled.
            txn: Application transaction id of the batch.

        Returns:
            Whether rows were written: False for no rows or an id that was committed before.

        Raises:
            StorageError: TABLE-SCHEMA when a row does not fit the schema or the stored table
                has another one; STORE-… when the store cannot be reached or written.
        """
        schema = SCHEMAS[table]
        if not rows:
            return False
        data = to_arrow(schema, rows)
        from deltalake import CommitProperties, Transaction, write_deltalake
        from deltalake.exceptions import CommitFailedError, DeltaError

        properties = None
        if txn is not None:
            properties = CommitProperties(app_transactions=[Transaction(txn, 1)])
        uri = self.lake.table(table)
        for attempt in range(_TRIES):
            delta = self._open(table) or self._create(schema)
            _check_stored(schema, delta, uri)
            # Two racing writers of one id conflict in the commit below; a later one stops here.
            if txn is not None and delta.transaction_version(txn) is not None:
                return False
            try:
                write_deltalake(
                    delta,
                    data,
                    mode="append",
                    schema_mode="merge",
                    commit_properties=properties,
                )
                return True
            except (CommitFailedError, DeltaError) as error:
                if attempt == _TRIES - 1:
                    raise _storage_error(error, uri, code="STORE-WRITE") from error
                time.sleep(random.uniform(0, 0.05 * 2 ** min(attempt, 5)))
            except OSError as error:
                raise _storage_error(error, uri) from error
        raise AssertionError("unreachable")

    def rows(
        self, table: str, *, where: Mapping[str, Any] | None = None, as_of: AsOf = None
    ) -> pa.Table:
        """The latest row of each key.

        Args:
            table: A name in `SCHEMAS`. A table nobody wrote to yet is empty.
            where: Column → value (or None for missing); partition columns read only their folder.
                Applied before the latest row is chosen, so filter on columns that do not change.
            as_of: Version number or moment of the table.

        Returns:
            Rows with the table's schema, ordered by key.
        """
        return latest(SCHEMAS[table], self.history(table, where=where, as_of=as_of))

    def history(
        self, table: str, *, where: Mapping[str, Any] | None = None, as_of: AsOf = None
    ) -> pa.Table:
        """Every row that was ever appended, oldest first. Arguments as `rows`."""
        schema = SCHEMAS[table]
        delta = self._open(table)
        if delta is None:
            return schema.arrow.empty_table()
        from deltalake.exceptions import DeltaError

        uri = self.lake.table(table)
        if as_of is not None:
            try:
                delta.load_as_version(as_of)
            except (DeltaError, ValueError) as error:
                raise StorageError(
                    f"table {table} has no version {as_of}; the latest is {self.version(table)}.",
                    code="TABLE-SCHEMA", where=uri,
                ) from error  # fmt: skip
        _check_stored(schema, delta, uri)
        try:
            # The engine's own reader is some four times faster on many small files than a
            # pyarrow dataset; it promises no order, which `recorded_at` gives back.
            stored = pa.table(delta.scan(predicate=_predicate(where or {})))
        except (OSError, DeltaError) as error:
            raise _storage_error(error, uri) from error
        return _conform(schema, stored).sort_by([("recorded_at", "ascending")])

    def frame(self, table: str, **options: Any) -> pd.DataFrame:
        """`rows` as a pandas frame."""
        frame: pd.DataFrame = self.rows(table, **options).to_pandas()
        return frame

    def version(self, table: str) -> int | None:
        """Version number of the table; None when nobody wrote to it yet."""
        delta = self._open(table)
        return None if delta is None else int(delta.version())

    def _create(self, schema: Table) -> DeltaTable:
        """An empty table, made on its own so that racing first writers append to the same one."""
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError

        uri = self.lake.table(schema.name)
        try:
            return DeltaTable.create(
                _delta_uri(uri),
                schema=schema.arrow,
                mode="ignore",
                partition_by=list(schema.partition_by) or None,
                description=schema.description,
                storage_options=self._options(),
            )
        except (OSError, DeltaError) as error:
            existing = self._open(schema.name)
            if existing is None:
                raise _storage_error(error, uri, code="STORE-WRITE") from error
            return existing

    def _options(self) -> dict[str, str] | None:
        return Store().delta_options() if self.lake.uri.startswith("s3://") else None

    def _open(self, table: str) -> DeltaTable | None:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError

        uri = self.lake.table(table)
        try:
            return DeltaTable(_delta_uri(uri), storage_options=self._options())
        except TableNotFoundError:
            return None
        except (OSError, DeltaError) as error:
            raise _storage_error(error, uri) from error


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
            raise _schema_error(
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
            raise _schema_error(schema, f"column {column.name!r} needs a value in every row.")
        try:
            if any(_loses(value, column.type) for value in values):
                raise pa.ArrowTypeError("a fraction in an integer column")
            arrays.append(pa.array(values, type=column.type, from_pandas=False))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            got = sorted({type(v).__name__ for v in values if v is not None})
            raise _schema_error(
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
    """Of rows in order of appending the last of each key, ordered by key."""
    if table.num_rows == 0:
        return table
    indexed = table.append_column("_row", pa.array(range(table.num_rows), type=pa.int64()))
    last = indexed.group_by(list(schema.key), use_threads=False).aggregate([("_row", "max")])
    kept = table.take(last["_row_max"])
    return kept.sort_by([(name, "ascending") for name in schema.key])


def _predicate(where: Mapping[str, Any]) -> str | None:
    """`where` as SQL for the engine: every value a literal, strings quoted."""
    terms = []
    for name, value in where.items():
        if value is None:
            terms.append(f"{name} IS NULL")
        elif isinstance(value, str):
            quoted = value.replace("'", "''")
            terms.append(f"{name} = '{quoted}'")
        elif isinstance(value, bool | int | float):
            terms.append(f"{name} = {value}")
        else:
            raise TypeError(f"cannot filter {name} by a {type(value).__name__}")
    return " AND ".join(terms) or None


def _conform(schema: Table, stored: pa.Table) -> pa.Table:
    """`stored` with the schema's columns in order; a column it lacks is missing throughout."""
    arrays = []
    for column in schema.columns:
        if column.name in stored.column_names:
            arrays.append(stored[column.name].cast(column.type))
        else:
            arrays.append(pa.nulls(stored.num_rows, type=column.type))
    return pa.table(arrays, schema=schema.arrow)


def _check_stored(schema: Table, delta: DeltaTable, uri: str) -> None:
    """Refuse a stored table whose columns have other types than ours, or other partitions."""
    stored = {f.name: pa.field(f).type for f in delta.schema().fields}
    for column in schema.columns:
        if column.name not in stored:
            continue
        got = stored[column.name]
        if not _same_kind(got, column.type):
            raise _schema_error(
                schema, f"column {column.name!r} is stored as {got}, expected {column.type}.", uri
            )
    missing = [name for name in schema.key if name not in stored]
    if missing:
        raise _schema_error(schema, f"the stored table lacks the column {missing[0]!r}.", uri)


def _same_kind(got: pa.DataType, expected: pa.DataType) -> bool:
    """Whether two types hold the same values, whatever the physical layout."""
    if pa.types.is_list(expected):
        is_list = pa.types.is_list(got) or pa.types.is_large_list(got)
        return bool(is_list) and _same_kind(got.value_type, expected.value_type)
    if pa.types.is_string(expected):
        views = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        return any(check(got) for check in views)
    return bool(got == expected)


def _delta_uri(uri: str) -> str:
    """The address as deltalake takes it: it percent-decodes plain paths, so they are encoded.

    Raises:
        StorageError: STORE-ADDRESS for a local folder with `%` in its name: deltalake's log reader
            decodes twice and would look elsewhere.
    """
    if uri.startswith("s3://"):
        return uri
    path = Path(local_path(uri)).absolute()
    if "%" in str(path):
        raise StorageError(
            "a lake cannot lie in a folder with % in its name.", code="STORE-ADDRESS", where=uri,
            hint="Choose another folder.",
        )  # fmt: skip
    return path.as_uri()


def _schema_error(schema: Table, message: str, where: str | None = None) -> StorageError:
    return StorageError(
        message, code="TABLE-SCHEMA", where=where or f"table {schema.name}",
        hint="The tables are described in docs/reference.md.",
    )  # fmt: skip


def _storage_error(error: Exception, uri: str, code: str = "STORE-UNREACHABLE") -> StorageError:
    text = str(error).lower()
    if any(word in text for word in ("403", "forbidden", "accessdenied", "access denied")):
        code = "STORE-DENIED"
    return StorageError(
        f"the table cannot be reached ({type(error).__name__}).", code=code, where=uri,
        hint="Check the address, the endpoint and the credentials (`sgcd doctor`).",
    )  # fmt: skip
