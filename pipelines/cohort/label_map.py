"""Label maps with FreeSurfer's numbers: read, checked, and laid on an isotropic RAS+ grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.cohort.tissues import label_table
from sgcd_core.errors import InputError
from sgcd_core.io.nifti import read_nifti, to_ras
from sgcd_core.io.store import Store

Labels = NDArray[np.int16]
Affine = NDArray[np.float64]

#: Parcels of the cortex: first number, one past the last, and the cortex that they are part of.
_PARCELS = ((1000, 2000, 3), (2000, 3000, 42), (11000, 12000, 3), (12000, 13000, 42))
#: Numbers of newer atlases (SAMSEG, CHARM) and what they are called elsewhere: those from 902 on
#: are 400 lower, white matter crowns are white matter.
_SAME = {**{n: n - 400 for n in range(902, 931)}, 34: 2, 66: 41, 192: 2, 183: 8, 184: 47, 126: 16,
         267: 16, 520: 24}  # fmt: skip
#: Air inside the head and around it, in such atlases.
_AIR = (262, 501, 517)
#: Stands for every number beyond, and for negative ones: all unknown.
_BEYOND = 13000
#: Each of these must be there: white matter and cortex, left and right.
_NEEDED = (2, 41, 3, 42)
LEAST_ML = 10.0
#: Share of what is not 0 that may have a number this project does not know.
MAX_UNKNOWN = 0.05
#: How far from whole a number may be: files that are stored with a slope round a little.
_ROUNDING = 0.05
#: Voxels of maps that are brought onto another grid: this side instead of a finer one, mm.
FINEST_MM, FINE_MM = 0.7, 1.0


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A head as labels.

    Attributes:
        labels: int16 (X, Y, Z), FreeSurfer's numbers up to 1023, 0 outside and where the number
            is unknown; parcels are cortex. Axes R A S, isotropic.
        affine: Voxel → world, mm RAS+.
        sha256: Of the file's bytes.
    """

    labels: Labels
    affine: Affine
    sha256: str


def read_label_map(uri: str) -> LabelMap:
    """The label map at an address, whatever its grid.

    Raises:
        InputError: BIDS-INVALID, not a map of a whole brain in FreeSurfer's numbers; and as for
            `read_nifti`.
    """
    scan = read_nifti(uri, Store())
    labels = _checked(scan.data, float(abs(np.linalg.det(scan.affine[:3, :3]))) / 1000, uri)
    ras, affine, _ = to_ras(labels, scan.affine)
    return LabelMap(*_isotropic(ras, affine), scan.sha256)


def bounds(mask: NDArray[np.bool_], margin: int) -> tuple[slice, slice, slice]:
    """The box around a mask, widened by `margin` voxels where there is room."""
    out = []
    for axis in range(3):
        line = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        out.append(slice(max(0, int(line[0]) - margin), int(line[-1]) + margin + 1))
    return out[0], out[1], out[2]


def _checked(data: NDArray[np.float32], voxel_ml: float, uri: str) -> Labels:
    """Values of a file as labels, parcels as cortex; other programs' numbers are refused."""
    whole = np.rint(data)
    if float(np.abs(data - whole).max()) > _ROUNDING:
        raise _refused("it holds values that are not whole numbers", uri)
    whole[(whole < 0) | (whole > _BEYOND)] = _BEYOND
    numbers = whole.astype(np.int16)
    table = _table()
    counts = np.zeros(len(table), np.int64)
    for part in numbers:
        counts += np.bincount(part.ravel(), minlength=len(table))
    counts[[0, *_AIR]] = 0
    voxels = np.bincount(table, weights=counts, minlength=1024)
    if voxels[0] > MAX_UNKNOWN * counts.sum():
        share = voxels[0] / counts.sum()
        raise _refused(f"{share:.0%} of the voxels that are not 0 have unknown numbers", uri)
    few = [str(n) for n in _NEEDED if voxels[n] * voxel_ml < LEAST_ML]
    if few:
        raise _refused(f"{', '.join(few)} fill less than {LEAST_ML:.0f} ml each", uri)
    out: Labels = table[numbers]
    return out


def _table() -> Labels:
    """Number in a file → label; 0 for those that are unknown."""
    table = np.zeros(_BEYOND + 1, np.int16)
    known = np.flatnonzero(label_table())
    table[known] = known
    for number, other in _SAME.items():
        if not table[number]:
            table[number] = table[other]
    for first, end, cortex in _PARCELS:
        table[first:end] = cortex
    return table


def _refused(found: str, uri: str) -> InputError:
    return InputError(
        f"this is not a label map with FreeSurfer's numbers: {found}.", code="BIDS-INVALID",
        where=uri,
        hint="Expected is a whole brain as aseg, aparc+aseg or SynthSeg give it: 2 and 41 white "
        "matter, 3 and 42 (or parcels from 1000 to 2999) cortex.",
    )  # fmt: skip


def _isotropic(labels: Labels, affine: Affine) -> tuple[Labels, Affine]:
    """Labels (axes near R A S) on an isotropic grid along R A S; as they are if they lie on one.

    Nearest neighbour; the new side is the smallest of the old ones, `FINE_MM` if that is finer
    than `FINEST_MM`.
    """
    from scipy.ndimage import affine_transform

    sides = np.linalg.norm(affine[:3, :3], axis=0)
    if np.allclose(affine[:3, :3], sides[0] * np.eye(3), rtol=0, atol=1e-3 * sides[0]):
        return labels, affine
    side = float(sides.min()) if sides.min() >= FINEST_MM else FINE_MM
    box = bounds(labels > 0, 1)
    corners = np.stack(np.meshgrid(*[(s.start, s.stop) for s in box]), -1).reshape(-1, 3)
    world = corners @ affine[:3, :3].T + affine[:3, 3]
    count = np.ceil(np.ptp(world, axis=0) / side).astype(int) + 1
    out = np.diag([side, side, side, 1.0])
    out[:3, 3] = world.min(axis=0)
    pull = np.linalg.inv(affine) @ out
    moved = affine_transform(
        labels, pull[:3, :3], pull[:3, 3], tuple(count), order=0, mode="grid-constant"
    )
    return moved, out
