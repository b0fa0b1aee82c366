"""Few large files instead of many small ones, and old ones removed once nobody can be reading them.

Compaction rewrites small files of one partition as one, in one commit; every row stays, and every
earlier version still names the files it had. These are removed when they were replaced longer ago
than the horizon. A reader that started since, and `--as-of` any version since, find all they need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines.catalog import Catalog
from pipelines.catalog_rows import find_schema
from pipelines.delta import (
    PROPERTIES,
    active_files,
    open_table,
    renewing,
    require_room,
    storage_error,
)
from pipelines.lake import Lake
from pipelines.schemas import SCHEMAS
from sgcd_core.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from deltalake import DeltaTable

#: How long replaced files are kept unless told otherwise, and at least.
KEEP = timedelta(days=30)
LEAST = timedelta(days=1)
#: Files of this size are left alone.
TARGET_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Upkeep:
    """What was done to one table, or would be.

    Attributes:
        table: Its name.
        rows: Rows in it, before and after.
        files_before: Files a reader of the whole table opens.
        files_after: The same afterwards; of a dry run an estimate.
        removed: Replaced files older than the horizon that were removed.
    """

    table: str
    rows: int
    files_before: int
    files_after: int
    removed: int


def optimize(
    catalog: Catalog,
    *,
    keep: timedelta = KEEP,
    tables: Sequence[str] = (),
    dry_run: bool = False,
) -> list[Upkeep]:
    """Compact the tables and remove what was replaced before the horizon. Safe beside writers.

    Args:
        catalog: Whose tables.
        keep: Replaced files younger than this stay: for running readers and old versions.
        tables: Only these; all by default.
        dry_run: Say what would be done, change nothing.

    Returns:
        A record a table that exists.

    Raises:
        ConfigError: `keep` is shorter than a day or longer than the tables' log is kept.
        UsageError: QUERY-INVALID for an unknown table.
        StorageError: STORE-… when a table cannot be read or written; another `optimize` at the
            same time is one reason. What was done is whole; run it again.
    """
    longest = timedelta(days=int(PROPERTIES["delta.deletedFileRetentionDuration"].split()[1]))
    if not LEAST <= keep <= longest:
        raise ConfigError(
            f"replaced files are kept for {LEAST.days} to {longest.days} days, "
            f"got {keep / timedelta(days=1):g}.",
            where="--keep-days", hint="A running reader may still need younger files.",
        )  # fmt: skip
    found = []
    for name in tables or SCHEMAS:
        find_schema(name)
        done = renewing(
            catalog.lake.table(name), partial(_upkeep, catalog.lake, name, keep, dry_run)
        )
        if done is not None:
            found.append(done)
    return found


def _upkeep(lake: Lake, name: str, keep: timedelta, dry_run: bool) -> Upkeep | None:
    from deltalake.exceptions import DeltaError

    delta, uri = open_table(lake, name), lake.table(name)
    if delta is None:
        return None
    before = active_files(delta)
    hours = int(keep / timedelta(hours=1))
    try:
        if dry_run:
            after = _estimate(before)
        else:
            together = [small for small in _small(before) if len(small) > 1]
            require_room(uri, sum(map(sum, together)))
            _set_properties(delta)
            if together:
                delta.optimize.compact(target_size=TARGET_BYTES, max_concurrent_tasks=1)
            delta.create_checkpoint()
            files = active_files(delta)
            after = len(files)
            if _rows(files) < _rows(before):  # concurrent appends may only add
                raise StorageError(
                    f"compaction of {name} kept {_rows(files)} of {_rows(before)} rows; nothing "
                    "was removed.",
                    code="TABLE-SCHEMA", where=uri,
                    hint=f"Version {delta.version() - 1} is whole. Please report this.",
                )  # fmt: skip
        # Only files the log names as replaced; the log itself keeps them longer than `keep`.
        removed = delta.vacuum(
            retention_hours=hours, dry_run=dry_run, enforce_retention_duration=False
        )
    except (OSError, DeltaError) as error:
        raise storage_error(error, uri, writing=True) from error
    return Upkeep(name, _rows(before), len(before), after, len(removed))


def _set_properties(delta: DeltaTable) -> None:
    """Give a table from before they were set what new tables are made with."""
    have: dict[str, Any] = delta.metadata().configuration
    missing = {key: value for key, value in PROPERTIES.items() if have.get(key) != value}
    if missing:
        delta.alter.set_table_properties(missing)


def _rows(files: Sequence[dict[str, Any]]) -> int:
    return sum(file["num_records"] or 0 for file in files)


def _estimate(files: Sequence[dict[str, Any]]) -> int:
    """Files after compaction: of each partition the large ones, and the small ones put together."""
    small = _small(files)
    return len(files) - sum(map(len, small)) + sum(-(-sum(one) // TARGET_BYTES) for one in small)


def _small(files: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Sizes of each partition's files that compaction puts together, bytes."""
    sizes: dict[Any, list[int]] = defaultdict(list)
    for file in files:
        place = tuple(value for key, value in file.items() if key.startswith("partition."))
        if file["size_bytes"] < TARGET_BYTES:
            sizes[place].append(file["size_bytes"])
    return list(sizes.values())
