"""Where a prepared scan lies: everything needed to go to the model grid and back."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgcd_core.errors import StorageError
from sgcd_core.io.nifti import Orientation
from sgcd_core.volume.resample import voxel_sides

Array = NDArray[Any]
Rows = tuple[tuple[float, ...], ...]

_FORMAT = 1


@dataclass(frozen=True)
class Geometry:
    """The way from a scan's stored voxels to the model grid, exact also after a JSON round trip.

    Attributes:
        native_shape: Stored grid of the scan.
        native_affine: (4, 4), stored voxel → world mm RAS+.
        ras_orientation: What `from_ras` needs to undo the reordering.
        model_affine: (4, 4), model voxel → template mm RAS+.
        model_shape: Model grid.
        world_to_template: (4, 4) rigid, world mm → template mm.
        intensity_low: Scan intensity that becomes 0 (after bias correction).
        intensity_high: Scan intensity that becomes 1.
        brain_ml: Volume of the native brain mask.
    """

    native_shape: tuple[int, int, int]
    native_affine: Rows
    ras_orientation: Orientation
    model_affine: Rows
    model_shape: tuple[int, int, int]
    world_to_template: Rows
    intensity_low: float
    intensity_high: float
    brain_ml: float

    def longest_voxel_mm(self) -> float:
        """The longest side of the stored scan's voxels."""
        return float(voxel_sides(np.array(self.native_affine)).max())

    def native_to_model(self) -> Array:
        """(4, 4) float64, stored voxel index → model voxel index."""
        template_from_native = np.array(self.world_to_template) @ np.array(self.native_affine)
        out: Array = np.linalg.solve(np.array(self.model_affine), template_from_native)
        return out

    def model_to_native(self) -> Array:
        """(4, 4) float64, model voxel index → stored voxel index."""
        out: Array = np.linalg.inv(self.native_to_model())
        return out

    def model_world_affine(self) -> Array:
        """(4, 4) float64, model voxel → the scan's own world mm, RAS+."""
        out: Array = np.linalg.solve(np.array(self.world_to_template), np.array(self.model_affine))
        return out

    def scale(self, values: Array) -> Array:
        """Scan intensities on the model's scale, float32: 0 at the low end, 1 at the high end."""
        span = self.intensity_high - self.intensity_low
        out: Array = ((values - np.float32(self.intensity_low)) / np.float32(span)).astype(
            np.float32, copy=False
        )
        return out

    def to_json(self) -> bytes:
        """UTF-8 JSON, the same bytes each time."""
        fields = {"format": _FORMAT, **dataclasses.asdict(self)}
        return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, *, where: str | None = None) -> Geometry:
        """The geometry in `data`.

        Raises:
            StorageError: TABLE-SCHEMA when it is damaged or of another format.
        """
        try:
            raw = json.loads(data)
            if raw.pop("format") != _FORMAT:
                raise ValueError("format")
            geometry = cls(
                native_shape=_triple(raw["native_shape"]),
                native_affine=rows(raw["native_affine"]),
                ras_orientation=_orientation(raw["ras_orientation"]),
                model_affine=rows(raw["model_affine"]),
                model_shape=_triple(raw["model_shape"]),
                world_to_template=rows(raw["world_to_template"]),
                intensity_low=float(raw["intensity_low"]),
                intensity_high=float(raw["intensity_high"]),
                brain_ml=float(raw["brain_ml"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise StorageError(
                "this is not a geometry file of this version.", code="TABLE-SCHEMA", where=where,
                hint="Delete it and run `sgcd prepare` again.",
            ) from error  # fmt: skip
        return geometry


def rows(matrix: Any) -> Rows:
    """A (4, 4) matrix as nested tuples of float.

    Raises:
        ValueError: It has another shape or is not finite.
    """
    array = np.asarray(matrix, dtype=np.float64)
    if array.shape != (4, 4) or not np.isfinite(array).all():
        raise ValueError("expected a finite 4×4 matrix")
    return tuple(tuple(float(v) for v in row) for row in array)


def _triple(values: Any) -> tuple[int, int, int]:
    a, b, c = (int(v) for v in values)
    return a, b, c


def _orientation(values: Any) -> Orientation:
    (a, i), (b, j), (c, k) = values
    return ((int(a), int(i)), (int(b), int(j)), (int(c), int(k)))
