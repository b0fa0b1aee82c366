"""Prepared scans of random sites, made on the fly, and the pool that training draws them from.

A site is a random scanner that a few random subjects visit once each; no subject visits two sites,
so no pair of scans of one brain exists. What the network learns to make is the acquisition without
its noise: from noisy scans it would learn to copy their noise.

Scans are numbered, sites after sites, and handed out by number: each serves once.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.cohort import (
    Anatomy,
    Scanner,
    load_anatomy,
    random_scanner,
    random_subject,
    render_acquisition,
)
from pipelines.cohort.anatomy import CENTRE
from sgcd_core.config import load_config
from sgcd_core.errors import SgcdError, UsageError
from sgcd_core.style.look import measure_look
from sgcd_core.volume.bias import bias_field
from sgcd_core.volume.resample import resample_masked

Array = NDArray[Any]

SUBJECTS = 5
#: Sites in a row that are made of the same few anatomies, which are read once.
SITES_PER_LOAD = 12
#: Sites in a row whose scans are handed out mixed, and sites made before they are asked for.
MIXED, AHEAD = 10, 30
ANATOMIES_AT_ONCE = 4
#: Part of the sites whose subjects are all of one anatomy, as alike as a narrow study's are.
ALIKE = 0.4
SEQUENCES = ("T1w", "T2w")
SCANS_PER_SITE = SUBJECTS * len(SEQUENCES)
#: Scans that a user of the pool is given at once.
HANDFUL = 100
#: Grids a scan is kept on: name → (voxel side in mm, shape).
GRIDS: dict[str, tuple[float, tuple[int, int, int]]] = {
    name: (grid.mm, grid.shape)
    for name, grid in ((name, load_config(name).prepare) for name in ("tiny", "small"))
}


@dataclass(frozen=True)
class SiteScans:
    """The scans of one random site and sequence.

    Attributes:
        sequence: BIDS suffix.
        images: By grid, (N, X, Y, Z) float32 in [0, 1], 0 outside the brain.
        clean: The same acquisitions without noise, on the same intensity scale.
        masks: By grid, (N, X, Y, Z) bool.
    """

    sequence: str
    images: dict[str, NDArray[np.float32]]
    clean: dict[str, NDArray[np.float32]]
    masks: dict[str, NDArray[np.bool_]]


def random_site(
    anatomies: Sequence[Anatomy], rng: np.random.Generator, subjects: int = SUBJECTS
) -> Iterator[SiteScans]:
    """A random scanner and its scans, one `SiteScans` for each sequence.

    Scanners go from ideal to odder than any usual one. Four in five are given what bias N4
    leaves (up to half of the coil's), the fifth is corrected by N4 itself, which costs more.
    """
    scanner = random_scanner(rng, strength=float(rng.uniform(0.2, 2.0)))
    corrected = rng.uniform() < 0.2
    if not corrected:
        left = float(rng.uniform(0, 0.5))
        scanner = scanner.model_copy(update={"bias": tuple(b * left for b in scanner.bias)})
    mm = float(rng.choice([1.5, 2.0, 2.0, 2.5]))
    alike = rng.uniform() < ALIKE
    picks = rng.integers(len(anatomies), size=1 if alike else subjects)
    people = [random_subject(anatomies[int(n)], rng) for n in np.resize(picks, subjects)]
    for sequence in SEQUENCES:
        found: dict[str, list[tuple[Array, Array, Array]]] = {name: [] for name in GRIDS}
        for person in people:
            for name, three in _on_grids(person, scanner, sequence, mm, corrected, rng).items():
                found[name].append(three)
        stacks = {name: [np.stack(x) for x in zip(*all_, strict=True)]
                  for name, all_ in found.items()}  # fmt: skip
        images, clean, masks = ({name: s[i] for name, s in stacks.items()} for i in range(3))
        yield SiteScans(sequence, images, clean, masks)


def _on_grids(
    person: Any, scanner: Scanner, sequence: str, mm: float, corrected: bool,
    rng: np.random.Generator,
) -> dict[str, tuple[Array, Array, Array]]:  # fmt: skip
    """By grid, the scan, the acquisition without noise and the brain mask."""
    data, clean, affine = render_acquisition(person, scanner, sequence, mm, rng)
    mask = data > 0
    if corrected:
        field = bias_field(data, mask, affine)
        data, clean = (np.asarray(x / field, np.float32) for x in (data, clean))
    out = {}
    for name, (side, shape) in GRIDS.items():
        grid: NDArray[Any] = np.diag([side, side, side, 1.0])
        grid[:3, 3] = CENTRE - side * (np.array(shape) - 1) / 2
        image, inside = resample_masked(data, mask, affine, grid, shape)
        without, _ = resample_masked(clean, mask, affine, grid, shape)
        low, high = np.percentile(image[inside], (0.5, 99.5))
        scaled, ideal = (
            (np.clip((x - low) / max(high - low, 1e-6), 0, 1) * inside).astype(np.float32)
            for x in (image, without)
        )
        out[name] = (scaled, ideal, inside)
    return out


class Pool:
    """A folder of numbered random sites: producers add, and no scan is handed out twice.

    Files stay (11 MB a site); `taken.json` tells which scans are whose, `anatomies.json` of which
    heads they are. Who trains a preset anew in the same folder is given the same scans again.

    Args:
        folder: Where the files lie.
        mixed: Sites in a row whose scans are handed out mixed.
    """

    def __init__(self, folder: str | Path, mixed: int = MIXED) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.mixed = mixed

    @property
    def ended(self) -> Path:
        """Where it is said that a producer ended, which nobody wanted."""
        return self.folder / "ended.txt"

    def anatomies(self) -> list[str]:
        """Label maps that the sites are made of, in order; none where nobody has said."""
        path = self.folder / "anatomies.json"
        return list(json.loads(path.read_text())) if path.exists() else []

    def claim(self, anatomies: Sequence[str]) -> None:
        """Say which label maps the sites are made of.

        Raises:
            UsageError: There are sites of others, or of nobody knows which.
        """
        if self.anatomies() == list(anatomies):
            return
        if self.files():
            raise UsageError(
                "the sites there were not made of the same anatomies.", where=str(self.folder),
                hint="Take another folder, take the sites there away, or name their maps in "
                "anatomies.json there if you know them.",
            )  # fmt: skip
        self._write("anatomies.json", json.dumps(list(anatomies)))

    def _write(self, name: str, text: str) -> None:
        """A file, complete or not at all, whoever else writes it."""
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        os.replace(temporary, self.folder / name)

    def say_ended(self, what: str) -> None:
        """Tell all who wait for sites that there will be no more, and why."""
        self._write(self.ended.name, what)

    def files(self) -> list[Path]:
        """Complete files by the number of their site."""
        return sorted(self.folder.glob("*.npz"), key=lambda path: path.name.split("-")[::-1])

    def path(self, sequence: str, site: int) -> Path:
        """File of one site and sequence, there or not."""
        return self.folder / f"{sequence}-{site:07d}.npz"

    def add(self, site: int, scans: SiteScans) -> None:
        """Write one file, complete or not at all: what scans without noise are, in 254 steps with
        0 outside, and the looks of the scans as they are.
        """
        arrays: dict[str, Array] = {}
        for grid, clean in scans.clean.items():
            masks, mm = scans.masks[grid], GRIDS[grid][0]
            arrays[grid] = np.round(clean * 254 + masks).astype(np.uint8)
            arrays[f"{grid}_looks"] = np.stack([
                measure_look(image, mask, mm, scans.sequence).vector()
                for image, mask in zip(scans.images[grid], masks, strict=True)
            ])  # fmt: skip
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, self.path(scans.sequence, site))

    def take(self, user: str, count: int) -> list[int]:
        """Numbers of the first `count` scans that are this user's, the same at every call.

        Scans are given for good, in handfuls and in turn, so none is given to two.
        """
        with (self.folder / "taken.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            users = self._taken()
            mine = [n for n, name in enumerate(users) if name == user]
            missing = -(-count // HANDFUL) - len(mine)
            if missing > 0:
                mine += range(len(users), len(users) + missing)
                said = {**self._sizes(), "users": [*users, *[user] * missing]}
                self._write("taken.json", json.dumps(said))
        return [HANDFUL * n + k for n in mine for k in range(HANDFUL)][:count]

    def wanted(self) -> int:
        """Sites that users have been given scans of, and some more."""
        block = self.mixed * SCANS_PER_SITE
        return -(-HANDFUL * len(self._taken()) // block) * self.mixed + AHEAD

    def _taken(self) -> list[str]:
        """Whose each handful is; refuses what was numbered in another way."""
        taken = self.folder / "taken.json"
        if not taken.exists():
            return []
        said = json.loads(taken.read_text())
        users = said.pop("users")
        if said != self._sizes():
            raise ValueError(f"{taken}: scans are numbered by {said} there, {self._sizes()} here")
        return list(users)

    def _sizes(self) -> dict[str, int]:
        """What the number of a scan depends on."""
        return {"handful": HANDFUL, "mixed": self.mixed, "subjects": SUBJECTS}

    def scan(self, number: int) -> tuple[Path, int]:
        """File and place in it of a numbered scan, there or not."""
        block, place = divmod(number, self.mixed * SCANS_PER_SITE)
        order = np.random.default_rng(block).permutation(self.mixed * SCANS_PER_SITE)
        site, rest = divmod(int(order[place]), SCANS_PER_SITE)
        sequence, index = divmod(rest, SUBJECTS)
        return self.path(SEQUENCES[sequence], block * self.mixed + site), index

    @staticmethod
    def read(path: Path, grid: str, index: int) -> tuple[Array, Array, Array]:
        """Scan `index` of a file without its noise, (X, Y, Z) in [0, 1], its mask, and the looks
        (N, LOOK_SIZE) of all scans of the file.
        """
        with np.load(path) as arrays:
            codes, looks = arrays[grid][index], arrays[f"{grid}_looks"]
        return np.maximum((codes.astype(np.float32) - 1) / 254, 0), codes > 0, looks


def produce(
    pool: Pool, anatomies: Sequence[str], seed: int, worker: int = 0, workers: int = 1, *,
    sites: int | None = None, at_least: int = 0,
    measured: Callable[[int, Sequence[SiteScans]], None] | None = None,
) -> None:  # fmt: skip
    """Add the random sites that the pool lacks: `sites` of them, or for ever as they are wanted.

    What a site is follows from `seed`, its number and the anatomies, not from who makes it.

    Args:
        pool: Where to.
        anatomies: Addresses of label maps; the last is always among those in use.
        seed: Of everything.
        worker: Number of this producer; it makes every so-manieth site.
        workers: How many producers there are.
        sites: How many the pool is to hold; None for ever.
        at_least: Made before any is wanted.
        measured: Called with the number of each site and its scans as well.

    Raises:
        UsageError: The pool is of other anatomies.
    """
    pool.claim(anatomies)
    loaded: list[Anatomy] = []
    block = -1
    for number in itertools.count(worker, workers) if sites is None else range(sites):
        while sites is None and number >= max(at_least, pool.wanted()):
            time.sleep(1.0)
        if all(pool.path(sequence, number).exists() for sequence in SEQUENCES):
            continue
        if number // SITES_PER_LOAD != block:
            block = number // SITES_PER_LOAD
            count = min(ANATOMIES_AT_ONCE, len(anatomies) - 1)
            rng = np.random.default_rng([seed, 0, block])
            picks = [*rng.choice(len(anatomies) - 1, count, replace=False), -1]
            loaded = [load_anatomy(anatomies[int(i)]) for i in picks]
        site = list(random_site(loaded, np.random.default_rng([seed, 1, number])))
        if measured is not None:  # before it is there: a site that is there is not made again
            measured(number, site)
        for scans in site:
            pool.add(number, scans)


def wait_for(
    there: Callable[[], bool], what: str, seconds: float = 600.0, ended: Path | None = None,
    count: Callable[[], int] = int, tell: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Until something is in the pool.

    Args:
        there: Whether it is.
        what: It.
        seconds: How long at most without anything new.
        ended: See `Pool.ended`.
        count: How many of it are there.
        tell: Called with that, at most twice a minute.

    Raises:
        SgcdError: A producer has ended, or has made nothing for too long.
    """
    last, since, told = count(), time.monotonic(), time.monotonic()
    while not there():
        if ended is not None and ended.exists():
            raise SgcdError(
                f"the pool has no {what}, and {ended.read_text()}.", where=str(ended.parent),
                hint="Its own error stands above; the same command goes on.",
            )  # fmt: skip
        now = time.monotonic()
        if (found := count()) != last:
            last, since = found, now
        if now - since > seconds:
            raise SgcdError(f"for {seconds:.0f} s nothing new came, and the pool has no {what}.")
        if tell is not None and now - told > 30:
            told = now
            tell(found)
        time.sleep(0.2)
