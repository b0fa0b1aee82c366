"""Numbers with their nouns, for sentences that people read."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 scan`, `2 scans`, `0 scans`; `plural` for nouns that do more than take an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
