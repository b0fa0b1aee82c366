"""Objects in S3 and its kin, over botocore: retries, conditional writes, errors with codes.

Use through `Store`. Clients are shared by the threads of one process and never cross a fork.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, TypeVar

from sgcd_core.errors import InputError, SgcdError, StorageError

T = TypeVar("T")

_DENIED = frozenset(
    [
        "403",
        "AccessDenied",
        "AllAccessDisabled",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "AuthorizationHeaderMalformed",
        "401",
    ]
)
_ABSENT = frozenset(("404", "NoSuchKey", "NoSuchBucket", "NoSuchVersion"))
_SETTINGS = (
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "SGCD_S3_ANON",
    "SGCD_S3_PATH_STYLE",
)  # fmt: skip
CONNECT_SECONDS = 3
READ_SECONDS = 10
ATTEMPTS = 3

_lock = threading.Lock()
_clients: dict[tuple[int, tuple[str | None, ...]], Any] = {}


def endpoint() -> str | None:
    """The endpoint that the environment names, or None for AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def region() -> str:
    """The region that the environment names; us-east-1 when it names none."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def anonymous() -> bool:
    """Whether requests go unsigned."""
    return os.environ.get("SGCD_S3_ANON", "") == "1"


def path_style() -> bool:
    """Bucket in the path rather than the host name: the default wherever an endpoint is named."""
    return os.environ.get("SGCD_S3_PATH_STYLE", "1" if endpoint() else "0") == "1"


def client() -> Any:
    """This process's client for the settings now in the environment."""
    key = (os.getpid(), tuple(os.environ.get(name) for name in _SETTINGS))
    with _lock:
        if key not in _clients:
            import botocore
            from botocore.config import Config
            from botocore.session import get_session

            _clients[key] = get_session().create_client(
                "s3",
                region_name=region(),
                endpoint_url=endpoint(),
                config=Config(
                    connect_timeout=CONNECT_SECONDS,
                    read_timeout=READ_SECONDS,
                    retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
                    max_pool_connections=32,
                    signature_version=botocore.UNSIGNED if anonymous() else None,
                    s3={"addressing_style": "path" if path_style() else "auto"},
                ),
            )
        return _clients[key]


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the parent's lock may be held by a thread that is not here
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// address."""
    bucket, _, key = uri[len("s3://") :].partition("/")
    if not bucket:
        raise StorageError(
            "names no bucket.", code="STORE-ADDRESS", where=uri, hint="Write s3://bucket/prefix."
        )
    return bucket, key


def _code(error: BaseException) -> str:
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _problem(uri: str, error: Exception, *, writing: bool) -> SgcdError:
    """What botocore found wrong, as one of our errors. Credentials never enter the message."""
    from botocore import exceptions as boto

    code, kind = _code(error), type(error).__name__
    where = f"the store at {endpoint()}" if endpoint() else "the store"
    if code in _ABSENT and not writing:
        what = "bucket" if code == "NoSuchBucket" else "object"
        return InputError(
            f"there is no such {what}.", code="SCAN-MISSING", where=uri,
            hint="Check the bucket and the key.",
        )  # fmt: skip
    if code in _DENIED or isinstance(
        error, (boto.NoCredentialsError, boto.PartialCredentialsError, boto.NoAuthTokenError)
    ):
        return StorageError(
            f"{where} refuses these credentials ({code or kind}).", code="STORE-DENIED", where=uri,
            hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or SGCD_S3_ANON=1 for a public "
            "bucket, and check the bucket's policy.",
        )  # fmt: skip
    if isinstance(error, (boto.ParamValidationError, boto.InvalidS3AddressingStyleError)):
        return StorageError(
            "is not a valid bucket and key.", code="STORE-ADDRESS", where=uri,
            hint="Write s3://bucket/prefix.",
        )  # fmt: skip
    if writing and isinstance(error, boto.ClientError):
        return StorageError(
            f"{where} did not take the object ({code}).", code="STORE-WRITE", where=uri,
            hint="Check that the bucket exists and has room.",
        )  # fmt: skip
    return StorageError(
        f"{where} does not answer ({code or kind}).", code="STORE-UNREACHABLE", where=uri,
        hint="Check AWS_ENDPOINT_URL, the network and that the service is up.",
    )  # fmt: skip


def _call(uri: str, request: Callable[[Any], T], *, writing: bool = False) -> T:
    """`request(client)`, its errors turned into ours."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return request(client())
    except (BotoCoreError, ClientError, ValueError) as error:  # ValueError: a malformed endpoint
        raise _problem(uri, error, writing=writing) from error


def _etag(response: dict[str, Any]) -> str:
    return str(response["ETag"]).strip('"')


def read(uri: str, max_bytes: int | None) -> bytes:
    """The object's bytes, at most `max_bytes`; a connection that breaks half way is tried again."""
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    bucket, key = split(uri)
    for attempt in range(ATTEMPTS):
        response = _call(uri, lambda c: c.get_object(Bucket=bucket, Key=key))
        with response["Body"] as body:
            if max_bytes is not None and int(response["ContentLength"]) > max_bytes:
                raise InputError(
                    f"is {response['ContentLength']} bytes, over the limit of {max_bytes}.",
                    code="SCAN-TOO-BIG", where=uri,
                )  # fmt: skip
            try:
                return bytes(body.read())
            except (BotoCoreError, HTTPError, OSError) as error:
                if attempt == ATTEMPTS - 1:
                    raise _problem(uri, error, writing=False) from error
        time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def info(uri: str) -> tuple[int, str]:
    """Size in bytes and etag of an object."""
    bucket, key = split(uri)
    if not key:
        raise InputError("names a bucket, not an object.", code="SCAN-MISSING", where=uri)
    response = _call(uri, lambda c: c.head_object(Bucket=bucket, Key=key))
    return int(response["ContentLength"]), _etag(response)


def modified(uri: str) -> datetime:
    """When an object was written, by the service's clock."""
    bucket, key = split(uri)
    response = _call(uri, lambda c: c.head_object(Bucket=bucket, Key=key))
    moment: datetime = response["LastModified"]
    return moment


def write(uri: str, data: bytes, if_absent: bool) -> str:
    """Put an object; with `if_absent` by a conditional put (`If-None-Match: *`)."""
    bucket, key = split(uri)
    condition = {"IfNoneMatch": "*"} if if_absent else {}
    for attempt in range(ATTEMPTS):
        try:
            return _etag(
                _call(
                    uri,
                    lambda c: c.put_object(Bucket=bucket, Key=key, Body=data, **condition),
                    writing=True,
                )
            )
        except StorageError as error:
            code = _code(error.__cause__) if error.__cause__ else ""
            if if_absent and code in ("PreconditionFailed", "412"):
                raise FileExistsError(uri) from None
            # Two conditional puts met: the loser learns from a second try whether it lost.
            if not if_absent or code not in ("ConditionalRequestConflict", "409"):
                raise
            if attempt == ATTEMPTS - 1:
                raise
        time.sleep(0.1 * 2**attempt)
    raise AssertionError("unreachable")


def delete(uri: str) -> None:
    """Remove an object; nothing happens when it is absent."""
    bucket, key = split(uri)
    _call(uri, lambda c: c.delete_object(Bucket=bucket, Key=key), writing=True)


def _list_page(arguments: dict[str, str], s3: Any) -> dict[str, Any]:
    page: dict[str, Any] = s3.list_objects_v2(**arguments)
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
            page = _call(prefix, functools.partial(_list_page, arguments))
        except InputError as error:
            raise StorageError(
                "there is no such bucket.", code="STORE-EMPTY", where=prefix,
                hint="Check the bucket's name and AWS_ENDPOINT_URL.",
            ) from error  # fmt: skip
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                empty = False
                yield f"s3://{bucket}/{item['Key']}", int(item["Size"]), _etag(item)
        if not page.get("IsTruncated"):
            break
        token = {"ContinuationToken": page["NextContinuationToken"]}
    if empty and folder:
        try:
            yield (prefix.rstrip("/"), *info(prefix.rstrip("/")))
        except InputError:
            return


def delta_options() -> dict[str, str]:
    """The environment's S3 settings in the words of deltalake."""
    options = {
        "AWS_REGION": region(),
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false" if path_style() else "true",
        "AWS_CONDITIONAL_PUT": "etag",
        "connect_timeout": f"{CONNECT_SECONDS}s",
        "timeout": "60s",
    }
    if url := endpoint():
        options["AWS_ENDPOINT_URL"] = url
        options["AWS_ALLOW_HTTP"] = "true" if url.startswith("http://") else "false"
    if anonymous():
        return options | {"AWS_SKIP_SIGNATURE": "true"}
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given and os.environ.get("AWS_PROFILE"):
        from botocore.session import get_session

        credentials = get_session().get_credentials()
        if credentials is not None:
            fixed = credentials.get_frozen_credentials()
            values = (fixed.access_key, fixed.secret_key, fixed.token)
            given = {n: v for n, v in zip(names, values, strict=True) if v}
    return options | given
