"""Shading: what bias correction leaves, as a smooth field of few numbers.

N4 looks at one scan and stops early; the coil is the same for every scan of a site, so the mean
over a site's scans says more than any of them. A scan is modelled as a few tissue intensities
times 1 + F, F a polynomial of position; intensities and F are fitted in turn (Wells 1996, IEEE
TMI 15:429), voxels on edges counting little. Units: F is a part of the intensity.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import eval_legendre

Array = NDArray[Any]

#: Total degree of the polynomial.
ORDER = 3
_POWERS = tuple(
    (i, j, k)
    for i in range(ORDER + 1)
    for j in range(ORDER + 1 - i)
    for k in range(ORDER + 1 - i - j)
    if i + j + k
)
#: Coefficients of a field.
SHADING_SIZE = len(_POWERS)
#: Distance from the grid's centre that stands for 1, mm.
RADIUS_MM = 100.0
BALL_MM = 70.0
TISSUES, ROUNDS, RIDGE = 3, 12, 1e-3
#: Gradient magnitude, intensity a voxel, at which a voxel's weight is a quarter.
EDGE = 0.15
MOST_VOXELS, LIMIT = 8000, 0.6


#: Ranks at which the average contrasts are held.
_RANKS = (
    0, 0.005, 0.01, 0.02, 0.03, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.5625,
    0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375, 0.955, 0.97, 0.98, 0.99, 0.995, 1,
)  # fmt: skip
#: What an average scan's intensities are at these ranks: the mean over digital sites.
_CONTRASTS = {
    "T1w": (
        0, 0.005, 0.027, 0.067, 0.096, 0.165, 0.259, 0.336, 0.402, 0.459, 0.511, 0.56, 0.606,
        0.649, 0.691, 0.733, 0.775, 0.819, 0.862, 0.905, 0.921, 0.938, 0.954, 0.981, 1.005,
        1.083,
    ),
    "T2w": (
        0, 0.002, 0.01, 0.022, 0.029, 0.048, 0.08, 0.115, 0.154, 0.194, 0.234, 0.273, 0.313,
        0.354, 0.396, 0.44, 0.487, 0.54, 0.609, 0.716, 0.763, 0.818, 0.866, 0.933, 0.975, 1.082,
    ),
}  # fmt: skip


def contrast_of(sequence: str, levels: Array) -> NDArray[np.float64] | None:
    """Quantile function at `levels` of an average scan; None for a sequence none is known of.

    A field acts on intensities; how much of it is seen depends on the contrast, and so does what
    anatomy adds to a fit. Shown in one contrast, the scans of all sites are fitted alike.
    """
    values = _CONTRASTS.get(sequence)
    if values is None:
        return None
    rising = np.asarray(values) + 1e-6 * np.arange(len(values))
    return np.asarray(np.interp(levels, _RANKS, rising))


def shading_field(coefficients: Array, shape: tuple[int, ...], mm: float) -> NDArray[np.float32]:
    """1 + F on a grid centred where the fit's was: float32 `shape`, within 0.4 and 1.6."""
    terms = _terms(tuple(shape), float(mm))
    field = np.zeros(shape, np.float32)
    for value, offset, (x, y, z) in zip(coefficients, _offsets(), terms, strict=True):
        field += np.float32(value) * (x[:, None, None] * y[:, None] * z - np.float32(offset))
    return np.asarray(1 + np.clip(field, -LIMIT, LIMIT), np.float32)


#: 1 for terms that are alike on the left and on the right, -1 for those that change sign.
SIDES = np.array([-1.0 if i % 2 else 1.0 for i, _, _ in _POWERS])


def mirrored(coefficients: Array) -> NDArray[np.float32]:
    """Coefficients (SHADING_SIZE,) of the field with left and right exchanged."""
    return np.asarray(np.asarray(coefficients) * SIDES, np.float32)


def estimate_shading(image: Array, mask: Array, mm: float) -> NDArray[np.float32]:
    """Coefficients (SHADING_SIZE,) of the shading of one prepared scan.

    Args:
        image: (X, Y, Z) float, [0, 1]; about 4 mm is fine enough.
        mask: (X, Y, Z) bool, the brain.
        mm: Voxel side.
    """
    out = np.zeros(SHADING_SIZE, np.float32)
    at = np.flatnonzero(mask)
    at = at[:: max(1, len(at) // MOST_VOXELS)]
    if len(at) < 10 * SHADING_SIZE:
        return out
    # edges are edges of tissue at any voxel side: the gradient is taken over 4 mm
    edge = ndimage.gaussian_gradient_magnitude(np.asarray(image, np.float32), 0.7 * 4.0 / mm)
    y = np.asarray(image, np.float64).reshape(-1)[at]
    weight = 1 / (1 + (edge.reshape(-1)[at] * (4.0 / mm) / EDGE) ** 2) ** 2
    x = _design(np.unravel_index(at, image.shape), image.shape, mm)
    means = np.quantile(y, np.linspace(0.1, 0.9, TISSUES))
    spread, field = 0.15, np.zeros(len(y))
    for round_ in range(ROUNDS):
        flat = y / (1 + field)
        for _ in range(2 if round_ else 8):
            distance = (flat - means[:, None]) ** 2
            part = np.exp(-(distance - distance.min(0)) / (2 * spread**2))
            part /= part.sum(0)
            heavy = part * weight
            means = (heavy * flat).sum(1) / np.maximum(heavy.sum(1), 1e-9)
            spread = max(0.02, float(np.sqrt((heavy * distance).sum() / weight.sum())))
        expected, square = means @ part, means**2 @ part
        scale = weight / spread**2
        left = (x * (scale * square)) @ x.T + RIDGE * scale.sum() * np.eye(len(x))
        out = np.linalg.solve(left, x @ (scale * (expected * y - square)))
        field = np.clip(out @ x, -LIMIT, LIMIT)
    return np.asarray(out, np.float32)


@cache
def _offsets() -> tuple[float, ...]:
    """Mean of each polynomial over a ball of a head's size, so that a field is 1 on average."""
    mm, side = 5.0, 31
    line = (np.arange(side) - side // 2) * mm
    inside = np.sqrt(line[:, None, None] ** 2 + line[:, None] ** 2 + line**2) < BALL_MM
    terms = _terms((side, side, side), mm)
    return tuple(float((x[:, None, None] * y[:, None] * z)[inside].mean()) for x, y, z in terms)


@cache
def _terms(shape: tuple[int, ...], mm: float) -> list[tuple[Array, Array, Array]]:
    """Legendre polynomials along each axis, a triple a coefficient."""
    lines = [
        [eval_legendre(n, u).astype(np.float32) for n in range(ORDER + 1)]
        for u in ((np.arange(s) - (s - 1) / 2) * mm / RADIUS_MM for s in shape)
    ]
    return [(lines[0][i], lines[1][j], lines[2][k]) for i, j, k in _POWERS]


def _design(index: tuple[Array, ...], shape: tuple[int, ...], mm: float) -> NDArray[np.float64]:
    """The polynomials at some voxels, (SHADING_SIZE, N)."""
    i, j, k = index
    rows = zip(_offsets(), _terms(tuple(shape), float(mm)), strict=True)
    return np.stack([x[i] * y[j] * z[k] - offset for offset, (x, y, z) in rows]).astype(np.float64)
