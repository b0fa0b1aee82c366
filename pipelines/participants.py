"""participants.tsv of a derivative data set: the rows of its sources, for those who are in it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from pipelines.derivative import bids_label, participant
from pipelines.lesions import dataset_root
from sgcd_core.errors import InputError
from sgcd_core.io.bids_tables import SITE_COLUMNS, read_table
from sgcd_core.io.store import Store, join

Row = Mapping[str, Any]

_ID, _NONE = "participant_id", "n/a"
_SITE = "where the participant was scanned, as the source says it"
#: What the catalog knows of people; also for columns that a source does not describe.
_KNOWN = {
    "age": {"Description": "age at the scan", "Units": "years"},
    "sex": {
        "Description": "sex", "Levels": {"F": "female", "M": "male", "O": "other"},
    },
}  # fmt: skip


def participants_tables(
    scans: Iterable[Row], store: Store, present: str | None = None, gone: Collection[str] = ()
) -> tuple[bytes, dict[str, Any]]:
    """participants.tsv, and the content of participants.json.

    A participant of several sources, or with several rows in one, has one row here; what these do
    not agree on is n/a.

    Args:
        scans: Rows of `scans` with an output, whose `participant` (`sub-01`) is who they are of in
            this data set; read once, only what they say of people is kept.
        store: Where the sources lie.
        present: Root of the data set they are for; its rows of other participants are kept.
        gone: Other participants whose rows are not.
    """
    people: dict[str, list[dict[str, str]]] = {}
    described: dict[str, Any] = {}
    roots: dict[str | None, dict[str, set[str]]] = {}  # root → label there → labels here
    known: dict[str, dict[tuple[str | None, str | None], None]] = {}  # in the order they came
    for scan in scans:
        label = scan.get("participant") or participant(scan)
        people.setdefault(label, [])
        here = roots.setdefault(dataset_root(scan), {})
        here.setdefault(participant(scan), set()).add(label)
        age = None if scan["age"] is None else f"{scan['age']:g}"
        known.setdefault(label, {})[age, scan["sex"]] = None
    for root in sorted(name for name in roots if name is not None):
        rows = _rows(store, root)
        for row in rows:
            label = f"sub-{bids_label(row.get(_ID, '').removeprefix('sub-'))}"
            told = {k: v for k, v in row.items() if k and k != "session_id"}
            for mine in roots[root].get(label, ()):
                people[mine].append(told)
        described = _columns(store, root) | described if rows else described
    for label, table in people.items():
        if not table:  # no table knows them
            for age, sex in known[label]:
                table.append({k: v for k, v in (("age", age), ("sex", sex)) if v})
    if present is not None:
        described |= {k: v for k, v in _columns(store, present).items() if k not in described}
        for row in _rows(store, present):
            if row.get(_ID) and row[_ID] not in people and row[_ID] not in gone:
                people[row[_ID]] = [row]
    names = list(dict.fromkeys(
        name for rows in people.values() for row in rows for name in row if name != _ID
    ))  # fmt: skip
    lines = ["\t".join([_ID, *names])]
    for label, rows in sorted(people.items()):
        lines.append("\t".join([label, *(_agreed(rows, name) for name in names)]))
    sites = {name: {"Description": _SITE} for name in names if name.lower() in SITE_COLUMNS}
    columns = _KNOWN | sites | described
    described = {name: columns[name] for name in names if name in columns}
    return ("\n".join(lines) + "\n").encode(), described


def _agreed(rows: Sequence[Mapping[str, str]], name: str) -> str:
    values = {value for row in rows if (value := row.get(name, "").strip()) not in ("", _NONE)}
    return values.pop() if len(values) == 1 else _NONE


def _rows(store: Store, root: str) -> list[dict[str, str]]:
    try:
        return read_table(join(root, "participants.tsv"), store, keep_case=True)
    except InputError:  # none, or one that `sgcd index` has complained of
        return []


def _columns(store: Store, root: str) -> dict[str, Any]:
    try:
        found = json.loads(store.read_bytes(join(root, "participants.json"), max_bytes=10**7))
    except (InputError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
