"""SQL over the catalog for analysts, in a process that can reach nothing but the rows it is given.

A child process parses the statement and says which tables and partitions it needs; they are read
here, each as one snapshot, and handed over as Arrow data. The child (`pipelines.query_child`) gets
no credentials, is locked before it sees the statement, and is stopped at the deadline.

In SQL each table's name is the latest row of each key; `results_all` and so on are all rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import IO, Any

import pyarrow as pa

from pipelines.catalog import AsOf, Catalog
from pipelines.catalog_rows import latest
from pipelines.lake import Lake
from pipelines.query_wire import QueryLimits, pack, receive, send, unpack, view_names
from pipelines.schemas import SCHEMAS
from sgcd_core.child import python_path
from sgcd_core.errors import CODES, UsageError

__all__ = ["QueryLimits", "parse_as_of", "run_query"]

#: Starting the child and parsing take half a second; this is for a very busy machine.
_START_SECONDS = 120.0
#: Where a Python of modules or conda may have the libraries that it needs.
_LIBRARY_PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


def run_query(
    lake: Lake | Catalog,
    sql: str,
    *,
    as_of: AsOf | str = None,
    limits: QueryLimits | None = None,
) -> pa.Table:
    """The result of one SELECT over the catalog's tables.

    Args:
        lake: Where the tables lie.
        sql: One statement that reads.
        as_of: A moment, or its text in ISO 8601 (UTC unless it says otherwise); a version (`7`),
            where the statement reads one table; versions by table (`results=7,scans=3`).
        limits: What the query may use.

    Returns:
        Each column under a name of its own: of two `status` the second is `status_1`. A sum of
        whole numbers is int64 where it fits.

    Raises:
        UsageError: QUERY-INVALID, the statement is not SQL or names something unknown;
            QUERY-REFUSED, it does something else than read the tables; QUERY-LIMIT, it needs more
            time, memory or rows than it may.
        StorageError: A table cannot be read; TABLE-VERSION, it has no such version.
    """
    catalog = lake if isinstance(lake, Catalog) else Catalog(lake)
    limits = limits or QueryLimits()
    versions = parse_as_of(as_of) if isinstance(as_of, str) else as_of
    with _child(sql, limits) as child:
        needs = child.hear(_START_SECONDS)["needs"]
        for table in _given(catalog, needs, versions):
            child.give(pack(table))
        child.hear(limits.seconds)
        found = child.result()
        return _whole(found.rename_columns(_distinct(found.column_names)))


def _whole(table: pa.Table) -> pa.Table:
    """Sums of whole numbers as such: DuckDB's own type for them comes as a decimal."""
    for place, field in enumerate(table.schema):
        if not pa.types.is_decimal(field.type) or field.type.scale:
            continue
        try:
            table = table.set_column(place, field.name, table[place].cast(pa.int64()))
        except pa.ArrowInvalid:  # beyond 64 bits
            continue
    return table


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, a repeated one numbered so that it is like no other."""
    taken, seen = set(names), Counter[str]()
    found: list[str] = []
    for name in names:
        own = name
        while seen[name] and (own := f"{name}_{seen[name]}") in taken:
            seen[name] += 1
        seen[name] += 1
        taken.add(own)
        found.append(own)
    return found


def _given(catalog: Catalog, needs: Mapping[str, Any], as_of: Any) -> Iterator[pa.Table]:
    """The rows of each view asked for, in order."""
    tables = {view: view_names()[view] for view in needs}
    if isinstance(as_of, int) and len(set(tables.values())) > 1:
        raise UsageError(
            "a version belongs to one table, and the statement reads several.",
            hint="Name them as in results=7,scans=3, or give a date.",
        )
    read: dict[str, pa.Table] = {}  # each table once: one snapshot for both its views
    for view, filters in needs.items():
        table = tables[view]
        if table not in read:
            where = filters if view != table else _lasting(catalog, filters)
            if list(tables.values()).count(table) > 1:
                where = {}
            when = as_of.get(table) if isinstance(as_of, Mapping) else as_of
            read[table] = catalog.history(table, where=where, as_of=when)
        yield read[table] if view != table else latest(SCHEMAS[table], read[table])


def _lasting(catalog: Catalog, filters: dict[str, Any]) -> dict[str, Any]:
    """Of filters on partitions those that may stand before the latest rows are chosen.

    A model has one target. The site and the sequence of a scan can be corrected by indexing it
    again; in a lake where that happened, all partitions are read, so that an old row of the wrong
    site is never taken for the latest.
    """
    if not set(filters) - {"target"}:
        return filters
    labels = catalog.history("scans", columns=["scan_id", "site", "sequence"])
    distinct = labels.group_by(labels.column_names).aggregate([])
    if len(distinct) == len(distinct["scan_id"].unique()):
        return filters
    return {name: values for name, values in filters.items() if name == "target"}


def parse_as_of(text: str | None) -> dict[str, int] | AsOf:
    """`7`, `results=7,scans=3` or an ISO moment (UTC unless it says otherwise).

    Raises:
        UsageError: It is none of these.
    """
    if text is None or text == "":
        return None
    if text.isdecimal():
        return int(text)
    if "=" in text:
        versions = {}
        for part in text.split(","):
            name, _, number = part.strip().partition("=")
            if name not in SCHEMAS or not number.isdecimal():
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


class _Child:
    """One running child: what it says and what it is given."""

    def __init__(self, process: subprocess.Popen[bytes], limits: QueryLimits) -> None:
        self._process, self._limits = process, limits
        assert process.stdin and process.stdout
        self._in: IO[bytes] = process.stdin
        self._out: IO[bytes] = process.stdout

    def give(self, data: bytes) -> None:
        """Send one message; a child that ended early says why in its next answer."""
        with suppress(BrokenPipeError):
            send(self._in, data)

    def hear(self, seconds: float) -> dict[str, Any]:
        """The child's next message, within `seconds`; an error it reports is raised."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            answer: dict[str, Any] = json.loads(receive(self._out, 2**24))
        except (EOFError, ValueError) as error:
            if late.is_set():
                raise UsageError(
                    f"the query was stopped after {seconds:g} s.", code="QUERY-LIMIT",
                    hint="Select fewer rows, or filter on target, site and sequence.",
                ) from error  # fmt: skip
            raise self._gone() from error
        finally:
            timer.cancel()
        if "error" in answer:
            problem = answer["error"]
            code = problem["code"] if problem["code"] in CODES else "QUERY-INVALID"
            raise UsageError(problem["message"], code=code, hint=problem["hint"])
        return answer

    def result(self) -> pa.Table:
        """The table that follows the last message."""
        try:
            return unpack(receive(self._out, 2 * self._limits.result_mb * 2**20))
        except (EOFError, pa.ArrowException) as error:
            raise self._gone() from error

    def _gone(self) -> UsageError:
        self._process.kill()
        return UsageError(
            f"the query ended its process (exit code {self._process.wait()}); "
            f"its memory is limited to {self._limits.memory_mb} MB.",
            code="QUERY-LIMIT", hint="Select fewer rows or columns.",
        )  # fmt: skip


@contextmanager
def _child(sql: str, limits: QueryLimits) -> Iterator[_Child]:
    """A child that has the statement; killed at the end, whatever happens."""
    libraries = {k: v for k, v in os.environ.items() if k in _LIBRARY_PATHS}
    with tempfile.TemporaryDirectory(prefix="sgcd-query-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.query_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=libraries | {"PYTHONPATH": python_path(), "HOME": folder, "LC_ALL": "C.UTF-8"},
        )
        try:
            child = _Child(process, limits)
            child.give(json.dumps({"sql": sql, "limits": asdict(limits)}).encode())
            yield child
        finally:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with suppress(OSError):
                        pipe.close()
            process.wait()
