"""The error of bytes that are not those that were written."""

from __future__ import annotations

from typing import Any

from sgcd_core.errors import StorageError


class DigestError(StorageError):
    """STORE-DIGEST, with what is needed to judge a second read.

    Attributes:
        found: SHA-256 of what was read; "" where the object was replaced meanwhile.
        by_etag: Only the etag contradicts, and not every store's etag is an MD5.
    """

    def __init__(self, message: str, where: str, found: str = "", by_etag: bool = False) -> None:
        super().__init__(
            message, code="STORE-DIGEST", where=where,
            hint="Run the command again. If it stays so, the object is damaged: restore it, or "
            "make it again with --force.",
        )  # fmt: skip
        self.found, self.by_etag = found, by_etag

    def __reduce__(self) -> tuple[Any, ...]:
        return (DigestError, (self.message, self.where, self.found, self.by_etag))
