"""Anatomies that subjects are made from: label maps in a folder, or nilearn's template."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.cohort.tissues import (
    FIRST_HEAD_TISSUE,
    FLUID,
    GREY_RIM,
    OUTSIDE_BRAIN,
    Tissue,
    label_table,
)
from sgcd_core.errors import InputError
from sgcd_core.io.nifti import read_nifti, to_ras
from sgcd_core.io.store import Store

#: Where the centre of a brain is put, mm RAS+: that of the ICBM152 brain.
CENTRE = np.array([0.0, -18.0, 8.0])
TEMPLATE = "template"


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
        to_sulcus: float32 (N,), mm from the nearest sulcal CSF, for grey matter rims; else large.
        to_ventricle: float32 (N,), mm from the nearest ventricle, for brain tissue; else large.
        depth: float32 (N,) in [0, 1], white matter in the neighbourhood (myelin gradient).
        brain: bool (N,), inside the brain hull.
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

    @property
    def mm(self) -> float:
        """Voxel side, mm."""
        return float(abs(self.affine[0, 0]))

    def fill(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Per-voxel values (N,) as a float32 box, 0 elsewhere."""
        box = np.zeros(int(np.prod(self.shape)), np.float32)
        box[self.index] = values
        return box.reshape(self.shape)


def list_anatomies(folder: str | None) -> list[str]:
    """Addresses of the label maps under `folder`, sorted; `["template"]` for None.

    Raises:
        InputError: STORE-EMPTY when there is no NIfTI file.
    """
    if folder is None:
        return [TEMPLATE]
    if folder.endswith((".nii", ".nii.gz")):
        return [folder]
    found = sorted(
        o.uri for o in Store().list(folder) if o.uri.endswith((".nii", ".nii.gz"))
    )  # fmt: skip
    if not found:
        raise InputError("no .nii or .nii.gz label map lies here.", code="STORE-EMPTY",
                         where=folder)  # fmt: skip
    return found


def stem(uri: str) -> str:
    """File name without folder and extension."""
    return uri.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gz").removesuffix(".nii")


@lru_cache(maxsize=16)
def load_anatomy(uri: str = TEMPLATE, *, mm: float = 1.0, head: bool = False) -> Anatomy:
    """The anatomy at an address, or the template; kept in memory once loaded.

    Args:
        uri: A label map with FreeSurfer numbers (any grid near 1 mm), or `template`.
        mm: Side of the working voxels: 1, or 2 for coarse cohorts.
        head: Keep skull, skin and eyes (label maps only).

    Raises:
        InputError: Not a label map with both grey and white matter, or a head asked of the
            template.
    """
    if uri == TEMPLATE:
        if head:
            raise InputError("the template holds a brain only; head=True needs label maps.",
                             code="BIDS-INVALID", where=uri)  # fmt: skip
        from pipelines.cohort.template import template_fractions

        main, second, share, affine = template_fractions(mm)
        box = _bounds(main > 0, 3)
        affine = _shifted(affine, box)
        main = main[box]
        return _finish(TEMPLATE, main, second[box], share[box], affine, main > 0)
    scan = read_nifti(uri, Store())
    labels, affine, _ = to_ras(scan.data, scan.affine)
    step = max(1, round(mm / float(np.sqrt((affine[:3, 0] ** 2).sum()))))
    labels = labels[::step, ::step, ::step]
    affine = affine @ np.diag([step, step, step, 1.0])
    codes = np.clip(np.rint(labels), 0, 1023).astype(np.int32)
    tissue = label_table()[codes]
    if not ((tissue == Tissue.WHITE).any() and (tissue == Tissue.CORTEX).any()):
        raise InputError("no FreeSurfer labels of white matter and cortex.", code="BIDS-INVALID",
                         where=uri)  # fmt: skip
    solid = (tissue > 0) & (tissue < FIRST_HEAD_TISSUE) & (tissue != Tissue.SULCAL_CSF)
    solid &= ~np.isin(codes, OUTSIDE_BRAIN)
    keep = tissue > 0 if head else solid
    box = _bounds(keep, round(8 / (step or 1)))
    tissue, solid = tissue[box], solid[box]
    affine = _shifted(affine, box)
    brain = _hull(solid, step)
    fill = brain & ~solid
    tissue = np.where(fill, np.uint8(Tissue.SULCAL_CSF), tissue)
    if not head:
        tissue = np.where(brain, tissue, np.uint8(0))
    share = np.ones(tissue.shape, np.float32)
    return _finish(stem(uri), tissue, tissue, share, affine, brain)


def _bounds(mask: NDArray[np.bool_], margin: int) -> tuple[slice, slice, slice]:
    """The box around a mask, widened by `margin` voxels where there is room."""
    out = []
    for axis in range(3):
        line = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        out.append(slice(max(0, int(line[0]) - margin), int(line[-1]) + margin + 1))
    return out[0], out[1], out[2]


def _shifted(affine: NDArray[np.float64], box: tuple[slice, slice, slice]) -> NDArray[np.float64]:
    """The affine of a box cut out of a volume."""
    out = affine.copy()
    out[:3, 3] += affine[:3, :3] @ [s.start for s in box]
    return out


def _hull(solid: NDArray[np.bool_], step: int) -> NDArray[np.bool_]:
    """Closing of the brain by about 7 mm, plus the 1.5 mm of fluid a stripped brain keeps."""
    from scipy.ndimage import binary_fill_holes, distance_transform_edt

    wide = np.pad(solid, 8)
    grown = distance_transform_edt(~wide) * step <= 7.0
    closed = distance_transform_edt(grown) * step > 5.5
    out: NDArray[np.bool_] = binary_fill_holes(closed | wide)[8:-8, 8:-8, 8:-8]
    return out


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
    tissue_brain = brain & ~np.isin(main, FLUID)
    rim = tissue_brain & np.isin(main, GREY_RIM)
    sulcus = (main == Tissue.SULCAL_CSF) | ~brain
    to_sulcus = np.where(rim, distance_transform_edt(~sulcus) * mm, 1e3).astype(np.float32)
    ventricle = main == Tissue.VENTRICLE
    to_ventricle = distance_transform_edt(~ventricle) * mm if ventricle.any() else 1e3
    to_ventricle = np.where(tissue_brain, to_ventricle, 1e3).astype(np.float32)
    white = np.isin(main, (Tissue.WHITE, Tissue.CEREBELLUM_WHITE)).astype(np.float32)
    depth = gaussian_filter(white, 1.5 / mm, truncate=3.0)
    index = np.flatnonzero(main).astype(np.int32)
    centre = affine @ np.append(np.argwhere(brain).mean(axis=0), 1.0)
    moved = affine.astype(np.float64).copy()
    moved[:3, 3] += CENTRE - centre[:3]

    def flat(values: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.ascontiguousarray(values.reshape(-1)[index])

    return Anatomy(
        name, (main.shape[0], main.shape[1], main.shape[2]), moved, index,
        flat(main).astype(np.uint8), flat(second).astype(np.uint8),
        flat(share).astype(np.float32), flat(to_sulcus).astype(np.float32),
        flat(to_ventricle).astype(np.float32), flat(depth).astype(np.float32),
        flat(brain).astype(np.bool_),
    )  # fmt: skip
