"""Tries are counted before a scan is touched, so that a scan that kills its worker is set aside.

A restarted worker knows nothing of its predecessor; the count therefore lies in the store, one
small object per try, written only if absent. Delta would need the driver to commit, and the
driver does not see a worker die.
"""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime

from pipelines.lake import Lake
from sgcd_core.io.store import Store, join

#: After this many tries that never ended, a scan is `quarantined` (SCAN-QUARANTINED).
MAX_ATTEMPTS = 3


def model_key(model: str, version: int) -> str:
    """Name of one version of one model, as a folder."""
    return f"{model}-v{version}"


def worker_name() -> str:
    """Host and process, as in `results.worker`."""
    return f"{socket.gethostname()}:{os.getpid()}"


def begin_attempt(lake: Lake, model_key: str, scan_id: str, *, store: Store | None = None) -> int:
    """Count one try of a scan; call before anything else is done with it.

    Returns:
        1 for the first try since the last `end_attempts`. Above `MAX_ATTEMPTS` the caller must
        not touch the scan but report it `quarantined`.
    """
    store = store or Store()
    body = json.dumps(
        {"worker": worker_name(), "started_at": datetime.now(UTC).isoformat()}
    ).encode()
    number = 1
    while True:
        try:
            store.write_bytes(_uri(lake, model_key, scan_id, number), body, if_absent=True)
            return number
        except FileExistsError:
            # Beyond the limit nothing is gained by counting on.
            if number > MAX_ATTEMPTS:
                return number
            number += 1


def count_attempts(lake: Lake, model_key: str, scan_id: str, *, store: Store | None = None) -> int:
    """Tries since the last `end_attempts`."""
    store = store or Store()
    return sum(1 for _ in store.list(_folder(lake, model_key, scan_id)))


def end_attempts(lake: Lake, model_key: str, scan_id: str, *, store: Store | None = None) -> None:
    """Forget the tries of a scan whose row is committed (ok, flagged or failed).

    Not for a quarantined scan, unless the user asks to try it again.
    """
    store = store or Store()
    for item in list(store.list(_folder(lake, model_key, scan_id))):
        store.delete(item.uri)


def _folder(lake: Lake, model_key: str, scan_id: str) -> str:
    # The slash at the end keeps one scan's prefix from matching a longer name.
    return join(lake.scratch("attempts"), model_key, scan_id) + "/"


def _uri(lake: Lake, model_key: str, scan_id: str, number: int) -> str:
    return join(_folder(lake, model_key, scan_id), f"{number}.json")
