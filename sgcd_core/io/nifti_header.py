"""What a NIfTI header says about the voxels and where they lie; nothing is repaired silently.

Fields follow nifti1.h and nifti2.h (nifti.nimh.nih.gov); the quaternion is read as in nifti1_io.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgcd_core.errors import InputError

#: datatype code → NumPy type, for the types that hold one real number a voxel
DTYPES: dict[int, str] = {
    2: "uint8", 4: "int16", 8: "int32", 16: "float32", 64: "float64", 256: "int8",
    512: "uint16", 768: "uint32", 1024: "int64", 1280: "uint64",
}  # fmt: skip
_REFUSED = {1: "binary", 32: "complex", 128: "RGB", 1792: "complex", 2048: "complex", 2304: "RGBA"}
#: The header fields that say where the voxels lie, carried to an output bit for bit.
GEOMETRY_FIELDS = (
    "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip
MIN_VOXEL_MM, MAX_VOXEL_MM = 0.2, 10.0


@dataclass(frozen=True, eq=False)
class Header:
    """A checked header.

    Attributes:
        version: 1 or 2.
        byte_order: "<" or ">".
        shape: Three sides, trailing sides of 1 dropped.
        dtype: NumPy name of the stored type.
        offset: Where the voxels begin, bytes.
        slope: Scaling, 1 where the header gives none.
        inter: Offset of the scaling, 0 where the header gives none.
        affine: float64 (4, 4), voxel → world mm RAS+: sform where its code is set, else qform.
        qform: float64 (4, 4) of the quaternion, None when qform_code is 0.
        sform: float64 (4, 4) of the srow fields, None when sform_code is 0.
        geometry: `GEOMETRY_FIELDS` as stored (native byte order).
    """

    version: int
    byte_order: str
    shape: tuple[int, int, int]
    dtype: str
    offset: int
    slope: float
    inter: float
    affine: NDArray[np.float64]
    qform: NDArray[np.float64] | None
    sform: NDArray[np.float64] | None
    qform_code: int
    sform_code: int
    geometry: dict[str, Any]

    @property
    def voxel_bytes(self) -> int:
        """Bytes of the stored voxels."""
        return int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize


def _layout(start: bytes, where: str) -> tuple[int, str, Any]:
    """Version, byte order and the raw fields, from the first 540 bytes or fewer."""
    from nibabel.nifti1 import header_dtype as dtype_1
    from nibabel.nifti2 import header_dtype as dtype_2

    for order, word in (("<", "little"), (">", "big")):
        size = int.from_bytes(start[:4], word)  # type: ignore[arg-type]
        if size == 348 and len(start) >= 348 and start[344:348] == b"n+1\0":
            layout = np.dtype(dtype_1).newbyteorder(order)  # type: ignore[arg-type]
            return 1, order, np.frombuffer(start[:348], layout)[0]
        if size == 540 and len(start) >= 540 and start[4:12] == b"n+2\0\r\n\x1a\n":
            layout = np.dtype(dtype_2).newbyteorder(order)  # type: ignore[arg-type]
            return 2, order, np.frombuffer(start[:540], layout)[0]
    raise InputError(
        "is not a NIfTI-1 or NIfTI-2 file (.nii or .nii.gz).", code="SCAN-UNREADABLE", where=where,
        hint="Convert it with dcm2niix, or put a .hdr/.img pair into one .nii.",
    )  # fmt: skip


def _shape(raw: Any, where: str) -> tuple[int, int, int]:
    dims = [int(d) for d in raw["dim"]]
    if not 1 <= dims[0] <= 7:
        raise InputError(
            f"the header gives {dims[0]} dimensions, expected 3.", code="SCAN-NOT-3D", where=where
        )
    sides = dims[1 : dims[0] + 1]
    while len(sides) > 3 and sides[-1] == 1:
        sides.pop()
    if len(sides) != 3 or min(sides) < 1:
        raise InputError(
            f"the shape is {tuple(sides)}, expected one volume of three sides.",
            code="SCAN-NOT-3D", where=where,
            hint="Give one volume of a series." if len(sides) > 3 else None,
        )  # fmt: skip
    return sides[0], sides[1], sides[2]


def _qform(raw: Any) -> NDArray[np.float64]:
    """The quaternion's affine, as `nifti_quatern_to_mat44` computes it."""
    b, c, d = (float(raw[f"quatern_{x}"]) for x in "bcd")
    if not np.isfinite((b, c, d)).all():
        return np.full((4, 4), np.nan)
    a2 = 1.0 - (b * b + c * c + d * d)
    if a2 < 1e-7:
        norm = float(np.sqrt(b * b + c * c + d * d))
        a, b, c, d = 0.0, b / norm, c / norm, d / norm
    else:
        a = float(np.sqrt(a2))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    zooms = np.asarray(raw["pixdim"][1:4], np.float64).copy()
    if raw["pixdim"][0] < 0:
        zooms[2] = -zooms[2]
    affine = np.eye(4)
    affine[:3, :3] = rotation * zooms
    affine[:3, 3] = [float(raw[f"qoffset_{x}"]) for x in "xyz"]
    return affine


def _refuse_affine(what: str, where: str) -> InputError:
    return InputError(
        f"{what}: left and right are unknown.", code="SCAN-AFFINE", where=where,
        hint="Convert the scan again from DICOM.",
    )  # fmt: skip


def check_affine(affine: NDArray[np.float64], where: str) -> None:
    """Refuse an affine that is not finite or (nearly) singular, or whose voxel sides are absurd.

    Raises:
        InputError: SCAN-AFFINE or SCAN-VOXEL-SIZE.
    """
    if not np.isfinite(affine).all():
        raise _refuse_affine("the affine is not finite", where)
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    if min(sides) == 0 or abs(np.linalg.det(affine[:3, :3] / sides)) < 1e-3:
        raise _refuse_affine("the affine is singular", where)
    if min(sides) < MIN_VOXEL_MM or max(sides) > MAX_VOXEL_MM:
        text = " × ".join(f"{s:.3g}" for s in sides)
        raise InputError(
            f"a voxel is {text} mm, expected sides of {MIN_VOXEL_MM} to {MAX_VOXEL_MM:g} mm.",
            code="SCAN-VOXEL-SIZE", where=where, hint="Check the units of the header.",
        )  # fmt: skip


def _affines(
    raw: Any, where: str
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None, NDArray[np.float64]]:
    """(qform, sform, the one to use), refused where they cannot tell left from right."""
    codes = int(raw["qform_code"]), int(raw["sform_code"])
    if min(codes) < 0 or max(codes) > 5:
        raise _refuse_affine(f"the form codes are {codes}, expected 0 to 5", where)
    # With both codes 0 the standard gives voxel sides but no direction ("method 1"): tools differ
    # on whether the first axis runs to the left or to the right, so such a scan is refused.
    if codes == (0, 0):
        raise _refuse_affine("qform_code and sform_code are both 0", where)
    zooms = np.asarray(raw["pixdim"][1:4], np.float64)
    if not np.isfinite(zooms).all() or min(zooms) <= 0:
        raise InputError(
            "pixdim holds a voxel side that is not a positive number.", code="SCAN-VOXEL-SIZE",
            where=where, hint="Convert the scan again from DICOM.",
        )  # fmt: skip
    qform = _qform(raw) if codes[0] else None
    sform = None
    if codes[1]:
        rows = [np.asarray(raw[f"srow_{x}"], np.float64) for x in "xyz"]
        sform = np.vstack([*rows, [0.0, 0.0, 0.0, 1.0]])
    for affine in (sform, qform):
        if affine is not None:
            check_affine(affine, where)
    if qform is not None and sform is not None:
        by_q, by_s = qform[:3, :3], sform[:3, :3]
        turn = (by_s / np.linalg.norm(by_s, axis=0)) @ np.linalg.inv(
            by_q / np.linalg.norm(by_q, axis=0)
        )
        # a tilt of the head turns the left by far less than 60 degrees
        if np.linalg.det(turn) < 0 or turn[0, 0] < 0.5:
            raise InputError(
                "sform and qform disagree about left and right.", code="SCAN-ORIENTATION",
                where=where, hint="Convert the scan again, or correct the wrong one of the two.",
            )  # fmt: skip
    chosen = sform if sform is not None else qform
    assert chosen is not None
    return qform, sform, chosen


@np.errstate(all="ignore")  # absurd numbers are looked for below, and refused
def parse_header(start: bytes, where: str) -> Header:
    """Read and check the first 540 bytes (or fewer, where the file is shorter).

    Raises:
        InputError: SCAN-UNREADABLE, SCAN-NOT-3D, SCAN-DTYPE, SCAN-AFFINE, SCAN-ORIENTATION or
            SCAN-VOXEL-SIZE.
    """
    version, order, raw = _layout(start, where)
    shape = _shape(raw, where)
    code = int(raw["datatype"])
    if code not in DTYPES:
        name = _REFUSED.get(code, f"of code {code}")
        raise InputError(
            f"the voxels are {name}, expected integers or real numbers.", code="SCAN-DTYPE",
            where=where, hint="Give the magnitude image.",
        )  # fmt: skip
    least = 352 if version == 1 else 544
    offset = float(raw["vox_offset"]) or float(least)
    if not (np.isfinite(offset) and offset.is_integer() and least <= offset < 2**40):
        raise InputError(
            f"the header puts the voxels at an impossible place, expected byte {least} or later.",
            code="SCAN-UNREADABLE", where=where,
        )  # fmt: skip
    slope, inter = float(raw["scl_slope"]), float(raw["scl_inter"])
    if not np.isfinite(slope) or slope == 0:  # the standard: no scaling
        slope, inter = 1.0, 0.0
    qform, sform, affine = _affines(raw, where)
    native = {f: np.array(raw[f], raw[f].dtype.newbyteorder("=")) for f in GEOMETRY_FIELDS}
    return Header(
        version=version,
        byte_order=order,
        shape=shape,
        dtype=DTYPES[code],
        offset=int(offset),
        slope=slope,
        inter=inter if np.isfinite(inter) else 0.0,
        affine=affine,
        qform=qform,
        sform=sform,
        qform_code=int(raw["qform_code"]),
        sform_code=int(raw["sform_code"]),
        geometry=native,
    )
