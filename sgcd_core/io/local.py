"""Files on this machine: atomic writes, sorted walks, errors with codes. Use through `Store`."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from sgcd_core.errors import InputError, SgcdError, StorageError
from sgcd_core.io.digest import DigestError

CHUNK_BYTES = 1 << 20
_TEMPORARY = ".sgcd-tmp-"
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def _etag(info: os.stat_result) -> str:
    return f"{info.st_mtime_ns:x}-{info.st_size:x}-{info.st_ino:x}"


def _problem(uri: str, error: OSError | ValueError, *, writing: bool = False) -> SgcdError:
    number = error.errno if isinstance(error, OSError) else errno.EINVAL  # a NUL in the name
    if number in _ABSENT and not writing:
        return InputError(
            "is a folder, not a file." if number == errno.EISDIR else "there is no such file.",
            code="SCAN-MISSING", where=uri, hint="Check the spelling of the path.",
        )  # fmt: skip
    reason = os.strerror(number) if number else type(error).__name__
    return disk_error(uri, number, reason, writing=writing)


def disk_error(uri: str, number: int | None, reason: str, *, writing: bool) -> StorageError:
    """What the system's error of this number means for what lies at `uri`."""
    if number == errno.EROFS:
        return StorageError(
            f"writing failed: {reason}.", code="STORE-DENIED", where=uri,
            hint="Mount it so that it can be written, or use another place.",
        )  # fmt: skip
    if number in (errno.EACCES, errno.EPERM):
        verb = "written" if writing else "read"
        return StorageError(
            f"this user may not have it {verb}.", code="STORE-DENIED", where=uri,
            hint="Check the permissions of the file and its folders.",
        )  # fmt: skip
    if writing:
        return StorageError(
            f"writing failed: {reason}.", code="STORE-WRITE", where=uri,
            hint="Check free space and that the folder can be written.",
        )  # fmt: skip
    return StorageError(f"reading failed: {reason}.", code="STORE-UNREACHABLE", where=uri)


def _complain(uri: str) -> Callable[[OSError], None]:
    """For `os.walk`, which would pass over a folder it may not list."""

    def complain(error: OSError) -> None:
        raise _problem(uri, error) from error

    return complain


def chunks(
    uri: str, path: str, max_bytes: int | None, sha256: str | None = None
) -> Iterator[bytes]:
    """The file piece by piece; see `Store.read_chunks`."""
    at, whole = 0, hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(CHUNK_BYTES):
                at += len(piece)
                if max_bytes is not None and at > max_bytes:
                    raise InputError(
                        f"is longer than the limit of {max_bytes} bytes.",
                        code="SCAN-TOO-BIG", where=uri,
                    )  # fmt: skip
                if sha256:
                    whole.update(piece)
                yield piece
    except (OSError, ValueError) as error:
        raise _problem(uri, error) from error
    if sha256 and not whole.hexdigest().startswith(sha256):
        raise DigestError("what was read is not what was written (SHA-256).", uri)


def read(uri: str, path: str, max_bytes: int | None, sha256: str | None = None) -> bytes:
    """The file's bytes, at most `max_bytes`."""
    whole = io.BytesIO()
    for piece in chunks(uri, path, max_bytes, sha256):
        whole.write(piece)
    return whole.getvalue()


def info(uri: str, path: str) -> tuple[int, str]:
    """Size in bytes and etag of a file."""
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, "folder")
    except (OSError, ValueError) as error:
        raise _problem(uri, error) from error
    return found.st_size, _etag(found)


def modified(uri: str, path: str) -> datetime:
    """When a file was written, by the clock of its file system."""
    try:
        return datetime.fromtimestamp(os.stat(path).st_mtime, UTC)
    except (OSError, ValueError) as error:
        raise _problem(uri, error) from error


def write(uri: str, path: str, data: bytes, if_absent: bool) -> str:
    """Write beside the target, then move (or, if it must be absent, link) into place."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
    try:
        if not name:
            raise IsADirectoryError(errno.EISDIR, "folder")
        if folder:
            os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                etag = _etag(os.fstat(file.fileno()))
            if if_absent:
                _link(temporary, path)
            else:
                os.replace(temporary, path)
            _sync(folder)
        finally:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(temporary)
    except FileExistsError:
        if if_absent and not os.path.isdir(path) and os.path.lexists(path):
            raise
        raise StorageError(
            "a file stands where a folder is needed.", code="STORE-WRITE", where=uri
        ) from None
    except (OSError, ValueError) as error:
        raise _problem(uri, error, writing=True) from error
    return etag


def try_writing(uri: str, folder: str, size: int) -> None:
    """Write `size` bytes to a file without a name in a folder, and give it up."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for start in range(0, size, CHUNK_BYTES):
                file.write(bytes(min(CHUNK_BYTES, size - start)))
            file.flush()
    except (OSError, ValueError) as error:
        raise _problem(uri, error, writing=True) from error


def _sync(folder: str) -> None:
    """Make the new name outlive a power cut: a row must never outlive the object it names."""
    with contextlib.suppress(OSError):  # some network file systems cannot
        number = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _link(temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links: claim the name first, then move the content over it.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)


def delete(uri: str, path: str) -> None:
    """Remove a file; nothing happens when it is absent."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise _problem(uri, error, writing=True) from error


def leftovers(uri: str, path: str, before: datetime) -> Iterator[str]:
    """What writers that were killed in the middle of a write left under a folder before a time."""
    for folder, _, names in os.walk(path, onerror=_complain(uri)):
        for found in (os.path.join(folder, n) for n in names if n.startswith(_TEMPORARY)):
            with contextlib.suppress(InputError):  # its writer has moved it since
                if modified(uri, found) < before:
                    yield found


def walk(uri: str, path: str) -> Iterator[tuple[str, int, str]]:
    """(path, size, etag) of every file under a folder, sorted by path.

    Links are followed, under each of their names, except back to a folder above.
    """
    root = path.rstrip("/") or "/"
    try:  # one look: between two, another process may make the folder
        is_folder = stat.S_ISDIR(os.stat(root).st_mode)
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise _problem(uri, error) from error
        is_folder = False
        if not os.path.islink(root):
            return  # nothing is there; a link that leads nowhere is listed
    if not is_folder:
        yield _entry(uri, root)
        return
    found: list[str] = []
    above: dict[str, frozenset[tuple[int, int]]] = {root: frozenset()}

    for folder, subfolders, names in os.walk(root, onerror=_complain(uri), followlinks=True):
        here = os.stat(folder)
        over, place = above.pop(folder), (here.st_dev, here.st_ino)
        if place in over:  # a link back to a folder above
            subfolders.clear()
            continue
        above |= dict.fromkeys((os.path.join(folder, n) for n in subfolders), over | {place})
        found.extend(os.path.join(folder, n) for n in names if not n.startswith(_TEMPORARY))
    for name in sorted(found):
        yield _entry(uri, name)


def _entry(uri: str, path: str) -> tuple[str, int, str]:
    try:
        found = os.stat(path)
    except OSError as error:
        if error.errno in _ABSENT:  # a link that leads nowhere, or to itself
            return path, 0, ""
        raise _problem(uri, error) from error
    return path, found.st_size, _etag(found)
