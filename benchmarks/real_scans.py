"""What harmonizing real scans did: to sites, to histograms, to people and to their lesions.

Takes a lake in which real scans were indexed, prepared and harmonized; changes nothing but its
table `site_metrics`. Nobody needs to have been scanned twice.

    python benchmarks/real_scans.py LAKE --out FOLDER [--model target-SITE] [--patient MS12]
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipelines import figures
from pipelines.catalog import Catalog
from pipelines.downstream import evaluate_downstream
from pipelines.evaluate import load_output, usable_results
from pipelines.lake import Lake
from pipelines.prepare import load_prepared
from ray_jobs.evaluate import downstream_table
from ray_jobs.models import resolve
from ray_jobs.outcome import table
from sgcd_core.errors import SgcdError
from sgcd_core.io.store import Store
from sgcd_core.metrics import dice, histogram_distance, masked_histogram, pcc
from sgcd_core.modelpack import load_modelpack

Row = dict[str, Any]
Nifti = nib.nifti1.Nifti1Image
Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

#: People with lesions among the scans of docs/real-data.md.
PATIENTS = ("MS12", "TCGADU7294")
#: A voxel belongs to a lesion when its rank exceeds its mirror image's by so much of all ranks.
ASYMMETRY = 0.25
#: Depth below the brain's surface where lesions are looked for, mm: sulci are never symmetric.
DEPTH_MM = 8.0
SMOOTH_MM = 1.5
#: What says where the voxels lie.
GEOMETRY = (
    "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
    "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pair:
    """One scan before and after, on the model grid.

    Attributes:
        subject: BIDS label.
        site: Where it was taken.
        sequence: BIDS suffix.
        before: Prepared scan, float32 (X, Y, Z) in [0, 1], RAS+.
        after: Harmonized scan, likewise.
        mask: The brain, bool.
        affine: (4, 4), voxel → template mm.
        status: `ok` or `flagged`.
    """

    subject: str
    site: str
    sequence: str
    before: Image
    after: Image
    mask: Mask
    affine: NDArray[np.float64]
    status: str = "ok"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lake", help="where the scans were harmonized")
    parser.add_argument("--out", type=Path, default=Path("work/real"), help="folder for pictures")
    parser.add_argument("--model", action="append", help="default: every model with results")
    parser.add_argument("--patient", action="append", help=f"default: {', '.join(PATIENTS)}")
    parser.add_argument("--features", default="auto", help="as for sgcd evaluate")
    args = parser.parse_args()
    lake = Lake.open(args.lake)
    args.out.mkdir(parents=True, exist_ok=True)
    have = sorted({r["model"] for r in Catalog(lake).rows("results").to_pylist()})
    for model in args.model or have:
        name, version = resolve(lake, model)
        print(f"\n# {name}@{version}")
        look_at(lake, name, version, args.features, args.patient or PATIENTS, args.out)


def look_at(
    lake: Lake, name: str, version: int, features: str, patients: Sequence[str], out: Path
) -> None:
    """Print the figures of one model and write its pictures."""
    config = load_modelpack(lake.model(name, version), Store()).config
    found = evaluate_downstream(lake, name, version, config, features=features)
    print(f"\nSite and age from features of {found.features}; lower accuracy: less site is left")
    print("\n".join([*downstream_table(found.lines), *found.notes]))
    print("\n" + geometry_text([compare_files(*files) for files in own_grids(lake, name, version)]))
    target, pairs = read_pairs(lake, name, version, config.prepare.digest())
    for sequence in sorted({pair.sequence for pair in pairs}):
        mine = [pair for pair in pairs if pair.sequence == sequence]
        stem = f"{name}-v{version}-{sequence}"
        sites, goal = site_histograms(mine, target)
        picture = figures.histograms(sites, goal, sequence=sequence)
        (out / f"{stem}-histograms.png").write_bytes(picture)
        if goal is not None:
            print(f"\n{sequence}, distance of a site's mean histogram to the target's")
            rows = [[site, *(histogram_distance(h, goal) for h in both)]
                    for site, both in sites.items()]  # fmt: skip
            print("\n".join(table(["site", "before", "after"], rows)))
        print("\n" + identity_text(sequence, identity(mine)))
        labels = [(f"{p.site}\n{p.subject} {p.status}", p.before, p.after) for p in mine]
        (out / f"{stem}-sheet.png").write_bytes(figures.contact_sheet(labels))
    lesions = [pair for pair in pairs if pair.subject in patients]
    if lesions:
        print("\nLesions by one rule on input and output: overlap, volume after by before")
        rows, drawn = lesion_rows(lesions)
        head = ["subject", "sequence", "ml", "ml after", "ratio", "dice", "larger elsewhere, ml",
                "its rank : mirrored", "after"]  # fmt: skip
        print("\n".join(table(head, rows)))
        (out / f"{name}-v{version}-lesions.png").write_bytes(figures.outlines(drawn))
    print(f"pictures: {out}")


def read_pairs(lake: Lake, name: str, version: int, recipe: str) -> tuple[str | None, list[Pair]]:
    """The target site, and every scan that was harmonized; one that cannot be read is named."""
    results = usable_results(Catalog(lake), name, version)
    out = []
    for row in sorted(results, key=lambda r: (r["site"] or "", r["subject"] or "")):
        try:
            own = load_prepared(lake, recipe, row["scan_id"])
            after = load_output(row, own.image.shape)
        except SgcdError as error:
            print(f"left out {row['scan_id']}: {error.code}")
            continue
        grid = np.array(own.geometry.model_affine)
        after = np.where(own.mask, after, 0).astype(np.float32)
        out.append(Pair(row["subject"] or row["scan_id"], row["site"] or "-", row["sequence"],
                        own.image, after, own.mask, grid, row["status"]))  # fmt: skip
    return next((r["target"] for r in results if r["target"]), None), out


def own_grids(lake: Lake, name: str, version: int) -> Iterator[tuple[Nifti, Nifti]]:
    """Every scan that was harmonized and its output, as nibabel reads the files; one that cannot be
    read is named.
    """
    uris = {row["scan_id"]: row["uri"] for row in Catalog(lake).rows("scans").to_pylist()}
    for row in usable_results(Catalog(lake), name, version):
        found = []
        for uri in (uris[row["scan_id"]], row["output_uri"]):
            try:
                data = Store().read_bytes(uri)
            except SgcdError as error:
                print(f"left out {row['scan_id']}: {error.code}")
                break
            data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
            found.append(Nifti.from_bytes(data))
        else:
            yield found[0], found[1]


def compare_files(scan: Nifti, output: Nifti) -> tuple[bool, bool, float, float]:
    """Whether the output's voxels lie where the scan's do, by every field of the header that says
    so; whether all are finite; correlation where the output is above 0, and with the output
    mirrored along the axis that goes from left to right.
    """
    one, other = scan.header, output.header
    shape = output.shape[:3]
    same = scan.shape[:3] == shape and all(np.array_equal(one[k], other[k]) for k in GEOMETRY)
    if scan.shape[:3] != shape:
        return False, False, float("nan"), float("nan")
    before, after = (
        np.reshape(x.get_fdata(dtype=np.float32, caching="unchanged"), shape)
        for x in (scan, output)
    )
    mirrored = np.flip(after, int(np.argmax(np.abs(scan.affine[0, :3]))))
    brain = after > 0
    finite = bool(np.isfinite(after).all())
    return same, finite, pcc(after, before, brain), pcc(mirrored, before, brain)


def geometry_text(found: Sequence[tuple[bool, bool, float, float]]) -> str:
    """What `compare_files` says about all outputs."""
    same, finite = (sum(x[k] for x in found) for k in (0, 1))
    own, mirrored = ([x[k] for x in found] for k in (2, 3))
    straight, across = (
        f"{min(x, default=np.nan):.3f} to {max(x, default=np.nan):.3f}"
        for x in ([v for v in each if np.isfinite(v)] for each in (own, mirrored))
    )
    return (
        f"{same} of {len(found)} outputs have the shape, voxel sides, qform, sform and codes of "
        f"their scan, bit for bit, {finite} only finite voxels; correlation on the scan's own "
        f"voxels {straight}, with the output mirrored left to right {across}"
    )


def site_histograms(pairs: Sequence[Pair], target: str | None) -> tuple[dict[str, Any], Any]:
    """Mean masked histograms of each site before and after; and the target's own, before."""
    sites = {}
    for site in sorted({pair.site for pair in pairs}):
        mine = [pair for pair in pairs if pair.site == site]
        both = [np.mean([masked_histogram(image(p), p.mask) for p in mine], axis=0)
                for image in (lambda p: p.before, lambda p: p.after)]  # fmt: skip
        sites[site] = (both[0], both[1])
    goal = None if target is None or target not in sites else sites[target][0]
    return sites, goal


def identity(pairs: Sequence[Pair]) -> list[tuple[str, float, float]]:
    """Of each output: its subject, correlation with its own input, largest with another's.

    Correlations are inside both brains. The second is NaN when there is nobody else.
    """
    out = []
    for pair in pairs:
        others = [
            pcc(pair.after, other.before, both)
            for other in pairs
            if other.subject != pair.subject and (both := pair.mask & other.mask).any()
        ]
        own = pcc(pair.after, pair.before, pair.mask)
        out.append((pair.subject, own, max(others, default=float("nan"))))
    return out


def identity_text(sequence: str, found: Sequence[tuple[str, float, float]]) -> str:
    """How many outputs are most like their own input, and how near the others come."""
    compared = [(who, own, other) for who, own, other in found if np.isfinite(other)]
    if not compared:
        return f"{sequence}: nobody to be confused with."
    wrong = [who for who, own, other in compared if not own > other]
    text = (
        f"{sequence}: {len(compared) - len(wrong)} of {len(compared)} outputs correlate most with "
        f"their own input (own at least {min(own for _, own, _ in compared):.3f}, another's at "
        f"most {max(other for _, _, other in compared):.3f})"
    )
    return text + (f"; not {', '.join(wrong)}" if wrong else "")


def most(regions: NDArray[np.int32], where: Mask) -> Mask:
    """Of labelled regions the one that fills most of `where`; none where none lies there."""
    sizes = np.bincount(regions[where], minlength=2)[1:]
    out: Mask = (regions == int(sizes.argmax()) + 1) & bool(sizes.max())
    return out


def unlike_regions(
    rank: Image, mask: Mask, affine: NDArray[np.float64], *, dark: bool
) -> NDArray[np.int32]:
    """Regions deep in the brain that are darker (or brighter) than their mirror image, from 1.

    Only ranks inside the brain are compared, so any rising map of all intensities leaves the
    result as it is. It finds lesions of one side; those alike on both sides cancel.

    Args:
        rank: (X, Y, Z) float32, of `ranks`.
        mask: (X, Y, Z) bool.
        affine: (4, 4), voxel → template mm RAS+; x = 0 is the middle of the brain.
        dark: Whether the lesion is dark (T1w) or bright (T2w).
    """
    sides = np.abs(np.diag(affine)[:3])
    # Ranks first: smoothing intensities would not commute with a change of contrast.
    inside = ndimage.gaussian_filter(mask.astype(np.float32), SMOOTH_MM / sides)
    rank = ndimage.gaussian_filter(rank, SMOOTH_MM / sides) / np.maximum(inside, 1e-3)
    depth = ndimage.distance_transform_edt(mask, sampling=sides)
    mirrored, other_depth = mirror(rank, affine), mirror(depth.astype(np.float32), affine)
    deep = (depth > DEPTH_MM) & (other_depth > DEPTH_MM)
    unlike = (mirrored - rank if dark else rank - mirrored) > ASYMMETRY
    labels: NDArray[np.int32] = ndimage.label(unlike & deep)[0]
    return labels


def ranks(image: Image, mask: Mask) -> Image:
    """Share of the brain's voxels that are darker, (X, Y, Z) float32 in [0, 1], 0 outside."""
    from scipy.stats import rankdata

    out = np.zeros(image.shape, np.float32)
    values = image[mask]
    out[mask] = (rankdata(values) - 0.5) / max(1, len(values))
    return out


def mirror(volume: Image, affine: NDArray[np.float64]) -> Image:
    """The volume with left and right exchanged about x = 0 of its world, 0 where nothing is."""
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    to = np.linalg.inv(affine) @ flip @ affine
    out: Image = ndimage.affine_transform(volume, to[:3, :3], to[:3, 3], order=1, mode="constant")
    return out


def lesion_rows(pairs: Sequence[Pair]) -> tuple[list[list[Any]], list[tuple[Any, ...]]]:
    """Of each scan's lesion: volume before and after, ratio, Dice; of a larger region that is now
    elsewhere its volume, and its mean rank and its mirror image's before and after; and what
    to draw.
    """
    rows: list[list[Any]] = []
    drawn: list[tuple[Any, ...]] = []
    for pair in pairs:
        dark = pair.sequence == "T1w"
        ranked = [ranks(image, pair.mask) for image in (pair.before, pair.after)]
        regions, now = (unlike_regions(rank, pair.mask, pair.affine, dark=dark) for rank in ranked)
        first = most(regions, regions > 0)
        second, largest = most(now, first), most(now, now > 0)
        voxel = abs(float(np.linalg.det(pair.affine[:3, :3]))) / 1000
        before, after = float(first.sum()) * voxel, float(second.sum()) * voxel
        ratio = after / before if before else None
        elsewhere: list[Any] = ["no", None, None]
        if (largest & ~second).any():
            elsewhere = [float(largest.sum()) * voxel]
            for rank in ranked:
                both = (x[largest].mean() for x in (rank, mirror(rank, pair.affine)))
                elsewhere.append("{:.2f} : {:.2f}".format(*both))
        rows.append([pair.subject, pair.sequence, before, after, ratio,
                     dice(first, second) if before else None, *elsewhere])  # fmt: skip
        drawn.append((f"{pair.subject} {pair.sequence}", pair.before, first, pair.after, second))
    return rows, drawn


if __name__ == "__main__":
    main()
