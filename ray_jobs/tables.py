"""The commands of the tables themselves: ask them, keep them fast, hand them on."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from ray_jobs.context import absolute, open_lake, quoted
from ray_jobs.outcome import Outcome, table
from sgcd_core.errors import UsageError
from sgcd_core.words import counted


def query(args: Any) -> Outcome:
    """`sgcd query`: locked SQL over the tables, or what tables and columns there are."""
    from pipelines.catalog import Catalog
    from pipelines.query import QueryLimits, run_query
    from pipelines.query_format import format_of, format_result, plain_rows
    from sgcd_core.io.store import Store

    catalog = Catalog(open_lake(args.lake))
    if args.tables or args.schema is not None:
        if args.out or args.format:
            raise UsageError("--out and --format are for the rows of a SELECT; see --json.")
        rows = catalog.tables() if args.tables else _columns(args.schema)
        lines = table(list(rows[0]), [list(row.values()) for row in rows])
        return Outcome("", lines=lines, data={"rows": rows})
    sql = sys.stdin.read() if args.sql == "-" else args.sql
    if not sql:
        raise UsageError(
            "what is asked? Give one SELECT, --tables or --schema.",
            hint='Example: sgcd query "SELECT site, count(*) FROM scans GROUP BY site" --lake LAKE',
        )
    limits = QueryLimits(seconds=args.timeout) if args.timeout else QueryLimits()
    found = run_query(catalog, sql, as_of=args.as_of, limits=limits)
    if args.json and not args.out:
        return Outcome(counted(found.num_rows, "row"), data={"rows": plain_rows(found)})
    body = format_result(found, args.format or format_of(args.out))
    if args.out:
        uri = absolute(args.out)
        Store().write_bytes(uri, body)
        return Outcome(f"{counted(found.num_rows, 'row')} in {args.out}", data={"out": uri})
    sys.stdout.buffer.write(body)
    sys.stdout.buffer.flush()
    return Outcome("")  # the table counts its rows itself, the others are for programs


def optimize(args: Any) -> Outcome:
    """`sgcd optimize`: compaction, and removal of what nobody can be reading any more."""
    from pipelines.catalog import Catalog
    from pipelines.optimize import optimize as run
    from sgcd_core.io.store import Store

    catalog = Catalog(open_lake(args.lake))
    done = run(
        catalog, keep=timedelta(days=args.keep_days), tables=args.tables, dry_run=args.dry_run
    )
    rows = [asdict(item) for item in done]
    header = ["table", "rows", "files_before", "files_after", "removed"]
    lines = table(header, [[row[name] for name in header] for row in rows]) if rows else []
    before, after = (sum(row[name] for row in rows) for name in ("files_before", "files_after"))
    removed = sum(row["removed"] for row in rows)
    verb = "would make" if args.dry_run else "made"
    gone = "remove" if args.dry_run else "removed"
    text = f"{verb} {counted(before, 'file')} {after}, and {gone} {removed}"
    text += f" replaced more than {args.keep_days:g} days ago"
    left = 0
    if not args.tables:  # they lie beside volumes as well as in tables
        limit = datetime.now(UTC) - timedelta(days=args.keep_days)
        left = Store().remove_leftovers(catalog.lake.uri, limit, dry_run=args.dry_run)
    if left:
        text += f"; {counted(left, 'unfinished file')} of killed writers as old as that"
    follow = f"sgcd optimize --lake {quoted(args.lake)}" if args.dry_run else ""
    return Outcome(text, next=follow, lines=lines, data={"tables": rows, "leftovers": left})


def export(args: Any) -> Outcome:
    """`sgcd export`: plain Parquet files and a README."""
    from pipelines.catalog import Catalog
    from pipelines.export import export as run
    from pipelines.query import parse_as_of

    when = parse_as_of(args.as_of)
    if when is not None and not isinstance(when, datetime):
        raise UsageError(
            "export takes a date: a version belongs to one table.", hint="As in --as-of 2026-03-01."
        )
    out = absolute(args.out)
    files = run(Catalog(open_lake(args.lake)), out, history=args.history, as_of=when)
    rows = sum(file.rows for file in files)
    data = {"out": out, "files": [asdict(file) for file in files]}
    return Outcome(
        f"{counted(rows, 'row')} in {counted(len(files), 'file')} in {args.out}", data=data
    )


def _columns(name: str) -> list[dict[str, Any]]:
    """A row a column of one table, or of all."""
    from pipelines.catalog_docs import type_name
    from pipelines.catalog_rows import find_schema
    from pipelines.schemas import SCHEMAS

    schemas = [find_schema(name.removesuffix("_all"))] if name else list(SCHEMAS.values())
    return [
        {
            "table": schema.name, "column": c.name, "type": type_name(c.type),
            "unit": c.unit or "-", "meaning": c.description,
        }
        for schema in schemas
        for c in schema.columns
    ]  # fmt: skip
