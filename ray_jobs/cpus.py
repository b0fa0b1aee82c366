"""How many CPUs this process may use: in a container or a pod, fewer than the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

#: Where Linux has its control groups, and where it tells those of this process.
GROUPS, MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cpu_count() -> int:
    """CPUs this process may run on, or fewer where a quota allows less time, rounded up."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return min([count, *map(math.ceil, _quotas())])


def _quotas() -> list[float]:
    """CPUs' worth of time that this process's control groups, and those around them, may take.

    Kubernetes' `limits.cpu` and Docker's `--cpus` are such quotas. In a container the path may be
    that of the world outside, of which only the top is seen; so every folder is asked.
    """
    try:
        lines = MINE.read_text().splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, files = GROUPS, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            top, files = GROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            found += _quota([folder / name for name in files])
            if folder == top:
                break
    return found


def _quota(files: list[Path]) -> list[float]:
    """What is over its period; nothing where there is no limit, or no such group."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return [int(quota) / int(period)] if int(quota) > 0 else []
    except (OSError, ValueError):  # `max`
        return []
