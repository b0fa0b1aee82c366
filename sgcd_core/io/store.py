"""One door to bytes: local paths, file:// and s3://.

Plain paths and S3 keys are taken letter by letter, so `#`, `%`, spaces and any script are safe in
them. A file:// address is percent-decoded (RFC 8089) and leaves this module as a plain path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote, unquote

from sgcd_core.errors import InputError, StorageError

S3 = "s3://"
#: Characters that a name may have before a word or two and an ending go to it.
LONGEST_NAME = 240


@dataclass(frozen=True)
class ObjectInfo:
    """What a store knows of an object without reading it.

    Attributes:
        uri: Plain path or s3:// address.
        size: Bytes.
        etag: Changes whenever the content does; compare for equality only.
    """

    uri: str
    size: int
    etag: str


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data`, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def is_s3(uri: str) -> bool:
    """Whether `uri` is an s3:// address."""
    return uri.startswith(S3)


def s3_path(uri: str) -> str:
    """`bucket/key` of an s3:// address.

    Raises:
        StorageError: STORE-ADDRESS when it names no bucket.
    """
    path = uri[len(S3) :]
    if not path or path.startswith("/"):
        raise StorageError(
            "names no bucket.", code="STORE-ADDRESS", where=uri,
            hint="Write s3://bucket/prefix; a variable in it may be empty.",
        )  # fmt: skip
    return path


def trimmed(uri: str) -> str:
    """An address without slashes at its end, but for the root of a disk.

    Raises:
        StorageError: STORE-ADDRESS for s3:// without a bucket, and where there is none.
    """
    if is_s3(uri):
        return S3 + s3_path(uri).rstrip("/")
    return filled(uri).rstrip("/") or "/"


def filled(uri: str) -> str:
    """`uri`, which would stand for the folder one is in if it were empty.

    Raises:
        StorageError: STORE-ADDRESS.
    """
    if not uri.strip():
        raise StorageError(
            "the address is empty.", code="STORE-ADDRESS", where=repr(uri),
            hint="A variable in it may be empty; the folder you are in is written as a dot.",
        )  # fmt: skip
    return uri


def local_path(uri: str) -> str:
    """The plain path of a local address.

    Raises:
        StorageError: STORE-ADDRESS when the address has another scheme or names another host.
    """
    if uri.startswith("file:"):
        rest = uri[len("file:") :]
        if rest.startswith("//"):
            host, slash, path = rest[2:].partition("/")
            if host not in ("", "localhost"):
                raise StorageError(
                    "a file:// address must name this machine.", code="STORE-ADDRESS", where=uri,
                    hint="Write three slashes: file:///folder/scan.nii.gz.",
                )  # fmt: skip
            rest = slash + path
        return unquote(rest)
    scheme, sign, _ = uri.partition("://")
    if sign and scheme.replace("+", "").replace("-", "").isalnum():
        raise StorageError(
            f"addresses that begin with {scheme}:// are not supported.", code="STORE-ADDRESS",
            where=uri, hint="Use a local path, file:// or s3://.",
        )  # fmt: skip
    return uri


def join(*parts: str) -> str:
    """Parts of an address put together with single slashes; empty parts are left out.

    A file:// base becomes a plain path, so that later parts need no percent-encoding.

    Raises:
        StorageError: STORE-ADDRESS for s3:// without a bucket, and as for `local_path`.
    """
    filled = [part for part in parts if part]
    if not filled:
        return ""
    scheme = S3 if is_s3(filled[0]) else ""
    head = s3_path(filled[0]) if scheme else local_path(filled[0])
    root = "/" if head.startswith("/") and not scheme else ""
    pieces = [piece for part in (head, *filled[1:]) for piece in part.split("/") if piece]
    return scheme + root + "/".join(pieces)


def file_name(text: str) -> str:
    """`text` as the name of one object or folder: percent-encoded, a long one with a digest.

    Encoding makes three characters of a byte, and a disk takes 255 in a name.
    """
    name = quote(text, safe="")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 17]}-{sha256_hex(text.encode())[:16]}"


def is_below(address: str, folder: str) -> bool:
    """Whether an address is `folder` or lies in it."""
    return f"{address}/".startswith(f"{folder.rstrip('/')}/")


class Store:
    """Reads, writes and lists objects; holds nothing, so it is free to build, pickle and fork.

    S3 settings are taken at the moment of use from where the AWS tools have them: the environment
    (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE, …), ~/.aws, or the machine's role; and from
    SGCD_S3_ANON, SGCD_S3_PATH_STYLE, SGCD_S3_RETRY_SECONDS, SGCD_S3_TIMEOUT_SECONDS. See
    docs/storage.md.
    """

    def read_bytes(
        self, uri: str, *, max_bytes: int | None = None, sha256: str | None = None
    ) -> bytes:
        """The whole object, sure to be what was written; never more than `max_bytes` are held.

        Args:
            uri: Address.
            max_bytes: Bound.
            sha256: SHA-256 it must have, or the first digits of it.

        Raises:
            InputError: SCAN-MISSING, or SCAN-TOO-BIG when it is longer than `max_bytes`.
            StorageError: STORE-DIGEST when it is not what was written, after several reads;
                STORE-UNREACHABLE, STORE-DENIED, STORE-EXPIRED or STORE-ADDRESS.
        """
        if is_s3(uri):
            from sgcd_core.io import s3

            return s3.read(uri, max_bytes, sha256)
        from sgcd_core.io import local

        return local.read(uri, local_path(uri), max_bytes, sha256)

    def read_chunks(
        self, uri: str, *, max_bytes: int | None = None, sha256: str | None = None
    ) -> Iterator[bytes]:
        """The object in pieces of at most 1 MiB, so that a large one need not fit in memory.

        Length and digest are known at the end only: trust nothing before the last piece came.
        Arguments and errors as for `read_bytes`.
        """
        if is_s3(uri):
            from sgcd_core.io import s3

            return s3.chunks(uri, max_bytes, sha256)
        from sgcd_core.io import local

        return local.chunks(uri, local_path(uri), max_bytes, sha256)

    def write_bytes(self, uri: str, data: bytes, *, if_absent: bool = False) -> str:
        """Write the object in one step: readers see the old content or the new. Returns its etag.

        With `if_absent`, of any number of writers exactly one succeeds, and it learns so even
        where the store's answer was lost on the way.

        Raises:
            FileExistsError: `if_absent` and the object exists.
            StorageError: STORE-WRITE, STORE-UNREACHABLE, STORE-DENIED, STORE-EXPIRED or
                STORE-ADDRESS.
        """
        if is_s3(uri):
            from sgcd_core.io import s3

            return s3.write(uri, data, if_absent)
        from sgcd_core.io import local

        return local.write(uri, local_path(uri), data, if_absent)

    def require_room(self, folder: str, size: int) -> None:
        """Raise what writing `size` bytes to a folder would raise now; nothing stays there.

        For writers that are not this store and fail badly. S3 is not asked.

        Raises:
            StorageError: STORE-WRITE, STORE-DENIED or STORE-ADDRESS.
        """
        if is_s3(folder):
            return
        from sgcd_core.io import local

        local.try_writing(folder, local_path(folder), size)

    def info(self, uri: str) -> ObjectInfo:
        """Size and etag of one object.

        Raises:
            InputError: SCAN-MISSING; a folder is not an object.
            StorageError: As for `read_bytes`.
        """
        if is_s3(uri):
            from sgcd_core.io import s3

            return ObjectInfo(uri, *s3.info(uri))
        from sgcd_core.io import local

        path = local_path(uri)
        return ObjectInfo(path, *local.info(uri, path))

    def modified(self, uri: str) -> datetime:
        """When the object was written, by the store's own clock; S3 tells whole seconds.

        Raises:
            InputError, StorageError: As for `info`.
        """
        if is_s3(uri):
            from sgcd_core.io import s3

            return s3.modified(uri)
        from sgcd_core.io import local

        return local.modified(uri, local_path(uri))

    def exists(self, uri: str) -> bool:
        """Whether an object (not a folder) is there; see `has_any` for folders."""
        try:
            self.info(uri)
        except InputError as error:
            if error.code == "SCAN-MISSING":
                return False
            raise
        return True

    def has_any(self, prefix: str) -> bool:
        """Whether at least one object lies under the folder `prefix`, or is `prefix` itself."""
        return next(iter(self.list(prefix)), None) is not None

    def delete(self, uri: str) -> None:
        """Remove one object; nothing happens when it is absent."""
        if is_s3(uri):
            from sgcd_core.io import s3

            s3.delete(uri)
            return
        from sgcd_core.io import local

        local.delete(uri, local_path(uri))

    def remove_leftovers(self, prefix: str, before: datetime, *, dry_run: bool = False) -> int:
        """Remove what writers that were killed in the middle of a write left; how many files.

        No other method sees these files, and on S3 there are none: an object is whole or absent.

        Args:
            prefix: A folder; everything below it is looked through.
            before: Only files last written before this: a living writer's are younger.
            dry_run: Count, change nothing.

        Raises:
            StorageError: STORE-DENIED, STORE-WRITE, STORE-UNREACHABLE.
        """
        if is_s3(prefix):
            return 0
        from sgcd_core.io import local

        found = 0
        for path in local.leftovers(prefix, local_path(prefix), before):
            found += 1
            if not dry_run:
                local.delete(path, path)
        return found

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object under the folder `prefix`, at any depth, sorted by address.

        `sub-1` never yields what lies in `sub-10`. A prefix that is itself an object yields that
        object; one where nothing is yields nothing. A link that leads nowhere is listed with an
        empty etag, so that the scan it stands for can be reported.

        Raises:
            StorageError: STORE-EMPTY when the bucket does not exist, else as for `read_bytes`.
        """
        if is_s3(prefix):
            from sgcd_core.io import s3

            found = s3.walk(prefix)
        else:
            from sgcd_core.io import local

            found = local.walk(prefix, local_path(prefix))
        for uri, size, etag in found:
            yield ObjectInfo(uri, size, etag)

    def delta_options(self, uri: str) -> dict[str, str]:
        """`storage_options` that lead deltalake to the same endpoint with the same credentials.

        Take them anew for every table that is opened: credentials end.

        Args:
            uri: Address of the table; a local one needs none.

        Raises:
            StorageError: As for `read_bytes`.
        """
        if not is_s3(uri):
            return {}
        from sgcd_core.io import s3

        return s3.delta_options(uri)

    def has_new_credentials(self, uri: str, refused: dict[str, str]) -> bool:
        """Whether the store may now be asked with other credentials than those it refused.

        Args:
            uri: Address of the table.
            refused: What `delta_options` gave for it then.
        """
        if not is_s3(uri):
            return False
        from sgcd_core.io import s3

        return s3.has_new_credentials(uri, refused)
