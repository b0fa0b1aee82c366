"""The Delta tables behind the catalog: opened, made, and what went wrong as our own errors."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import pyarrow as pa

from pipelines.lake import Lake
from pipelines.schemas import Table
from sgcd_core.errors import StorageError
from sgcd_core.io.local import disk_error
from sgcd_core.io.store import Store, is_s3, local_path

if TYPE_CHECKING:
    from deltalake import DeltaTable

T = TypeVar("T")
log = logging.getLogger(__name__)

#: The store knows the credentials no more, or they do not suffice.
REFUSED = ("STORE-EXPIRED", "STORE-DENIED")
#: What the system says where another writer was first: no trouble of the disk.
_RACES = (errno.EEXIST, errno.ENOENT)
#: Bytes that a commit takes beside its rows, and each further file of it, about.
_COMMIT_BYTES, _FILE_BYTES = 1 << 16, 3 << 12
#: What a table is made with. Old files and log entries outlive any horizon of `sgcd optimize`.
PROPERTIES = {
    "delta.appendOnly": "true",
    "delta.logRetentionDuration": "interval 400 days",
    "delta.deletedFileRetentionDuration": "interval 400 days",
}


def renewing(uri: str, work: Callable[[], T]) -> T:
    """`work()`, done again once where the store refused credentials that have new ones by then.

    An open table keeps the credentials it was opened with, so `work` opens its table itself.

    Args:
        uri: Address of the table that `work` opens.
        work: What is done with it; raises what it cannot do as `storage_error`.
    """
    store = Store()
    used = store.delta_options(uri)
    try:
        return work()
    except StorageError as error:
        if not (error.code in REFUSED and store.has_new_credentials(uri, used)):
            raise
        log.info("event=credentials_renewed uri=%s", uri)
    return work()


def open_table(lake: Lake, name: str) -> DeltaTable | None:
    """The table as it is now; None when nobody wrote to it yet."""
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    uri = lake.table(name)
    try:
        return DeltaTable(_delta_uri(uri), storage_options=_options(uri))
    except TableNotFoundError:
        return None
    except (OSError, DeltaError) as error:
        raise storage_error(error, uri) from error


def create_table(lake: Lake, schema: Table) -> DeltaTable:
    """An empty table, made on its own so that racing first writers append to the same one."""
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    uri = lake.table(schema.name)
    require_room(uri)
    try:
        return DeltaTable.create(
            _delta_uri(uri),
            schema=schema.arrow,
            mode="ignore",
            partition_by=list(schema.partition_by) or None,
            description=schema.description,
            configuration=PROPERTIES,
            storage_options=_options(uri),
        )
    except (OSError, DeltaError) as error:
        existing = open_table(lake, schema.name)
        if existing is None:
            raise storage_error(error, uri, writing=True) from error
        return existing


def require_room(uri: str, size: int = 0, files: int = 1) -> None:
    """Refuse to write rows of `size` bytes in so many files where a full or locked disk would.

    The table library's writer panics there, and prints so.

    Raises:
        StorageError: STORE-WRITE, STORE-DENIED.
    """
    Store().require_room(uri, size + _COMMIT_BYTES + files * _FILE_BYTES)


def load_version(delta: DeltaTable, name: str, version: int, uri: str) -> None:
    """Move an open table to one of its versions.

    Raises:
        StorageError: TABLE-VERSION when there is no such version; STORE-EXPIRED, STORE-DENIED.
    """
    from deltalake.exceptions import DeltaError

    newest = int(delta.version())
    if version > newest:
        raise no_version(name, version, f"the latest is {newest}", uri)
    try:
        delta.load_as_version(version)
    except (OSError, DeltaError, ValueError, OverflowError) as error:
        refusal = storage_error(error, uri)
        if refusal.code in REFUSED:
            raise refusal from error
        raise no_version(name, version, f"the latest is {newest}", uri) from error


def active_files(delta: DeltaTable) -> list[dict[str, Any]]:
    """Files of this version, none opened: path, size_bytes, num_records, partition.COLUMN, …"""
    found: list[dict[str, Any]] = pa.table(delta.get_add_actions(flatten=True)).to_pylist()
    return found


def no_version(name: str, version: int, why: str, uri: str) -> StorageError:
    """The error for a version that is not there, or no longer whole."""
    return StorageError(
        f"table {name} has no version {version}; {why}.", code="TABLE-VERSION", where=uri,
        hint="A date always works: rows are never deleted.",
    )  # fmt: skip


def storage_error(error: Exception, uri: str, *, writing: bool = False) -> StorageError:
    """What the table library raised, as ours; its own text may hold an address with secrets."""
    number = _disk_number(error, uri)
    if number is not None:
        return disk_error(uri, number, os.strerror(number), writing=writing)
    verb = "written" if writing else "read"
    away = isinstance(error, OSError) and is_s3(uri)
    code = "STORE-WRITE" if writing and not away else "STORE-UNREACHABLE"
    what = "the address, the endpoint and the credentials" if is_s3(uri) else "the address"
    return StorageError(
        f"the table cannot be {verb} ({type(error).__name__}).", code=_refusal(error) or code,
        where=uri, hint=f"Check {what} (`sgcd doctor`).",
    )  # fmt: skip


def may_pass(error: Exception, uri: str) -> bool:
    """Whether writing again may help, as after a race: not where disk or store have refused."""
    refused = _refusal(error) is not None or _disk_number(error, uri) is not None
    return not (refused or isinstance(error, OSError))


def _refusal(error: Exception) -> str | None:
    """Code of what an S3 store says of the credentials; None where that is not the trouble."""
    text = str(error).lower()
    if "expiredtoken" in text:
        return "STORE-EXPIRED"
    refused = any(word in text for word in ("forbidden", "accessdenied", "access denied"))
    return "STORE-DENIED" if refused else None


def _disk_number(error: Exception, uri: str) -> int | None:
    """The system's number of an error of a local disk, which the table library puts into text."""
    found = None if is_s3(uri) else re.search(r"\(os error (\d+)\)", str(error))
    return None if found is None or int(found[1]) in _RACES else int(found[1])


def _options(uri: str) -> dict[str, str] | None:
    return Store().delta_options(uri) or None


def _delta_uri(uri: str) -> str:
    """The address as deltalake takes it: it percent-decodes plain paths, so they are encoded.

    Raises:
        StorageError: STORE-ADDRESS for `%` in it, and for a backslash on S3: deltalake's log
            reader decodes twice and would look elsewhere.
    """
    path = uri.removeprefix("s3://") if is_s3(uri) else str(Path(local_path(uri)).absolute())
    if "%" in path or (is_s3(uri) and "\\" in path):
        raise StorageError(
            "a lake cannot lie in a folder with % or \\ in its name.", code="STORE-ADDRESS",
            where=uri, hint="Choose another folder.",
        )  # fmt: skip
    return f"s3://{quote(path)}" if is_s3(uri) else Path(path).as_uri()
