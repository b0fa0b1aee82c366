"""From a volume to encoder inputs: slices in three planes, scaled isotropically and padded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SlicePlan:
    """Which slices of a volume are looked at; the same for both members of a pair.

    Attributes:
        indices: For each of the three axes the slice indices along it.
        box: Bounding box of the brain, (start, stop) for each axis, voxels.
    """

    indices: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def plan_slices(mask: Tensor, per_plane: int) -> SlicePlan:
    """Evenly spaced slices in the middle 60 % of the brain's bounding box.

    Args:
        mask: (X, Y, Z) bool, not empty.
        per_plane: Slices in each plane.
    """
    indices, box = [], []
    for axis in range(3):
        others = tuple(i for i in range(3) if i != axis)
        filled = mask.any(dim=others[1]).any(dim=others[0]).nonzero().flatten()
        start, stop = int(filled[0]), int(filled[-1]) + 1
        steps = torch.arange(1, per_plane + 1, dtype=torch.float64) / (per_plane + 1)
        positions = start + (stop - start) * (0.2 + 0.6 * steps)
        indices.append(tuple(int(p) for p in positions))
        box.append((start, stop))
    return SlicePlan((indices[0], indices[1], indices[2]), (box[0], box[1], box[2]))


def cut_slices(volume: Tensor, plan: SlicePlan, size: int) -> Tensor:
    """The planned slices as square grey images.

    Each slice is cut to the brain's box, scaled by one factor for both sides so that the longer
    one fills `size`, and padded with 0: never stretched. Differentiable.

    Args:
        volume: (X, Y, Z) float32 in [0, 1].
        plan: Slices and box.
        size: Side of the output, pixels.

    Returns:
        (S, 1, size, size) float32, axis 0 in the order sagittal, coronal, axial; the patient's
        superior (or anterior, in axial slices) is up.
    """
    images = []
    for axis in range(3):
        rows, cols = (i for i in range(3) if i != axis)
        (r0, r1), (c0, c1) = plan.box[rows], plan.box[cols]
        for index in plan.indices[axis]:
            image = volume.select(axis, index)[r0:r1, c0:c1].T.flip(0)
            images.append(_fit(image[None, None], size))
    return torch.cat(images)


def _fit(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[-2:]
    factor = size / max(height, width)
    new = (max(1, round(height * factor)), max(1, round(width * factor)))
    image = F.interpolate(image, size=new, mode="bilinear", align_corners=False, antialias=True)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    return F.pad(image, (left, size - new[1] - left, top, size - new[0] - top))
