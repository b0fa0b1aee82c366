"""One request to S3: tried again while there is hope, its errors turned into ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from sgcd_core.io.backoff import Backoff
from sgcd_core.io.s3 import errors
from sgcd_core.io.s3.client import FIRST_SECONDS, connection, renewed
from sgcd_core.io.store import s3_path

T = TypeVar("T")
log = logging.getLogger(__name__)


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// address."""
    bucket, _, key = s3_path(uri).partition("/")
    return bucket, key


def call(
    uri: str, request: Callable[[Any], T], *, writing: bool = False, backoff: Backoff | None = None
) -> T:
    """`request(client)`: tried again while there is hope, its errors turned into ours."""
    backoff = backoff or Backoff()
    link, fresh = None, False
    while True:
        try:
            link = connection()
            answer = request(link.client)
            link.answered = True
            return answer
        except errors.RAISED as error:
            expired = errors.is_expired(error)
            if isinstance(error, RuntimeError) and not expired:
                raise
            if link and errors.error_code(error):
                link.answered = True
            if link and not fresh and (expired or errors.is_refused(error)) and renewed(link):
                fresh = True
                log.info("event=credentials_renewed uri=%s", uri)
                continue
            patience = link.patience() if link else FIRST_SECONDS
            if not (errors.is_transient(error) and backoff.again(patience)):
                endpoint = link.endpoint if link else None
                raise errors.problem(uri, error, endpoint, writing=writing) from error
            reason = errors.error_code(error) or type(error).__name__
            log.info("event=store_retry uri=%s tries=%d reason=%s", uri, backoff.tries, reason)


def etag_of(response: dict[str, Any]) -> str:
    """The etag in an answer, which every object has."""
    if not response.get("ETag"):
        raise errors.BrokenAnswer("no etag")
    return str(response["ETag"]).strip('"')


def delta_options(uri: str) -> dict[str, str]:
    """`storage_options` for the Delta table at `uri`, from the very settings used here."""
    try:
        return connection().delta_options(split(uri)[0])
    except errors.RAISED as error:
        raise errors.problem(uri, error, None, writing=False) from error


def has_new_credentials(uri: str, refused: dict[str, str]) -> bool:
    """Whether credentials other than those in the `refused` storage options can be had now."""
    try:
        link = connection()
        return link.delta_options(split(uri)[0]) != refused or renewed(link)
    except errors.RAISED:
        return False  # their source does not answer; what the store said counts
