"""NIfTI in and out: bounded and CRC-checked reading, fresh headers, lossless RAS+ reordering."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from sgcd_core.errors import InputError
from sgcd_core.io.gunzip import MAGIC, Gunzip
from sgcd_core.io.nifti_header import Header, parse_header
from sgcd_core.io.store import Store, sha256_hex
from sgcd_core.words import counted

#: Stored axis of each RAS axis, and whether it runs the other way (-1).
Orientation = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

MAX_INFLATED = 2_000_000_000
#: More than this share of NaN or infinite voxels is refused; fewer are set to 0, with a note.
MAX_NONFINITE = 1e-3
_SLACK = 1 << 20  # bytes that may follow the voxels
_HEADER_BYTES = 540


@dataclass(frozen=True, eq=False)
class NiftiScan:
    """One 3D scan as it is stored.

    Attributes:
        data: float32 (X, Y, Z), scaled by the header's slope, finite, stored orientation.
        affine: float64 (4, 4), voxel → world mm RAS+: sform where its code is set, else qform.
        shape: Voxels.
        voxel_mm: Voxel sides, mm, along the stored axes.
        qform: float64 (4, 4), None when its code is 0.
        sform: float64 (4, 4), None when its code is 0.
        dtype: NumPy name of the stored type.
        sha256: Of the file's bytes, 64 hex digits.
        version: NIfTI version, 1 or 2.
        geometry: Header fields that place the voxels, as stored.
        notes: (code, message) of what is odd but does no harm.
    """

    data: NDArray[np.float32] = field(repr=False)
    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    voxel_mm: tuple[float, float, float]
    qform: NDArray[np.float64] | None
    sform: NDArray[np.float64] | None
    qform_code: int
    sform_code: int
    dtype: str
    sha256: str
    version: int = 1
    geometry: dict[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[tuple[str, str], ...] = ()


def _too_big(size: int, limit: int, where: str) -> InputError:
    return InputError(
        f"the image needs {size} bytes, the limit is {limit}.", code="SCAN-TOO-BIG", where=where,
        hint="Raise prepare.max_inflated_bytes if the scan is genuine.",
    )  # fmt: skip


def _unpack(data: bytes, where: str, max_inflated: int) -> tuple[Header, bytes, bool]:
    """Header, voxel bytes, and whether unknown bytes follow the gzip stream."""
    stream = Gunzip(data, where) if data[:2] == MAGIC else None
    start = stream.read(_HEADER_BYTES) if stream else data[:_HEADER_BYTES]
    header = parse_header(start, where)
    end = header.offset + header.voxel_bytes
    memory = header.offset + max(header.voxel_bytes, 4 * int(np.prod(header.shape, dtype=object)))
    if memory > max_inflated:
        raise _too_big(memory, max_inflated, where)
    if stream is None:
        body, excess = data[header.offset : end], len(data) - end
    else:
        skip = stream.read(max(0, header.offset - len(start)))
        known = len(start) + len(skip)
        body = stream.read(max(0, end - known), after=start[header.offset :])
        body = body[: header.voxel_bytes]
        excess = len(stream.read(_SLACK + 1))  # to the end, so that the CRC is checked
    if excess > _SLACK:
        raise InputError(
            "the file holds far more bytes than its header accounts for.", code="SCAN-TOO-BIG",
            where=where, hint="Check that the header belongs to this image.",
        )  # fmt: skip
    if len(body) < header.voxel_bytes:
        raise InputError(
            f"holds {len(body)} bytes of voxels, the header says {header.voxel_bytes}.",
            code="SCAN-TRUNCATED", where=where, hint="The file was not copied whole; copy again.",
        )  # fmt: skip
    return header, body, stream is not None and stream.trailing


def _voxels(header: Header, body: bytes) -> NDArray[np.float32]:
    """Scaled float32 voxels; scaling runs in float64 where float32 could not hold the type."""
    stored = np.frombuffer(body, np.dtype(header.dtype).newbyteorder(header.byte_order))  # type: ignore[arg-type]
    stored = stored.reshape(header.shape, order="F")
    with np.errstate(over="ignore", invalid="ignore"):
        if (header.slope, header.inter) == (1.0, 0.0):
            return stored.astype(np.float32)
        scaled = stored.astype(np.float64)
        scaled *= header.slope
        scaled += header.inter
        return scaled.astype(np.float32)


def decode_nifti(data: bytes, *, where: str, max_inflated: int = MAX_INFLATED) -> NiftiScan:
    """The scan in the bytes of a .nii or .nii.gz, NIfTI-1 or -2, checked against silent damage.

    Nothing that tells left from right or sets the scale is repaired: such a scan is refused. Up to
    `MAX_NONFINITE` of the voxels may be NaN or infinite; they become 0, and `notes` says so.

    Args:
        data: The file's bytes; gzip is told by its first two bytes, not by the name.
        where: Address for messages.
        max_inflated: Bound on header, voxels and their float32 copy, bytes.

    Raises:
        InputError: SCAN-UNREADABLE, -TRUNCATED, -CORRUPT, -TOO-BIG, -NOT-3D, -DTYPE, -AFFINE,
            -ORIENTATION, -VOXEL-SIZE or -NONFINITE.
    """
    header, body, trailing = _unpack(data, where, max_inflated)
    voxels = _voxels(header, body)
    notes: list[tuple[str, str]] = []
    if trailing:
        notes.append(("SCAN-CORRUPT", "unknown bytes follow the compressed image; left unread."))
    bad = 0
    if header.dtype.startswith("float") or (header.slope, header.inter) != (1.0, 0.0):
        finite = np.isfinite(voxels)
        bad = voxels.size - int(np.count_nonzero(finite))
    if bad > MAX_NONFINITE * voxels.size:
        raise InputError(
            f"{bad} of {voxels.size} voxels are NaN or infinite.", code="SCAN-NONFINITE",
            where=where, hint="Write the scan again with 0 outside the brain.",
        )  # fmt: skip
    if bad:
        voxels[~finite] = 0
        notes.append(("SCAN-NONFINITE", f"{counted(bad, 'voxel')} NaN or infinite, read as 0."))
    sides = np.linalg.norm(header.affine[:3, :3], axis=0)
    return NiftiScan(
        data=voxels,
        affine=header.affine,
        shape=header.shape,
        voxel_mm=(float(sides[0]), float(sides[1]), float(sides[2])),
        qform=header.qform,
        sform=header.sform,
        qform_code=header.qform_code,
        sform_code=header.sform_code,
        dtype=header.dtype,
        sha256=sha256_hex(data),
        version=header.version,
        geometry=header.geometry,
        notes=tuple(notes),
    )


def read_nifti(
    uri: str,
    store: Store | None = None,
    *,
    max_inflated: int = MAX_INFLATED,
    sha256: str | None = None,
) -> NiftiScan:
    """The scan at `uri`; arguments and errors as for `Store.read_bytes` and `decode_nifti`."""
    data = (store or Store()).read_bytes(uri, max_bytes=max_inflated, sha256=sha256)
    return decode_nifti(data, where=uri, max_inflated=max_inflated)


def encode_nifti(
    data: ArrayLike,
    like: NiftiScan | NDArray[np.float64],
    *,
    dtype: DTypeLike = np.float32,
    level: int = 1,
) -> bytes:
    """Bytes of a .nii.gz with a fresh header (no text, no extension, no date), the same each time.

    Args:
        data: (X, Y, Z), stored orientation; bool or rounded integers for an integer `dtype`.
        like: The scan whose placement (affine, qform, sform and codes) is kept bit for bit, or an
            affine (4, 4), voxel → world mm RAS+.
        dtype: Stored type.
        level: Compression, 1 (fast) to 9.

    Raises:
        ValueError: The shape is not `like`'s, or a value does not fit `dtype`.
    """
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    array, kind = np.asarray(data), np.dtype(dtype)
    if array.ndim != 3:
        raise ValueError(f"expected (X, Y, Z), got shape {array.shape}")
    if isinstance(like, NiftiScan) and array.shape != like.shape:
        raise ValueError(f"expected the scan's shape {like.shape}, got {array.shape}")
    if kind.kind in "iu" and array.dtype != bool:
        limits = np.iinfo(kind)
        array = np.rint(array)
        if array.size and not (array.min() >= limits.min and array.max() <= limits.max):
            raise ValueError(f"values do not fit {kind.name}")
    header: Any = (
        Nifti2Header() if isinstance(like, NiftiScan) and like.version == 2 else Nifti1Header()
    )
    header.set_data_dtype(kind)
    header.set_data_shape(array.shape)
    if isinstance(like, NiftiScan):
        for name, value in like.geometry.items():
            header[name] = value
    else:
        header.set_xyzt_units("mm")
        header.set_qform(like, code=2, strip_shears=True)
        header.set_sform(like, code=2)
    header["vox_offset"] = 352 if header.sizeof_hdr == 348 else 544
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["magic"] = b"n+1" if header.sizeof_hdr == 348 else b"n+2\0\r\n\x1a\n"
    stored = array.astype(header.get_data_dtype(), copy=False)
    packer = zlib.compressobj(level, zlib.DEFLATED, 31)  # gzip without a date or a name
    head = packer.compress(header.binaryblock + b"\0\0\0\0")
    return head + packer.compress(stored.tobytes(order="F")) + packer.flush()


def to_ras(
    data: NDArray[Any], affine: NDArray[np.float64]
) -> tuple[NDArray[Any], NDArray[np.float64], Orientation]:
    """The volume with its axes in the order and direction closest to RAS+; no voxel is changed.

    Args:
        data: (X, Y, Z), any type.
        affine: (4, 4), voxel → world mm RAS+, not singular.

    Returns:
        The reordered copy; its affine, so that each voxel keeps its world position; and the
        orientation that `from_ras` needs.
    """
    from nibabel.orientations import inv_ornt_aff, io_orientation

    found = io_orientation(affine)  # for each stored axis: its RAS axis and direction
    stored = [int(np.flatnonzero(found[:, 0] == axis)[0]) for axis in range(3)]
    signs = [int(found[axis, 1]) for axis in stored]
    orientation: Orientation = (
        (stored[0], signs[0]), (stored[1], signs[1]), (stored[2], signs[2]),
    )  # fmt: skip
    ras = data.transpose(stored)[tuple(slice(None, None, sign) for sign in signs)]
    return np.ascontiguousarray(ras), affine @ inv_ornt_aff(found, data.shape), orientation


def from_ras(data_ras: NDArray[Any], orientation: Orientation) -> NDArray[Any]:
    """The inverse of `to_ras`: (X, Y, Z) back in stored order and direction."""
    flipped = data_ras[tuple(slice(None, None, int(sign)) for _, sign in orientation)]
    return np.ascontiguousarray(flipped.transpose(np.argsort([int(a) for a, _ in orientation])))
