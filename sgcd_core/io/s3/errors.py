"""What S3 and botocore may answer, and what it means: try again, renew, or tell the user."""

from __future__ import annotations

from http.client import HTTPException
from typing import Any

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from sgcd_core.errors import InputError, SgcdError, StorageError

#: Everything a request may raise: botocore's own, a body that breaks off, a malformed endpoint.
RAISED: tuple[type[Exception], ...] = (
    boto.BotoCoreError, boto.ClientError, ResponseParserError, HTTPError, HTTPException, OSError,
    ValueError, RuntimeError,
)  # fmt: skip
ABSENT = frozenset(("404", "NoSuchKey", "NoSuchBucket", "NoSuchVersion"))
#: A condition of the request does not hold: the object exists, or is another one by now.
CONDITION = frozenset(("412", "PreconditionFailed"))
_EXPIRED = frozenset(
    ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
)
_DENIED = frozenset((
    "401", "403", "AccessDenied", "AllAccessDisabled", "AuthorizationHeaderMalformed",
    "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
))  # fmt: skip
_TRANSIENT = frozenset((
    "BadDigest", "ConditionalRequestConflict", "InternalError", "OperationAborted",
    "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException",
    "TooManyRequests", "TooManyRequestsException", "XAmzContentSHA256Mismatch",
))  # fmt: skip
_TRANSIENT_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504, 509))
_LOST_KINDS: tuple[type[Exception], ...] = (
    boto.HTTPClientError, boto.ResponseStreamingError, boto.IncompleteReadError,
    boto.FlexibleChecksumError, ResponseParserError, HTTPError, HTTPException, OSError,
)  # fmt: skip
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.NoAuthTokenError)
_NOT_RENEWED = (boto.CredentialRetrievalError, boto.SSOError, boto.TokenRetrievalError)


class BrokenAnswer(HTTPException):
    """An answer that says 200 and is not one; the text is for the log."""


def error_code(error: BaseException | None) -> str:
    """The code of S3's error document; "" for none."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def is_transient(error: Exception) -> bool:
    """Whether the same request may well succeed in a moment."""
    if isinstance(error, boto.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return error_code(error) in _TRANSIENT or status in _TRANSIENT_STATUS
    return isinstance(error, _LOST_KINDS)


def is_expired(error: Exception) -> bool:
    """Whether the credentials were good once."""
    # botocore tells of renewed credentials that are over already by a bare RuntimeError.
    late = isinstance(error, RuntimeError) and "expired" in str(error)
    return late or error_code(error) in _EXPIRED or isinstance(error, _NOT_RENEWED)


def is_refused(error: Exception) -> bool:
    """Whether other credentials might do."""
    return error_code(error) in _DENIED


def problem(uri: str, error: Exception, endpoint: str | None, *, writing: bool) -> SgcdError:
    """What went wrong, as one of our errors. Credentials never enter the message."""
    code, kind = error_code(error), type(error).__name__
    where = f"the store at {endpoint}" if endpoint else "the store"
    if code in ABSENT and not writing:
        what = "bucket" if code == "NoSuchBucket" else "object"
        return InputError(
            f"there is no such {what}.", code="SCAN-MISSING", where=uri,
            hint="Check the bucket and the key.",
        )  # fmt: skip
    if is_expired(error):
        return StorageError(
            f"the credentials for {where} have expired and could not be renewed ({code or kind}).",
            code="STORE-EXPIRED", where=uri,
            hint="Get new ones (log in again, or set AWS_SESSION_TOKEN and its two keys), then run "
            "the same command: it goes on where it stopped.",
        )  # fmt: skip
    if code == "RequestTimeTooSkewed":
        return StorageError(
            f"{where} says that this machine's clock is wrong ({code}).",
            code="STORE-DENIED", where=uri, hint="Set the clock: signatures carry the time.",
        )  # fmt: skip
    if code == "InvalidObjectState":
        return StorageError(
            f"the object is archived ({code}).", code="STORE-DENIED", where=uri,
            hint="Restore it from its storage class (Glacier, Deep Archive, …), then run the same "
            "command again.",
        )  # fmt: skip
    if isinstance(error, boto.ProfileNotFound):
        return StorageError(
            "AWS_PROFILE names no profile of the AWS files.", code="STORE-DENIED", where=uri,
            hint="Check AWS_PROFILE, ~/.aws/config and ~/.aws/credentials.",
        )  # fmt: skip
    if is_refused(error) or isinstance(error, _NO_CREDENTIALS):
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
    if writing and isinstance(error, boto.ClientError) and not is_transient(error):
        return StorageError(
            f"{where} did not take the object ({code}).", code="STORE-WRITE", where=uri,
            hint="Check that the bucket exists and has room.",
        )  # fmt: skip
    return StorageError(
        f"{where} does not answer ({code or kind}).", code="STORE-UNREACHABLE", where=uri,
        hint="Check AWS_ENDPOINT_URL, the network and that the service is up; then run the same "
        "command again.",
    )  # fmt: skip
