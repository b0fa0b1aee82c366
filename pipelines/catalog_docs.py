"""The tables as Markdown, generated from their schemas.

python -m pipelines.catalog_docs docs/catalog.md     # bring that page up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa

from pipelines.schemas import SCHEMAS, Table

BEGIN = "<!-- generated from pipelines/schemas.py: begin -->\n"
END = "<!-- generated: end -->\n"


def type_name(kind: pa.DataType) -> str:
    """An Arrow type in words that no renderer takes for a tag."""
    if pa.types.is_list(kind):
        return f"list of {type_name(kind.value_type)}"
    return "time, UTC" if pa.types.is_timestamp(kind) else str(kind)


def column_table(table: Table) -> list[str]:
    """The columns as lines of a Markdown table."""
    lines = ["| column | type | unit | meaning |", "|---|---|---|---|"]
    return lines + [
        f"| {c.name} | {type_name(c.type)} | {c.unit} | {c.description} |" for c in table.columns
    ]


def reference_markdown() -> str:
    """All tables and columns, for the reference page."""
    lines: list[str] = []
    for table in SCHEMAS.values():
        partitions = ", ".join(table.partition_by) or "none"
        lines += [f"### {table.name}", "", table.description, ""]
        lines += [f"Key: {', '.join(table.key)}. Partitions: {partitions}.", ""]
        lines += [*column_table(table), ""]
    return "\n".join(lines)


def with_reference(page: str) -> str:
    """`page` with the part between its two marks generated anew."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the marks {BEGIN.strip()} and {END.strip()}")
    return head + begin + "\n" + reference_markdown() + "\n" + end + tail


def main() -> None:
    """Bring the page named on the command line up to date."""
    path = Path(sys.argv[1])
    path.write_text(with_reference(path.read_text()))


if __name__ == "__main__":
    main()
