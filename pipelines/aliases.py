"""Aliases of a lake's models: which version `champion` is. The lake holds the truth.

Every move is one small numbered object, `models/NAME/aliases/ALIAS/000001.json`, written only if
absent: of two moves at once one comes second and builds on the other. The highest number counts,
the rest is the history.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from pipelines.lake import Lake
from pipelines.ledger import worker_name
from sgcd_core.errors import ModelError, UsageError
from sgcd_core.io.store import Store, join

#: Always the newest version, by themselves; nobody moves them.
NEWEST = ("latest", "candidate")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
#: Moves in a row that may come between reading an alias and moving it.
_RACES = 50


@dataclass(frozen=True)
class Move:
    """One move of an alias.

    Attributes:
        number: 1 for the first.
        version: The version it was moved to.
        previous: The version it was moved from; None for the first move.
        pack_sha256: SHA-256 of that version's `pack.json`, which holds those of all its files.
        moved_at: Time, ISO 8601, UTC.
        moved_by: Host and process.
    """

    number: int
    version: int
    previous: int | None
    pack_sha256: str
    moved_at: str
    moved_by: str


def check_alias(alias: str) -> str:
    """`alias`, when it may be moved.

    Raises:
        UsageError: It could be taken for a version, moves by itself or is no plain word.
    """
    if alias in NEWEST:
        raise UsageError(
            f"{alias} always is the newest version and cannot be moved.", where="--alias",
            hint="Use champion, or a name of your own.",
        )  # fmt: skip
    if _ALIAS.fullmatch(alias) is None or re.fullmatch(r"[vV]\d+", alias):
        raise UsageError(
            f"{alias!r} is no alias: letters, digits, - and _, a letter first, not like v1.",
            where="--alias",
        )
    return alias


def history(lake: Lake, name: str, alias: str) -> list[Move]:
    """Every move of an alias, the first one first; empty when it was never moved.

    Raises:
        ModelError: MODEL-FORMAT, a move cannot be read.
    """
    store = Store()
    return [_read(store, item.uri) for item in store.list(_folder(lake, name, alias) + "/")]


def current(lake: Lake, name: str, alias: str) -> Move | None:
    """The move that counts; None when the lake has no such alias."""
    if _ALIAS.fullmatch(alias) is None:
        return None
    store = Store()
    found = [item.uri for item in store.list(_folder(lake, name, alias) + "/")]
    return _read(store, found[-1]) if found else None


def aliases(lake: Lake, name: str) -> dict[str, int]:
    """Version behind every alias of a model that was moved once."""
    root = _folder(lake, name, "")
    words = {
        item.uri[len(root) :].strip("/").split("/")[0] for item in Store().list(root + "/")
    }  # fmt: skip
    return {word: move.version for word in sorted(words) if (move := current(lake, name, word))}


def move(lake: Lake, name: str, alias: str, version: int, pack_sha256: str) -> Move | None:
    """Move an alias to a version; None when it is there already.

    Whoever moves at the same time is not overwritten unseen: the second builds on the first.

    Raises:
        StorageError: The store cannot be written.
        ModelError: Others moved it all the time.
    """
    store = Store()
    for _ in range(_RACES):
        last = current(lake, name, alias)
        if last is not None and (last.version, last.pack_sha256) == (version, pack_sha256):
            return None
        done = Move(
            1 if last is None else last.number + 1, version,
            None if last is None else last.version, pack_sha256,
            datetime.now(UTC).isoformat(timespec="seconds"), worker_name(),
        )  # fmt: skip
        body = (json.dumps(asdict(done), indent=1) + "\n").encode()
        uri = join(_folder(lake, name, alias), f"{done.number:06d}.json")
        try:
            store.write_bytes(uri, body, if_absent=True)
        except FileExistsError:
            continue
        return done
    raise ModelError(
        f"{alias} of {name} is moved by others all the time.", code="MODEL-ALIAS", where=lake.uri,
        hint="Find out who promotes models, then try again.",
    )  # fmt: skip


def _folder(lake: Lake, name: str, alias: str) -> str:
    return join(lake.model(name), "aliases", alias)


def _read(store: Store, uri: str) -> Move:
    try:
        return Move(**json.loads(store.read_bytes(uri, max_bytes=100_000)))
    except (ValueError, TypeError) as error:
        raise ModelError(
            "this move of an alias is damaged.", code="MODEL-FORMAT", where=uri,
            hint="Delete the file: the move before it counts again.",
        ) from error  # fmt: skip
