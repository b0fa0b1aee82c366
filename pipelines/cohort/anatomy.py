"""Anatomies that subjects are made from: label maps in a folder, or nilearn's template."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.cohort.label_map import bounds, read_label_map
from pipelines.cohort.tissues import (
    FIRST_HEAD_TISSUE,
    GREY_RIM,
    OUTSIDE_BRAIN,
    Tissue,
    label_table,
)
from sgcd_core.errors import InputError
from sgcd_core.io.store import Store, is_below, is_s3, local_path, trimmed

#: Where the centre of a brain is put, mm RAS+: that of the ICBM152 brain.
CENTRE = np.array([0.0, -18.0, 8.0])
TEMPLATE = "template"
FAR = 1000.0
#: Moves of fluid borders that ageing chooses from, mm; outward is positive.
SULCUS_WALLS = np.linspace(-1.2, 1.2, 25)
VENTRICLE_WALLS = np.linspace(-9.0, 7.0, 65)


@dataclass(frozen=True)
class Anatomy:
    """One head in a box of isotropic voxels; per-voxel values are kept for its tissue only.

    Attributes:
        name: File stem, or `template`.
        shape: Box, voxels, axes R A S.
        affine: Voxel → world, mm RAS+, centre of the brain at `CENTRE`.
        index: int32 (N,), flat positions in the box of the voxels that follow.
        main: uint8 (N,), the tissue that fills most of each voxel.
        second: uint8 (N,), the other one.
        share: float32 (N,) in [0, 1], the part of `main`.
        to_sulcus: float32 (N,), mm from the border of sulcal CSF and grey matter, negative in
            the fluid; `FAR` elsewhere.
        to_ventricle: float32 (N,), mm from the ventricles' wall, negative inside; `FAR` elsewhere.
        depth: float32 (N,) in [0, 1], white matter in the neighbourhood (myelin gradient).
        brain: bool (N,), inside the brain hull.
        sulcus_curve: Sulcal CSF as a part of the hull, its border moved by `SULCUS_WALLS`.
        ventricle_curve: The same of the ventricles by `VENTRICLE_WALLS`.
    """

    name: str
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    index: NDArray[np.int32]
    main: NDArray[np.uint8]
    second: NDArray[np.uint8]
    share: NDArray[np.float32]
    to_sulcus: NDArray[np.float32]
    to_ventricle: NDArray[np.float32]
    depth: NDArray[np.float32]
    brain: NDArray[np.bool_]
    sulcus_curve: NDArray[np.float64]
    ventricle_curve: NDArray[np.float64]

    @property
    def mm(self) -> float:
        """Voxel side, mm."""
        return float(abs(self.affine[0, 0]))

    def fill(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Per-voxel values (N,) as a float32 box, 0 elsewhere."""
        box = np.zeros(int(np.prod(self.shape)), np.float32)
        box[self.index] = values
        return box.reshape(self.shape)


def list_anatomies(folder: str | None, out: str | None = None) -> list[str]:
    """Addresses of the label maps under `folder`, sorted; `["template"]` for None.

    What lies below `out`, a folder in `folder` that a cohort is written to, is left out.

    Raises:
        InputError: STORE-EMPTY when there is no NIfTI file.
    """
    if folder is None:
        return [TEMPLATE]
    if folder.endswith((".nii", ".nii.gz")):
        return [folder]
    found = sorted(o.uri for o in Store().list(folder) if o.uri.endswith((".nii", ".nii.gz")))
    if out is not None and not is_below(_place(folder), _place(out)):
        found = [uri for uri in found if not is_below(_place(uri), _place(out))]
    if not found:
        raise InputError("no .nii or .nii.gz label map lies here.", code="STORE-EMPTY",
                         where=folder)  # fmt: skip
    return found


def stem(uri: str) -> str:
    """File name without folder and extension."""
    return uri.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gz").removesuffix(".nii")


def names_of(uris: list[str], folder: str | None) -> dict[str, str]:
    """Addresses by name: the stem, or where others share it the path below `folder`."""
    count = Counter(stem(uri) for uri in uris)
    root = f"{_place(folder)}/" if folder else ""
    return {
        stem(uri) if count[stem(uri)] == 1 else _place(uri).removeprefix(root): uri for uri in uris
    }


def _place(uri: str) -> str:
    """An address in the one form that can be compared with others."""
    return trimmed(uri) if is_s3(uri) else os.path.abspath(local_path(uri))


def check_anatomy(uri: str, head: bool) -> str:
    """SHA-256 of the label map at an address, empty for the template, once it is known to be good.

    Raises:
        InputError: As for `load_anatomy`.
    """
    if uri != TEMPLATE:
        return read_label_map(uri).sha256
    if head:
        raise InputError("the template holds a brain only; head=True needs label maps.",
                         code="BIDS-INVALID", where=uri)  # fmt: skip
    return ""


@lru_cache(maxsize=16)
def load_anatomy(uri: str = TEMPLATE, *, mm: float = 1.0, head: bool = False) -> Anatomy:
    """The anatomy at an address, or the template; kept in memory once loaded.

    Args:
        uri: A label map with FreeSurfer's numbers on any grid, or `template`.
        mm: Side of the working voxels: 1, or 2 for coarse cohorts.
        head: Keep skull, skin and eyes (label maps only).

    Raises:
        InputError: BIDS-INVALID, not a whole brain in FreeSurfer's numbers, or a head asked of
            the template; and as for `read_nifti`.
    """
    if uri == TEMPLATE:
        check_anatomy(uri, head)
        from pipelines.cohort.template import template_fractions

        main, second, share, affine = template_fractions(mm)
        box = bounds(main > 0, 3)
        affine = _shifted(affine, box)
        main = main[box]
        return _finish(TEMPLATE, main, second[box], share[box], affine, main > 0)
    found = read_label_map(uri)
    step = max(1, round(mm / float(np.linalg.norm(found.affine[:3, 0]))))
    labels = found.labels[::step, ::step, ::step]
    affine = found.affine @ np.diag([step, step, step, 1.0])
    side = round(float(np.linalg.norm(affine[:3, 0])), 3)
    tissue = label_table()[labels]
    solid = (tissue > 0) & (tissue < FIRST_HEAD_TISSUE) & (tissue != Tissue.SULCAL_CSF)
    solid &= ~np.isin(labels, OUTSIDE_BRAIN)
    keep = tissue > 0 if head else solid
    box = bounds(keep, round(8 / side))
    tissue, solid = tissue[box], solid[box]
    affine = _shifted(affine, box)
    brain = _hull(solid, side)
    fill = brain & ~solid
    tissue = np.where(fill, np.uint8(Tissue.SULCAL_CSF), tissue)
    if not head:
        tissue = np.where(brain, tissue, np.uint8(0))
    share = np.ones(tissue.shape, np.float32)
    return _finish(stem(uri), tissue, tissue, share, affine, brain)


def _shifted(affine: NDArray[np.float64], box: tuple[slice, slice, slice]) -> NDArray[np.float64]:
    """The affine of a box cut out of a volume."""
    out = affine.copy()
    out[:3, 3] += affine[:3, :3] @ [s.start for s in box]
    return out


def _hull(solid: NDArray[np.bool_], mm: float) -> NDArray[np.bool_]:
    """Closing of the brain by about 7 mm, plus the 1.5 mm of fluid a stripped brain keeps.

    `mm` is the side of a voxel. Distances are taken on every second voxel and interpolated: eight
    times cheaper, and smooth.
    """
    from scipy.ndimage import binary_fill_holes, distance_transform_edt, zoom

    pad = max(8, 2 * math.ceil(4 / mm))
    wide = np.pad(solid, [(pad, pad + s % 2) for s in solid.shape])
    x, y, z = (s // 2 for s in wide.shape)
    coarse = wide.reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5)) > 0.4
    grown = distance_transform_edt(~coarse) * 2 * mm <= 7.0
    depth = distance_transform_edt(grown).astype(np.float32) * 2 * mm
    fine = zoom(depth, 2, order=1, grid_mode=True, mode="nearest")
    hull = binary_fill_holes((fine > 5.5) | wide)
    a, b, c = solid.shape
    return np.asarray(hull[pad : pad + a, pad : pad + b, pad : pad + c])


def _finish(
    name: str,
    main: NDArray[np.uint8],
    second: NDArray[np.uint8],
    share: NDArray[np.float32],
    affine: NDArray[np.float64],
    brain: NDArray[np.bool_],
) -> Anatomy:
    """Distances for ageing, neighbourhood for myelin, centring, and the flat form."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    mm = float(abs(affine[0, 0]))
    ventricle = np.isin(main, (Tissue.VENTRICLE, Tissue.CHOROID_PLEXUS))
    sulcus = (main == Tissue.SULCAL_CSF) | ~brain
    tissue = ~(ventricle | sulcus)
    inner, nearest = distance_transform_edt(~tissue, return_indices=True)
    pure = ~tissue & (main > 0) & (share > 0.999)
    near = main[tuple(axis[pure] for axis in nearest)]
    second = second.copy()
    second[pure] = near
    rim = tissue & np.isin(main, GREY_RIM)
    to_sulcus = np.full(main.shape, FAR, np.float32)
    to_sulcus[rim] = ((distance_transform_edt(~sulcus) - 0.5) * mm)[rim]
    fluid = (main == Tissue.SULCAL_CSF) & brain
    to_sulcus[fluid] = ((0.5 - inner) * mm)[fluid]
    to_ventricle = np.full(main.shape, FAR, np.float32)
    if ventricle.any():
        to_ventricle[tissue] = ((distance_transform_edt(~ventricle) - 0.5) * mm)[tissue]
        to_ventricle[ventricle] = ((0.5 - inner) * mm)[ventricle]
    white = np.isin(main, (Tissue.WHITE, Tissue.CEREBELLUM_WHITE)).astype(np.float32)
    depth = gaussian_filter(white, 1.5 / mm, truncate=3.0)
    index = np.flatnonzero(main).astype(np.int32)
    centre = affine @ np.append(np.argwhere(brain).mean(axis=0), 1.0)
    moved = affine.astype(np.float64).copy()
    moved[:3, 3] += CENTRE - centre[:3]

    def flat(values: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(values.reshape(-1)[index])

    count = int(brain.sum())
    return Anatomy(
        name=name,
        shape=(main.shape[0], main.shape[1], main.shape[2]),
        affine=moved,
        index=index,
        main=flat(main),
        second=flat(second),
        share=flat(share.astype(np.float32)),
        to_sulcus=flat(to_sulcus),
        to_ventricle=flat(to_ventricle),
        depth=flat(depth),
        brain=flat(brain),
        sulcus_curve=_curve(to_sulcus, SULCUS_WALLS, count),
        ventricle_curve=_curve(to_ventricle, VENTRICLE_WALLS, count),
    )


def _curve(
    distance: NDArray[np.float32], walls: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    """Fluid as a part of the brain hull when the border is moved to each of `walls`."""
    values = np.sort(distance[distance < FAR], axis=None)
    return np.asarray(np.searchsorted(values, walls) / max(count, 1))
