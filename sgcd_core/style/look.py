"""A look: how the scans of one site and sequence are distributed, and what brains they show.

The intensities of two sites can be matched by rank, but a rank depends on what is in the head:
an old brain has more fluid, so its white matter begins at a higher rank. A *profile* is a
description of the brain in ranks alone, blind to contrast: how the ranks are spread over
homogeneous and mixed, deep and superficial tissue. `composition.py` predicts from two profiles
how ranks have to be shifted; then matching keeps tissues apart that plain histogram matching mixes.
The shading (`shading.py`) is taken out before either is measured, and is part of the look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sgcd_core.style.rim import RIM_SIZE, measure_rim
from sgcd_core.style.shading import (
    SHADING_SIZE,
    contrast_of,
    estimate_shading,
    mirrored,
    shading_field,
)
from sgcd_core.style.texture import TEXTURE_SIZE, measure_texture
from sgcd_core.volume.resample import block_mean

Array = NDArray[Any]

#: Levels at which a look's quantile function is held.
LEVELS = np.linspace(0.0, 1.0, 257)
#: Side of the voxels a profile is taken on, mm; finer grids are averaged to about this first.
PROFILE_MM = 4.0
RANK_BINS = 16
#: Edges of local standard deviation, in ranks, and of depth below the brain's surface, mm.
SPREAD_EDGES = np.array([0.06, 0.12, 0.2, 0.3])
DEPTH_EDGES = np.array([5.0, 9.0, 17.0, 29.0])
_SPREADS, _DEPTHS = len(SPREAD_EDGES) + 1, len(DEPTH_EDGES) + 1
PROFILE_SIZE = RANK_BINS * _SPREADS * _DEPTHS + RANK_BINS * _SPREADS


@dataclass(frozen=True)
class Look:
    """The mean over scans of one site and sequence.

    Attributes:
        quantiles: (257,) float32, mean quantile function of the intensities inside the masks: the
            Wasserstein barycentre of the scans' distributions.
        profile: (PROFILE_SIZE,) float32, mean profile.
        shading: (SHADING_SIZE,) float32, mean coefficients of the shading.
        voxel: (1,) float32, mean of the longest sides of the stored scans' voxels, mm; 0: not
            known.
        texture: (TEXTURE_SIZE,) float32, mean sharpness and noise along each axis.
        rim: (RIM_SIZE,) float32, mean brightness of the brain's outermost layers.
    """

    quantiles: NDArray[np.float32]
    profile: NDArray[np.float32]
    shading: NDArray[np.float32]
    voxel: NDArray[np.float32]
    texture: NDArray[np.float32]
    rim: NDArray[np.float32]

    def vector(self) -> NDArray[np.float32]:
        """All parts as one vector, for storing."""
        parts = [
            self.quantiles, self.profile, self.shading, self.voxel, self.texture, self.rim
        ]  # fmt: skip
        return np.concatenate(parts).astype(np.float32)

    @classmethod
    def from_vector(cls, vector: Array) -> Look:
        """Inverse of `vector`."""
        values = np.asarray(vector, np.float32)
        return cls(*np.split(values, _ENDS))


class SiteLook(NamedTuple):
    """The look of a site and sequence, and how much is behind it.

    Attributes:
        scans: How many it is the mean of.
        mean: (LOOK_SIZE,).
        subjects: How many people the scans are of.
    """

    scans: int
    mean: Array
    subjects: int


#: How much of a scan's own look is in the look it is taken to have, its site's being known.
OWN_PART = 0.3
#: Length of `Look.vector`.
LOOK_SIZE = len(LEVELS) + PROFILE_SIZE + SHADING_SIZE + 1 + TEXTURE_SIZE + RIM_SIZE
#: Length of the parts that say what no curve reaches: texture and rim.
DETAIL_SIZE = TEXTURE_SIZE + RIM_SIZE
#: Where the parts of `Look.vector` end, but for the last.
_ENDS = np.cumsum([len(LEVELS), PROFILE_SIZE, SHADING_SIZE, 1, TEXTURE_SIZE]).tolist()
_VOXEL, _TEXTURE, _RIM = _ENDS[2], slice(_ENDS[3], _ENDS[4]), slice(_ENDS[4], None)


def measure_look(
    image: Array, mask: Array, mm: float, sequence: str, *, voxel_mm: float = 0.0
) -> Look:
    """The look of one prepared scan.

    Args:
        image: (X, Y, Z) float, [0, 1].
        mask: (X, Y, Z) bool, the brain.
        mm: Voxel side.
        sequence: BIDS suffix.
        voxel_mm: Longest side of the stored scan's voxels; 0: not known.
    """
    image, mask = np.asarray(image, np.float32), np.asarray(mask, bool)
    if not mask.any():
        return Look.from_vector(np.zeros(LOOK_SIZE, np.float32))
    raw = quantiles(image, mask)
    own, shown = rising(raw), contrast_of(sequence, LEVELS)
    shown = own if shown is None else shown
    average = np.where(mask, through(image, raw, shown), 0).astype(np.float32)
    coarse, inside, side = _coarse(average, mask, mm)
    shading = estimate_shading(coarse, inside, side)
    flat = np.interp(average / shading_field(shading, image.shape, mm), shown, own)
    flat = np.asarray(flat * mask, np.float32)
    profile = composition_profile(flat, mask, mm)
    texture, rim = measure_texture(average, mask), measure_rim(image, mask)
    voxel = np.array([voxel_mm], np.float32)
    return Look(quantiles(flat, mask), profile, shading, voxel, texture, rim)


def through(values: Array, own: Array, shown: Array) -> NDArray[np.float64]:
    """`values` of a scan with quantile function `own` as those of one with `shown`, rank for rank.

    Equal quantiles (many voxels of one value) map to the middle of what they span.
    """
    unique, first, counts = np.unique(own, return_index=True, return_counts=True)
    return np.asarray(np.interp(values, unique, 0.5 * (shown[first] + shown[first + counts - 1])))


def rising(values: Array) -> NDArray[np.float64]:
    """A quantile function made strictly rising, so that it can be inverted."""
    return np.asarray(values, np.float64) + 1e-7 * np.arange(len(values))


def mean_look(looks: Sequence[Look]) -> Look:
    """The look of a group of scans."""
    if not looks:
        raise ValueError("a look needs at least one scan")
    vectors: Array = np.stack([look.vector() for look in looks])
    return Look.from_vector(vectors.mean(axis=0))


def leave_out(mean: Array, count: int, own: Array) -> NDArray[np.float32]:
    """Look vector of a group without one of its scans; of a group of one, that scan's own.

    Args:
        mean: (LOOK_SIZE,) of all `count` scans.
        count: How many.
        own: (LOOK_SIZE,) of the scan to leave out.
    """
    if count < 2:
        return np.asarray(own, np.float32)
    rest = (np.asarray(mean, np.float64) * count - np.asarray(own)) / (count - 1)
    return np.asarray(rest, np.float32)


def blend(site: Array, own: Array, part: float) -> NDArray[np.float32]:
    """Look vector between a site's and a scan's own; `part` is the scan's.

    Where one does not know how long its voxels are, they are the other's.
    """
    out = np.asarray((1 - part) * np.asarray(site) + part * np.asarray(own), np.float32)
    if not (site[_VOXEL] and own[_VOXEL]):
        out[_VOXEL] = max(site[_VOXEL], own[_VOXEL])
    return out


def restyled(
    look: Array, before: Array, after: Array, mask: Array, sequence: str
) -> NDArray[np.float32]:
    """Look vector of a site whose scans were all recoloured as one of them was.

    Args:
        look: (LOOK_SIZE,), the site's.
        before: (X, Y, Z), a scan of the site.
        after: (X, Y, Z), the same scan with other intensities, sharpness and noise.
        mask: (X, Y, Z) bool.
        sequence: BIDS suffix.
    """
    out = np.array(look, np.float32)
    count, now = len(LEVELS), quantiles(after, mask)
    out[:count] = np.interp(out[:count], rising(quantiles(before, mask)), now)
    shown = contrast_of(sequence, LEVELS)
    average = after if shown is None else through(after, now, shown)
    out[_TEXTURE] = measure_texture(np.where(mask, average, 0), mask)
    return out


def with_rim(look: Array, image: Array, mask: Array) -> NDArray[np.float32]:
    """Look vector (LOOK_SIZE,) with the rim of a scan (X, Y, Z) in another contrast."""
    out = np.array(look, np.float32)
    out[_RIM] = measure_rim(image, mask)
    return out


def mirrored_look(look: Array) -> NDArray[np.float32]:
    """Look vector of the same scans with left and right exchanged."""
    own = Look.from_vector(look)
    return replace(own, shading=mirrored(own.shading)).vector()


def details(looks: Any) -> Any:
    """Texture and rim (…, DETAIL_SIZE) of look vectors (…, LOOK_SIZE), arrays or tensors."""
    return looks[..., _TEXTURE.start :]


def voxels(looks: Any) -> Any:
    """Longest voxel sides (…,), mm, of look vectors (…, LOOK_SIZE), arrays or tensors."""
    return looks[..., _VOXEL]


def quantiles(image: Array, mask: Array) -> NDArray[np.float32]:
    """Quantile function of the masked voxels at `LEVELS`, float32."""
    return np.asarray(np.quantile(np.asarray(image)[mask], LEVELS), np.float32)


def composition_profile(image: Array, mask: Array, mm: float) -> NDArray[np.float32]:
    """Joint distribution of rank, local spread of ranks and depth, square-rooted (PROFILE_SIZE,).

    Any strictly rising map of the intensities leaves it as it is. The square root evens out the
    variances of counts (Hellinger).
    """
    image, mask, mm = _coarse(np.asarray(image, np.float32), np.asarray(mask, bool), mm)
    box = ndimage.find_objects(mask.astype(np.uint8))[0] if mask.any() else None
    if box is None:
        return np.zeros(PROFILE_SIZE, np.float32)
    image, mask = np.pad(image[box], 3), np.pad(mask[box], 3)
    ranks = np.zeros(image.shape, np.float32)
    ranks[mask] = _midranks(image[mask])
    weight = mask.astype(np.float32)
    sigma = PROFILE_MM / mm
    share = np.maximum(ndimage.gaussian_filter(weight, sigma), 1e-3)
    mean = ndimage.gaussian_filter(ranks, sigma) / share
    square = ndimage.gaussian_filter(ranks * ranks, sigma) / share
    spread = np.digitize(np.sqrt(np.maximum(square - mean**2, 0))[mask], SPREAD_EDGES)
    depth = np.digitize(ndimage.distance_transform_edt(mask)[mask] * mm, DEPTH_EDGES)

    def bins(values: Array) -> Array:
        return np.asarray(np.clip((values * RANK_BINS).astype(int), 0, RANK_BINS - 1))

    joint = (bins(ranks[mask]) * _SPREADS + spread) * _DEPTHS + depth
    smooth = bins(mean[mask]) * _SPREADS + spread
    counts: Array = np.concatenate(
        [
            np.bincount(joint, minlength=RANK_BINS * _SPREADS * _DEPTHS),
            np.bincount(smooth, minlength=RANK_BINS * _SPREADS),
        ]
    )
    return np.asarray(np.sqrt(counts / len(joint)), np.float32)


def _coarse(image: Array, mask: Array, mm: float) -> tuple[Array, Array, float]:
    """Block means near `PROFILE_MM`; a block at least half brain counts as brain."""
    factor = max(1, round(PROFILE_MM / mm))
    if factor == 1:
        return image, mask, mm
    sides = np.full(3, factor)
    share = block_mean(mask.astype(np.float32), sides)
    total = block_mean(image * mask, sides)
    inside = share >= 0.5
    blocks_mean: Array = np.where(inside, total / np.maximum(share, 0.5), 0)
    return blocks_mean, inside, mm * factor


def _midranks(values: Array) -> Array:
    """Ranks in (0, 1), equal values sharing their mean rank, float32."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    end = np.cumsum(counts)
    middle = (end - counts / 2) / len(values)
    return np.asarray(middle[inverse], np.float32)
