"""When to try a request again: waits drawn from a growing interval, until a deadline."""

from __future__ import annotations

import random
import time

BASE_SECONDS, CAP_SECONDS = 0.1, 10.0
#: Tries that every request gets, whatever the deadline.
LEAST_TRIES = 2


class Backoff:
    """The waits of one request: before try n + 1, uniform(0, min(cap, base · 2ⁿ)) seconds.

    Drawing from the whole interval ("full jitter") keeps many workers that failed together from
    coming back together (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog 2015).
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.tries = 1

    def again(self, seconds: float) -> bool:
        """Wait and answer True; False, at once, where that would end after `seconds` in all."""
        wait = random.uniform(0, min(CAP_SECONDS, BASE_SECONDS * 2.0**self.tries))
        late = time.monotonic() - self._start + wait > seconds
        if late and self.tries >= LEAST_TRIES:
            return False
        self.tries += 1
        time.sleep(wait)
        return True

    def progressed(self) -> None:
        """Something new arrived: the deadline counts from now, the waits start small again."""
        self._start = time.monotonic()
        self.tries = 1
