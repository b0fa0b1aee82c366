"""The catalog: append-only Delta tables in the lake, read as the latest row of each key.

    from pipelines.catalog import Catalog
    lake = Catalog("s3://bucket/lake")
    lake.rows("scans", where={"site": "A"}).to_pandas()
    lake.query("SELECT site, count(*) AS n FROM results GROUP BY site").to_pandas()

Only one process (the driver) appends; a batch's transaction id makes a repeated append a no-op.
No table is ever updated or merged: on an object store appends all commit, merges conflict.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.catalog_rows import (
    check_columns,
    check_stored,
    conform,
    find_schema,
    latest,
    oldest_first,
    predicate,
    schema_error,
    to_arrow,
    until,
)
from pipelines.delta import (
    active_files,
    create_table,
    load_version,
    may_pass,
    no_version,
    open_table,
    renewing,
    require_room,
    storage_error,
)
from pipelines.lake import Lake
from pipelines.output_addresses import outputs_here
from pipelines.schemas import SCHEMAS, Table
from sgcd_core.io.store import is_s3, local_path

if TYPE_CHECKING:
    import pandas as pd
    from deltalake import DeltaTable

    from pipelines.query import QueryLimits

#: A table's version (what Delta keeps, see `sgcd optimize`), a moment (always), or the latest.
AsOf = int | datetime | None

_TRIES = 12


class Catalog:
    """The tables of one lake. Holds no connection; cheap to build.

    Args:
        lake: Where the tables lie: a `Lake`, or the address of one that must exist.

    Raises:
        StorageError: LAKE-MISSING when there is no lake at the address.
    """

    def __init__(self, lake: Lake | str) -> None:
        if isinstance(lake, str):
            lake = Lake.open(lake if is_s3(lake) else os.path.expanduser(local_path(lake)))
        self.lake = lake

    def append(self, table: str, rows: Sequence[Mapping[str, Any]], txn: str | None = None) -> bool:
        """Append `rows`; with `txn`, at most once for that id whoever repeats it.

        Args:
            table: A name in `SCHEMAS`.
            rows: Column → value. Columns left out are missing, times marked `now` are filled.
            txn: Application transaction id of the batch.

        Returns:
            Whether rows were written: False for no rows or a `txn` that was committed before, if
            only by an earlier try of this very call.

        Raises:
            StorageError: TABLE-SCHEMA when a row does not fit the schema or the stored table
                has another one; STORE-… when the store cannot be reached or written.
        """
        schema = find_schema(table)
        if not rows:
            return False
        data = to_arrow(schema, rows)
        # A try may fail after its commit, so even rows that nobody named are written by an id.
        own = txn or uuid.uuid4().hex
        written = renewing(self.lake.table(table), lambda: self._append(schema, data, own))
        return written or txn is None

    def _append(self, schema: Table, data: pa.Table, txn: str) -> bool:
        from deltalake import CommitProperties, Transaction, write_deltalake
        from deltalake.exceptions import CommitFailedError, DeltaError, SchemaMismatchError

        properties = CommitProperties(app_transactions=[Transaction(txn, 1)])
        uri = self.lake.table(schema.name)
        for attempt in range(_TRIES):
            delta = open_table(self.lake, schema.name) or create_table(self.lake, schema)
            check_stored(schema, delta, uri)
            data = _like_stored(data, delta)
            try:
                # Two racing writers of one id conflict in the commit below; a later one stops here.
                if delta.transaction_version(txn) is not None:
                    return False
                parts = data.group_by(list(schema.partition_by)).aggregate([]).num_rows
                require_room(uri, data.nbytes, files=parts)
                write_deltalake(
                    delta,
                    data,
                    mode="append",
                    schema_mode="merge",
                    commit_properties=properties,
                )
                return True
            except SchemaMismatchError as error:
                raise schema_error(schema, f"{error}.", uri) from error
            except (CommitFailedError, DeltaError, OSError) as error:
                if attempt == _TRIES - 1 or not may_pass(error, uri):
                    raise storage_error(error, uri, writing=True) from error
                time.sleep(random.uniform(0, 0.05 * 2 ** min(attempt, 5)))
        raise AssertionError("unreachable")

    def rows(
        self,
        table: str,
        *,
        where: Mapping[str, Any] | None = None,
        as_of: AsOf = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """The latest row of each key that was not taken back.

        Args:
            table: A name in `SCHEMAS`. A table nobody wrote to yet is empty.
            where: Column → value, list of values, or None for missing; partition columns read
                only their folders. Applied before the latest row is chosen, so filter on columns
                that do not change; `query` filters after.
            as_of: A moment, or a version number of the table; else as it is now.
            columns: Read only these.

        Returns:
            Rows with the table's schema, ordered by key.

        Raises:
            UsageError: QUERY-INVALID for an unknown table or column, with the nearest names.
            StorageError: TABLE-VERSION for a version that is not there or no longer whole;
                TABLE-SCHEMA, STORE-… when the table cannot be read.
        """
        schema = find_schema(table)
        also = {*schema.key, "recorded_at", *filter(None, [schema.counts_by])}
        wanted = None if columns is None else sorted({*columns, *also})
        found = latest(schema, self.history(table, where=where, as_of=as_of, columns=wanted))
        return found if columns is None else found.select(list(columns))

    def history(
        self,
        table: str,
        *,
        where: Mapping[str, Any] | None = None,
        as_of: AsOf = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Every row that was ever appended, oldest first. Arguments as `rows`.

        Addresses of outputs are those in this lake, also where it was copied or moved since.
        """
        schema = find_schema(table)
        check_columns(schema, columns or ())
        # Always with the time: the engine promises no order.
        read = None if columns is None else sorted({*columns, "recorded_at"})
        version = as_of if isinstance(as_of, int) else None
        found = renewing(
            self.lake.table(table), lambda: self._read(schema, where or {}, read, version)
        )
        rows = oldest_first(conform(schema, found, read))
        if table == "results":
            rows = outputs_here(rows, self.lake)
        if isinstance(as_of, datetime):
            rows = until(rows, as_of)
        return rows if columns is None else rows.select(list(columns))

    def _read(
        self,
        schema: Table,
        where: Mapping[str, Any],
        columns: Sequence[str] | None,
        version: int | None,
    ) -> pa.Table:
        """Every row as it is stored; `columns` that the stored table lacks are left out."""
        delta = open_table(self.lake, schema.name)
        if delta is None:
            return pa.Table.from_batches([], schema=schema.arrow)
        uri = self.lake.table(schema.name)
        if version is not None:
            load_version(delta, schema.name, version, uri)
        check_stored(schema, delta, uri)
        stored = {field.name for field in delta.schema().fields}
        from deltalake.exceptions import DeltaError

        try:
            # The engine's own reader is some four times faster on many small files than a
            # pyarrow dataset.
            return pa.table(
                delta.scan(
                    columns=None if columns is None else [c for c in columns if c in stored],
                    predicate=predicate(schema, where, stored),
                )
            )
        except (OSError, DeltaError, pa.ArrowException) as error:
            if version is not None and "not found" in str(error).lower():
                raise no_version(schema.name, version, "its files are gone", uri) from error
            raise storage_error(error, uri) from error

    def frame(self, table: str, **options: Any) -> pd.DataFrame:
        """`rows` as a pandas frame."""
        frame: pd.DataFrame = self.rows(table, **options).to_pandas()
        return frame

    def query(
        self, sql: str, *, as_of: AsOf | str = None, limits: QueryLimits | None = None
    ) -> pa.Table:
        """The result of one SELECT; see `pipelines.query.run_query`."""
        from pipelines.query import run_query

        return run_query(self, sql, as_of=as_of, limits=limits)

    def version(self, table: str) -> int | None:
        """Version number of the table; None when nobody wrote to it yet."""
        delta = self._open(table)
        return None if delta is None else int(delta.version())

    def tables(self) -> list[dict[str, Any]]:
        """A row a table: table, rows (all that were ever appended), files, bytes, version, is."""
        found = []
        for name, schema in SCHEMAS.items():
            delta = self._open(name)
            files = [] if delta is None else active_files(delta)
            found.append(
                {
                    "table": name,
                    "rows": sum(file["num_records"] or 0 for file in files),
                    "files": len(files),
                    "bytes": sum(file["size_bytes"] for file in files),
                    "version": None if delta is None else int(delta.version()),
                    "is": schema.description,
                }
            )
        return found

    def _open(self, table: str) -> DeltaTable | None:
        return renewing(self.lake.table(table), lambda: open_table(self.lake, table))


def _like_stored(data: pa.Table, delta: DeltaTable) -> pa.Table:
    """`data` without units and descriptions of columns that are stored: those there stay.

    The engine refuses rows whose descriptions are worded otherwise.
    """
    stored = {field.name for field in delta.schema().fields}
    fields = [f.remove_metadata() if f.name in stored else f for f in data.schema]
    return data.cast(pa.schema(fields))
