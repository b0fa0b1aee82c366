"""What a command hands back to the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DONE, WITH_FAILURES, STOPPED = 0, 1, 75


@dataclass(frozen=True)
class Outcome:
    """The end of a command.

    Attributes:
        summary: One line that says what was done.
        next: The next sensible command, or an empty string.
        exit_code: 0 all done, 1 finished with failed scans.
        lines: What is printed above the summary (tables, one line per scan).
        data: The same for programs: printed by `--json`.
    """

    summary: str
    next: str = ""
    exit_code: int = DONE
    lines: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def table(header: list[str], rows: list[list[Any]]) -> list[str]:
    """Text lines of a table: numbers to the right, the rest to the left."""

    def text(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [[text(value) for value in row] for row in rows]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(header)]
    right = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows if row[i] is not None)
        for i in range(len(header))
    ]

    def line(row: list[str]) -> str:
        parts = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return [line(header), line(["-" * w for w in widths]), *(line(row) for row in cells)]


def failure_line(row: dict[str, Any]) -> str:
    """One line about a scan that could not be used: address, code, sentence."""
    text = str(row["message"] or "").removeprefix(f"[{row['code']}] ")
    text = text.removeprefix(f"{row['uri']}: ")
    return f"failed {row['uri']}: [{row['code']}] {text}"
