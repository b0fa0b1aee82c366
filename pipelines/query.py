"""SQL over the catalog for analysts, in a process that can reach nothing but the rows it is given.

The tables are read here, as one snapshot, and handed to a child process as Arrow data. There DuckDB
is locked before it sees the query: no files, no network, no extensions, no settings; memory and
result size are bounded, and the child is stopped at the deadline. It gets no credentials.

In SQL each table's name is the latest row of each key; `results_history` and so on are all rows.
"""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pipelines.catalog import AsOf, Catalog, latest
from pipelines.lake import Lake
from pipelines.schemas import SCHEMAS
from sgcd_core.errors import UsageError

FORMATS = ("table", "csv", "parquet", "json")


@dataclass(frozen=True)
class QueryLimits:
    """What a query may use.

    Attributes:
        seconds: Wall-clock time, after which it is stopped.
        memory_mb: Memory of the database engine.
        rows: Longest result; a longer one is an error, not a silent cut.
        threads: Cores.
    """

    seconds: float = 60.0
    memory_mb: int = 1024
    rows: int = 1_000_000
    threads: int = 2


def run_query(
    lake: Lake, sql: str, *, as_of: str | None = None, limits: QueryLimits | None = None
) -> pa.Table:
    """The result of one SELECT over the catalog's tables.

    Args:
        lake: Where the tables lie.
        sql: One statement that reads.
        as_of: A version (`7`), versions by table (`results=7,scans=3`) or a moment (ISO 8601).
        limits: What the query may use.

    Raises:
        UsageError: The statement does not parse, does something else than read, asks for something
            that is locked, or exceeds a limit.
        StorageError: A table cannot be read.
    """
    limits = limits or QueryLimits()
    catalog, versions = Catalog(lake), parse_as_of(as_of)
    tables: dict[str, pa.Table] = {}
    for name, schema in SCHEMAS.items():
        # Reading what the text does not even name would only cost time.
        if re.search(rf"\b{name}(_history)?\b", sql, re.IGNORECASE):
            version = versions.get(name) if isinstance(versions, dict) else versions
            history = catalog.history(name, as_of=version)
            tables[f"{name}_history"] = history
            tables[name] = latest(schema, history)
        else:
            tables[name] = tables[f"{name}_history"] = schema.arrow.empty_table()
    return _in_child(sql, tables, limits)


def parse_as_of(text: str | None) -> dict[str, int] | AsOf:
    """`7`, `results=7,scans=3` or an ISO moment (UTC unless it says otherwise).

    Raises:
        UsageError: It is none of these.
    """
    if text is None or text == "":
        return None
    if text.isdigit():
        return int(text)
    if "=" in text:
        versions = {}
        for part in text.split(","):
            name, _, number = part.strip().partition("=")
            if name not in SCHEMAS or not number.isdigit():
                raise UsageError(
                    f"--as-of takes TABLE=VERSION, got {part!r}.",
                    hint=f"Tables: {', '.join(SCHEMAS)}.",
                )
            versions[name] = int(number)
        return versions
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(
            f"--as-of takes a version, TABLE=VERSION or a date, got {text!r}.",
            hint="Examples: 7; results=7,scans=3; 2026-03-01T12:00.",
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def format_result(table: pa.Table, format: str = "table") -> bytes:
    """The result as text or as a Parquet file.

    Raises:
        UsageError: There is no such format.
    """
    if format == "table":
        return _text(table).encode()
    out = io.BytesIO()
    if format == "csv":
        table.to_pandas().to_csv(out, index=False)
    elif format == "json":
        rows = json.dumps(table.to_pylist(), default=str, ensure_ascii=False, indent=1)
        out.write(rows.encode() + b"\n")
    elif format == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, out)
    else:
        raise UsageError(f"no format {format!r}; there are {', '.join(FORMATS)}.")
    return out.getvalue()


def _text(table: pa.Table) -> str:
    """Aligned columns for a terminal, numbers to the right."""
    rows = [[_cell(value) for value in row.values()] for row in table.to_pylist()]
    names = table.column_names
    widths = [max([len(n), *(len(r[i]) for r in rows)]) for i, n in enumerate(names)]
    right = [pa.types.is_integer(t) or pa.types.is_floating(t) for t in table.schema.types]

    def line(cells: list[str]) -> str:
        padded = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
    rule = ["─" * w for w in widths]
    return "\n".join([line(names), line(rule), *(line(r) for r in rows), f"({count})"]) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    # A terminal must not be driven by what a cell holds.
    return "".join(c if c.isprintable() else "�" for c in str(value))


def _in_child(sql: str, tables: dict[str, pa.Table], limits: QueryLimits) -> pa.Table:
    """Run the query in a process of its own and bring the result back."""
    message = io.BytesIO()
    _send(message, json.dumps({"sql": sql, "limits": asdict(limits)}).encode())
    for name, table in tables.items():
        _send(message, name.encode())
        _send(message, _pack(table))
    root = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory(prefix="sgcd-query-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pipelines.query"],
                input=message.getvalue(),
                capture_output=True,
                timeout=limits.seconds,
                cwd=folder,
                env={"PYTHONPATH": root, "HOME": folder, "LC_ALL": "C.UTF-8"},
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UsageError(
                f"the query was stopped after {limits.seconds:g} s.",
                hint="Select fewer rows, or filter on target, site and sequence.",
            ) from error
    answer = io.BytesIO(done.stdout)
    try:
        head = json.loads(_receive(answer))
    except (EOFError, ValueError) as error:
        raise UsageError(
            f"the query ended its process (exit code {done.returncode}); "
            f"its memory is limited to {limits.memory_mb} MB.",
            hint="Select fewer rows or columns.",
        ) from error
    if head["error"]:
        raise UsageError(f"the query failed: {head['error']}")
    return pa.ipc.open_stream(_receive(answer)).read_all()


def _send(stream: IO[bytes], data: bytes) -> None:
    stream.write(struct.pack(">Q", len(data)) + data)


def _receive(stream: IO[bytes]) -> bytes:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    data = stream.read(struct.unpack(">Q", head)[0])
    return data


def _pack(table: pa.Table) -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def _execute(sql: str, tables: dict[str, pa.Table], limits: QueryLimits) -> pa.Table:
    """In the child: lock the engine, then run the one statement."""
    import duckdb

    connection = duckdb.connect(":memory:")
    for name, table in tables.items():
        connection.register(name, table)
    connection.execute("SET temp_directory = ''")
    connection.execute(f"SET memory_limit = '{limits.memory_mb}MB'")
    connection.execute(f"SET threads = {limits.threads}")
    # Otherwise a name in the SQL could be looked up among the variables of this process.
    connection.execute("SET python_enable_replacements = false")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    statements = connection.extract_statements(sql)
    allowed = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
    if len(statements) != 1 or statements[0].type not in allowed:
        raise ValueError("one SELECT is expected; the tables cannot be changed here.")
    reader: Any = connection.execute(statements[0]).to_arrow_reader(10_000)
    batches, rows = [], 0
    for batch in reader:
        rows += batch.num_rows
        if rows > limits.rows:
            raise ValueError(f"the result has more than {limits.rows} rows; add a LIMIT.")
        batches.append(batch)
    return pa.Table.from_batches(batches, schema=reader.schema)


def _child() -> None:
    """Entry of the child process: request on stdin, answer on stdout."""
    import duckdb

    request = json.loads(_receive(sys.stdin.buffer))
    tables: dict[str, pa.Table] = {}
    while True:
        try:
            name = _receive(sys.stdin.buffer).decode()
        except EOFError:
            break
        tables[name] = pa.ipc.open_stream(_receive(sys.stdin.buffer)).read_all()
    try:
        result = _execute(request["sql"], tables, QueryLimits(**request["limits"]))
    except (duckdb.Error, ValueError, MemoryError) as error:
        _send(sys.stdout.buffer, json.dumps({"error": str(error) or "out of memory"}).encode())
        return
    _send(sys.stdout.buffer, json.dumps({"error": None}).encode())
    _send(sys.stdout.buffer, _pack(result))


if __name__ == "__main__":
    _child()
