"""The process a query runs in: locked before it sees the statement, and gone after it.

It has no credentials and an empty folder. The engine may not touch files, network, extensions or
settings; beneath it the operating system grants no further file or socket, a fixed address space
and processor time. Standard input brings the request, later the tables asked for; standard output
takes what the statement needs, then its result or what is wrong with it.
"""

from __future__ import annotations

import json
import math
import re
import resource
import signal
import sys
import time
from typing import IO, Any

import duckdb
import pyarrow as pa

from pipelines.catalog_rows import nearest
from pipelines.query_needs import find_needs
from pipelines.query_wire import QueryLimits, pack, receive, send, unpack, view_names
from pipelines.schemas import SCHEMAS
from sgcd_core.errors import UsageError

#: Longest statement, in characters.
LONGEST = 100_000
_BATCH = 2048
#: How long the tables may take to come.
_WAIT_SECONDS = 3600
_UNKNOWN = re.compile(r'(?:Referenced column|column named) "([^"]+)"')


def _connect(limits: QueryLimits) -> duckdb.DuckDBPyConnection:
    """An engine with every view, empty; what Python and the engine load late is loaded here."""
    connection = duckdb.connect(":memory:")
    for view, table in view_names().items():
        connection.register(view, pa.Table.from_batches([], schema=SCHEMAS[table].arrow))
    connection.sql("SELECT json_serialize_sql('SELECT now()') FROM scans").to_arrow_reader(1)
    connection.execute("SET TimeZone = 'UTC'")  # the same days on every machine
    connection.execute("SET temp_directory = ''")
    connection.execute(f"SET memory_limit = '{limits.memory_mb}MB'")
    connection.execute(f"SET threads = {limits.threads}")
    # Otherwise a name in the SQL could be looked up among the variables of this process.
    connection.execute("SET python_enable_replacements = false")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _confine(limits: QueryLimits) -> None:
    """No file or socket can be opened from here on, nothing written but to the open pipes."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Should the parent be gone, it ends by itself, busy or asleep.
    busy = math.ceil(limits.seconds * limits.threads) + 10
    _limit(resource.RLIMIT_CPU, busy)
    signal.alarm(_WAIT_SECONDS)


def _confine_memory(limits: QueryLimits, statm: IO[str] | None) -> None:
    """Bound the address space, for what the engine's own count misses."""
    if statm is None:  # not Linux
        return
    statm.seek(0)
    used = int(statm.read().split()[0]) * resource.getpagesize()
    most = used + (limits.memory_mb + 3 * limits.result_mb + 256) * 2**20
    _limit(resource.RLIMIT_AS, most)


def _limit(what: int, most: int) -> None:
    """At most so much, or what this machine's administrator allows where that is less."""
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def _open_statm() -> IO[str] | None:
    try:
        return open("/proc/self/statm")
    except OSError:
        return None


def _parse(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, dict[str, Any]]:
    """The one statement and its syntax tree."""
    if len(sql) > LONGEST:
        raise UsageError(
            f"the statement is longer than {LONGEST} characters.", code="QUERY-LIMIT",
            hint="Filter the result in Python, or `sgcd export` the tables.",
        )  # fmt: skip
    statements = connection.extract_statements(sql)
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise UsageError(
            "one SELECT is expected; nothing can be changed, set or loaded here.",
            code="QUERY-REFUSED", hint="PIVOT needs its values: PIVOT … ON site IN ('A', 'B').",
        )  # fmt: skip
    found = connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    tree = json.loads(found[0][0])
    if tree.get("error"):
        raise UsageError("one SELECT is expected.", code="QUERY-REFUSED")
    return statements[0], tree


def _run(connection: duckdb.DuckDBPyConnection, statement: Any, limits: QueryLimits) -> pa.Table:
    reader = connection.sql(statement.query).to_arrow_reader(_BATCH)
    batches: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in reader:
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows > limits.rows:
            raise UsageError(
                f"the result has more than {limits.rows} rows.", code="QUERY-LIMIT",
                hint="Add a LIMIT, or use `sgcd export` for whole tables.",
            )  # fmt: skip
        if size > limits.result_mb * 2**20:
            raise UsageError(
                f"the result is larger than {limits.result_mb} MB.", code="QUERY-LIMIT",
                hint="Select fewer rows or columns.",
            )  # fmt: skip
        batches.append(batch)
    return pa.Table.from_batches(batches, schema=reader.schema)


def _explain(error: BaseException, views: list[str]) -> UsageError:
    """What went wrong as our own error; the engine's text only where it speaks of the statement."""
    if isinstance(error, UsageError):
        return error
    text = str(error)  # an error inside a stream of batches comes as Arrow's, with DuckDB's text
    short = isinstance(error, MemoryError | duckdb.OutOfMemoryException | RecursionError)
    if short or "Out of Memory Error" in text:
        return UsageError(
            "the query needs more memory than it may use.", code="QUERY-LIMIT",
            hint="Select fewer rows or columns, or aggregate first.",
        )  # fmt: skip
    if isinstance(error, duckdb.PermissionException) or "disabled by configuration" in text:
        return UsageError(
            "the statement asks for something that is locked.", code="QUERY-REFUSED",
            hint="Only the catalog's tables can be read: no files, network, extensions, settings.",
        )  # fmt: skip
    unknown = _UNKNOWN.search(text)
    if unknown and isinstance(error, duckdb.BinderException):
        tables = {view_names()[view] for view in views} or set(SCHEMAS)
        known = sorted({c.name for table in tables for c in SCHEMAS[table].columns})
        return UsageError(
            f"there is no column {unknown[1]!r} in {', '.join(views) or 'this statement'}"
            f"{nearest(unknown[1], known)}.",
            code="QUERY-INVALID", hint="`sgcd query --schema TABLE` lists them all.",
        )  # fmt: skip
    return UsageError(f"the query failed: {_plain(text)}", code="QUERY-INVALID")


def _plain(text: str, longest: int = 1500) -> str:
    """Text that cannot drive a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text[:longest])


def main() -> None:
    """Read the request, say what is needed, take it, answer."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    request = json.loads(receive(source))
    limits = QueryLimits(**request["limits"])
    needs: dict[str, Any] = {}
    try:
        statm = _open_statm()
        connection = _connect(limits)
        _confine(limits)
        statement, tree = _parse(connection, request["sql"])
        partitions = {view: SCHEMAS[t].partition_by for view, t in view_names().items()}
        needs = find_needs(tree, partitions)
        send(sink, json.dumps({"needs": needs}).encode())
        for view in needs:
            connection.register(view, unpack(receive(source)))
        _confine_memory(limits, statm)
        signal.alarm(math.ceil(limits.seconds) + 10)
        started = time.monotonic()
        result = pack(_run(connection, statement, limits))
    except (duckdb.Error, UsageError, MemoryError, RecursionError, ValueError, OSError) as error:
        problem = _explain(error, list(needs))
        found = {"code": problem.code, "message": problem.message, "hint": problem.hint}
        send(sink, json.dumps({"error": found}).encode())
        return
    send(sink, json.dumps({"seconds": time.monotonic() - started}).encode())
    send(sink, result)


if __name__ == "__main__":
    main()
