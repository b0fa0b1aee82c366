"""Three planes of a scan as small WebP pictures inside a page.

Neurological convention, as in nilearn and fMRIPrep: the left of a coronal or axial picture is the
person's left. Axes come from the affine, so a scan stored the other way round looks the same.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgcd_core.io.nifti import to_ras

Array = NDArray[Any]
Plane = NDArray[np.float32]

#: Plane → (the axis it cuts, the letters at the left and right edge of its picture).
PLANES = {"sagittal": (0, "P", "A"), "coronal": (1, "L", "R"), "axial": (2, "L", "R")}
#: Differences and uncertainties beyond these are drawn as these, parts of the intensity range.
CHANGE_LIMIT = 0.3
UNCERTAINTY_LIMIT = 0.1
#: Black at zero, like the background: blue below and red above.
CHANGE_COLOURS = ("#c4e1ff", "#2f7fd6", "#000000", "#d9552b", "#ffdcc0")
UNCERTAINTY_COLOURS = ("#000000", "#6a1b5f", "#d8453c", "#f9a825", "#fff6c8")
#: Intensities and their greys. Vessels and enhancing lesions lie above 1 and must stay brighter
#: than white matter, which a harmonized scan may hold just below it.
TONES = ((0.0, 1.0, 2.0), (0.0, 215.0, 255.0))
_MARGIN_MM = 4.0
_LONG_SIDE = 300  # pixels of the brain's longest side


@dataclass(frozen=True)
class Cut:
    """Where a volume is cut: the same for all volumes of one scan.

    Attributes:
        affine: (4, 4), stored voxel → world mm RAS+.
        levels: RAS voxel of the sagittal, coronal and axial plane.
        box: The brain with a margin, RAS voxels.
        sides: Voxel sides along the RAS axes, mm.
    """

    affine: NDArray[np.float64]
    levels: tuple[int, int, int]
    box: tuple[slice, slice, slice]
    sides: tuple[float, float, float]

    @classmethod
    def through(cls, mask: Array, affine: NDArray[np.float64]) -> Cut:
        """A cut through the middle of a brain.

        Args:
            mask: bool (X, Y, Z), stored orientation.
            affine: (4, 4), stored voxel → world mm RAS+.
        """
        inside, placed, _ = to_ras(mask, affine)
        if not inside.any():
            inside = np.ones_like(inside)
        sides = np.linalg.norm(placed[:3, :3], axis=0)
        levels, box = [], []
        # A little right of the midline: the plane between the hemispheres shows no cortex. A
        # little above the middle: the basal ganglia and ventricles.
        for axis, share in enumerate((0.58, 0.5, 0.54)):
            found = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))
            low, high = int(found[0]), int(found[-1])
            levels.append(round(low + share * (high - low)))
            margin = int(np.ceil(_MARGIN_MM / sides[axis]))
            last = inside.shape[axis]
            box.append(slice(max(0, low - margin), min(last, high + 1 + margin)))
        return cls(
            affine, (levels[0], levels[1], levels[2]), (box[0], box[1], box[2]),
            (float(sides[0]), float(sides[1]), float(sides[2])),
        )  # fmt: skip

    def planes(self, volume: Array) -> dict[str, Plane]:
        """Plane → (rows, columns) float32, top or front up, left or back to the left.

        Args:
            volume: (X, Y, Z), stored orientation.
        """
        ras = to_ras(volume, self.affine)[0]
        return {name: self._plane(ras, axis) for name, (axis, _, _) in PLANES.items()}

    def _plane(self, ras: Array, axis: int) -> Plane:
        at: list[Any] = list(self.box)
        at[axis] = self.levels[axis]
        # Remaining axes rise to the right/front and up; rot90 puts the second one upright.
        return np.rot90(np.asarray(ras[tuple(at)], np.float32))

    def size(self, plane: str) -> tuple[int, int]:
        """Width and height of a plane's picture, square pixels, one scale for all planes."""
        mm = [(b.stop - b.start) * side for b, side in zip(self.box, self.sides, strict=True)]
        across, up = (axis for axis in range(3) if axis != PLANES[plane][0])
        scale = _LONG_SIDE / max(mm)
        return max(1, round(mm[across] * scale)), max(1, round(mm[up] * scale))


def grey(plane: Plane) -> Array:
    """Intensities as uint8, one curve for all scans: `TONES`."""
    return np.asarray(np.interp(plane, *TONES).round(), np.uint8)


def signed(plane: Plane) -> Array:
    """Differences as uint8 RGB: black at 0, blue below, red above, full at `CHANGE_LIMIT`."""
    return _coloured(plane / (2 * CHANGE_LIMIT) + 0.5, CHANGE_COLOURS)


def magnitude(plane: Plane) -> Array:
    """Uncertainties as uint8 RGB: black at 0, bright at `UNCERTAINTY_LIMIT`."""
    return _coloured(plane / UNCERTAINTY_LIMIT, UNCERTAINTY_COLOURS)


def _coloured(values: Plane, stops: Sequence[str]) -> Array:
    """Values [0, 1] as uint8 RGB, linear between evenly spaced colours `#rrggbb`."""
    colours = np.array([list(bytes.fromhex(stop[1:])) for stop in stops], np.float64)
    at = np.linspace(0, 1, len(stops))
    found = [np.interp(values, at, colours[:, channel]) for channel in range(3)]
    return np.stack(found, axis=-1).round().astype(np.uint8)


def draw(cut: Cut, volume: Array, paint: Callable[[Plane], Array] = grey) -> dict[str, str]:
    """Plane → `data:` address of its picture.

    Args:
        cut: Where.
        volume: (X, Y, Z), stored orientation.
        paint: `grey`, `signed` or `magnitude`.
    """
    from PIL import Image

    out = {}
    for name, plane in cut.planes(volume).items():
        # Values are enlarged, then coloured: the other way round edges would get false colours.
        enlarged = Image.fromarray(np.ascontiguousarray(plane)).resize(
            cut.size(name), Image.Resampling.BICUBIC
        )
        body = io.BytesIO()
        picture = Image.fromarray(paint(np.asarray(enlarged)))
        picture.save(body, format="WEBP", quality=85, method=4)
        out[name] = "data:image/webp;base64," + base64.b64encode(body.getvalue()).decode()
    return out
