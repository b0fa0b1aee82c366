"""`--bids-filter-file`: which scans of a data set are wanted, as users of fMRIPrep write it.

The file is JSON: for each kind of scan (t1w, t2w) the entities a scan must have. A value is a
label, a list of labels, null (the entity must be absent) or "*" (it must be there).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgcd_core.errors import ConfigError
from sgcd_core.io.bids import parse_name

#: Kinds of scans by the suffix of their names; those of other programs (bold, …) are left out.
KINDS = {"t1w": "T1w", "t2w": "T2w"}
#: Entities by the names pybids gives them.
ENTITIES = {
    "subject": "sub", "session": "ses", "task": "task", "acquisition": "acq", "ceagent": "ce",
    "reconstruction": "rec", "direction": "dir", "run": "run", "echo": "echo", "part": "part",
    "chunk": "chunk",
}  # fmt: skip
#: Keys that say what every scan here is already.
_GIVEN = {"datatype": ("anat",), "suffix": tuple(KINDS.values()), "extension": None}

Filters = Mapping[str, Mapping[str, Any]]


def read_filters(path: str) -> Filters:
    """Filters by suffix (T1w, T2w).

    Raises:
        ConfigError: CONFIG-FILE or CONFIG-KEY.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "this file cannot be read as JSON.", code="CONFIG-FILE", where=path,
            hint='Write it as {"t1w": {"session": "01"}}.',
        ) from error  # fmt: skip
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise ConfigError(
            "this is no filter of kinds and entities.", code="CONFIG-FILE", where=path,
            hint='Write it as {"t1w": {"session": "01"}}.',
        )  # fmt: skip
    filters = {KINDS[k.lower()]: v for k, v in found.items() if k.lower() in KINDS}
    for wanted in filters.values():
        for key, value in wanted.items():
            labels = value if isinstance(value, list) else [value]
            if any(isinstance(label, list | dict) for label in labels):
                raise ConfigError(
                    f"the filter's value of {key!r} is neither a label nor a list of labels.",
                    code="CONFIG-FILE", where=path,
                    hint='Write it as {"t1w": {"session": ["01", "02"]}}.',
                )  # fmt: skip
            if key not in ENTITIES and key not in _GIVEN:
                raise ConfigError(
                    f"the filter's entity {key!r} is not known.", code="CONFIG-KEY", where=path,
                    hint=f"Known are {', '.join((*ENTITIES, *_GIVEN))}.",
                )  # fmt: skip
    return filters


def passes(uri: str, filters: Filters) -> bool:
    """Whether a scan has what the filter of its kind asks for; a kind without one passes."""
    name = parse_name(uri.rpartition("/")[2])
    if name is None:
        return False
    wanted, have = filters.get(name.suffix, {}), dict(name.all_entities)
    for key, value in wanted.items():
        if key in _GIVEN:
            allowed = _GIVEN[key]
            values = value if isinstance(value, list) else [value]
            if allowed is not None and not set(values) & set(allowed):
                return False
            if key == "suffix" and name.suffix not in values:
                return False
        elif not _fits(have.get(ENTITIES[key]), value, ENTITIES[key]):
            return False
    return True


def _fits(label: str | None, value: Any, entity: str) -> bool:
    if value is None or value == "Query.NONE":
        return label is None
    if value in ("*", "Query.ANY"):
        return label is not None
    if isinstance(value, list):
        return any(_fits(label, one, entity) for one in value)
    if label is None:
        return False
    text = str(value).removeprefix(f"{entity}-")
    # pybids takes indices as numbers: run 1 is run-01.
    return label == text or (label.isdecimal() and text.isdecimal() and int(label) == int(text))
