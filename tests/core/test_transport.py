"""Carrying a harmonization to the native grid: what stays, what is recoloured."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from sgcd_core.config import TransportConfig
from sgcd_core.io.nifti import NiftiScan
from sgcd_core.volume.geometry import Geometry, rows
from sgcd_core.volume.transport import DARKEST, carry_to_native, native_on_model_grid

SHAPE = (60, 72, 56)
MM = 2.0


def _rotation(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 3.0], [s, c, 0, -2.0], [0, 0, 1, 1.0], [0, 0, 0, 1]])


def _scan(data: np.ndarray) -> tuple[NiftiScan, Geometry]:
    affine = np.diag([MM, MM, MM, 1.0])
    affine[:3, 3] = -MM * (np.array(SHAPE) - 1) / 2
    model = np.diag([4.0, 4.0, 4.0, 1.0])
    shape = (32, 40, 32)
    model[:3, 3] = -4.0 * (np.array(shape) - 1) / 2
    scan = NiftiScan(
        data=data.astype(np.float32), affine=affine, shape=SHAPE, voxel_mm=(MM, MM, MM),
        qform=affine, sform=affine, qform_code=1, sform_code=1, dtype="float32", sha256="0" * 64,
    )  # fmt: skip
    geometry = Geometry(
        native_shape=SHAPE, native_affine=rows(affine), ras_orientation=((0, 1), (1, 1), (2, 1)),
        model_affine=rows(model), model_shape=shape, world_to_template=rows(_rotation(7)),
        intensity_low=100.0, intensity_high=900.0, brain_ml=1000.0,
    )  # fmt: skip
    return scan, geometry


@pytest.fixture(scope="module")
def head() -> tuple[NiftiScan, np.ndarray, Geometry]:
    """Folded tissue in an ellipsoid, with noise, intensities 100 to 900."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    mask = (grid**2).sum(axis=0) < 0.75
    rng = np.random.default_rng(3)
    folds = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 2.5)
    folds = folds / folds[mask].std()
    tissue = 0.25 + 0.3 * (folds > -0.4) + 0.25 * (folds > 0.5)
    tissue = ndimage.gaussian_filter(tissue, 0.6) + rng.normal(0, 0.015, SHAPE)
    scan, geometry = _scan(np.where(mask, 100 + 800 * np.clip(tissue, 0, 1), 0))
    return scan, mask, geometry


def _highpass(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    weight = ndimage.gaussian_filter(mask.astype(float), 2)
    smooth = ndimage.gaussian_filter(np.where(mask, values, 0).astype(float), 2)
    inside = ndimage.binary_erosion(mask, iterations=2)
    return (values - smooth / np.maximum(weight, 1e-6))[inside]


def test_an_unchanged_scan_comes_back_unchanged(head: tuple) -> None:
    scan, mask, geometry = head
    source, model_mask = native_on_model_grid(scan, mask, geometry)
    out = carry_to_native(scan, mask, geometry, source, model_mask, TransportConfig())
    assert out.shape == scan.shape and out.dtype == np.float32
    np.testing.assert_allclose(out[mask], geometry.scale(scan.data)[mask], atol=1e-4)
    assert not out[~mask].any()


@pytest.mark.parametrize(("gain", "offset"), [(0.6, 0.2), (1.4, 0.05)])
def test_gain_and_offset_are_carried_exactly(head: tuple, gain: float, offset: float) -> None:
    scan, mask, geometry = head
    source, model_mask = native_on_model_grid(scan, mask, geometry)
    wanted = np.where(model_mask, gain * source + offset, 0)
    out = carry_to_native(scan, mask, geometry, wanted, model_mask, TransportConfig())
    np.testing.assert_allclose(
        out[mask], np.maximum(gain * geometry.scale(scan.data)[mask] + offset, 0), atol=2e-3
    )


@pytest.mark.parametrize("power", [0.6, 1.7])
def test_a_contrast_change_is_carried_and_native_detail_survives(head: tuple, power: float) -> None:
    scan, mask, geometry = head
    source, model_mask = native_on_model_grid(scan, mask, geometry)
    curve = lambda x: np.clip(x, 0, 1) ** power  # noqa: E731
    out = carry_to_native(scan, mask, geometry, curve(source), model_mask, TransportConfig())
    native = geometry.scale(scan.data)
    truth = curve(native)
    error = np.sqrt(((out - truth)[mask] ** 2).mean())
    unharmonized = np.sqrt(((native - truth)[mask] ** 2).mean())
    assert error < 0.4 * unharmonized
    detail = np.corrcoef(_highpass(out, mask), _highpass(truth, mask))[0, 1]
    assert detail > 0.98
    # Detail must not fade either: a slope pulled to 0 would keep the correlation and lose this.
    assert _highpass(out, mask).std() > 0.85 * _highpass(truth, mask).std()


def test_a_bias_field_that_was_removed_on_the_model_grid_leaves_the_native_scan(
    head: tuple,
) -> None:
    scan, mask, geometry = head
    ramp = np.linspace(0.75, 1.25, SHAPE[1])[None, :, None].astype(np.float32)
    clean, model_mask = native_on_model_grid(scan, mask, geometry)
    biased = NiftiScan(**{**scan.__dict__, "data": (scan.data * ramp).astype(np.float32)})
    out = carry_to_native(biased, mask, geometry, clean, model_mask, TransportConfig())
    truth = geometry.scale(scan.data)
    before = np.abs(geometry.scale(biased.data) - truth)[mask].mean()
    assert np.abs(out - truth)[mask].mean() < 0.35 * before


def test_a_lesion_is_recoloured_and_not_removed(head: tuple) -> None:
    scan, mask, geometry = head
    data = scan.data.copy()
    spot = (slice(29, 32), slice(35, 38), slice(27, 30))
    data[spot] = 1000.0
    lesion = NiftiScan(**{**scan.__dict__, "data": data})
    healthy, model_mask = native_on_model_grid(scan, mask, geometry)
    darker = np.where(model_mask, 0.7 * healthy + 0.1, 0)  # the model never drew the lesion
    out = carry_to_native(lesion, mask, geometry, darker, model_mask, TransportConfig())
    around = ndimage.binary_dilation(np.pad(np.ones((3, 3, 3), bool), 3), iterations=2)
    box = tuple(slice(s.start - 3, s.stop + 3) for s in spot)
    ring = around.copy()
    ring[2:-2, 2:-2, 2:-2] = False
    assert out[spot].mean() > out[box][ring].max() * 0.9
    assert out[spot].mean() > out[box][ring].mean() + 0.1


def test_what_the_maps_leave_over_is_added_up_to_a_bound(head: tuple) -> None:
    """A sharpened image is no local linear map of the scan; a lesion drawn over is far from one."""
    scan, mask, geometry = head
    source, model_mask = native_on_model_grid(scan, mask, geometry)
    sharper = np.where(model_mask, source + 0.8 * (source - ndimage.gaussian_filter(source, 1)), 0)

    def carried(wanted: np.ndarray, bound: float) -> np.ndarray:
        config = TransportConfig(remainder=bound)
        return carry_to_native(scan, mask, geometry, wanted.astype(np.float32), model_mask, config)

    def error(out: np.ndarray) -> float:
        span = geometry.intensity_high - geometry.intensity_low
        data = np.where(mask, out * span + geometry.intensity_low, 0).astype(np.float32)
        again = NiftiScan(**{**scan.__dict__, "data": data})
        there, inside = native_on_model_grid(again, mask, geometry)
        return float(np.sqrt(((there - sharper)[inside & model_mask] ** 2).mean()))

    alone, bounded, free = (carried(sharper, bound) for bound in (0.0, 0.05, 1.0))
    assert error(free) <= error(bounded) + 1e-4 and error(bounded) < 0.85 * error(alone)
    gone = np.where(model_mask, np.minimum(source, np.median(source[model_mask])), 0)
    change = np.abs(carried(gone, 0.05) - carried(gone, 0.0))
    assert 0.04 < change.max() <= 0.05 + 1e-5


def test_the_rim_of_the_brain_does_not_fade(head: tuple) -> None:
    scan, mask, geometry = head
    source, model_mask = native_on_model_grid(scan, mask, geometry)
    wanted = np.where(model_mask, 0.8 * source + 0.2, 0)
    out = carry_to_native(scan, mask, geometry, wanted, model_mask, TransportConfig())
    rim = mask & ~ndimage.binary_erosion(mask)
    expected = 0.8 * geometry.scale(scan.data)[rim] + 0.2
    np.testing.assert_allclose(out[rim], expected, atol=5e-3)


def test_nothing_inside_is_zero_even_where_the_map_goes_below(head: tuple) -> None:
    scan, mask, geometry = head
    source, model_mask = native_on_model_grid(scan, mask, geometry)
    wanted = np.where(model_mask, np.maximum(1.5 * source - 0.5, 0), 0)
    out = carry_to_native(scan, mask, geometry, wanted, model_mask, TransportConfig())
    assert np.array_equal(out > 0, mask) and not out[~mask].any() and np.isfinite(out).all()
    assert (out[mask] == np.float32(DARKEST)).mean() > 0.01


@pytest.mark.parametrize("sides", [(1.0, 1.0, 1.0), (1.0, 1.0, 4.0), (3.0, 3.5, 4.0)])
@pytest.mark.parametrize("mm", [1.0, 2.0])
def test_the_part_of_the_grid_that_is_worked_on_does_not_show(
    sides: tuple[float, float, float], mm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thick slices reach further than their centres; what is cut off must count for nothing."""
    extent = np.array([40.0, 44.0, 40.0])
    shape = tuple(int(n) for n in extent / np.array(sides))
    axes = np.meshgrid(*[(np.arange(n) + 0.5) / n * 2 - 1 for n in shape], indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    mask = radius < 0.75  # with empty slices around it
    noise = np.random.default_rng(0).normal(0, 10, shape)
    data = np.where(mask, 300 + 200 * (radius < 0.5) + noise, 0).astype(np.float32)
    affine = np.diag([*sides, 1.0])
    affine[:3, 3] = -np.array(sides) * (np.array(shape) - 1) / 2
    model_shape = tuple(int(n) for n in (extent + 8) / mm)
    model = np.diag([mm, mm, mm, 1.0])
    model[:3, 3] = -mm * (np.array(model_shape) - 1) / 2
    geometry = Geometry(
        shape, rows(affine), ((0, 1), (1, 1), (2, 1)), rows(model), model_shape, rows(np.eye(4)),
        0.0, 600.0, 1000.0,
    )  # fmt: skip
    scan = NiftiScan(data, affine, shape, sides, None, affine, 0, 1, "float32", "")
    image, model_mask = native_on_model_grid(scan, mask, geometry)
    harmonized = np.where(model_mask, np.sqrt(image.clip(0, 1)), 0).astype(np.float32)
    arguments = (scan, mask, geometry, harmonized, np.ones_like(model_mask), TransportConfig())
    cut = carry_to_native(*arguments)
    whole = tuple(slice(0, n) for n in model_shape)
    monkeypatch.setattr("sgcd_core.volume.transport._reached", lambda *_: whole)
    np.testing.assert_array_equal(cut, carry_to_native(*arguments))
