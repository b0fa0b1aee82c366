"""BIDS names: a strict grammar, a flat listing, and sidecars by inheritance.

Brain Imaging Data Structure 1.10 (bids-specification.readthedocs.io): file name structure and the
inheritance principle. Entities after `sub` and `ses` are kept as they come.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgcd_core.errors import InputError
from sgcd_core.io.store import ObjectInfo, Store, is_below, join
from sgcd_core.words import counted

#: Folders of a data set that hold no raw scans.
SKIPPED_FOLDERS = frozenset(("derivatives", "sourcedata", "code", "stimuli", "phenotype"))
#: A BIDS label, as a regular expression.
LABEL = r"[A-Za-z0-9+]+"
_NAME = re.compile(
    rf"(?:sub-(?P<subject>{LABEL})_)?(?:ses-(?P<session>{LABEL})_)?"
    rf"(?P<entities>(?:[a-z]+-{LABEL}_)*)(?P<suffix>[A-Za-z0-9]+)(?P<extension>\.nii(?:\.gz)?|\.json)"
)
_FOLDERS = re.compile(rf"(?:.*/)?sub-(?P<subject>{LABEL})/(?:ses-(?P<session>{LABEL})/)?[a-z]+/")
_MAX_TEXT = 16_000_000


#: Entities of images whose voxels are no magnitude.
NO_MAGNITUDE = frozenset({("part", "phase"), ("part", "real"), ("part", "imag")})


@dataclass(frozen=True)
class BidsName:
    """A file name taken apart.

    Attributes:
        subject: Label without `sub-`; None only for a sidecar higher up.
        session: Label without `ses-`.
        entities: The others, as (key, label), in order.
        suffix: T1w, T2w, …
        extension: .nii, .nii.gz or .json.
    """

    subject: str | None
    session: str | None
    entities: tuple[tuple[str, str], ...]
    suffix: str
    extension: str

    @property
    def all_entities(self) -> frozenset[tuple[str, str]]:
        """Every entity, subject and session among them."""
        own = (("sub", self.subject), ("ses", self.session))
        return frozenset((*((k, v) for k, v in own if v), *self.entities))


def parse_name(name: str) -> BidsName | None:
    """The parts of a BIDS file name (no folders), None when it is not one.

    An image needs a subject; no entity may occur twice.
    """
    match = _NAME.fullmatch(name)
    if match is None or (match["subject"] is None and match["extension"] != ".json"):
        return None
    pairs = [part.split("-", 1) for part in match["entities"].split("_") if part]
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys) or "sub" in keys or "ses" in keys:
        return None
    entities = tuple((key, label) for key, label in pairs)
    return BidsName(
        match["subject"], match["session"], entities, match["suffix"], match["extension"]
    )


@dataclass(frozen=True)
class BidsScan:
    """One image of a BIDS tree.

    Attributes:
        object: Address, size and etag.
        name: Its parsed name.
        root: Address of the data set it lies in.
    """

    object: ObjectInfo
    name: BidsName
    root: str


@dataclass
class BidsTree:
    """What a flat listing of a BIDS tree holds.

    Attributes:
        scans: Images with a wanted suffix, sorted by address.
        tables: participants.tsv and sessions.tsv files, by address.
        sidecars: JSON files with BIDS names, by folder.
        notes: Sentences about files that were left out.
        listed: What was listed: a folder or one image.
    """

    scans: list[BidsScan] = field(default_factory=list)
    tables: set[str] = field(default_factory=set)
    sidecars: dict[str, list[tuple[str, BidsName]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    listed: str = ""


def _root_of(uri: str, name: BidsName, source: str) -> str | None:
    """The data set's root of a scan at `uri`; None when folders and name disagree."""
    folder = uri.rpartition("/")[0] + "/"
    match = _FOLDERS.fullmatch(folder)
    if match is None:
        return source.rstrip("/")  # a plain prefix of well-named files
    if (match["subject"], match["session"]) != (name.subject, name.session):
        return None
    return folder[: match.start("subject") - len("sub-")].rstrip("/") or "/"


def is_skipped(relative: str) -> bool:
    """Whether a path inside a data set is hidden or lies in one of `SKIPPED_FOLDERS`."""
    *folders, name = relative.split("/")
    return name.startswith(".") or any(f in SKIPPED_FOLDERS or f.startswith(".") for f in folders)


def is_image(name: str) -> bool:
    """Whether a file has the ending of an image, in whatever capitals."""
    return name.lower().endswith((".nii", ".nii.gz"))


def is_text(address: str) -> bool:
    """Whether an address can be written down: a folder's name on disk may be any bytes."""
    try:
        address.encode()
    except UnicodeEncodeError:
        return False
    return True


def list_tree(
    source: str, store: Store, suffixes: Iterable[str], *, everything: bool = False
) -> BidsTree:
    """One flat listing of `source` (a data set, one of its folders, or a prefix), sorted out.

    Args:
        source: Folder or s3:// prefix, or one image.
        store: Where it lies.
        suffixes: Wanted ones, such as T1w.
        everything: Also look into derivatives/, sourcedata/, code/ and hidden folders.

    Raises:
        StorageError: As for `Store.list`.
    """
    base = source.rstrip("/")
    tree, wanted, odd, capitals, unsayable = BidsTree(listed=join(base)), set(suffixes), 0, 0, 0
    parts = 0
    in_lower_case = {suffix.lower() for suffix in wanted}
    for item in store.list(source):
        relative = item.uri[len(join(base)) :].lstrip("/") or item.uri.rpartition("/")[2]
        if not everything and is_skipped(relative):
            continue
        folder, _, file = item.uri.rpartition("/")
        if not is_text(item.uri):
            unsayable += 1
            continue
        if file in ("participants.tsv", "sessions.tsv") or file.endswith("_sessions.tsv"):
            tree.tables.add(item.uri)
            continue
        name = parse_name(file)
        if name is not None and name.extension == ".json":
            tree.sidecars.setdefault(folder, []).append((item.uri, name))
        elif name is not None and name.suffix in wanted:
            if NO_MAGNITUDE & name.all_entities:
                parts += 1
                continue
            root = _root_of(item.uri, name, join(base))
            if root is None:
                tree.notes.append(f"{item.uri}: its folders and its name disagree; left out")
            else:
                tree.scans.append(BidsScan(item, name, root))
        elif is_image(file):
            like = parse_name(file.lower())
            meant = like is not None and like.suffix in in_lower_case
            capitals += meant
            odd += name is None and not meant
    if unsayable:
        tree.notes.append(
            f"{source}: {counted(unsayable, 'file')} at addresses not in UTF-8; left out"
        )
    if parts:
        tree.notes.append(
            f"{source}: {counted(parts, 'image')} of a phase, a real or an imaginary part; left out"
        )
    if odd:
        tree.notes.append(f"{source}: {odd} images are not named as BIDS asks; left out")
    if capitals:
        tree.notes.append(
            f"{source}: {capitals} images differ from BIDS names in capitals alone; left out. "
            f"Write {' or '.join(sorted(wanted))} and .nii.gz"
        )
    return tree


def _folders_up(folder: str, root: str) -> Iterator[str]:
    """From `root` down to `folder`."""
    yield root
    if folder.startswith(root.rstrip("/") + "/"):
        here = root.rstrip("/")
        for part in folder[len(here) + 1 :].split("/"):
            here = f"{here}/{part}"
            yield here


def _possible(folder: str, scan: BidsScan) -> Iterator[tuple[str, BidsName]]:
    """Names that sidecars of a scan have in a folder at its place or above."""
    name, depth = scan.name, folder[len(scan.root) :].split("/")[1:]
    subject = name.subject if len(depth) > 0 else None
    session = name.session if len(depth) > 1 else None
    head = [f"sub-{subject}"] * (subject is not None) + [f"ses-{session}"] * (session is not None)
    for count in range(len(name.entities) + 1):
        for entities in itertools.combinations(name.entities, count):
            words = [*head, *(f"{key}-{label}" for key, label in entities), name.suffix]
            found = BidsName(subject, session, entities, name.suffix, ".json")
            yield f"{folder.rstrip('/')}/{'_'.join(words)}.json", found


class Sidecars:
    """JSON sidecars of a tree, read once each, merged by inheritance (deeper files win)."""

    def __init__(self, tree: BidsTree, store: Store) -> None:
        self._tree = tree
        self._store = store
        self._cache: dict[str, dict[str, Any]] = {}
        self._exists: dict[str, bool] = {}
        self.notes: list[str] = []

    def of(self, scan: BidsScan) -> tuple[Mapping[str, Any], str | None]:
        """(fields, address of the deepest file that applies or None).

        A file applies when it lies in the scan's folder or above, has the same suffix, and every
        entity in its name is the scan's.
        """
        merged: dict[str, Any] = {}
        deepest: str | None = None
        own = scan.name.all_entities
        for folder in _folders_up(scan.object.uri.rpartition("/")[0], scan.root):
            fitting = [
                (len(name.all_entities), uri)
                for uri, name in self._in(folder, scan)
                if name.suffix == scan.name.suffix and name.all_entities <= own
            ]
            for _, uri in sorted(fitting):
                merged |= self._read(uri)
                deepest = uri
        return merged, deepest

    def _in(self, folder: str, scan: BidsScan) -> Sequence[tuple[str, BidsName]]:
        """JSON files of a folder; where it lies above what was listed, those a scan may have."""
        if is_below(folder, self._tree.listed):
            return self._tree.sidecars.get(folder, ())
        return [found for found in _possible(folder, scan) if self._is_there(found[0])]

    def _is_there(self, uri: str) -> bool:
        if uri not in self._exists:
            self._exists[uri] = self._store.exists(uri)
        return self._exists[uri]

    def _read(self, uri: str) -> dict[str, Any]:
        if uri not in self._cache:
            content: Any = None
            with contextlib.suppress(InputError, ValueError, RecursionError):
                content = json.loads(self._store.read_bytes(uri, max_bytes=_MAX_TEXT))
            if not isinstance(content, dict):
                self.notes.append(f"{uri}: cannot be read as a JSON object; left out")
                content = {}
            self._cache[uri] = content
        return self._cache[uri]
