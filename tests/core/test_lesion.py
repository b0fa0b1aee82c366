"""Lesion masks: what the network draws in a lesion is left out, its surroundings decide."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from sgcd_core.config import TransportConfig
from sgcd_core.errors import InputError
from sgcd_core.io.nifti import NiftiScan
from sgcd_core.volume.geometry import Geometry, rows
from sgcd_core.volume.lesion import (
    fill_smoothly,
    lesion_on_model_grid,
    read_lesion,
    require_surroundings,
)
from sgcd_core.volume.transport import (
    carry_to_native,
    carry_uncertainty,
    local_linear_maps,
    native_on_model_grid,
    recolour_lesion,
)

SHAPE, MM = (60, 72, 56), 2.0
MODEL = (32, 40, 32)
CONFIG = TransportConfig()
GAIN, OFFSET = 0.6, 0.25


class Case:
    """A scan with a lesion, the two grids, and a network that is right but for the lesion."""

    def __init__(self) -> None:
        affine = np.diag([MM, MM, MM, 1.0])
        affine[:3, 3] = -MM * (np.array(SHAPE) - 1) / 2
        model = np.diag([4.0, 4.0, 4.0, 1.0])
        model[:3, 3] = -4.0 * (np.array(MODEL) - 1) / 2
        turn = np.eye(4)
        c, s = np.cos(0.12), np.sin(0.12)
        turn[:2, :2] = [[c, -s], [s, c]]
        turn[:3, 3] = 3, -2, 1
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
        self.mask = (grid**2).sum(axis=0) < 0.75
        rng = np.random.default_rng(3)
        folds = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 2.5)
        folds = folds / folds[self.mask].std()
        tissue = 0.25 + 0.3 * (folds > -0.4) + 0.25 * (folds > 0.5)
        tissue = ndimage.gaussian_filter(tissue, 0.6) + rng.normal(0, 0.015, SHAPE)
        centre = np.array([0.2, 0.1, -0.1])[:, None, None, None]
        self.lesion = ((grid - centre) ** 2).sum(axis=0) < 0.05
        tissue = np.where(self.lesion, 0.12 + 0.04 * rng.standard_normal(SHAPE), tissue)
        data = np.where(self.mask, 100 + 800 * np.clip(tissue, 0, 1), 0).astype(np.float32)
        self.scan = NiftiScan(
            data=data, affine=affine, shape=SHAPE, voxel_mm=(MM, MM, MM), qform=affine,
            sform=affine, qform_code=1, sform_code=1, dtype="float32", sha256="0" * 64,
        )  # fmt: skip
        self.geometry = Geometry(
            native_shape=SHAPE, native_affine=rows(affine),
            ras_orientation=((0, 1), (1, 1), (2, 1)), model_affine=rows(model), model_shape=MODEL,
            world_to_template=rows(turn), intensity_low=100.0, intensity_high=900.0,
            brain_ml=1000.0,
        )  # fmt: skip
        self.source, self.model_mask = native_on_model_grid(self.scan, self.mask, self.geometry)
        self.model_lesion = lesion_on_model_grid(self.lesion, self.geometry)
        self.right = np.where(self.model_mask, GAIN * self.source + OFFSET, 0).astype(np.float32)

    def redrawn(self, seed: int) -> np.ndarray:
        """The right output with something else drawn over the lesion."""
        drawn = np.random.default_rng(seed).uniform(0, 1, MODEL).astype(np.float32)
        return np.where(self.model_lesion & self.model_mask, drawn, self.right)

    def native(self, harmonized: np.ndarray, lesion: np.ndarray | None) -> np.ndarray:
        return carry_to_native(
            self.scan, self.mask, self.geometry, harmonized, self.model_mask, CONFIG, lesion
        )


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_whatever_the_network_drew_in_the_lesion_is_left_out(case: Case) -> None:
    outputs = [
        case.native(case.redrawn(seed), case.model_lesion) for seed in (1, 2)
    ]  # fmt: skip
    np.testing.assert_array_equal(*outputs)
    models = [
        recolour_lesion(
            case.source, case.redrawn(seed), case.model_mask, case.model_lesion, CONFIG
        )
        for seed in (1, 2)
    ]  # fmt: skip
    np.testing.assert_array_equal(*models)
    # without the mask it does reach the output
    bare = case.native(case.redrawn(1), None) - case.native(case.redrawn(2), None)
    assert np.abs(bare[case.lesion]).mean() > 0.03


def test_a_lesion_is_recoloured_as_its_surroundings_are(case: Case) -> None:
    out = case.native(case.redrawn(1), case.model_lesion)
    wanted = GAIN * case.geometry.scale(case.scan.data) + OFFSET
    np.testing.assert_allclose(out[case.mask], wanted[case.mask], atol=2e-3)
    model = recolour_lesion(
        case.source, case.redrawn(1), case.model_mask, case.model_lesion, CONFIG
    )
    np.testing.assert_allclose(model[case.model_mask], case.right[case.model_mask], atol=2e-3)


def test_outside_the_lesion_nothing_changes(case: Case) -> None:
    curved = np.where(case.model_mask, case.source.clip(0, 1) ** 1.6, 0).astype(np.float32)
    model = recolour_lesion(case.source, curved, case.model_mask, case.model_lesion, CONFIG)
    outside = ~(case.model_lesion & case.model_mask)
    np.testing.assert_array_equal(model[outside], curved[outside])
    # two windows and one voxel of interpolation is as far as a lesion voxel reaches in the fit
    reach = ndimage.binary_dilation(
        case.model_lesion, np.ones((3, 3, 3)), iterations=2 * CONFIG.radius
    )
    at = lesion_reach(case, reach)
    far = case.mask & ~at
    assert far.sum() > 0.5 * case.mask.sum()
    with_mask, without = case.native(curved, case.model_lesion), case.native(curved, None)
    # the ridge pulls to the whole brain's slope, which is now that of the healthy brain
    np.testing.assert_allclose(with_mask[far], without[far], atol=2e-3)


def lesion_reach(case: Case, reach: np.ndarray) -> np.ndarray:
    """Native voxels that interpolate from a model voxel of `reach`."""
    to_model = case.geometry.native_to_model()
    index = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")).reshape(3, -1)
    at = to_model[:3, :3] @ index + to_model[:3, 3:]
    return ndimage.map_coordinates(reach.astype(float), at, order=1).reshape(SHAPE) > 0


def test_without_a_mask_the_voxels_are_those_of_before(case: Case) -> None:
    curved = np.where(case.model_mask, case.source.clip(0, 1) ** 1.6, 0).astype(np.float32)
    bare = case.native(curved, None)
    empty = case.native(curved, np.zeros(MODEL, bool))
    np.testing.assert_array_equal(bare, empty)
    outside = lesion_on_model_grid(np.zeros(SHAPE, bool), case.geometry)
    assert not outside.any()
    np.testing.assert_array_equal(
        recolour_lesion(case.source, curved, case.model_mask, outside, CONFIG), curved
    )


def test_there_is_no_seam(case: Case) -> None:
    """Slope and offset step no more across the lesion's edge and in it than elsewhere."""
    shade = 1 + 0.25 * np.linspace(-1, 1, MODEL[0])[:, None, None]
    wanted = np.where(case.model_mask, shade * (0.7 * case.source + 0.1), 0).astype(np.float32)
    drawn = np.where(case.model_lesion, 1.0, wanted).astype(np.float32)
    maps = local_linear_maps(case.source, drawn, case.model_mask, CONFIG, case.model_lesion)
    inner = ndimage.binary_erosion(case.model_mask, iterations=2)
    for field in maps:
        for axis in range(3):
            step = np.abs(np.diff(field, axis=axis))
            pair = [
                np.take(inner, range(start, MODEL[axis] - 1 + start), axis=axis)
                for start in (0, 1)
            ]  # fmt: skip
            hit = [
                np.take(case.model_lesion, range(start, MODEL[axis] - 1 + start), axis=axis)
                for start in (0, 1)
            ]
            both = pair[0] & pair[1]
            healthy = step[both & ~hit[0] & ~hit[1]]
            touched = step[both & (hit[0] | hit[1])]
            assert touched.max() <= healthy.max()
            assert touched.mean() <= 1.5 * healthy.mean()
    # and the shading, which varies across the lesion, goes on through it
    slope, offset = maps
    inside = case.model_lesion & case.model_mask
    got = slope[inside] * case.source[inside] + offset[inside]
    np.testing.assert_allclose(got, (shade * (0.7 * case.source + 0.1))[inside], atol=0.03)


def test_the_recolouring_of_a_lesion_rises_even_where_the_surroundings_are_turned(
    case: Case,
) -> None:
    rng = np.random.default_rng(0)
    ring = ndimage.binary_dilation(case.model_lesion, iterations=3) & ~case.model_lesion
    turned = np.where(ring, 1 - case.source, 0.9 * case.source + 0.05)
    turned = np.where(case.model_mask, turned, 0).astype(np.float32)
    turned[case.model_lesion] = rng.uniform(0, 1, int(case.model_lesion.sum()))
    slope, _ = local_linear_maps(
        case.source, turned, case.model_mask, CONFIG, case.model_lesion
    )  # fmt: skip
    inside = case.model_lesion & case.model_mask
    assert slope[inside].min() > 0.05
    bare, _ = local_linear_maps(case.source, turned, case.model_mask, CONFIG)
    assert bare[inside].min() < 0


def test_every_model_voxel_that_a_lesion_voxel_reads_is_left_out(case: Case) -> None:
    for place in ((20, 30, 25), (31, 36, 28)):  # one native voxel is much less than a model voxel
        spot = np.zeros(SHAPE, bool)
        spot[place] = True
        found = lesion_on_model_grid(spot, case.geometry)
        at = case.geometry.native_to_model() @ np.array([*place, 1.0])
        corners = np.stack(np.nonzero(found)).T
        assert len(corners) == np.prod(np.ceil(at[:3]) - np.floor(at[:3]) + 1)
        assert np.abs(corners - at[:3]).max() < 1


def test_a_coarse_scan_marks_every_finer_model_voxel_inside() -> None:
    geometry = Geometry(
        native_shape=(10, 10, 10), native_affine=rows(np.diag([5.0, 5, 5, 1])),
        ras_orientation=((0, 1), (1, 1), (2, 1)), model_affine=rows(np.diag([1.0, 1, 1, 1])),
        model_shape=(50, 50, 50), world_to_template=rows(np.eye(4)), intensity_low=0.0,
        intensity_high=1.0, brain_ml=1.0,
    )  # fmt: skip
    spot = np.zeros((10, 10, 10), bool)
    spot[4, 5, 6] = True
    found = lesion_on_model_grid(spot, geometry)
    assert found[18:23, 23:28, 28:33].all()  # 5 mm around (20, 25, 30) mm
    assert not found[:15].any() and not found[26:].any()


def _mask_image(case: Case, **more: object) -> NiftiScan:
    return replace(case.scan, data=case.lesion.astype(np.float32), **more)


def test_a_mask_on_the_scan_s_grid_is_read_and_another_grid_is_refused(case: Case) -> None:
    np.testing.assert_array_equal(read_lesion(_mask_image(case), case.scan), case.lesion)
    # The same voxels in another order: the second axis first and backwards.
    n = case.scan.shape[1]
    order = np.array([[0, 1, 0, 0], [-1, 0, 0, n - 1], [0, 0, 1, 0], [0, 0, 0, 1]], float)
    again = case.lesion[:, ::-1].transpose(1, 0, 2)
    other = _mask_image(case, affine=case.scan.affine @ order, shape=again.shape)
    other = replace(other, data=again.astype(np.float32))
    np.testing.assert_array_equal(read_lesion(other, case.scan), case.lesion)
    hair = case.scan.affine.copy()
    hair[0, 3] += 0.05  # a rounded affine is the same grid
    assert read_lesion(_mask_image(case, affine=hair), case.scan).any()
    turned = case.scan.affine @ np.diag([-1.0, 1, 1, 1])
    shifted = case.scan.affine.copy()
    shifted[2, 3] += 2.0
    small = replace(case.scan, data=case.scan.data[1:], shape=(59, 72, 56))
    for wrong in (_mask_image(case, affine=turned), _mask_image(case, affine=shifted), small):
        with pytest.raises(InputError) as caught:
            read_lesion(wrong, case.scan, where="m.nii.gz")
        assert caught.value.code == "LESION-GRID"


def test_a_mask_of_the_whole_brain_is_refused(case: Case) -> None:
    require_surroundings(case.model_lesion, case.model_mask)
    with pytest.raises(InputError) as caught:
        require_surroundings(case.model_mask, case.model_mask)
    assert caught.value.code == "LESION-TOO-BIG"


def test_filling_is_harmonic() -> None:
    grid = np.stack(np.meshgrid(*[np.arange(20.0)] * 3, indexing="ij"))
    plane = 1 + 0.2 * grid[0] - 0.1 * grid[2]
    holes = ((grid - 9.5) ** 2).sum(0) < 36
    spoilt = np.where(holes, 77.0, plane)
    np.testing.assert_allclose(fill_smoothly(spoilt, ~holes, holes, 0.0), plane, atol=1e-6)
    rng = np.random.default_rng(1)
    noisy = rng.uniform(2, 3, plane.shape)
    filled = fill_smoothly(np.where(holes, -5, noisy), ~holes, holes, 0.0)
    assert filled.min() >= 2 - 1e-6 and filled.max() <= 3 + 1e-6
    alone = fill_smoothly(spoilt, np.zeros_like(holes), holes, 4.0)
    np.testing.assert_array_equal(alone[holes], 4.0)
    np.testing.assert_array_equal(alone[~holes], spoilt[~holes])


def test_uncertainty_is_carried_in_units_of_the_output(case: Case) -> None:
    """Against the deviation of the native outputs themselves, drawn k times."""
    rng = np.random.default_rng(5)
    smooth = [ndimage.gaussian_filter(rng.standard_normal(MODEL), 4) for _ in range(6)]
    draws = [
        np.where(case.model_mask, 0.5 * case.source + 0.2 + s, 0).astype(np.float32) for s in smooth
    ]
    spread = np.std(draws, axis=0).astype(np.float32)
    carried = carry_uncertainty(spread, case.model_mask, case.mask, case.geometry)
    truth = np.std([case.native(draw, None) for draw in draws], axis=0)
    inner = ndimage.binary_erosion(case.mask, iterations=3)
    assert not carried[~case.mask].any()
    assert carried[inner].mean() == pytest.approx(truth[inner].mean(), rel=0.1)
    assert np.corrcoef(carried[inner], truth[inner])[0, 1] > 0.9
