"""participants.tsv and sessions.tsv: who was scanned, where, at what age."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sgcd_core.errors import InputError
from sgcd_core.io.store import Store, is_below, join

#: Columns that may hold the site, the first one present wins; upper and lower case are the same.
SITE_COLUMNS = (
    "site", "site_id", "siteid", "site_name", "center", "centre", "scanner_site",
    "acquisition_site", "scanner_id", "scanner",
)  # fmt: skip
_MISSING = frozenset(("", "n/a", "na", "nan", "none", "null", "unknown"))
_AGE = re.compile(r"(\d+(?:\.\d*)?)\s*([YyMmWwDd]?)\+?")
_DECIMAL_COMMA = re.compile(r"(\d+),(\d+)")
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_SEX = {"m": "M", "male": "M", "f": "F", "female": "F", "o": "O", "other": "O"}
_SEX_COLUMNS = ("sex", "gender")
_SPLITS = ("train", "test")
_MAX_TEXT = 64_000_000


def cell(row: Mapping[str, str], *names: str) -> str | None:
    """The first of these columns that the row has, None where its value says missing."""
    for name in names:
        if name in row:
            value = row[name].strip()
            return None if value.lower() in _MISSING else value
    return None


def parse_age(text: str | None) -> float | None:
    """Years from "34", "34.5", "34,5", "89+", "034Y" or "006M"; None for all else or beyond 130."""
    text = (text or "").strip()
    comma = _DECIMAL_COMMA.fullmatch(text)
    match = _AGE.fullmatch(f"{comma[1]}.{comma[2]}" if comma else text)
    if match is None:
        return None
    years = round(float(match[1]) * _YEARS[match[2].upper()], 4)
    return years if years <= 130 else None


def parse_sex(text: str | None) -> str | None:
    """F, M or O; None for anything else."""
    return _SEX.get((text or "").strip().lower())


def parse_split(text: str | None) -> str | None:
    """train or test; test for any other word, so that nothing is learned from it; None for none."""
    value = (text or "").strip().lower()
    return value if value in _SPLITS else "test" if value else None


#: Column → its names, whether a value is understood, what becomes of others.
_UNDERSTOOD: dict[str, tuple[tuple[str, ...], Callable[[str], bool], str]] = {
    "split": (
        ("split",), lambda value: value.lower() in _SPLITS,
        "they count as test, so that nothing is learned from them. Write train or test",
    ),
    "age": (
        ("age",), lambda value: parse_age(value) is not None,
        "they are left out. Write years, such as 34.5",
    ),
    "sex": (
        _SEX_COLUMNS, lambda value: parse_sex(value) is not None,
        "they are left out. Write F, M or O",
    ),
}  # fmt: skip


class Unread:
    """Counts the values of tables that are not understood."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = defaultdict(list)

    def look(self, rows: Sequence[Mapping[str, str]], uri: str) -> None:
        """Look through the rows of the table at `uri`."""
        for line, row in enumerate(rows, 2):
            for column, (names, understood, _) in _UNDERSTOOD.items():
                value = cell(row, *names)
                if value is not None and not understood(value):
                    self._places[column].append(f"line {line} of {uri}")

    @property
    def notes(self) -> list[str]:
        """A sentence a column: how many, where the first is, and what to write."""
        return [
            f"{len(places)} values of {column} are not understood, the first in {places[0]}; "
            f"{_UNDERSTOOD[column][2]}"
            for column, places in self._places.items()
        ]


def read_table(
    uri: str, store: Store, *, delimiter: str = "\t", keep_case: bool = False
) -> list[dict[str, str]]:
    """Rows of a delimited text file; short rows are filled with "".

    Column names are in lower case, unless `keep_case`.

    Raises:
        InputError: BIDS-INVALID when it is not UTF-8 text or two columns have one name; else as
            for `Store.read_bytes`.
    """
    try:
        text = store.read_bytes(uri, max_bytes=_MAX_TEXT).decode("utf-8-sig")
        plain = delimiter == "\t"  # BIDS tables know no quotes
        lines = list(
            csv.reader(
                io.StringIO(text, newline=""),
                delimiter=delimiter,
                quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
            )
        )
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            "is not a table in UTF-8 text.", code="BIDS-INVALID", where=uri,
            hint="Save it as UTF-8, one row a line.",
        ) from error  # fmt: skip
    lines = [line for line in lines if any(value.strip() for value in line)]
    if not lines:
        return []
    names = [name.strip().strip('"') for name in lines[0]]
    if not keep_case:
        names = [name.lower() for name in names]
    named = [name for name in names if name]  # spreadsheets leave columns without one
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise InputError(f"two columns have the name {twice[0]!r}.", code="BIDS-INVALID", where=uri)
    rows = []
    for line in lines[1:]:
        values = [value.strip().strip('"') for value in line]
        values += [""] * (len(names) - len(values))
        rows.append({n: v for n, v in zip(names, values, strict=False) if n})
    return rows


@dataclass(frozen=True)
class Person:
    """What the tables say of one subject in one session; None where they say nothing."""

    site: str | None = None
    session_site: str | None = None
    age: float | None = None
    sex: str | None = None
    split: str | None = None


class People:
    """Looks up subjects in the tables of one data set; each file is read once.

    participants.tsv may hold one row a subject, or, with a column session_id, one a session.

    Args:
        root: Address of the data set.
        tables: Addresses of its tables, as far as they were listed.
        store: Where they lie.
        listed: What was listed, a folder or one image; None for all of `root`.
    """

    def __init__(
        self, root: str, tables: set[str], store: Store, listed: str | None = None
    ) -> None:
        self._root, self._tables, self._store = root, tables, store
        self._listed = root if listed is None else listed
        self._notes: list[str] = []
        self._unread = Unread()
        self._participants: dict[tuple[str, str | None], dict[str, str]] = {}
        uri = join(root, "participants.tsv")
        # A source below the root does not list the root's table: look for it.
        if uri in tables or store.exists(uri):
            self._load(uri)
        self._sessions: dict[str, dict[str, dict[str, str]]] = {}

    @property
    def notes(self) -> list[str]:
        """Sentences about rows and values that were not used so far."""
        return self._notes + self._unread.notes

    def _load(self, uri: str) -> None:
        rows = read_table(uri, self._store)
        self._unread.look(rows, uri)
        if rows and "participant_id" not in rows[0]:
            first = next(iter(rows[0]), "")
            self._notes.append(
                f"{uri} has no column participant_id, so nothing is taken from it; its first is "
                f"{first!r}. Columns are separated by tabs"
            )
            return
        for row in rows:
            subject = cell(row, "participant_id")
            if subject is None:
                continue
            key = subject.removeprefix("sub-"), _session_of(row)
            if key in self._participants:
                self._notes.append(f"{uri}: sub-{key[0]} has two rows; the first is used")
            else:
                self._participants[key] = row

    def _session_rows(self, subject: str) -> dict[str, dict[str, str]]:
        if subject not in self._sessions:
            name = f"sub-{subject}"
            uri = join(self._root, name, f"{name}_sessions.tsv")
            there = uri in self._tables
            if not there and not is_below(uri, self._listed):
                there = self._store.exists(uri)
            rows = read_table(uri, self._store) if there else []
            self._unread.look(rows, uri)
            self._sessions[subject] = {s: row for row in rows if (s := _session_of(row))}
        return self._sessions[subject]

    def of(self, subject: str, session: str | None) -> Person:
        """What is known of a subject; a session's own row wins for age and split."""
        row = self._participants.get((subject, session)) or {}
        base = self._participants.get((subject, None), {})
        own = self._session_rows(subject).get(session, {}) if session else {}
        ages = [parse_age(cell(r, "age")) for r in (own, row, base)]
        return Person(
            site=cell(row, *SITE_COLUMNS) or cell(base, *SITE_COLUMNS),
            session_site=cell(own, *SITE_COLUMNS),
            age=next((a for a in ages if a is not None), None),
            sex=next((s for r in (row, base) if (s := parse_sex(cell(r, *_SEX_COLUMNS)))), None),
            split=next((s for r in (own, row, base) if (s := parse_split(cell(r, "split")))), None),
        )


def _session_of(row: Mapping[str, str]) -> str | None:
    session = cell(row, "session_id", "session")
    return session.removeprefix("ses-") if session else None
