"""The result of a query as text, or as a file other programs read."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sgcd_core.errors import UsageError
from sgcd_core.words import counted

FORMATS = ("table", "csv", "parquet", "json")


def format_result(table: pa.Table, format: str = "table") -> bytes:
    """The result as text or as a Parquet file.

    Raises:
        UsageError: There is no such format; QUERY-INVALID, it cannot hold a value of the result.
    """
    if format not in FORMATS:
        raise UsageError(f"no format {format!r}; there are {', '.join(FORMATS)}.")
    out = io.BytesIO()
    with _holding(format):
        if format == "table":
            out.write(_text(table).encode())
        elif format == "csv":
            for column in table.columns:  # pandas takes infinity for a year
                if pa.types.is_timestamp(column.type):
                    pc.min_max(column).as_py()
            for place, column in enumerate(table.columns):
                nested = pa.types.is_nested(column.type)  # pandas shortens them
                if nested or pa.types.is_interval(column.type):  # and has a class for spans
                    as_text = _json_text if nested else plain_value
                    texts = pa.array(map(as_text, column.to_pylist()), pa.string())
                    table = table.set_column(place, table.column_names[place], texts)
            # As objects: a column of whole numbers with one missing would get decimals.
            table.to_pandas(integer_object_nulls=True).to_csv(out, index=False)
        elif format == "json":
            text = json.dumps(plain_rows(table), default=str, ensure_ascii=False, indent=1)
            out.write(text.encode() + b"\n")
        else:
            import pyarrow.parquet as pq

            pq.write_table(table, out)
    return out.getvalue()


@contextmanager
def _holding(format: str) -> Iterator[None]:
    """While open, a value that the format has no word for is an error of the statement."""
    try:
        yield
    except (ValueError, OverflowError, NotImplementedError) as error:
        raise UsageError(
            f"the result holds a value that {format} output cannot: a date outside the years 1 to "
            "9999, say, or a type of its own.",
            code="QUERY-INVALID", hint="Select it as text: CAST(… AS VARCHAR).",
        ) from error  # fmt: skip


def format_of(path: str | None, default: str = "table") -> str:
    """The format a file name stands for: its ending, where that is a format.

    Raises:
        UsageError: Its ending is that of something else (`.tsv`, `.xlsx`).
    """
    name = (path or "").rpartition("/")[2]
    _, dot, ending = name.rpartition(".")
    if ending.lower() in FORMATS and dot:
        return ending.lower()
    if ending.isalnum() and dot and not ending[0].isdigit() and ending.lower() != "txt":
        raise UsageError(
            f"no format goes with the ending .{ending}.", where=path,
            hint=f"Name one with --format: {', '.join(FORMATS)}.",
        )  # fmt: skip
    return default


def plain_rows(table: pa.Table) -> list[Any]:
    """The rows as JSON has them: times in ISO 8601, NaN and infinity as missing.

    Raises:
        UsageError: QUERY-INVALID, JSON cannot hold a value of the result.
    """
    with _holding("json"):
        return [plain_value(row) for row in table.to_pylist()]


def plain_value(value: Any) -> Any:
    """A value as JSON has it, and all that it holds; see `plain_rows`."""
    if isinstance(value, pa.MonthDayNano):
        return _span(value)
    if isinstance(value, dict):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):  # a map is a list of pairs
        return [plain_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value.isoformat() if isinstance(value, date) else value


def _json_text(value: Any) -> str | None:
    if value is None:
        return None
    return json.dumps(plain_value(value), default=str, ensure_ascii=False)


def _span(value: Any) -> str:
    """A span of time as SQL shows it: `14 months 3 days 01:30:00.5`."""
    whole, rest = divmod(abs(value.nanoseconds), 10**9)
    clock = f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    clock += f".{rest:09d}".rstrip("0") if rest else ""
    parts = [
        f"{n} {name}{'' if abs(n) == 1 else 's'}"
        for n, name in ((value.months, "month"), (value.days, "day")) if n
    ]  # fmt: skip
    if value.nanoseconds or not parts:
        parts.append(("-" if value.nanoseconds < 0 else "") + clock)
    return " ".join(parts)


def _text(table: pa.Table) -> str:
    """Aligned columns for a terminal, numbers to the right."""
    rows = [[_cell(value) for value in row.values()] for row in table.to_pylist()]
    names = table.column_names
    widths = [max([len(n), *(len(r[i]) for r in rows)]) for i, n in enumerate(names)]
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    right = [any(is_one(t) for is_one in numbers) for t in table.schema.types]

    def line(cells: list[str]) -> str:
        padded = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = ["─" * w for w in widths]
    return (
        "\n".join(
            [line(names), line(rule), *(line(r) for r in rows), f"({counted(len(rows), 'row')})"]
        )
        + "\n"
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, pa.MonthDayNano):
        return _span(value)
    # A terminal must not be driven by what a cell holds.
    return "".join(c if c.isprintable() else "�" for c in str(value))
