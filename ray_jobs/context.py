"""What every command needs around its work: code version, the row in `runs`, who is asking."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from sgcd_core.errors import SgcdError
from sgcd_core.io.store import Store, filled, is_s3, local_path, trimmed

if TYPE_CHECKING:
    from pipelines.tracking import Tracker
    from sgcd_core.config import SgcdConfig

log = logging.getLogger(__name__)


@cache
def code_version() -> str:
    """Package version, with `git describe` when run from a checkout."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("sgcd-lake")
    except PackageNotFoundError:
        number = "unknown"
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return number
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=root, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return number
    return f"{number}+{done.stdout.strip()}"


@contextmanager
def recorded(
    lake: Lake, command: str, config_digest: str | None = None
) -> Iterator[dict[str, Any]]:
    """Record this run in the table `runs`; put what is worth keeping into the dict it yields."""
    started = datetime.now(UTC)
    summary: dict[str, Any] = {}
    status = "failed"
    try:
        yield summary
        status = "partial" if summary.get("failed") else "ok"
    except SgcdError as error:
        summary["code"] = error.code
        raise
    except BaseException as error:
        status = "failed" if isinstance(error, Exception) else "stopped"
        raise
    finally:
        row = {
            "run_id": f"{command}-{started:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}",
            "command": command, "config_digest": config_digest, "code_version": code_version(),
            "started_at": started, "finished_at": datetime.now(UTC), "status": status,
            "summary": json.dumps(summary, default=str),
        }  # fmt: skip
        try:
            Catalog(lake).append("runs", [row])
        except SgcdError as error:  # the run's own end must not be lost for its record
            said = summary.get("code") == error.code  # what ended the run is said once
            log.log(
                logging.INFO if said else logging.WARNING, "event=run_not_recorded code=%s",
                error.code,
            )  # fmt: skip


@contextmanager
def tracked(
    lake: Lake, command: str, config: SgcdConfig, **tags: Any
) -> Iterator[tuple[dict[str, Any], Tracker]]:
    """`recorded`, and a run in MLflow beside it; trouble in MLflow is a warning.

    The run's tags hold `tags`, and the versions of the tables that the work begins from.
    """
    from pipelines.cite import software_versions
    from pipelines.tracking import Tracker

    tags |= {f"{table}_version": Catalog(lake).version(table) for table in ("scans", "results")}
    named = {name: str(value) for name, value in tags.items() if value is not None}
    with (
        recorded(lake, command, config.digest()) as summary,
        Tracker.start(lake, command, config, {"code_version": code_version(), **named}) as tracker,
    ):
        summary["software"] = software_versions()
        yield summary, tracker


def track_training(
    tracker: Tracker, lake: Lake, name: str, version: int, history: list[dict[str, float]]
) -> None:
    """The losses of every step, and the model's files as plain artifacts and registered version."""
    track_files(tracker, lake, name, version, "candidate")  # first: losses may be many requests
    tracker.log_history(
        (int(item["step"]), {key: value for key, value in item.items() if key != "step"})
        for item in history
    )


def track_files(
    tracker: Tracker, lake: Lake, name: str, version: int, alias: str | None = None
) -> None:
    """The model's files, byte for byte, as plain artifacts, and the version in the registry."""
    store, root = Store(), lake.model(name, version)
    files = {
        item.uri.rpartition("/")[2]: store.read_bytes(item.uri) for item in store.list(root + "/")
    }
    tracker.log_pack(files)
    tracker.register(name, version, alias)


def open_lake(uri: str, *, create: bool = False) -> Lake:
    """The lake at `uri`; a local one by its absolute path, since workers may stand elsewhere.

    Raises:
        StorageError: LAKE-MISSING when there is none and `create` is false.
    """
    return Lake.open(absolute(uri), create=create)


def absolute(uri: str) -> str:
    """`uri` as every process of this machine understands it.

    Raises:
        StorageError: STORE-ADDRESS.
    """
    if is_s3(uri):
        return trimmed(uri)
    return os.path.abspath(os.path.expanduser(local_path(filled(uri))))


def quoted(argument: str) -> str:
    """`argument` as a shell would need it typed."""
    import shlex

    return shlex.quote(argument)
