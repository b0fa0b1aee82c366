"""Writing to S3: whole or not at all, and exactly once where that is asked for."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import uuid
from typing import Any

from sgcd_core.errors import InputError, SgcdError, StorageError
from sgcd_core.io.backoff import Backoff
from sgcd_core.io.s3 import errors
from sgcd_core.io.s3.reading import DIGEST, WRITER, head
from sgcd_core.io.s3.request import call, etag_of, split

#: Objects above this size are sent in parts, and a lost part is sent again alone.
PART_BYTES = 64 << 20


def write(uri: str, data: bytes, if_absent: bool) -> str:
    """Put an object; with `if_absent` by a conditional put (`If-None-Match: *`)."""
    word, backoff = uuid.uuid4().hex, Backoff()
    about = {"Metadata": {DIGEST: hashlib.sha256(data).hexdigest(), WRITER: word}}
    condition = {"IfNoneMatch": "*"} if if_absent else {}
    try:
        if len(data) > PART_BYTES:
            return _put_parts(uri, data, about, condition, backoff)
        return _put(uri, {"Body": data, **about, **condition}, backoff)
    except StorageError as error:
        code = errors.error_code(error.__cause__)
        if code not in (*errors.CONDITION, "NoSuchUpload"):
            raise
        # The answer to an earlier try may have been lost: is the object that one's?
        if backoff.tries > 1:
            with contextlib.suppress(InputError):
                there = head(uri)
                if there.get("Metadata", {}).get(WRITER) == word:
                    return etag_of(there)
        if if_absent and code in errors.CONDITION:
            raise FileExistsError(uri) from None
        raise


def _md5(data: bytes) -> str:
    """For `Content-MD5`, by which every service refuses an upload damaged on the way.

    The signature covers the SHA-256 too, but not every service compares it with the body.
    """
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _put(uri: str, arguments: dict[str, Any], backoff: Backoff) -> str:
    bucket, key = split(uri)
    sealed = arguments | {"ContentMD5": _md5(arguments["Body"])}
    return call(
        uri,
        lambda c: etag_of(c.put_object(Bucket=bucket, Key=key, **sealed)),
        writing=True,
        backoff=backoff,
    )


def _put_parts(
    uri: str, data: bytes, about: dict[str, Any], condition: dict[str, Any], backoff: Backoff
) -> str:
    """Put a large object in parts; it appears whole or not at all."""
    bucket, key = split(uri)
    upload: dict[str, Any] = {"Bucket": bucket, "Key": key}
    made = call(uri, lambda c: c.create_multipart_upload(**upload, **about), writing=True)
    upload["UploadId"] = made["UploadId"]
    try:
        parts = []
        for number, start in enumerate(range(0, len(data), PART_BYTES), 1):
            body = data[start : start + PART_BYTES]
            part = {"PartNumber": number, "Body": body, "ContentMD5": _md5(body)}
            etag = call(uri, functools.partial(_send, upload | part), writing=True)
            parts.append({"PartNumber": number, "ETag": etag})
        whole = {"MultipartUpload": {"Parts": parts}, **condition}
        return call(
            uri,
            lambda c: etag_of(c.complete_multipart_upload(**upload, **whole)),
            writing=True,
            backoff=backoff,
        )
    except SgcdError:
        with contextlib.suppress(SgcdError):
            call(uri, lambda c: c.abort_multipart_upload(**upload), writing=True)
        raise


def _send(part: dict[str, Any], client: Any) -> str:
    return etag_of(client.upload_part(**part))


def delete(uri: str) -> None:
    """Remove an object; nothing happens when it is absent."""
    bucket, key = split(uri)
    call(uri, lambda c: c.delete_object(Bucket=bucket, Key=key), writing=True)
