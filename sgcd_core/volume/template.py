"""The ICBM152 template that nilearn carries, and the model grid laid around it."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgcd_core.config import PrepareConfig

Array = NDArray[Any]

_FILE = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


@lru_cache(maxsize=1)
def _template_1mm() -> tuple[Array, Array]:
    """(197, 233, 189) float32 in [0, 1], 0 outside the brain, and its affine; 1 mm, RAS+."""
    import nibabel as nib

    # Importing nilearn.datasets takes eight seconds (all of scikit-learn): open its file instead.
    spec = importlib.util.find_spec("nilearn")
    path = Path(spec.origin).parent / _FILE if spec is not None and spec.origin else None
    if path is not None and path.is_file():
        image = nib.load(path)
    else:  # another nilearn lays its files out otherwise
        from nilearn.datasets import load_mni152_template

        image = load_mni152_template(resolution=1)
    data = np.asarray(image.dataobj, dtype=np.float32)
    return data / data.max(), np.asarray(image.affine, dtype=np.float64)


@lru_cache(maxsize=4)
def template(mm: float) -> tuple[Array, Array, Array]:
    """The stripped T1w ICBM152 2009a brain on a grid of `mm`.

    Returns:
        (image (X, Y, Z) float32 in [0, 1], brain mask bool, affine (4, 4) voxel → mm RAS+).
    """
    from sgcd_core.volume.resample import resample_masked

    data, affine = _template_1mm()
    sides = np.array(data.shape, float)
    out_affine = np.diag([mm, mm, mm, 1.0])
    out_affine[:3, 3] = affine[:3, 3] + (mm - 1.0) / 2.0
    shape = tuple(int(np.ceil(side / mm)) for side in sides)
    image, mask = resample_masked(
        data, data > 0, affine, out_affine, (shape[0], shape[1], shape[2])
    )
    return image, mask, out_affine


@lru_cache(maxsize=1)
def template_centre() -> Array:
    """Centre of the template brain's bounding box, mm RAS+, (3,) float64."""
    data, affine = _template_1mm()
    hit = np.argwhere(data > 0)
    middle: Array = (hit.min(axis=0) + hit.max(axis=0)) / 2.0
    centre: Array = affine[:3, :3] @ middle + affine[:3, 3]
    return centre


def model_affine(config: PrepareConfig) -> Array:
    """(4, 4) float64, voxel → template mm RAS+, of the model grid.

    The grid is axis-aligned and centred on the template brain's bounding box, so that a brain of
    the template's size has the same room on every side.
    """
    affine = np.diag([config.mm, config.mm, config.mm, 1.0])
    affine[:3, 3] = template_centre() - config.mm * (np.array(config.shape, float) - 1.0) / 2.0
    return affine
