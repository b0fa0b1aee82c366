"""The tables as plain Parquet files that explain themselves: for a colleague without this program.

Unit and description of each column are in the files' metadata and in a README beside them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa

from pipelines.catalog import Catalog
from pipelines.catalog_docs import column_table
from pipelines.catalog_rows import latest
from pipelines.schemas import SCHEMAS, Table
from sgcd_core.io.store import Store, join
from sgcd_core.words import counted


@dataclass(frozen=True)
class Exported:
    """One file.

    Attributes:
        uri: Its address.
        rows: Rows in it.
    """

    uri: str
    rows: int


def export(
    catalog: Catalog, out: str, *, history: bool = False, as_of: datetime | None = None
) -> list[Exported]:
    """Write every table as OUT/TABLE.parquet, and OUT/README.md; the same again changes nothing.

    Args:
        catalog: Whose tables.
        out: A folder or s3:// prefix; files of these names are replaced.
        history: Also OUT/TABLE_all.parquet with every row that was ever appended.
        as_of: A moment; else as the tables are now.

    Returns:
        The Parquet files.

    Raises:
        StorageError: A table cannot be read, or STORE-… when a file cannot be written.
    """
    store, files, lines = Store(), [], [_HEAD]
    for name, schema in SCHEMAS.items():
        every = catalog.history(name, as_of=as_of)
        parts = {name: latest(schema, every)} | ({f"{name}_all": every} if history else {})
        for stem, rows in parts.items():
            uri = join(out, f"{stem}.parquet")
            store.write_bytes(uri, _parquet(schema, rows))
            files.append(Exported(uri, rows.num_rows))
        counts = "; ".join(
            f"`{stem}.parquet`: {counted(rows.num_rows, 'row')}" for stem, rows in parts.items()
        )
        lines += [f"## {name}", "", schema.description, "", f"{counts}.", "", *column_table(schema)]
        lines.append("")
    store.write_bytes(join(out, "README.md"), "\n".join(lines).encode())
    return files


def _parquet(schema: Table, rows: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    out = io.BytesIO()
    about = {"description": schema.description, "key": ", ".join(schema.key)}
    pq.write_table(rows.replace_schema_metadata(about), out, compression="zstd")
    return out.getvalue()


_HEAD = """\
# Tables of an SGCD lake

Plain Parquet, one row for each key (the latest); files named `…_all` hold every row that was ever
appended. Times are UTC. Each column's unit and description are also in the files:

    import pyarrow.parquet as pq
    schema = pq.read_schema("results.parquet")
    schema.field("outlier_score").metadata      # {b"unit": …, b"description": …}
"""
