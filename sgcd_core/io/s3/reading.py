"""Reading and listing in S3: whole, bounded, and sure of every byte.

An object that was written through here carries its SHA-256 as metadata, and a mark that it is ours.
Others are compared with their etag where that is an MD5.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from botocore.exceptions import FlexibleChecksumError

from sgcd_core.errors import InputError, StorageError
from sgcd_core.io.backoff import Backoff
from sgcd_core.io.digest import DigestError
from sgcd_core.io.s3 import errors
from sgcd_core.io.s3.client import connection
from sgcd_core.io.s3.request import call, etag_of, split

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
#: Metadata of an object: the SHA-256 of its bytes.
DIGEST = "sha256"
#: Metadata of an object that was written through here: a word that is new for every write.
WRITER = "sgcd-writer"
#: Reads of an object whose bytes contradict its digest, before it counts as damaged.
READS = 6
_MD5 = re.compile(r"[0-9a-f]{32}")


def chunks(
    uri: str, max_bytes: int | None = None, sha256: str | None = None, *,
    backoff: Backoff | None = None, by_etag: bool = False,
) -> Iterator[bytes]:  # fmt: skip
    """The object piece by piece; see `Store.read_chunks`.

    A connection that breaks or stalls is taken up again at the byte where it broke, as long as
    the object is the same.

    Args:
        uri: Address.
        max_bytes: Bound on the whole.
        sha256: What the whole must have, or how that begins.
        backoff: Shared with the caller's own tries.
        by_etag: Compare with the etag where nothing better is known and it looks like an MD5.
    """
    backoff = backoff or Backoff()
    at, etag, size, kept = 0, "", None, None
    whole, md5 = hashlib.sha256(), None
    while True:
        response = _get(uri, at, etag, backoff)
        body = response["Body"]
        try:
            skip = 0 if "ContentRange" in response else at  # a store may not know ranges
            if not etag:
                etag, size = etag_of(response), response.get("ContentLength")
                about = response.get("Metadata", {})
                kept = about.get(DIGEST) if WRITER in about else None
                if by_etag and not (sha256 or kept) and _is_md5(etag, response):
                    md5 = hashlib.md5(usedforsecurity=False)
            elif etag_of(response) != etag:
                raise DigestError("the object was replaced while it was read.", uri)
            if max_bytes is not None and (size or 0) > max_bytes:
                raise _too_big(uri, max_bytes)
            while piece := body.read(CHUNK_BYTES):
                skip, piece = max(0, skip - len(piece)), piece[skip:]
                at += len(piece)
                if max_bytes is not None and at > max_bytes:
                    raise _too_big(uri, max_bytes)
                whole.update(piece)
                if md5:
                    md5.update(piece)
                backoff.progressed()
                yield piece
            if size is not None and at < size:
                raise ConnectionError("the body is short")
            break
        except FlexibleChecksumError as error:
            message = "what was read does not fit the store's own checksum."
            raise DigestError(message, uri, whole.hexdigest()) from error
        except errors.RAISED as error:
            if at == size:
                break
            link = connection()
            if not (errors.is_transient(error) and backoff.again(link.patience())):
                raise errors.problem(uri, error, link.endpoint, writing=False) from error
            reason = type(error).__name__
            log.info("event=store_resume uri=%s at=%d of=%s reason=%s", uri, at, size, reason)
        finally:
            body.close()
    found = whole.hexdigest()
    if (sha256 and not found.startswith(sha256)) or (kept and found != kept):
        raise DigestError("what was read is not what was written (SHA-256).", uri, found)
    if md5 and md5.hexdigest() != etag:
        raise DigestError("what was read does not fit its etag.", uri, found, by_etag=True)


def read(uri: str, max_bytes: int | None, sha256: str | None = None) -> bytes:
    """The object's bytes, at most `max_bytes`; read again where they contradict their digest."""
    backoff, faults = Backoff(), []
    while True:
        whole = io.BytesIO()
        try:
            for piece in chunks(uri, max_bytes, sha256, backoff=backoff, by_etag=True):
                whole.write(piece)
        except DigestError as error:
            faults.append(error)
            if len(faults) < READS:
                backoff.again(float("inf"))
                log.info("event=store_reread uri=%s reads=%d", uri, len(faults))
                continue
            # Reads that all agree are right; it is the etags of this store that are no MD5.
            if not all(one.by_etag and one.found == faults[0].found for one in faults):
                raise
            connection().etags_are_md5 = False
        return whole.getvalue()


def _get(uri: str, at: int, etag: str, backoff: Backoff) -> dict[str, Any]:
    """The answer to a GET of the object, from byte `at` where the etag is known."""
    bucket, key = split(uri)
    more = {"Range": f"bytes={at}-", "IfMatch": f'"{etag}"'} if etag else {}

    def get(client: Any) -> dict[str, Any]:
        response: dict[str, Any] = client.get_object(Bucket=bucket, Key=key, **more)
        return response

    try:
        return call(uri, get, backoff=backoff)
    except StorageError as error:
        if errors.error_code(error.__cause__) in errors.CONDITION:
            raise DigestError("the object was replaced while it was read.", uri) from error
        raise


def _is_md5(etag: str, response: dict[str, Any]) -> bool:
    """Whether an etag should be its object's MD5: not of parts, nor under keys of the user."""
    encrypted = response.get("ServerSideEncryption", "AES256") != "AES256"
    foreign = encrypted or "SSECustomerAlgorithm" in response or not connection().etags_are_md5
    return _MD5.fullmatch(etag) is not None and not foreign


def _too_big(uri: str, limit: int) -> InputError:
    return InputError(f"is longer than the limit of {limit} bytes.", code="SCAN-TOO-BIG", where=uri)


def info(uri: str) -> tuple[int, str]:
    """Size in bytes and etag of an object."""
    if not split(uri)[1]:
        raise InputError("names a bucket, not an object.", code="SCAN-MISSING", where=uri)
    try:
        response = head(uri)
    except StorageError as error:
        if errors.error_code(error.__cause__) not in ("400", "403"):
            raise
        # The answer to a HEAD has no body to say why: a GET either says it or renews credentials.
        _get(uri, 0, "", Backoff())["Body"].close()
        response = head(uri)
    return int(response["ContentLength"]), etag_of(response)


def modified(uri: str) -> datetime:
    """When an object was written, by the service's clock."""
    moment: datetime = head(uri)["LastModified"]
    return moment


def head(uri: str) -> dict[str, Any]:
    """The answer to a HEAD of the object."""
    bucket, key = split(uri)

    def request(client: Any) -> dict[str, Any]:
        response: dict[str, Any] = client.head_object(Bucket=bucket, Key=key)
        etag_of(response)
        return response

    return call(uri, request)


def _list_page(arguments: dict[str, str], client: Any) -> dict[str, Any]:
    page: dict[str, Any] = client.list_objects_v2(**arguments)
    if "IsTruncated" not in page or (page["IsTruncated"] and "NextContinuationToken" not in page):
        raise errors.BrokenAnswer(
            "a listing without an end"
        )  # an empty body would read as "no objects"
    return page


def walk(prefix: str) -> Iterator[tuple[str, int, str]]:
    """(uri, size, etag) of every object under a folder-like prefix, sorted by key."""
    bucket, key = split(prefix)
    folder = f"{key.rstrip('/')}/" if key.strip("/") else ""
    token: dict[str, str] = {}
    empty = True
    while True:
        arguments = {"Bucket": bucket, "Prefix": folder, **token}
        try:
            page = call(prefix, functools.partial(_list_page, arguments))
        except InputError as error:
            raise StorageError(
                "there is no such bucket.", code="STORE-EMPTY", where=prefix,
                hint="Check the bucket's name and AWS_ENDPOINT_URL.",
            ) from error  # fmt: skip
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                empty = False
                yield f"s3://{bucket}/{item['Key']}", int(item["Size"]), etag_of(item)
        if not page["IsTruncated"]:
            break
        token = {"ContinuationToken": page["NextContinuationToken"]}
    if empty and folder:
        try:
            yield (prefix.rstrip("/"), *info(prefix.rstrip("/")))
        except InputError:
            return
