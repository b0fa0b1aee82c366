"""A small lake with known truth, through the public writers: tissue in a ball, sites as curves.

Subjects differ in shape; a site is a monotone curve of the intensities, so that a perfect
harmonization is known. Sites: `T` is the target, `A` in training, `B` never seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.prepare import save_prepared
from sgcd_core.config import SgcdConfig
from sgcd_core.io.nifti import decode_nifti, encode_nifti, to_ras
from sgcd_core.io.store import Store, join, sha256_hex
from sgcd_core.volume.geometry import Geometry, rows
from sgcd_core.volume.prepare import Prepared

Array = np.ndarray[Any, Any]

SHAPE = (24, 28, 24)
CURVES: dict[str, Callable[[Array], Array]] = {
    "T": lambda x: x,
    "A": lambda x: x**1.6,
    "B": lambda x: 0.25 + 0.6 * x**0.6,
}


def make_config(shape: tuple[int, int, int] = SHAPE) -> SgcdConfig:
    # A grid the network could not take, and need not: nothing here runs it.
    update = {"shape": shape, "bias_correction": "none"}
    return SgcdConfig().model_copy(
        update={"prepare": SgcdConfig().prepare.model_copy(update=update)}
    )


def brain(seed: int, sequence: str, shape: tuple[int, int, int] = SHAPE) -> tuple[Array, Array]:
    """Tissue intensities at the target, float32 [0, 1], and the mask."""
    rng = np.random.default_rng(seed)
    axes = (np.linspace(-1, 1, n) for n in shape)
    grid = np.stack(np.meshgrid(*axes, indexing="ij")) * rng.uniform(0.95, 1.1, (3, 1, 1, 1))
    radius = np.sqrt((grid**2).sum(0))
    fold = 0.06 * np.sin(9 * np.arctan2(grid[1], grid[0]) + seed) * np.cos(7 * grid[2])
    levels = (0.75, 0.5, 0.15) if sequence == "T1w" else (0.3, 0.5, 0.9)
    ball = radius + fold
    image = np.select([ball < 0.5, ball < 0.72], levels[:2], levels[2])
    mask = radius < 0.9
    image = image + rng.normal(0, 0.02, shape)
    return np.where(mask, np.clip(image, 0.01, 0.99), 0).astype(np.float32), mask


def add_scan(
    lake: Lake,
    config: SgcdConfig,
    image: Array,
    mask: Array,
    *,
    subject: str,
    site: str,
    sequence: str,
    split: str,
) -> dict[str, Any]:
    """Write one prepared scan; returns its row of `scans`."""
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    data = encode_nifti(image, affine)
    native = decode_nifti(data, where="memory", max_inflated=10**9)
    name = f"{subject}-{site}-{sequence}"
    scan_id = sha256_hex(data)[:32]
    geometry = Geometry(
        image.shape, rows(affine), to_ras(native.data, native.affine)[2], rows(affine),
        image.shape, rows(np.eye(4)), 0.0, 1.0, 1200.0,
    )  # fmt: skip
    folder = lake.prepared(config.prepare.digest(), scan_id)
    save_prepared(folder, native, Prepared(image, mask, mask, geometry), Store())
    uri = join(lake.uri, "raw", f"{name}.nii.gz")
    Store().write_bytes(uri, data)
    return {
        "scan_id": scan_id, "dataset": "fake", "subject": subject, "session": site, "site": site,
        "sequence": sequence, "split": split, "uri": uri, "status": "ok",
    }  # fmt: skip


def fake_lake(
    folder: str,
    output: Callable[[Array, Array], Array],
    *,
    sequences: Sequence[str] = ("T1w",),
    sites: Sequence[str] = ("A", "B"),
    traveling: int = 2,
    shape: tuple[int, int, int] = SHAPE,
    make: Callable[[int, str, tuple[int, int, int]], tuple[Array, Array]] = brain,
) -> tuple[Lake, SgcdConfig]:
    """A lake with scans, prepared volumes and results of `target-T` version 1.

    Args:
        folder: Where the lake lies.
        output: (scan, the subject's look at the target) → harmonized scan; the second is for
            making a perfect or a useless model.
        sequences: BIDS suffixes.
        sites: Besides T.
        traveling: Test subjects, scanned at every site.
        shape: Model grid.
        make: (seed, sequence, shape) → (image at the target, mask).
    """
    lake, config = Lake.open(folder, create=True), make_config(shape)
    scans, results = [], []
    people = [(f"{s}{i}", [s], "train") for s in ("T", *sites) for i in range(3)]
    people += [(f"x{i}", ["T", *sites], "test") for i in range(traveling)]
    for number, (subject, places, split) in enumerate(people):
        for sequence in sequences:
            truth, mask = make(number, sequence, shape)
            for site in places:
                look = np.where(mask, CURVES[site](truth), 0).astype(np.float32)
                row = add_scan(
                    lake, config, look, mask,
                    subject=subject, site=site, sequence=sequence, split=split,
                )  # fmt: skip
                scans.append(row)
                after = np.clip(output(look, truth), 0, 1).astype(np.float32)
                uri = join(lake.derivatives("target-T"), f"{row['scan_id']}.nii.gz")
                data = encode_nifti(after, np.diag([4.0, 4.0, 4.0, 1.0]))
                Store().write_bytes(uri, data)
                shared = ("scan_id", "dataset", "subject", "session", "site", "sequence")
                results.append(
                    {k: row[k] for k in shared}
                    | {
                        "model": "target-T", "model_version": 1, "target": "T", "status": "ok",
                        "model_grid_uri": uri, "output_sha256": sha256_hex(data),
                        "output_uri": uri, "seconds_model": 0.5,
                    }
                )  # fmt: skip
    settings = config.model_dump(mode="json", include={"preset", "sequences", "prepare"})
    Store().write_bytes(lake.prepared_with, json.dumps(settings).encode())
    catalog = Catalog(lake)
    catalog.append("scans", scans)
    catalog.append("results", results)
    return lake, config
