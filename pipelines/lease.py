"""One at a time, by agreement in the lake: a lease that a holder who died loses by silence.

Most of a lake needs no lease, because tables are only appended to and objects are written whole.
It is for work that two jobs would do twice, or do to the same objects: training one model, taking
in a new site.

A lease is a row of numbered objects, of which the highest counts. Whoever creates the next number
holds it, and a conditional put lets exactly one succeed. The holder rewrites its object as it
works; one that has not changed for a while is taken over. Silence is measured by the clock of
whoever waits, so no two clocks need to agree.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipelines.lake import Lake
from pipelines.ledger import worker_name
from sgcd_core.errors import BusyError, SgcdError
from sgcd_core.io.store import Store, file_name, join

log = logging.getLogger(__name__)

#: How often a holder says that it is alive, and how long it may be silent, in seconds.
BEAT_SECONDS, SILENCE_SECONDS = 10.0, 60.0
#: How long to wait for a holder that is alive.
WAIT_SECONDS = 6 * 3600.0
#: Between two words about who is waited for.
_TELL_SECONDS = 300.0


@dataclass(frozen=True)
class Hold:
    """Who holds a lease, for processes that work for the holder and live as long as they like.

    Attributes:
        name: What is to be done by one at a time.
        folder: Where the row of holders lies.
        number: Place in it.
    """

    name: str
    folder: str
    number: int

    @property
    def lost(self) -> bool:
        """Whether another took the lease over."""
        return _newest(self.folder)[0] > self.number

    def check(self) -> None:
        """Go on only while the lease is held; asks the store.

        Raises:
            BusyError: LAKE-BUSY, another took it over because the holder was silent.
            StorageError: The store is out of reach.
        """
        if self.lost:
            raise BusyError(
                f"this job was silent for so long that another took over ({self.name}).",
                where=self.folder, hint="Run the same command again; what is done is kept.",
            )  # fmt: skip


class Lease:
    """A held lease, kept by signs of life; made by `lease`.

    Attributes:
        hold: Name, folder and place in the row of holders.
    """

    def __init__(self, lake: Lake, name: str, number: int, run: str, beat_seconds: float) -> None:
        self.hold = Hold(name, _folder(lake, name), number)
        self._run, self._beat_seconds = run, beat_seconds
        self._beats, self._lost = 0, False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True, name=f"lease-{name}")
        self._thread.start()

    def check(self) -> None:
        """As `Hold.check`."""
        self.hold.check()

    def release(self) -> None:
        """Let the next one have it at once."""
        self._end.set()
        self._thread.join(timeout=30)
        if not self._lost:
            try:
                self._write(released=True)
            except SgcdError as error:  # the next one waits for the silence, nothing is lost
                log.warning("event=lease_not_released name=%s code=%s", self.hold.name, error.code)

    def _live(self) -> None:
        while not self._end.wait(self._beat_seconds):
            try:
                if self.hold.lost:
                    self._lost = True
                    return
                self._beats += 1
                self._write()
            except SgcdError as error:  # a store that hiccups; silence would decide
                log.warning("event=lease_beat_failed name=%s code=%s", self.hold.name, error.code)

    def _write(self, released: bool = False) -> None:
        Store().write_bytes(
            _uri(self.hold.folder, self.hold.number), _body(self._run, self._beats, released)
        )


@contextmanager
def lease(
    lake: Lake,
    name: str,
    *,
    wait: float = WAIT_SECONDS,
    beat: float = BEAT_SECONDS,
    silence: float = SILENCE_SECONDS,
) -> Iterator[Lease]:
    """Hold the lease `name` of a lake for the time of the block.

    Args:
        lake: Whose lease; it lies in the lake's scratch.
        name: What is to be done by one at a time.
        wait: Seconds to wait for a holder that is alive; 0: only until it has shown that it is.
        beat: Seconds between two signs of life.
        silence: Seconds without one after which a holder counts as dead; several times `beat`.

    Raises:
        BusyError: LAKE-BUSY, it is held by another and `wait` is over.
        StorageError: The store is out of reach.
    """
    held = _acquire(lake, name, wait, beat, silence)
    try:
        yield held
    finally:
        held.release()


def _acquire(lake: Lake, name: str, wait: float, beat: float, silence: float) -> Lease:
    folder, run = _folder(lake, name), uuid.uuid4().hex
    started = time.monotonic()
    seen: tuple[int, str] | None = None
    alive = False
    since, told = started, -_TELL_SECONDS
    while True:
        number, etag = _newest(folder)
        now = time.monotonic()
        if (number, etag) != seen:
            alive = seen is not None
            seen, since = (number, etag), now
        body = _read(folder, number) if number else {"released": True}
        if body.get("released") or now - since >= silence:
            if _claim(folder, number + 1, run):
                _forget(folder, number)
                return Lease(lake, name, number + 1, run, beat)
            continue  # another was faster: look again
        if alive and now - started >= wait:
            raise BusyError(
                f"{body.get('holder', 'another process')} is doing this at the moment ({name}).",
                where=lake.uri, hint="Run the same command again later, or with a longer --wait.",
            )  # fmt: skip
        if now - told >= _TELL_SECONDS:
            told = now
            log.warning("waiting for %s, which works on the same (%s)", body.get("holder"), name)
        time.sleep(min(1.0, beat / 4))


def _claim(folder: str, number: int, run: str) -> bool:
    try:
        Store().write_bytes(_uri(folder, number), _body(run, 0, False), if_absent=True)
        return True
    except FileExistsError:
        # Over S3 a writer whose answer was lost is told that its own object exists.
        return _read(folder, number).get("run") == run


def _newest(folder: str) -> tuple[int, str]:
    """Highest number and its etag; (0, "") when nobody ever held it."""
    found = (0, "")
    for item in Store().list(folder + "/"):
        stem = item.uri.rpartition("/")[2].removesuffix(".json")
        if stem.isdigit():
            found = max(found, (int(stem), item.etag))
    return found


def _read(folder: str, number: int) -> dict[str, Any]:
    """What the holder wrote; empty when it cannot be read, which is no sign of release."""
    try:
        body = json.loads(Store().read_bytes(_uri(folder, number), max_bytes=10_000))
    except (SgcdError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _forget(folder: str, number: int) -> None:
    for item in list(Store().list(folder + "/")):
        stem = item.uri.rpartition("/")[2].removesuffix(".json")
        if stem.isdigit() and int(stem) <= number:
            Store().delete(item.uri)


def _body(run: str, beats: int, released: bool) -> bytes:
    values = {"run": run, "holder": worker_name(), "beats": beats, "released": released}
    return json.dumps(values).encode()


def _folder(lake: Lake, name: str) -> str:
    return join(lake.scratch("leases"), file_name(name))


def _uri(folder: str, number: int) -> str:
    return join(folder, f"{number:08d}.json")
