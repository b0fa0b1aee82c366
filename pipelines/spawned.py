"""Processes started to share work."""

from __future__ import annotations

import multiprocessing
import os
import threading


def begin_worker() -> None:
    """In a new process of a pool: one thread, and no longer than who started it."""
    import torch

    end_with_parent()
    torch.set_num_threads(1)


def end_with_parent() -> None:
    """End this spawned process when the one that started it is gone, however it went."""

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
