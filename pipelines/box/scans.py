"""Prepared scans of random sites, made on the fly, and the pool that training draws them from.

A site is a random scanner that a few random subjects visit once each; no subject visits two sites,
so no pair of scans of one brain exists. What the network learns to make is the acquisition without
its noise: from noisy scans it would learn to copy their noise.
"""

from __future__ import annotations

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
from sgcd_core.style.look import measure_look
from sgcd_core.volume.bias import bias_field
from sgcd_core.volume.resample import resample_masked

Array = NDArray[Any]

SUBJECTS = 5
#: Sites made before other anatomies are read.
SITES_PER_LOAD = 12
ANATOMIES_AT_ONCE = 4
#: Part of the sites whose subjects are all of one anatomy, as alike as a narrow study's are.
ALIKE = 0.4
SEQUENCES = ("T1w", "T2w")
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
    """A folder of random sites: producers add, the trainer reads the newest, old ones go.

    Args:
        folder: Where the files lie.
        keep: Files each producer leaves.
    """

    def __init__(self, folder: str | Path, keep: int = 200) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.keep = keep

    def files(self) -> list[Path]:
        """Complete files, oldest first."""
        return sorted(self.folder.glob("*.npz"), key=lambda path: path.name.split("-")[::-1])

    def add(self, name: str, scans: SiteScans) -> None:
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
        os.replace(temporary, self.folder / f"{name}.npz")

    @staticmethod
    def read(path: Path, grid: str, index: int) -> tuple[Array, Array, Array]:
        """Scan `index` of a file without its noise, (X, Y, Z) in [0, 1], its mask, and the looks
        (N, LOOK_SIZE) of all scans of the file.
        """
        with np.load(path) as arrays:
            codes, looks = arrays[grid][index], arrays[f"{grid}_looks"]
        return np.maximum((codes.astype(np.float32) - 1) / 254, 0), codes > 0, looks


def produce(
    pool: Pool, anatomies: Sequence[str], seed: int, worker: int, *, sites: int | None = None,
    measured: Callable[[SiteScans], None] | None = None,
) -> None:  # fmt: skip
    """Add random sites to the pool, without end or until `sites` of them.

    Numbers go on after those that are there, so no site is made twice.

    Args:
        pool: Where to.
        anatomies: Addresses of label maps; the last is always among those in use.
        seed: Of everything.
        worker: Number of this producer; each has its own sites.
        sites: How many; None for ever.
        measured: Called with each site's scans as well.
    """
    mine = [p for p in pool.files() if p.name.split("-")[1] == str(worker)]
    number = 1 + max((int(p.stem.split("-")[2]) for p in mine), default=-1)
    loaded: list[Anatomy] = []
    made = 0
    while sites is None or made < sites:
        rng = np.random.default_rng([seed, worker, number])
        if not loaded or made % SITES_PER_LOAD == 0:
            count = min(ANATOMIES_AT_ONCE, len(anatomies) - 1)
            picks = [*rng.choice(len(anatomies) - 1, count, replace=False), -1]
            loaded = [load_anatomy(anatomies[int(i)]) for i in picks]
        for scans in random_site(loaded, rng):
            pool.add(f"{scans.sequence}-{worker}-{number:07d}", scans)
            if measured is not None:
                measured(scans)
        made += 1
        number += 1
        mine = [p for p in pool.files() if p.name.split("-")[1] == str(worker)]
        for path in mine[: -pool.keep]:
            path.unlink(missing_ok=True)


def wait_for(pool: Pool, files: int, seconds: float = 600.0) -> None:
    """Until the pool holds so many files."""
    end = time.monotonic() + seconds
    while len(pool.files()) < files:
        if time.monotonic() > end:
            raise TimeoutError(f"the pool has {len(pool.files())} of {files} files")
        time.sleep(1.0)
