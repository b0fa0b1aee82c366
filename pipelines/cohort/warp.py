"""Smooth invertible random warps: stationary velocity fields, scaling and squaring."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sgcd_core.errors import ConfigError

Array = NDArray[np.float32]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int, int], sigma: float) -> Array:
    """Gaussian random field of standard deviation 1 on a grid, correlation `sigma` voxels."""
    from scipy.ndimage import gaussian_filter

    field = rng.standard_normal(shape, dtype=np.float32)
    field = gaussian_filter(field, sigma, mode="wrap", truncate=3.0)
    out: Array = field / max(float(field.std()), 1e-6)
    return out


def random_displacement(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    mm: float,
    *,
    scales: tuple[tuple[float, float], ...] = ((28.0, 3.5), (12.0, 1.6)),
    min_jacobian: float = 0.2,
) -> Array:
    """A random diffeomorphism as a displacement in mm, float32 (3, X, Y, Z), on a grid of `mm`.

    The velocity is a sum of Gaussian random fields; its exponential is taken by scaling and
    squaring (Arsigny 2006, MICCAI). The velocity is made weaker until the smallest Jacobian
    determinant of x + u(x) exceeds `min_jacobian`.

    Args:
        rng: Source of randomness.
        shape: Grid.
        mm: Grid spacing.
        scales: Pairs of correlation length and root-mean-square velocity, both mm.
        min_jacobian: Bound kept at every grid point.

    Raises:
        ConfigError: No positive Jacobian could be reached: the scales are far too rough.
    """
    velocity = np.zeros((3, *shape), np.float32)
    for length, amplitude in scales:
        for axis in range(3):
            velocity[axis] += np.float32(amplitude) * smooth_noise(rng, shape, length / mm)
    for _ in range(20):
        displacement = exponential(velocity, mm)
        if float(jacobian_determinant(displacement, mm).min()) > min_jacobian:
            return displacement
        velocity *= np.float32(0.85)
    raise ConfigError("no invertible warp with these scales.", hint="Use longer lengths.")


def exponential(velocity: Array, mm: float, steps: int = 5) -> Array:
    """exp(v) as a displacement in mm, by scaling and squaring; `velocity` in mm."""
    import torch

    size = velocity.shape[1:]
    axes = [torch.linspace(-1, 1, s) for s in size]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)[None]
    # displacement in mm → the unit cube that grid_sample works in, axes reversed
    scale = torch.tensor([2 / ((s - 1) * mm) for s in size[::-1]])
    moved = torch.from_numpy(velocity / np.float32(2**steps))[None]
    for _ in range(steps):
        points = grid + moved.flip(1).permute(0, 2, 3, 4, 1) * scale
        moved = moved + torch.nn.functional.grid_sample(
            moved, points, mode="bilinear", padding_mode="border", align_corners=True
        )
    return np.asarray(moved[0].numpy())


def jacobian_determinant(displacement: Array, mm: float) -> Array:
    """Determinant of the Jacobian of x + u(x), float32 (X, Y, Z)."""
    jacobian = np.empty((*displacement.shape[1:], 3, 3), np.float32)
    for i in range(3):
        for j, slope in enumerate(np.gradient(displacement[i], mm)):
            jacobian[..., i, j] = slope + np.float32(i == j)
    out: Array = np.linalg.det(jacobian)
    return out
