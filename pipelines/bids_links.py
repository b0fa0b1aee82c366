"""BIDS URIs: which data set a source lies in, by a name that `DatasetLinks` explains.

BIDS 1.10, "BIDS URI" (bids-specification.readthedocs.io): `bids:NAME:PATH` is PATH in the data set
that `DatasetLinks` of dataset_description.json gives for NAME, `bids::PATH` is in this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from sgcd_core.io.store import is_s3, join, sha256_hex


@dataclass(frozen=True)
class Links:
    """What turns addresses into BIDS URIs.

    Attributes:
        root: Address of the derivative data set itself.
        names: Name of every source data set by the address of its root.
    """

    root: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    def uri(self, address: str) -> str:
        """`address` as a BIDS URI; a plain URI where it lies in none of the data sets."""
        if inside := _below(address, self.root):
            return f"bids::{inside}"
        for root in sorted(self.names, key=len, reverse=True):
            if inside := _below(address, root):
                return f"bids:{self.names[root]}:{inside}"
        return as_uri(address)

    def dataset_links(self) -> dict[str, str]:
        """`DatasetLinks`: name → URI of the root."""
        return {name: as_uri(root) for root, name in sorted(self.names.items())}


def link_names(roots: Iterable[str], given: Mapping[str, str]) -> dict[str, str]:
    """A name for every data set, by root: its folder's, with a digest where that is taken.

    Args:
        roots: Addresses of data sets.
        given: Root → name as an earlier run gave them; these stay, since sidecars use them.
    """

    def plain(root: str) -> str:
        return re.sub(r"[^A-Za-z0-9]+", "-", folder_name(root)).strip("-") or "raw"

    return told_apart(roots, given, plain)


def told_apart(
    roots: Iterable[str], given: Mapping[str, str], plain: Callable[[str], str]
) -> dict[str, str]:
    """Names by root: those given, then `plain` of each other, with a digest where it is taken."""
    names = dict(given)
    for root in sorted(set(roots) - set(given)):
        name = plain(root)
        if name in names.values():
            name = f"{name}-{sha256_hex(root.encode())[:8]}"
        names[root] = name
    return names


def folder_name(root: str) -> str:
    """The last part of an address."""
    return root.rstrip("/").rpartition("/")[2]


def as_uri(address: str) -> str:
    """A local path as file://, an s3:// address as it is."""
    return address if is_s3(address) else PurePosixPath(join(address)).as_uri()


def _below(address: str, root: str) -> str | None:
    """The path of `address` inside `root`; None when it lies elsewhere."""
    base = root.rstrip("/") + "/"
    return address[len(base) :] if root and address.startswith(base) else None
