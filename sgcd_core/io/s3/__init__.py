"""Objects in S3 and its kin, over botocore; use through `Store`."""

from sgcd_core.io.s3.client import anonymous
from sgcd_core.io.s3.reading import chunks, info, modified, read, walk
from sgcd_core.io.s3.request import delta_options, has_new_credentials
from sgcd_core.io.s3.writing import delete, write

__all__ = [
    "anonymous", "chunks", "delete", "delta_options", "has_new_credentials", "info", "modified",
    "read", "walk", "write",
]  # fmt: skip
