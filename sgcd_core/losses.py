"""Every loss of the two stages, each citing its equation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sgcd_core.volume.condition import blurred, gradient_map


def prediction_loss(
    output: Tensor, target: Tensor, mask: Tensor | None, kind: str = "l2", sigma: float = 0.0
) -> Tensor:
    """L_N of Eq. 3: mean error of the network's prediction, one value a sample.

    Args:
        output: (B, 1, X, Y, Z) network output.
        target: Same shape.
        mask: (B, 1, X, Y, Z) bool to restrict to, or None for the whole volume.
        kind: `l2` as the paper, or `l1`.
        sigma: Of the Gaussian the error is smoothed with first, voxels. A scan's own noise is in
            the scan that the network is given too: voxel by voxel it would learn to copy it.

    Returns:
        (B,) losses.
    """
    difference = smoothed(output - target, mask, sigma)
    error = difference.abs() if kind == "l1" else difference.square()
    return masked_mean(error, mask)


def gradient_loss(estimate: Tensor, reference: Tensor, mask: Tensor, sigma: float = 0.0) -> Tensor:
    """L_G: squared difference of the normalized gradient maps inside the mask, (B,).

    Args:
        estimate: (B, 1, X, Y, Z) estimate of the clean image, [0, 1].
        reference: The image whose edges must stay, [0, 1].
        mask: (B, 1, X, Y, Z) bool.
        sigma: Of the Gaussian both are smoothed with first, voxels.
    """
    a, b = (smoothed(image, mask, sigma) for image in (estimate, reference))
    difference = gradient_map(a, mask) - gradient_map(b, mask)
    return masked_mean(difference.square(), mask)


def style_direction_loss(moved: Tensor, wanted: Tensor) -> Tensor:
    """L_S of Eq. 13: L1 distance plus one minus cosine of two style directions (B, E), (B,).

    The norms are guarded: a zero direction gives cosine 0 and a finite gradient.
    """
    distance = (wanted - moved).abs().sum(-1)
    return distance + 1 - F.cosine_similarity(wanted, moved, dim=-1, eps=1e-6)


def style_reconstruction_loss(moved: Tensor, wanted: Tensor) -> Tensor:
    """L_R: L1 distance of a target scan's own style and its reconstruction's (B, E), (B,)."""
    return (wanted - moved).abs().sum(-1)


def smoothed(image: Tensor, mask: Tensor | None, sigma: float) -> Tensor:
    """Gaussian smoothing inside the mask (everywhere where None), 0 outside; sigma 0: as it is.

    Voxels outside, and beyond the image's faces, count for nothing (normalized convolution;
    Knutsson 1993, CVPR).
    """
    if sigma <= 0:
        return image
    inside = torch.ones_like(image) if mask is None else mask.to(image.dtype)
    beyond = math.ceil(3 * sigma)
    side = slice(beyond, -beyond)

    def spread(volume: Tensor) -> Tensor:  # zeros keep one face out of the other: it is periodic
        return blurred(F.pad(volume, [beyond] * 6), [sigma**2] * 3)[..., side, side, side]

    weight = spread(inside).clamp(min=1e-3)
    return spread(image * inside) / weight * inside


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of each sample's voxels inside `mask` (all where None), (B,)."""
    if mask is None:
        return values.flatten(1).mean(1)
    inside = mask.to(values.dtype)
    total = inside.flatten(1).sum(1).clamp(min=1)
    return torch.sum((values * inside).flatten(1), dim=1) / total
