"""Processes that this one started, found while some of them end."""

from __future__ import annotations

import contextlib

import psutil


def started(word: str) -> list[psutil.Process]:
    """Those with `word` in their command line, the oldest first.

    One that has ended, or has ended and is not waited for yet, has no command line: it is left out.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one, to psutil
            if any(word in part for part in process.cmdline()):
                found.append((process.create_time(), process))
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]
