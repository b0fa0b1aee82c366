"""Reading refuses what would be silently wrong; writing keeps placement bit for bit."""

from __future__ import annotations

import gzip
import itertools
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from sgcd_core.errors import InputError
from sgcd_core.io.nifti import NiftiScan, decode_nifti, encode_nifti, from_ras, read_nifti, to_ras

SHAPE = (5, 7, 4)
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag([-1.0, 1.1, 1.3]), [12, -7, 3]
)


def voxels(dtype: str = "int16", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 120, shape).astype(dtype)


def build(
    data: np.ndarray | None = None,
    affine: np.ndarray = OBLIQUE,
    *,
    version: int = 1,
    order: str = "<",
    compress: bool = True,
    **fields: Any,
) -> bytes:
    """A NIfTI file with raw header fields set at will, past nibabel's checks."""
    data = voxels() if data is None else data
    kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    image = kind(data, affine, dtype=data.dtype)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    header = image.header.as_byteswapped(order)
    header["vox_offset"] = 352 if version == 1 else 544
    for name, value in fields.items():
        header[name] = value
    body = data.astype(data.dtype.newbyteorder(order)).tobytes(order="F")
    raw = header.binaryblock + bytes(4) + body
    return gzip.compress(raw, mtime=0) if compress else raw


def refused(data: bytes, limit: int = 10**9) -> str:
    with pytest.raises(InputError) as error:
        decode_nifti(data, where="scan.nii.gz", max_inflated=limit)
    assert "scan.nii.gz" in str(error.value)
    return error.value.code


def read(data: bytes) -> NiftiScan:
    return decode_nifti(data, where="scan", max_inflated=10**9)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    "dtype",
    [
        "uint8",
        "int8",
        "int16",
        "uint16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float32",
        "float64",
    ],
)
def test_every_type_order_and_version_is_read(
    dtype: str, compress: bool, order: str, version: int
) -> None:
    data = voxels(dtype)
    scan = read(build(data, version=version, order=order, compress=compress))
    np.testing.assert_array_equal(scan.data, data.astype(np.float32))
    assert scan.data.dtype == np.float32
    np.testing.assert_allclose(scan.affine, OBLIQUE, atol=1e-5)
    np.testing.assert_allclose(scan.voxel_mm, (1, 1.1, 1.3), rtol=1e-5)
    assert (scan.dtype, scan.version, scan.qform_code, scan.sform_code) == (dtype, version, 1, 1)


@pytest.mark.real
def test_agrees_with_nibabel_on_real_scans(data_dir: Path) -> None:
    for path in sorted((data_dir / "real").glob("sub-*/anat/*.nii.gz"))[::9]:
        reference, scan = nib.load(path), read_nifti(str(path))
        assert np.array_equal(scan.data, reference.get_fdata(dtype=np.float32))
        np.testing.assert_allclose(scan.affine, reference.affine, atol=1e-5)
        again = read(encode_nifti(scan.data, scan))
        assert np.array_equal(again.data, scan.data)
        np.testing.assert_array_equal(again.affine, scan.affine)


@pytest.mark.parametrize(
    ("slope", "inter", "expected"),
    [
        (2.5, -3, (2.5, -3)),
        (0, 7, (1, 0)),
        (np.nan, 7, (1, 0)),
        (2, np.nan, (2, 0)),
        (-1, 0, (-1, 0)),
    ],
)
def test_scaling_follows_the_standard(
    slope: float, inter: float, expected: tuple[float, float]
) -> None:
    scan = read(build(scl_slope=slope, scl_inter=inter))
    np.testing.assert_allclose(scan.data, voxels() * expected[0] + expected[1])


def test_trailing_singleton_axes_are_dropped() -> None:
    assert read(build(voxels(shape=(5, 7, 4, 1, 1)))).shape == (5, 7, 4)


@pytest.mark.parametrize("shape", [(5, 7, 4, 2), (5, 7), (5, 7, 4, 1, 3)])
def test_what_is_not_one_volume_is_refused(shape: tuple[int, ...]) -> None:
    assert refused(build(voxels(shape=shape))) == "SCAN-NOT-3D"


@pytest.mark.parametrize(
    "dim", [[3, 0, 7, 4, 1, 1, 1, 1], [3, -5, 7, 4, 1, 1, 1, 1], [0] * 8, [9] * 8]
)
def test_impossible_dimensions_are_refused(dim: list[int]) -> None:
    assert refused(build(dim=dim)) == "SCAN-NOT-3D"


@pytest.mark.parametrize("code", [0, 1, 32, 128, 1536, 1792, 2304, 99])
def test_types_without_one_real_number_are_refused(code: int) -> None:
    assert refused(build(datatype=code)) == "SCAN-DTYPE"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"qform_code": 0, "sform_code": 0}, "SCAN-AFFINE"),
        ({"sform_code": 17}, "SCAN-AFFINE"),
        ({"qform_code": -1}, "SCAN-AFFINE"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "SCAN-AFFINE"),
        ({"srow_x": [0, 0, 0, 0]}, "SCAN-AFFINE"),
        ({"srow_x": [0, 1, 0, 0], "srow_y": [0, 1, 0, 0]}, "SCAN-AFFINE"),
        ({"quatern_b": np.inf}, "SCAN-AFFINE"),
        ({"pixdim": [1, -1, 1.1, 1.3, 1, 1, 1, 1]}, "SCAN-VOXEL-SIZE"),
        ({"pixdim": [1, 0, 1.1, 1.3, 1, 1, 1, 1]}, "SCAN-VOXEL-SIZE"),
        ({"pixdim": [1, np.nan, 1.1, 1.3, 1, 1, 1, 1]}, "SCAN-VOXEL-SIZE"),
        ({"srow_x": [0.001, 0, 0, 0], "srow_y": [0, 0.001, 0, 0], "srow_z": [0, 0, 0.001, 0],
          "qform_code": 0}, "SCAN-VOXEL-SIZE"),
        ({"vox_offset": 4}, "SCAN-UNREADABLE"),
        ({"vox_offset": np.nan}, "SCAN-UNREADABLE"),
        ({"magic": b"ni1"}, "SCAN-UNREADABLE"),
        ({"sizeof_hdr": 349}, "SCAN-UNREADABLE"),
    ],
)  # fmt: skip
def test_headers_that_cannot_be_trusted_are_refused(fields: dict[str, Any], code: str) -> None:
    assert refused(build(**fields)) == code


def mirrored(axes: tuple[int, ...]) -> bytes:
    """A file whose qform has some world axes reversed against its sform."""
    image = nib.Nifti1Image(voxels(), np.eye(4))
    flip = np.eye(4)
    for axis in axes:
        flip[axis, axis] = -1
    image.set_sform(np.eye(4), 1)
    image.set_qform(flip, 1)
    return gzip.compress(image.to_bytes())


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_forms_that_disagree_about_left_and_right_are_refused(axes: tuple[int, ...]) -> None:
    assert refused(mirrored(axes)) == "SCAN-ORIENTATION"


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (1, 2, 0)])
def test_forms_that_exchange_left_for_another_direction_are_refused(order: tuple[int, ...]) -> None:
    turn = np.eye(4)
    turn[:3, :3] = np.eye(3)[list(order)]
    turn[:3, 0] *= np.linalg.det(turn[:3, :3])  # a rotation
    image = nib.Nifti1Image(voxels(), np.eye(4))
    image.set_sform(turn, 1)
    image.set_qform(np.eye(4), 1)
    assert refused(gzip.compress(image.to_bytes())) == "SCAN-ORIENTATION"


def test_a_qform_alone_is_enough_and_a_tilt_between_the_forms_is_allowed() -> None:
    alone = read(build(sform_code=0))
    np.testing.assert_allclose(alone.affine, OBLIQUE, atol=1e-5)
    assert alone.sform is None
    image = nib.Nifti1Image(voxels(), np.eye(4))
    image.set_sform(OBLIQUE * [[-1], [1], [1], [1]], 4)
    image.set_qform(np.eye(4), 1)
    np.testing.assert_allclose(read(image.to_bytes()).affine[0, 0], -OBLIQUE[0, 0], atol=1e-5)


@pytest.mark.parametrize(
    "data", [b"", b"\x1f\x8b", b"hello" * 200, gzip.compress(b"x" * 5000, mtime=0)]
)
def test_other_files_are_refused(data: bytes) -> None:
    assert refused(data) in ("SCAN-UNREADABLE", "SCAN-TRUNCATED")


def test_cut_files_are_refused() -> None:
    whole, raw = build(), build(compress=False)
    for cut in (1, 4, 8, 9, 40, len(whole) // 2):
        assert refused(whole[:-cut]) == "SCAN-TRUNCATED"
    for cut in (1, 100):
        assert refused(raw[:-cut]) == "SCAN-TRUNCATED"
        assert refused(gzip.compress(raw[:-cut])) == "SCAN-TRUNCATED"


def test_no_flipped_bit_passes_with_wrong_voxels(head_voxels: np.ndarray) -> None:
    """nibabel.load accepts most of these (it never checks the CRC)."""
    whole = build(head_voxels, np.diag([2.0, 2, 2, 1]))
    rng, caught = np.random.default_rng(3), 0
    for bit in rng.integers(0, 8 * len(whole), 100):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        try:
            scan = read(bytes(damaged))
        except InputError as error:
            caught += 1
            assert error.code in ("SCAN-CORRUPT", "SCAN-TRUNCATED", "SCAN-UNREADABLE"), error
        else:  # the gzip header's own date or flags
            np.testing.assert_array_equal(scan.data, head_voxels)
    assert caught >= 95


def test_every_byte_of_the_checksum_counts() -> None:
    whole = build()
    for i in range(1, 9):
        damaged = bytearray(whole)
        damaged[-i] ^= 0xFF
        assert refused(bytes(damaged)) == "SCAN-CORRUPT"


def test_gzip_members_are_joined_and_padding_is_ignored() -> None:
    raw = build(compress=False)
    parts = [raw[i : i + 97] for i in range(0, len(raw), 97)]
    members = b"".join(gzip.compress(part) for part in parts)
    np.testing.assert_array_equal(read(members).data, voxels())
    assert read(members + bytes(600)).notes == ()
    strange = read(members + b"not gzip")
    np.testing.assert_array_equal(strange.data, voxels())
    assert strange.notes[0][0] == "SCAN-CORRUPT"


def test_a_bomb_is_refused_at_once() -> None:
    header = build(compress=False, dim=[3, 5, 7, 4, 1, 1, 1, 1])
    small_header = gzip.compress(header + bytes(300_000_000), 1)
    large_header = gzip.compress(
        build(compress=False, dim=[3, 2000, 2000, 2000, 1, 1, 1, 1]) + bytes(10_000_000), 1
    )
    start = time.monotonic()
    assert refused(small_header) == "SCAN-TOO-BIG"
    assert refused(large_header) == "SCAN-TOO-BIG"
    assert refused(build(), limit=100) == "SCAN-TOO-BIG"
    assert time.monotonic() - start < 0.5


def test_nonfinite_voxels_few_are_zeroed_many_are_refused() -> None:
    data = np.ones((20, 20, 20), np.float32)
    data[0, 0, :3] = np.nan, np.inf, -np.inf
    scan = read(build(data))
    assert np.isfinite(scan.data).all()
    assert scan.data.sum() == data.size - 3
    assert scan.notes[0][0] == "SCAN-NONFINITE"
    data[0] = np.nan
    assert refused(build(data)) == "SCAN-NONFINITE"
    assert refused(build(np.full(SHAPE, 1e300))) == "SCAN-NONFINITE"  # beyond float32


@pytest.mark.parametrize("version", [1, 2])
def test_a_damaged_header_ends_in_a_code_or_a_usable_scan(version: int) -> None:
    raw, rng = build(compress=False, version=version), np.random.default_rng(version)
    for _ in range(1500):
        damaged = bytearray(raw)
        for place in rng.integers(0, 352 if version == 1 else 544, rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        try:
            scan = decode_nifti(bytes(damaged), where="scan", max_inflated=10**8)
        except InputError:
            continue
        assert scan.data.size * 4 <= 10**8
        assert np.isfinite(scan.data).all()
        assert np.isfinite(np.linalg.inv(scan.affine)).all()


def test_messages_hold_no_text_of_the_header() -> None:
    secret = build(descrip=b"DOE^JANE 19700101", db_name=b"JANE", sform_code=99)
    with pytest.raises(InputError) as error:
        read(secret)
    assert "JANE" not in str(error.value)


ALL_48 = [
    (axes, signs)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize(("axes", "signs"), ALL_48)
def test_to_ras_and_back_is_lossless(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    tilt = nib.eulerangles.euler2mat(0.2, -0.15, 0.1)
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag([0.9, 1.0, 1.2]) @ (np.eye(3) * signs)[:, axes]
    affine[:3, 3] = 3, -4, 5
    data = voxels(shape=(3, 4, 6)).astype(np.float32)
    ras, ras_affine, orientation = to_ras(data, affine)
    assert nib.aff2axcodes(ras_affine) == ("R", "A", "S")
    np.testing.assert_array_equal(from_ras(ras, orientation), data)
    expected = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    np.testing.assert_array_equal(ras, np.asarray(expected.dataobj))
    np.testing.assert_allclose(ras_affine, expected.affine, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 2), (17, 3, 1), (13, 11, 7)])
@pytest.mark.parametrize("version", [1, 2])
def test_writing_keeps_placement_bit_for_bit(shape: tuple[int, int, int], version: int) -> None:
    scan = read(build(voxels(shape=shape), version=version, order=">", descrip=b"DOE^JANE",
                      aux_file=b"JANE", intent_name=b"JANE", qform_code=2, sform_code=4,
                      quatern_b=0.0123456789, qoffset_x=1e-7 + 12))  # fmt: skip
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    out = encode_nifti(data, scan)
    again = read(out)
    np.testing.assert_array_equal(again.data, data)
    for name, value in scan.geometry.items():
        assert np.asarray(again.geometry[name]).tobytes() == np.asarray(value).tobytes(), name
    assert again.affine.tobytes() == scan.affine.tobytes()
    assert again.version == version
    assert b"JANE" not in gzip.decompress(out)
    assert out == encode_nifti(data, scan)
    assert struct.unpack("<I", out[4:8]) == (0,)  # no date
    reference = (nib.Nifti1Image if version == 1 else nib.Nifti2Image).from_bytes(
        gzip.decompress(out)
    )
    np.testing.assert_array_equal(reference.get_fdata(dtype=np.float32), data)


def test_masks_and_affines() -> None:
    mask = voxels() > 60
    scan = read(encode_nifti(mask, np.diag([-4.0, 4, 4, 1]), dtype=np.uint8))
    assert scan.dtype == "uint8"
    np.testing.assert_array_equal(scan.data, mask)
    np.testing.assert_array_equal(scan.affine, np.diag([-4.0, 4, 4, 1]))
    with pytest.raises(ValueError, match="do not fit"):
        encode_nifti(np.full(SHAPE, 300), np.eye(4), dtype=np.uint8)
    with pytest.raises(ValueError, match="shape"):
        encode_nifti(np.zeros((2, 2, 2)), scan)


def test_a_scan_survives_pickling() -> None:
    scan = read(build())
    again = pickle.loads(pickle.dumps(scan))
    assert encode_nifti(again.data, again) == encode_nifti(scan.data, scan)
