"""An anatomy from the ICBM152 template and tissue priors that nilearn carries; nothing to fetch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.cohort.tissues import Tissue

#: Deep grey structures as ellipsoids, MNI mm: tissue, centre (|x|, y, z), half axes.
_DEEP: tuple[tuple[Tissue, tuple[float, float, float], tuple[float, float, float]], ...] = (
    (Tissue.THALAMUS, (11, -19, 7), (11, 15, 11)),
    (Tissue.CAUDATE, (12, 14, 8), (7, 18, 15)),
    (Tissue.PUTAMEN, (27, 2, 2), (7, 19, 12)),
    (Tissue.PALLIDUM, (19, -4, 0), (6, 9, 6)),
    (Tissue.HIPPOCAMPUS, (26, -20, -14), (10, 18, 9)),
    (Tissue.VENTRAL_DC, (8, -16, -9), (10, 11, 7)),
)
_SHARPEN = 1.6


def template_fractions(
    mm: float,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32], NDArray[np.float64]]:
    """Main tissue, second tissue, share of the main one, and affine (mm RAS+) on the template.

    Fluid is what the priors of grey and white matter leave of the brain, or where the template
    is dark. Averaging over people blurred the priors: they are sharpened by a power and rescaled
    (Fonov 2011, NeuroImage 54:313, for the template).
    """
    from nilearn import datasets
    from scipy.ndimage import gaussian_filter

    step = max(1, round(mm))
    gm_image = datasets.load_mni152_gm_template(resolution=1)
    affine = np.asarray(gm_image.affine, np.float64) @ np.diag([step, step, step, 1.0])

    def values(image: object) -> NDArray[np.float32]:
        data = np.asarray(image.get_fdata(dtype=np.float32))  # type: ignore[attr-defined]
        if step > 1:
            data = gaussian_filter(data, 0.4 * step)
        return np.ascontiguousarray(data[::step, ::step, ::step])

    grey = np.clip(values(gm_image), 0, 1)
    white = np.clip(values(datasets.load_mni152_wm_template(resolution=1)), 0, 1)
    bright = values(datasets.load_mni152_template(resolution=1))
    brain = values(datasets.load_mni152_brain_mask(resolution=1)) > 0.5
    fluid = np.clip(1.0 - grey - white, 0, 1)
    # the priors leave white matter short of 1 in places; dark voxels are what fluid really is
    typical = float(np.median(bright[brain & (white > 0.8)]))
    fluid *= np.clip((0.80 - bright / typical) / 0.25, 0, 1)
    white = np.where(brain & (grey + white + fluid < 0.2), 1.0 - grey - fluid, white)
    main, second, share = _largest_two(
        np.stack([grey, white, fluid]) ** np.float32(_SHARPEN), _local_tissues(grey.shape, affine)
    )
    main[~brain] = 0
    second[~brain] = 0
    return main, second, share, affine


def _largest_two(
    parts: NDArray[np.float32], names: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """The names of the largest and the second of three parts, and the share of the largest."""
    a, b, c = parts
    name_a, name_b, name_c = names
    swap = b > a
    big, low = np.where(swap, b, a), np.where(swap, a, b)
    big_name, low_name = np.where(swap, name_b, name_a), np.where(swap, name_a, name_b)
    top = c > big
    middle = ~top & (c > low)
    second = np.where(top, big, np.where(middle, c, low))
    second_name = np.where(top, big_name, np.where(middle, name_c, low_name))
    first = np.where(top, c, big)
    share = first / np.maximum(first + second, np.float32(1e-6))
    return np.where(top, name_c, big_name), second_name, share.astype(np.float32)


def _local_tissues(shape: tuple[int, ...], affine: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Which tissue grey matter, white matter and fluid mean at each voxel, uint8 (3, X, Y, Z)."""
    x, y, z = (
        (affine[a, a] * np.arange(shape[a]) + affine[a, 3]).reshape(
            [-1 if b == a else 1 for b in range(3)]
        )
        for a in range(3)
    )
    out = np.empty((3, *shape), np.uint8)
    out[0], out[1], out[2] = Tissue.CORTEX, Tissue.WHITE, Tissue.SULCAL_CSF
    for tissue, (cx, cy, cz), (ax, ay, az) in _DEEP:
        inside = ((np.abs(x) - cx) / ax) ** 2 + ((y - cy) / ay) ** 2 + ((z - cz) / az) ** 2 < 1
        out[0][inside] = tissue
    stem = (np.abs(x) < 16) & (y > -46) & (y < -12) & (z < -14) & (z > -75)
    stem = stem & ((np.abs(x) / 16) ** 2 + ((y + 29) / 15) ** 2 < 1)
    below = z < -14 + 0.30 * (-38 - y) - 0.12 * np.abs(x)
    cerebellum = below & (y < -40) & (z < -6) & ~stem
    out[0][cerebellum], out[1][cerebellum] = Tissue.CEREBELLUM_CORTEX, Tissue.CEREBELLUM_WHITE
    out[0][stem], out[1][stem] = Tissue.VENTRAL_DC, Tissue.BRAIN_STEM
    lateral = ((np.abs(x) - 10) / 16) ** 2 + ((y + 6) / 46) ** 2 + ((z - 14) / 20) ** 2 < 1
    horns = ((np.abs(x) - 30) / 9) ** 2 + ((y + 38) / 16) ** 2 + ((z + 0) / 14) ** 2 < 1
    third = (np.abs(x) < 5) & (y > -32) & (y < 8) & (z > -14) & (z < 10)
    fourth = (np.abs(x) < 12) & (y > -56) & (y < -36) & (z > -44) & (z < -22)
    out[2][lateral | horns | third | fourth] = Tissue.VENTRICLE
    return out
