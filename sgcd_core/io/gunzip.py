"""Bounded gzip reading: every CRC is checked and no more is inflated than is asked for."""

from __future__ import annotations

import zlib

from sgcd_core.errors import InputError

MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 18  # compressed bytes handed over at a time: bounds what zlib copies back


class Gunzip:
    """A gzip stream of one or more members, inflated piece by piece.

    Zero bytes after the last member are padding, as for `gzip -d`. Anything else there is left
    unread and told by `trailing`.
    """

    def __init__(self, data: bytes, where: str) -> None:
        self._view = memoryview(data)
        self._position = 0
        self._where = where
        self._member = zlib.decompressobj(31)
        self._done = False
        self.trailing = False

    def read(self, size: int, *, after: bytes = b"") -> bytes:
        """`after` and the next `size` bytes, fewer only where the stream ends and its CRCs fit.

        Raises:
            InputError: SCAN-CORRUPT when the stream is damaged, SCAN-TRUNCATED when it breaks off.
        """
        pieces = [after]
        while size > 0 and not self._done:
            chunk = self._view[self._position : self._position + _CHUNK]
            try:
                piece = self._member.decompress(chunk, size)
            except zlib.error as error:
                raise InputError(
                    "the compressed stream is damaged.", code="SCAN-CORRUPT", where=self._where,
                    hint="Copy the file again from its source.",
                ) from error  # fmt: skip
            member = self._member  # at its end zlib may repeat unused_data in unconsumed_tail
            left = member.unused_data if member.eof else member.unconsumed_tail
            self._position += len(chunk) - len(left)
            pieces.append(piece)
            size -= len(piece)
            if self._member.eof:
                self._next_member()
            elif not chunk and not piece:
                raise InputError(
                    "the compressed stream breaks off.", code="SCAN-TRUNCATED", where=self._where,
                    hint="The file was not copied whole; copy it again.",
                )  # fmt: skip
        return b"".join(pieces)

    def _next_member(self) -> None:
        rest = self._view[self._position :]
        if bytes(rest[:2]) == MAGIC:
            self._member = zlib.decompressobj(31)
            return
        self._done = True
        self.trailing = any(bytes(rest[:_CHUNK])) or len(rest) > _CHUNK
