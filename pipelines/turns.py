"""The scans in flight in one worker: who may run beside whom, who holds the model, who is late.

A worker holds several scans, so that one is read and another written while a third is computed.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

#: Seconds after the deadline at which even a process that holds Python's lock is ended.
GRACE = 30.0


@dataclass
class _Clock:
    """Time one scan has had, without what it waited for others."""

    scan_id: str
    used: float = 0.0
    since: float | None = None

    def seconds(self) -> float:
        return self.used + (0.0 if self.since is None else time.monotonic() - self.since)

    def stop(self) -> None:
        self.used, self.since = self.seconds(), None

    def go(self) -> None:
        self.since = time.monotonic()


class Turns:
    """Turns of the threads of one process.

    Args:
        deadline: Seconds a scan may take, its waiting for others not counted; None: no watch.
        on_late: Called from a thread of its own with the scan_ids above the deadline; is expected
            to end the process, the only way to stop a thread that hangs.
    """

    def __init__(
        self, deadline: float | None = None, on_late: Callable[[list[str]], None] | None = None
    ) -> None:
        self._change = threading.Condition()
        self._together = 0
        self._alone = False
        self._want_alone = 0
        self._model = threading.Lock()
        self._clocks: dict[int, _Clock] = {}
        if deadline is not None and on_late is not None:
            watch = threading.Thread(target=self._watch, args=(deadline, on_late), daemon=True)
            watch.start()

    @contextmanager
    def together(self, scan_id: str) -> Iterator[None]:
        """A turn beside others; waits while one that must be alone runs or wants to."""
        with self._change:
            self._change.wait_for(lambda: not self._alone and not self._want_alone)
            self._together += 1
        try:
            with self._timed(scan_id):
                yield
        finally:
            with self._change:
                self._together -= 1
                self._change.notify_all()

    @contextmanager
    def alone(self, scan_id: str) -> Iterator[None]:
        """A turn with no other scan in this process: whatever happens then, this one did it."""
        with self._change:
            self._want_alone += 1
            self._change.wait_for(lambda: not self._alone and not self._together)
            self._want_alone -= 1
            self._alone = True
        try:
            with self._timed(scan_id):
                yield
        finally:
            with self._change:
                self._alone = False
                self._change.notify_all()

    @contextmanager
    def model(self) -> Iterator[None]:
        """The model, for one scan at a time; waiting for it is not held against the scan."""
        clock = self._clocks.get(threading.get_ident())
        if clock is not None:
            clock.stop()
        with self._model:
            if clock is not None:
                clock.go()
            yield

    @contextmanager
    def _timed(self, scan_id: str) -> Iterator[None]:
        me, clock = threading.get_ident(), _Clock(scan_id)
        clock.go()
        self._clocks[me] = clock
        try:
            yield
        finally:
            del self._clocks[me]

    def _watch(self, deadline: float, on_late: Callable[[list[str]], None]) -> None:
        # Code that never lets go of Python's lock would stop this thread as well; faulthandler's
        # own timer needs no lock and ends the process unless it is set anew in time.
        with open(os.devnull, "w") as nowhere:
            while True:
                faulthandler.dump_traceback_later(deadline + GRACE, exit=True, file=nowhere)
                time.sleep(min(1.0, deadline / 4))
                clocks = list(self._clocks.values())
                late = [clock.scan_id for clock in clocks if clock.seconds() > deadline]
                if late:
                    on_late(late)
