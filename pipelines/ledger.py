"""Tries are counted before a scan is touched, so that a scan that kills its worker is set aside.

A restarted worker knows nothing of its predecessor; the count therefore lies in the store, one
small object per try, written only if absent. Delta would need the driver to commit, and the
driver does not see a worker die. A try that ended holds its row, so that a driver that dies before
it commits costs no scan.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipelines.lake import Lake
from pipelines.turns import Turns
from sgcd_core.errors import InputError, StorageError
from sgcd_core.io.store import Store, join

#: After this many tries that never ended, a scan is `quarantined` (SCAN-QUARANTINED).
MAX_ATTEMPTS = 3
_LATE, _OPEN = "late.json", "open.json"
_ROW = "row"


def model_key(model: str, version: int) -> str:
    """Name of one version of one model, as a folder."""
    return f"{model}-v{version}"


def worker_name() -> str:
    """Host and process, as in `results.worker`."""
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass(frozen=True)
class Attempt:
    """One counted try of one scan.

    Attributes:
        lake: Where it is counted.
        model_key: See `model_key`.
        scan_id: The scan.
        number: 1 for the first; above `MAX_ATTEMPTS` the scan must not be touched.
        run: Who tries.
        started_at: When the try began.
    """

    lake: Lake
    model_key: str
    scan_id: str
    number: int
    run: str
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def begun(self) -> dict[str, Any]:
        """What the table `attempts` says of this try at its start."""
        return {
            "attempt": self.number, "batch_id": self.run, "worker": worker_name(),
            "started_at": self.started_at,
        }  # fmt: skip

    def earlier(self) -> list[dict[str, Any]]:
        """What the table `attempts` says of the tries before, which left this one to do."""
        found = []
        for number, body in self._before():
            ended = "uncommitted" if _ROW in body else "lost"
            found.append({
                "attempt": number, "batch_id": body["run"], "worker": body["worker"],
                "started_at": datetime.fromisoformat(body["started_at"]), "ended": ended,
            })  # fmt: skip
        if found and found[-1]["ended"] == "lost" and self.was_late(0.0):
            found[-1]["ended"] = "late"
        return found

    def keep(self, row: Mapping[str, Any], made_by: str) -> None:
        """Leave the row of a finished scan for whoever commits it, with what it was made by."""
        body = _started(self.run, self.started_at) | {"made_by": made_by, _ROW: dict(row)}
        uri = _uri(self.lake, self.model_key, self.scan_id, self.number)
        Store().write_bytes(uri, json.dumps(body, default=str).encode())

    def kept(self, made_by: str) -> dict[str, Any] | None:
        """The row of an earlier try that ended but was not committed, if `made_by` is the same."""
        for _, body in self._before():
            if body.get("made_by") == made_by:
                row: dict[str, Any] = body[_ROW]
                return row | {"finished_at": datetime.fromisoformat(row["finished_at"])}
        return None

    def was_late(self, deadline: float) -> bool:
        """Whether an earlier try took longer than `deadline` seconds."""
        note = _read(join(_folder(self.lake, self.model_key, self.scan_id), _LATE))
        return note is not None and float(note["seconds"]) >= deadline

    def _before(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and body of every try before this one.

        One may be gone: another job harmonized the same scan, and has committed its row.
        """
        for number in range(1, min(self.number, MAX_ATTEMPTS + 1)):
            body = _read(_uri(self.lake, self.model_key, self.scan_id, number))
            if body is not None:
                yield number, body


@contextmanager
def attempt(lake: Lake, model_key: str, scan_id: str, run: str, turns: Turns) -> Iterator[Attempt]:
    """Count one try of a scan in the run `run`, and hold its turn in this worker.

    Scans that were in flight beside one that killed their worker count a try, too. From its second
    try on a scan therefore runs alone: the tries after the first are its own.
    """
    with turns.together(scan_id):
        if _count(lake, model_key, scan_id, 1, run):
            yield Attempt(lake, model_key, scan_id, 1, run)
            return
    with turns.alone(scan_id):
        number = begin_attempt(lake, model_key, scan_id, run)
        yield Attempt(lake, model_key, scan_id, number, run)


def begin_attempt(lake: Lake, model_key: str, scan_id: str, run: str = "") -> int:
    """Count one try of a scan; call before anything else is done with it.

    Args:
        lake: Where it is counted.
        model_key: What it is tried with.
        scan_id: The scan.
        run: Who tries, for `forgive_attempts`.

    Returns:
        1 for the first try since the last `end_attempts`. Above `MAX_ATTEMPTS` the caller must
        not touch the scan but report it `quarantined`.
    """
    number = 1
    # Beyond the limit nothing is gained by counting on.
    while not _count(lake, model_key, scan_id, number, run) and number <= MAX_ATTEMPTS:
        number += 1
    return number


def note_late(lake: Lake, model_key: str, scan_id: str, seconds: float) -> None:
    """Write down that a try of this scan took longer than `seconds`."""
    uri = join(_folder(lake, model_key, scan_id), _LATE)
    Store().write_bytes(uri, json.dumps({"seconds": seconds}).encode())


def count_attempts(lake: Lake, model_key: str, scan_id: str) -> int:
    """Tries since the last `end_attempts`."""
    found = Store().list(_folder(lake, model_key, scan_id))
    return sum(_is_try(item.uri) for item in found)


def end_attempts(lake: Lake, model_key: str, scan_id: str) -> None:
    """Forget the tries of a scan whose row is committed (ok, flagged or failed).

    Not for a quarantined scan, unless the user asks to try it again.
    """
    store = Store()
    for item in list(store.list(_folder(lake, model_key, scan_id))):
        store.delete(item.uri)


def forget_attempts(lake: Lake, model_key: str, scan_ids: Collection[str]) -> None:
    """`end_attempts` for many scans with one listing: the user wants them tried anew."""
    store, root = Store(), join(lake.scratch("attempts"), model_key) + "/"
    for item in list(store.list(root)):
        if item.uri.rsplit("/", 2)[1] in scan_ids:
            store.delete(item.uri)


def open_attempts(lake: Lake, model_key: str) -> set[str]:
    """Scans with a try that may have written and whose row is not committed; one listing."""
    root = join(lake.scratch("attempts"), model_key) + "/"
    return {item.uri.rsplit("/", 2)[1] for item in Store().list(root)}


def is_committed(lake: Lake, model_key: str, scan_id: str, digest: str | None) -> bool:
    """Whether the last try of a scan is the one whose row says `digest` of its output.

    A driver that dies between its commit and `end_attempts` leaves such tries.
    """
    if digest is None:
        return False
    found = Store().list(_folder(lake, model_key, scan_id))
    tries = sorted(item.uri for item in found if _is_try(item.uri))
    body = _read(tries[-1]) if tries else None
    return body is not None and body.get(_ROW, {}).get("output_sha256") == digest


def forgive_attempts(lake: Lake, model_key: str, run: str) -> None:
    """Take back the tries that the end of the run `run` cut short: no scan is to blame for them.

    What they wrote may be there, so the scans stay in `open_attempts`.
    """
    store, root = Store(), join(lake.scratch("attempts"), model_key) + "/"
    last: dict[str, str] = {}
    for item in store.list(root):
        if _is_try(item.uri):
            last[item.uri.rpartition("/")[0]] = item.uri  # sorted, and one digit each
    for folder, uri in last.items():
        body = _read(uri)
        if body is not None and body["run"] == run and _ROW not in body:
            store.write_bytes(join(folder, _OPEN), b"{}")
            store.delete(uri)


@contextmanager
def taken_back(lake: Lake, run: str, *model_keys: str) -> Iterator[None]:
    """`forgive_attempts` when the block is stopped (Ctrl-C, SIGTERM) or the cluster gives up.

    The workers must be gone when the block ends.
    """
    try:
        yield
    except (KeyboardInterrupt, StorageError) as error:
        if isinstance(error, KeyboardInterrupt) or error.code == "CLUSTER":
            for key in model_keys:
                forgive_attempts(lake, key, run)
        raise


def _count(lake: Lake, model_key: str, scan_id: str, number: int, run: str) -> bool:
    """Whether this try is the one that took `number`."""
    uri = _uri(lake, model_key, scan_id, number)
    try:
        body = _started(run, datetime.now(UTC))
        Store().write_bytes(uri, json.dumps(body).encode(), if_absent=True)
    except FileExistsError:
        return False
    return True


def _read(uri: str) -> dict[str, Any] | None:
    """What an object of the ledger says; None when there is none."""
    try:
        body: dict[str, Any] = json.loads(Store().read_bytes(uri, max_bytes=1_000_000))
    except InputError as error:
        if error.code == "SCAN-MISSING":
            return None
        raise
    return body


def _started(run: str, at: datetime) -> dict[str, Any]:
    return {"worker": worker_name(), "started_at": at.isoformat(), "run": run}


def _is_try(uri: str) -> bool:
    return not uri.endswith((_LATE, _OPEN))


def _folder(lake: Lake, model_key: str, scan_id: str) -> str:
    # The slash at the end keeps one scan's prefix from matching a longer name.
    return join(lake.scratch("attempts"), model_key, scan_id) + "/"


def _uri(lake: Lake, model_key: str, scan_id: str, number: int) -> str:
    return join(_folder(lake, model_key, scan_id), f"{number}.json")
