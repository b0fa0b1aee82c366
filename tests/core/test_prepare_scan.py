"""Preparing a scan: what it finds, what it keeps, what it refuses."""

from __future__ import annotations

import importlib.util
import subprocess
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from sgcd_core.config import PrepareConfig
from sgcd_core.errors import InputError, StorageError
from sgcd_core.io.nifti import NiftiScan, encode_nifti, from_ras, read_nifti, to_ras
from sgcd_core.volume.geometry import Geometry
from sgcd_core.volume.prepare import Prepared, corrected_brain, prepare_scan
from sgcd_core.volume.resample import resample_masked, sample, without_spikes
from sgcd_core.volume.strip import extracted_mask, run_deepbet
from sgcd_core.volume.template import template
from sgcd_core.volume.transport import native_on_model_grid

PLAIN = PrepareConfig(bias_correction="none", registration="none")


def as_scan(data: np.ndarray, affine: np.ndarray) -> NiftiScan:
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    return NiftiScan(
        data=np.ascontiguousarray(data, np.float32), affine=affine,
        shape=data.shape, voxel_mm=tuple(sides), qform=affine, sform=affine, qform_code=1,
        sform_code=1, dtype="float32", sha256="0" * 64,
    )  # fmt: skip


def rotation(x: float, y: float, z: float) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    out = np.eye(4)
    out[:3, :3] = Rotation.from_euler("xyz", [x, y, z], degrees=True).as_matrix()
    return out


def brain(
    *, shape: tuple[int, int, int] = (80, 92, 78), mm: float = 2.5, pose: np.ndarray | None = None,
    inverted: bool = False,
) -> NiftiScan:  # fmt: skip
    """The template as if it had been scanned in another pose (world → template: `pose`)."""
    image, mask, affine = template(2.0)
    grid = np.diag([mm, mm, mm, 1.0])
    grid[:3, 3] = -mm * (np.array(shape) - 1) / 2 + np.array([0, -18, 8])
    pose = np.eye(4) if pose is None else pose
    contrast = 1.1 - image if inverted else image
    data, inside = resample_masked(contrast, mask, affine, pose @ grid, shape)
    return as_scan(np.where(inside, 50 + 700 * data, 0), grid)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare_scan(brain(), PLAIN, sequence="T1w")


def test_a_prepared_scan_fills_zero_to_one_inside_the_brain_only(prepared: Prepared) -> None:
    assert prepared.image.shape == (48, 56, 48) and prepared.image.dtype == np.float32
    assert prepared.image.min() == 0 and prepared.image.max() == 1
    assert not prepared.image[~prepared.mask].any()
    model_ml = prepared.mask.sum() * 4.0**3 / 1000
    assert model_ml == pytest.approx(prepared.geometry.brain_ml, rel=0.03)


def test_the_whole_template_brain_lies_inside_the_model_grid(prepared: Prepared) -> None:
    for axis in range(3):
        for end in (0, -1):
            assert not prepared.mask.take(end, axis=axis).any()


def test_native_to_model_and_back_is_the_identity() -> None:
    scan = brain(pose=rotation(9, -7, 5))
    geometry = prepare_scan(scan, PrepareConfig(bias_correction="none"), sequence="T1w").geometry
    points = np.random.default_rng(0).uniform(-50, 150, (4, 500))
    points[3] = 1
    back = geometry.model_to_native() @ geometry.native_to_model() @ points
    np.testing.assert_allclose(scan.affine @ back, scan.affine @ points, atol=1e-6)


def test_geometry_survives_json_bit_for_bit(prepared: Prepared) -> None:
    assert Geometry.from_json(prepared.geometry.to_json()) == prepared.geometry


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format": 99}', b'{"format": 1}'])
def test_a_damaged_geometry_is_an_error_with_a_code(data: bytes) -> None:
    with pytest.raises(StorageError, match="TABLE-SCHEMA"):
        Geometry.from_json(data)


def test_all_48_orientations_give_the_same_prepared_scan() -> None:
    scan = brain(shape=(60, 70, 57), mm=3.3)
    reference = prepare_scan(scan, PLAIN, sequence="T1w")
    for order in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            move = np.zeros((4, 4))  # stored index of the turned scan → index of the scan
            data = scan.data.transpose(order)
            move[3, 3] = 1
            for new, old in enumerate(order):
                move[old, new] = signs[new]
                move[old, 3] = scan.shape[old] - 1 if signs[new] < 0 else 0
            data = data[tuple(slice(None, None, s) for s in signs)]
            turned = as_scan(data, scan.affine @ move)
            other = prepare_scan(turned, PLAIN, sequence="T1w")
            np.testing.assert_allclose(other.image, reference.image, atol=1e-5)
            assert (other.mask == reference.mask).all()
            assert other.native_mask.shape == turned.shape
            assert (other.native_mask == (turned.data != 0)).all()
            ras, _, orientation = to_ras(turned.data, turned.affine)
            assert (from_ras(ras, orientation) == turned.data).all()


@pytest.mark.parametrize("inverted", [False, True], ids=["T1w", "T2w"])
@pytest.mark.parametrize("angles", [(22, -8, 6), (-15, 10, -12)])
def test_a_known_pose_is_found(angles: tuple[float, float, float], inverted: bool) -> None:
    pose = rotation(*angles)
    pose[:3, 3] = [6, -11, 8]
    scan = brain(shape=(96, 104, 96), pose=pose, inverted=inverted)
    config = PrepareConfig(bias_correction="none", brain_extraction="none")
    found = prepare_scan(scan, config, sequence="T2w" if inverted else "T1w").geometry
    corners = np.array([[x, y, z, 1.0] for x in (-60, 60) for y in (-80, 50) for z in (-50, 70)])
    world = np.linalg.solve(pose, corners.T)
    error = (np.array(found.world_to_template) @ world - corners.T)[:3]
    assert np.sqrt((error**2).sum(axis=0)).max() < 2.5  # mm, at the corners of the head


def test_a_bias_field_is_taken_out() -> None:
    scan = brain(shape=(60, 70, 57), mm=3.3)
    ramp = np.exp(np.linspace(-0.3, 0.3, scan.shape[2]))[None, None, :]
    biased = as_scan(scan.data * ramp, scan.affine)
    images = {
        (name, mode): prepare_scan(
            one, PrepareConfig(registration="none", bias_correction=mode), sequence="T1w"
        )
        for name, one in (("clean", scan), ("biased", biased))
        for mode in ("n4", "none")
    }
    mask = images["clean", "n4"].mask
    error = {
        mode: np.abs(images["biased", mode].image - images["clean", mode].image)[mask].mean()
        for mode in ("n4", "none")
    }
    assert error["n4"] < 0.5 * error["none"]


@pytest.mark.parametrize("shift", [-400.0, -1000.0])
def test_no_field_is_taken_out_of_intensities_without_a_zero(shift: float) -> None:
    """A field is a factor: of z-scores or a shifted scan N4 would make another image."""
    scan = brain(shape=(60, 70, 57), mm=3.3)
    moved = as_scan(scan.data + np.float32(shift), scan.affine)
    config = PrepareConfig(registration="none")
    found = {mode: prepare_scan(one, config.model_copy(update={"bias_correction": mode}),
                                sequence="T1w").image
             for mode, one in (("n4", moved), ("none", scan))}  # fmt: skip
    assert np.abs(found["n4"] - found["none"]).max() < 0.01


def test_the_same_scan_gives_the_same_voxels() -> None:
    scan = brain(shape=(60, 70, 57), mm=3.3, pose=rotation(8, 3, -4))
    first, second = (prepare_scan(scan, PrepareConfig(), sequence="T1w") for _ in range(2))
    assert first.geometry == second.geometry
    assert (first.image == second.image).all()


def test_coarser_sampling_averages_instead_of_picking() -> None:
    """Noise of the native grid must shrink on the model grid (anti-aliasing)."""
    rng = np.random.default_rng(0)
    data = rng.normal(100, 10, (64, 64, 64)).astype(np.float32)
    mask = np.ones(data.shape, bool)
    out, inside = resample_masked(data, mask, np.eye(4), np.diag([4.0, 4, 4, 1]), (16, 16, 16))
    assert out[inside].std() < 3.0
    assert out[inside].mean() == pytest.approx(100, abs=0.5)


def test_the_brain_edge_is_not_mixed_with_the_background() -> None:
    data = np.zeros((40, 40, 40), np.float32)
    mask = np.zeros(data.shape, bool)
    mask[9:31, 9:31, 9:31] = True
    data[mask] = 100
    out, inside = resample_masked(data, mask, np.eye(4), np.diag([3.0, 3, 3, 1]), (13, 13, 13))
    np.testing.assert_allclose(out[inside], 100, rtol=1e-4)
    assert not out[~inside].any()


def test_sampling_on_the_own_grid_changes_nothing() -> None:
    data = np.random.default_rng(1).random((7, 9, 8)).astype(np.float32)
    assert (sample(data, np.eye(4), data.shape) == data).all()


def test_an_extracted_brain_keeps_its_mask_with_any_background() -> None:
    scan = brain()
    for value in (0.0, -1000.0):
        data = np.where(scan.data != 0, scan.data, value).astype(np.float32)
        data[40, 46, 39] = value  # a hole is brain all the same
        mask = extracted_mask(data, scan.affine)
        assert mask is not None and (mask == (scan.data != 0)).all()


def test_a_part_of_the_brain_that_is_apart_stays_and_specks_do_not() -> None:
    scan = brain()
    data = scan.data.copy()
    low = np.flatnonzero((data != 0).any((0, 1)))[0]
    data[:, :, low + 7] = 0  # cuts the lowest part off
    apart = np.zeros(data.shape, bool)
    apart[:, :, : low + 7] = data[:, :, : low + 7] != 0
    assert 0.001 < apart.sum() / (data != 0).sum() < 0.05
    whole = data != 0
    speck = (0, data.shape[1] // 2, -2)
    data[speck] = 500
    mask = extracted_mask(data, scan.affine)
    assert mask is not None and mask[apart].all() and not mask[speck]
    assert (mask == whole).all()
    cut = np.where(whole, data, 0)
    cut[:, :, (low + data.shape[2]) // 2] = 0  # two halves are no brain
    assert extracted_mask(cut.astype(np.float32), scan.affine) is None


def head() -> NiftiScan:
    """A brain in a dark skull in a bright scalp, air exactly 0 as after defacing."""
    scan = brain(shape=(96, 104, 96))
    inside = scan.data != 0
    skull = ndimage.binary_dilation(inside, iterations=4)
    scalp = ndimage.binary_dilation(skull, iterations=5)
    data = np.where(scalp, 900, 0) + np.where(skull, 20 - 900, 0)
    return as_scan(np.where(inside, scan.data, data), scan.affine)


def test_a_head_is_not_taken_for_a_brain() -> None:
    scan = head()
    assert extracted_mask(scan.data, scan.affine) is None


def z_scored(data: np.ndarray) -> np.ndarray:
    """Intensities as z-scores over what is not 0, which stays 0."""
    inside = data != 0
    return np.where(inside, (data - data[inside].mean()) / data[inside].std(), 0).astype(np.float32)


def test_z_scored_brains_and_heads_are_what_they_are() -> None:
    scan = brain()
    mask = extracted_mask(z_scored(scan.data), scan.affine)
    assert mask is not None and (mask == (scan.data != 0)).all()
    whole = head()
    assert extracted_mask(z_scored(whole.data), whole.affine) is None
    assert extracted_mask(whole.data - 1000, whole.affine) is None


def test_a_head_without_a_tool_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "deepbet" else real(name, *a)
    )
    with pytest.raises(InputError, match=r"SCAN-NEEDS-STRIPPING.*pip install"):
        prepare_scan(head(), PrepareConfig(), sequence="T1w")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepbet") is None, reason="the extra `strip` is not installed"
)
def test_brain_extraction_that_fails_is_a_scan_without_a_brain() -> None:
    nothing = np.zeros((40, 40, 40), np.float32)
    with pytest.raises(InputError, match="SCAN-NO-BRAIN"):
        run_deepbet(nothing, where="scan")


@pytest.mark.parametrize(
    ("code", "scan", "sequence"),
    [
        ("SCAN-SEQUENCE", brain(), "bold"),
        ("SCAN-COARSE", as_scan(np.ones((60, 60, 30)), np.diag([3.0, 3, 6, 1])), "T2w"),
        ("SCAN-COVERAGE", as_scan(np.ones((100, 100, 20)), np.diag([2.0, 2, 2, 1])), "T1w"),
        ("SCAN-EMPTY", as_scan(np.ones((90, 90, 90)), np.diag([2.0, 2, 2, 1])), "T1w"),
    ],
)
def test_what_cannot_be_prepared_has_a_code(code: str, scan: NiftiScan, sequence: str) -> None:
    with pytest.raises(InputError) as caught:
        prepare_scan(scan, PrepareConfig(brain_extraction="none"), sequence=sequence)
    assert caught.value.code == code


def test_a_brain_that_lies_mostly_outside_the_model_grid_is_refused() -> None:
    scan = brain(shape=(60, 70, 57), mm=3.3)
    placed = np.eye(4)
    placed[1, 3] = 60.0  # mm
    assert prepare_scan(scan, PLAIN, sequence="T1w", placed=placed).mask.any()
    placed[1, 3] = 140.0  # a third is left, 620 ml
    with pytest.raises(InputError, match=r"SCAN-REGISTRATION.*outside the model grid"):
        prepare_scan(scan, PLAIN, sequence="T1w", placed=placed)


def test_a_mask_too_small_or_too_large_is_no_brain() -> None:
    config = PrepareConfig(brain_extraction="none")
    small = np.zeros((90, 90, 90), np.float32)
    small[40:50, 40:50, 40:50] = np.random.default_rng(0).random((10, 10, 10)) + 1
    large = np.random.default_rng(0).random((90, 90, 90)).astype(np.float32) + 1
    for data in (small, large):
        with pytest.raises(InputError, match="SCAN-NO-BRAIN"):
            prepare_scan(as_scan(data, np.diag([2.0, 2, 2, 1])), config, sequence="T1w")


@pytest.mark.parametrize(("end", "text"), [("timeout", "more than 5 s"), ("kill", "signal 9")])
def test_an_extraction_that_ran_out_of_time_or_memory_blames_no_scan(
    monkeypatch: pytest.MonkeyPatch, end: str, text: str
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        if end == "timeout":
            raise subprocess.TimeoutExpired(command, 5.0)
        return subprocess.CompletedProcess(command, -9)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match=text) as caught:
        run_deepbet(np.zeros((4, 4, 4), np.float32), timeout_s=5.0)
    assert caught.value.code == "SCAN-STRIP-ENDED"


@pytest.mark.slow
@pytest.mark.real
def test_real_scans_are_told_apart(data_dir: Path) -> None:
    """Extracted brains and heads of seven sites, some of them defaced."""
    for path in sorted((data_dir / "real").glob("sub-*/anat/*_T[12]w.nii.gz")):
        scan = read_nifti(str(path))
        given = extracted_mask(scan.data, scan.affine) is not None
        assert given == path.name.startswith(("sub-NSK", "sub-TCGA")), path.name
        z = z_scored(scan.data)
        assert (extracted_mask(z, scan.affine) is not None) == given, path.name


def test_the_prepared_image_can_be_written_and_read(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "image.nii.gz"
    affine = np.array(prepared.geometry.model_affine)
    path.write_bytes(encode_nifti(prepared.image, affine))
    again = read_nifti(str(path))
    assert (again.data == prepared.image).all()
    np.testing.assert_array_equal(again.affine, affine)


@pytest.mark.parametrize("spike", [3e38, -3e38, 1e7])
def test_one_corrupt_voxel_spoils_nothing_but_itself(spike: float) -> None:
    config = PrepareConfig(registration="none")
    scan = brain()
    sound = prepare_scan(scan, config, sequence="T1w")
    at = tuple(np.argwhere(sound.native_mask)[20_000])
    data = scan.data.copy()
    data[at] = spike
    broken = as_scan(data, scan.affine)
    # its brain as it was: a threshold would not take a voxel below 0 for brain
    image, mask, _ = corrected_brain(data, sound.native_mask, scan.affine, config)
    before, _, _ = corrected_brain(scan.data, sound.native_mask, scan.affine, config)
    off = np.abs(image - before)[mask] / before[mask].max()
    assert np.quantile(off, 0.999) < 0.01
    carried, inside = native_on_model_grid(broken, sound.native_mask, sound.geometry)
    plain, _ = native_on_model_grid(scan, sound.native_mask, sound.geometry)
    far = np.abs(carried - plain)[inside]
    assert np.isfinite(carried).all() and (far > 0.01).sum() < 30 and far.max() < 10


def test_nothing_of_a_sound_scan_is_bounded() -> None:
    image = np.random.default_rng(0).normal(500, 100, (20, 20, 20)).astype(np.float32)
    image[0, 0, :2] = 2600, -1600  # vessels, fat: nearly five ranges off
    assert np.array_equal(without_spikes(image, 300.0, 700.0), image)
