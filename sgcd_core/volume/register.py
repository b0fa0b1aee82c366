"""Rigid alignment of a brain with the template, which comes out alike whatever the scanner.

Scans of one subject must land on the same voxels, or nothing can be compared: mutual information
between each scan and the T1w template put scans of a subject at two scanners 0.6 mm (T1w) and
1.3 mm (T2w) apart, since its optimum depends on the contrast. So a scan is first shown in the
contrast of an average T1w scan, rank for rank (T2w from its highest rank down): 0.5 and 0.5 mm.
(Correlation instead of mutual information: 0.4 and 0.6 mm, but 4 mm without bias correction.)
"""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgcd_core.errors import InputError
from sgcd_core.style.shading import contrast_of
from sgcd_core.volume.resample import bounding_box, resample_masked, voxel_sides
from sgcd_core.volume.template import template, template_centre

Array = NDArray[Any]

#: Both images are compared on grids of this side, mm.
WORK_MM = 4.0
#: Nods of the head that the search starts from, degrees (the angle scanners differ in most).
START_PITCH = (-25.0, 0.0, 25.0)
MAX_ROTATION_DEG = 60.0
MAX_SHIFT_MM = 40.0
MIN_OVERLAP = 0.6
#: Correlation with the template below which the header may have the axes wrong and above which
#: another orientation may be right (measured on 65 scans: at least 0.39; with a header that is 90°
#: or 180° off at most 0.31), and what another orientation must be better by.
LIKELY_POSE, BETTER_POSE = 0.36, 0.05
#: Correlation with the template, where both brains are, below which a scan's contrast is reversed
#: (measured on 25 real and 32 digital scans: at least 0.18; labelled T2w for T1w or T1w for T2w at
#: most -0.17).
REVERSED = -0.1
OTHER = {"T1w": "T2w", "T2w": "T1w"}


def centre_of_mass(mask: Array, affine: Array) -> Array:
    """Mean position of the true voxels, mm, (3,) float64."""
    voxel = np.array([_mean_index(mask, axis) for axis in range(3)])
    centre: Array = np.asarray(affine, float)[:3, :3] @ voxel + np.asarray(affine, float)[:3, 3]
    return centre


def _mean_index(mask: Array, axis: int) -> float:
    others = tuple(a for a in range(3) if a != axis)
    count = mask.sum(axis=others, dtype=np.float64)
    return float((count * np.arange(count.size)).sum() / count.sum())


def centred(mask: Array, affine: Array) -> Array:
    """(4, 4) world → template mm that only brings the centre of mass onto the template's."""
    _, inside, grid = template(WORK_MM)
    out = np.eye(4)
    out[:3, 3] = centre_of_mass(inside, grid) - centre_of_mass(mask, affine)
    return out


def register_rigid(
    image: Array, mask: Array, affine: Array, *, sequence: str = "T1w", where: str | None = None
) -> Array:
    """Rigid transform of a brain onto the ICBM152 template.

    The search has a free isotropic scale, which is then dropped: the template brain is larger than
    most, and a rigid search would push a small brain against one side of it.

    Args:
        image: (X, Y, Z) float32, any unit.
        mask: (X, Y, Z) bool, the brain.
        affine: (4, 4) voxel → world mm, RAS+.
        sequence: BIDS suffix.
        where: Address for messages.

    Returns:
        (4, 4) float64, world mm → template mm, a rotation and a shift.

    Raises:
        InputError: SCAN-REGISTRATION when no plausible alignment was found, or when the brain fits
            better turned by further right angles: its header is wrong. SCAN-SEQUENCE when a T1w
            scan has the contrast of a T2w scan, or a T2w scan that of a T1w scan.
    """
    import SimpleITK as sitk  # noqa: N813

    fixed, fixed_mask, fixed_affine = template(WORK_MM)
    moving, moving_mask, moving_affine = _axis_aligned(image, mask, affine)
    moving = like_t1w(moving, moving_mask, sequence)
    fixed_itk, moving_itk = _to_itk(fixed, fixed_affine), _to_itk(moving, moving_affine)
    fixed_com = centre_of_mass(fixed_mask, fixed_affine)
    shift = centre_of_mass(moving_mask, moving_affine) - fixed_com

    def coarse(image: Any, pitch: float) -> tuple[float, Any]:
        start = sitk.Similarity3DTransform()
        start.SetCenter(fixed_com.tolist())
        start.SetTranslation(shift.tolist())
        start.SetRotation((1.0, 0.0, 0.0), float(np.radians(pitch)))
        return _search(fixed_itk, image, start, shrink=2, sigma_mm=4.0, iterations=60)

    tries = [coarse(moving_itk, pitch) for pitch in START_PITCH]
    best = min(tries, key=lambda pair: pair[0])[1]
    _, found = _search(fixed_itk, moving_itk, best, shrink=1, sigma_mm=2.0, iterations=150)
    world_to_template: Array = np.linalg.inv(_matrix(found))

    def lay(transform: Array, lies: Array) -> tuple[Array, Array]:
        return resample_masked(
            moving, moving_mask, transform @ lies, fixed_affine, fixed_mask.shape
        )

    def fits(laid: Array, laid_mask: Array) -> float:
        either = laid_mask | fixed_mask
        return _correlation(np.where(laid_mask, laid, 0), np.where(fixed_mask, fixed, 0), either)

    laid, laid_mask = lay(world_to_template, moving_affine)
    _check(world_to_template, laid_mask, moving_mask, moving_affine, where)
    if sequence in OTHER and _correlation(laid, fixed, laid_mask & fixed_mask) < REVERSED:
        raise InputError(
            f"labelled {sequence}, but its contrast is that of a {OTHER[sequence]} scan.",
            code="SCAN-SEQUENCE", where=where,
            hint="Correct its suffix, or `sequence` in the manifest, and index again. If the label "
            "is right, --set prepare.registration=none only centres it.",
        )  # fmt: skip
    alike = fits(laid, laid_mask)
    if alike < LIKELY_POSE:
        for turn in _right_angles(fixed_com + shift):
            lies = turn @ moving_affine
            there = _to_itk(moving, lies)
            _, pose = coarse(there, 0.0)
            if fits(*lay(np.linalg.inv(_matrix(pose)), lies)) < alike + BETTER_POSE:
                continue
            _, pose = _search(fixed_itk, there, pose, shrink=1, sigma_mm=2.0, iterations=150)
            # It must fit itself: scans of another contrast fit nowhere.
            found_alike = fits(*lay(np.linalg.inv(_matrix(pose)), lies))
            if found_alike > max(alike + BETTER_POSE, LIKELY_POSE):
                raise InputError(
                    "the brain fits the template better when its axes are turned by right angles "
                    "from where its header says that they lie.",
                    code="SCAN-REGISTRATION", where=where,
                    hint="The header's orientation is probably wrong: convert the scan anew. "
                    "--set prepare.registration=none only centres it.",
                )  # fmt: skip
    return world_to_template


def _correlation(one: Array, other: Array, where: Array) -> float:
    return float(np.corrcoef(one[where], other[where])[0, 1])


def _right_angles(centre: Array) -> list[Array]:
    """The 23 rotations (4, 4) about a point that lay axes on axes and change something."""
    turns = []
    for order in permutations(range(3)):
        for signs in product((1.0, -1.0), repeat=3):
            turn = np.eye(4)
            turn[:3, :3] = np.diag(signs)[:, order]
            turn[:3, 3] = centre - turn[:3, :3] @ centre
            if np.linalg.det(turn) > 0 and rotation_degrees(turn):
                turns.append(turn)
    return turns


def align_rigid(
    image: Array, mask: Array, onto: Array, onto_mask: Array, affine: Array, sequence: str
) -> Array:
    """Rigid transform of one prepared scan onto another of the same brain and sequence.

    Args:
        image: (X, Y, Z) float32, prepared.
        mask: (X, Y, Z) bool.
        onto: (X, Y, Z) float32, prepared on the same grid.
        onto_mask: (X, Y, Z) bool.
        affine: (4, 4) voxel → mm, axis-aligned, of that grid.
        sequence: BIDS suffix.

    Returns:
        (4, 4) float64, mm → mm.
    """
    import SimpleITK as sitk  # noqa: N813

    moving, fixed = (
        _to_itk(like_t1w(x, m, sequence), affine) for x, m in ((image, mask), (onto, onto_mask))
    )
    start = sitk.Euler3DTransform()
    start.SetCenter(template_centre().tolist())
    _, found = _search(fixed, moving, start, shrink=1, sigma_mm=2.0, iterations=150, correlate=True)
    aligned: Array = np.linalg.inv(_matrix(found))
    return aligned


def like_t1w(image: Array, mask: Array, sequence: str) -> Array:
    """A brain in the contrast of an average T1w scan, float32; other sequences as they are."""
    levels = np.linspace(0.0, 1.0, 257)
    shown = contrast_of("T1w", levels)
    if sequence not in ("T1w", "T2w") or shown is None or not mask.any():
        return image
    sign = -1.0 if sequence == "T2w" else 1.0
    ranked = sign * np.asarray(image, np.float64)
    own = np.quantile(ranked[mask], levels)
    out: Array = np.where(mask, np.interp(ranked, own, shown), 0).astype(np.float32)
    return out


def _matrix(found: Any) -> Array:
    """The rotation and shift (4, 4) of an ITK transform, without its scale."""
    linear = np.array(found.GetMatrix(), float).reshape(3, 3)
    u, _, vt = np.linalg.svd(linear)
    rotation, centre = u @ vt, template_centre()
    out: Array = np.eye(4)
    out[:3, :3] = rotation
    out[:3, 3] = np.array(found.TransformPoint(centre.tolist())) - rotation @ centre
    return out


def rotation_degrees(transform: Array) -> float:
    """Angle of the rotation in a (4, 4) rigid transform."""
    cosine = (np.trace(transform[:3, :3]) - 1.0) / 2.0
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def _axis_aligned(image: Array, mask: Array, affine: Array) -> tuple[Array, Array, Array]:
    """The brain on an axis-aligned world grid (ITK takes no sheared affine)."""
    box = bounding_box(mask)
    corners = np.array(
        [[x, y, z, 1.0] for x in (box[0].start, box[0].stop) for y in (box[1].start, box[1].stop)
         for z in (box[2].start, box[2].stop)]
    )  # fmt: skip
    world = corners @ np.asarray(affine, float)[:3].T
    low, high = world.min(axis=0) - 5 * WORK_MM, world.max(axis=0) + 5 * WORK_MM
    shape = tuple(int(np.ceil(side / WORK_MM)) + 1 for side in high - low)
    grid = np.diag([WORK_MM, WORK_MM, WORK_MM, 1.0])
    grid[:3, 3] = low
    out, out_mask = resample_masked(image, mask, affine, grid, (shape[0], shape[1], shape[2]))
    if not out_mask.any():
        raise InputError("the brain mask is empty or too thin to align.", code="SCAN-NO-BRAIN")
    top = float(np.percentile(out[out_mask], 99.5))
    return np.clip(out, 0, top), out_mask, grid


def _to_itk(volume: Array, affine: Array) -> Any:
    """An ITK image whose physical space is RAS+ mm; both images use it, so ITK need not know.

    Its axes stand at right angles.
    """
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.transpose(2, 1, 0)))
    sides = voxel_sides(affine)
    image.SetSpacing(sides.tolist())
    image.SetDirection((affine[:3, :3] / sides).ravel().tolist())
    image.SetOrigin([float(v) for v in affine[:3, 3]])
    return image


def _search(
    fixed: Any,
    moving: Any,
    start: Any,
    *,
    shrink: int,
    sigma_mm: float,
    iterations: int,
    correlate: bool = False,
) -> tuple[float, Any]:
    """One level of the search; (metric, lower is better; the transform found)."""
    import SimpleITK as sitk  # noqa: N813

    method = sitk.ImageRegistrationMethod()
    # One thread and every voxel: the same scan gives the same alignment on any worker.
    method.SetNumberOfThreads(1)
    method.SetNumberOfWorkUnits(1)
    if correlate:
        method.SetMetricAsCorrelation()
    else:
        method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel([shrink])
    method.SetSmoothingSigmasPerLevel([sigma_mm])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0 * shrink, minStep=0.002 * shrink, numberOfIterations=iterations,
        relaxationFactor=0.6, gradientMagnitudeTolerance=1e-8,
    )  # fmt: skip
    method.SetOptimizerScalesFromPhysicalShift()
    transform = type(start)(start)
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)
    return float(method.GetMetricValue()), transform


def _check(
    world_to_template: Array, laid: Array, mask: Array, affine: Array, where: str | None
) -> None:
    """Refuse an alignment that no head in a scanner could have.

    `laid` is the brain, bool, on the template's grid; `mask` where it lies, by `affine`.
    """
    _, fixed_mask, fixed_affine = template(WORK_MM)
    angle = rotation_degrees(world_to_template)
    centre = world_to_template @ np.append(centre_of_mass(mask, affine), 1.0)
    shift = float(np.linalg.norm(centre[:3] - centre_of_mass(fixed_mask, fixed_affine)))
    overlap = 2.0 * float((laid & fixed_mask).sum()) / float(laid.sum() + fixed_mask.sum())
    if angle > MAX_ROTATION_DEG or shift > MAX_SHIFT_MM or overlap < MIN_OVERLAP:
        raise InputError(
            f"the best alignment with the template turns {angle:.0f}°, shifts {shift:.0f} mm and "
            f"overlaps {overlap:.2f}; expected at most {MAX_ROTATION_DEG:.0f}°, "
            f"{MAX_SHIFT_MM:.0f} mm and at least {MIN_OVERLAP}.",
            code="SCAN-REGISTRATION", where=where,
            hint="Look at the scan; --set prepare.registration=none only centres it.",
        )  # fmt: skip
