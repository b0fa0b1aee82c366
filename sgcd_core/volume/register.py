"""Rigid alignment of a brain with the template, which comes out alike whatever the scanner.

Scans of one subject must land on the same voxels, or nothing can be compared: mutual information
between each scan and the T1w template put scans of a subject at two scanners 0.6 mm (T1w) and
1.3 mm (T2w) apart, since its optimum depends on the contrast. So a scan is first shown in the
contrast of an average T1w scan, rank for rank (T2w from its highest rank down): 0.5 and 0.5 mm.
(Correlation instead of mutual information: 0.4 and 0.6 mm, but 4 mm without bias correction.)

What lies beyond the field of view is unknown and not background: where it cuts the brain, the
search looks at the rest alone.
"""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgcd_core.errors import InputError
from sgcd_core.style.shading import contrast_of
from sgcd_core.volume.resample import bounding_box, resample_masked, voxel_ml, voxel_sides
from sgcd_core.volume.template import template, template_centre

Array = NDArray[Any]

#: Both images are compared on grids of this side, mm.
WORK_MM = 4.0
#: Nods of the head that the search starts from, degrees (the angle scanners differ in most).
START_PITCH = (-25.0, 0.0, 25.0)
MAX_ROTATION_DEG = 60.0
MAX_SHIFT_MM = 40.0
#: Dice overlap with the template of the brain enlarged to the template's volume: a small one can
#: overlap little, however it lies (measured: at least 0.90 on 25 real scans, on one shrunk to
#: 550 ml and on three that the field of view cuts by 40 to 60 mm, 0.88 on 60 digital ones; halves
#: of brains at most 0.82, moved by 40 mm at most 0.61).
MIN_OVERLAP = 0.84
#: Correlation with the template below which the header may have the axes wrong and above which
#: another orientation may be right (measured on 65 scans: at least 0.39; with a header that is 90°
#: or 180° off at most 0.31), and what another orientation must be better by.
LIKELY_POSE, BETTER_POSE = 0.36, 0.05
#: How many of those 23 orientations, the likeliest first, are looked at closely.
MOST_TURNS = 3
#: Correlation with the template, where both brains are, below which a scan's contrast is reversed
#: (measured on 25 real and 32 digital scans: at least 0.18; labelled T2w for T1w or T1w for T2w at
#: most -0.17).
REVERSED = -0.1
OTHER = {"T1w": "T2w", "T2w": "T1w"}
#: A brain that meets a face of its grid over more than this is cut there, cm². (One that only just
#: reaches it meets it over about 5 cm² for each mm of the voxel's side.)
CUT_CM2 = 20.0
#: A cut brain is continued by so much of its last plane, mm: smoothing must not darken it.
CONTINUED_MM = 16.0

Face = tuple[int, int]  # axis, and 0 for its low end or 1 for its high end


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
        mask: (X, Y, Z) bool, the brain. Where it meets a face of the grid over more than `CUT_CM2`,
            the field of view is taken to end there.
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
    cut = cut_faces(mask, affine)
    moving, moving_mask, moving_affine = _axis_aligned(image, mask, affine, cut)
    moving = like_t1w(moving, moving_mask, sequence)
    seen = _seen(cut, mask.shape, affine, moving_affine, moving_mask.shape)
    moving_mask &= seen
    fixed_itk = _to_itk(fixed, fixed_affine)
    fixed_com = centre_of_mass(fixed_mask, fixed_affine)
    shift = centre_of_mass(moving_mask, moving_affine) - fixed_com

    def shown(lies: Array) -> tuple[Any, Any]:
        """The scan and, for a cut one, what its field of view covers."""
        covered = _to_itk(seen.astype(np.uint8), lies) if cut else None
        return _to_itk(moving, lies), covered

    def coarse(image: Any, covered: Any, pitch: float) -> tuple[float, Any]:
        start = sitk.Similarity3DTransform()
        start.SetCenter(fixed_com.tolist())
        start.SetTranslation(shift.tolist())
        start.SetRotation((1.0, 0.0, 0.0), float(np.radians(pitch)))
        return _search(
            fixed_itk, image, start, covered=covered, shrink=2, sigma_mm=4.0, iterations=60
        )

    def fine(image: Any, covered: Any, start: Any) -> Array:
        _, found = _search(
            fixed_itk, image, start, covered=covered, shrink=1, sigma_mm=2.0, iterations=150
        )
        pose: Array = np.linalg.inv(_matrix(found))
        return pose

    def lay(transform: Array, turn: Array) -> tuple[Array, Array, Array]:
        """Image, mask, and the part of the template that the field of view covers."""
        laid, laid_mask = resample_masked(
            moving, moving_mask, transform @ (turn @ moving_affine), fixed_affine, fixed_mask.shape
        )
        lies = transform @ turn @ affine
        part = fixed_mask & _seen(cut, mask.shape, lies, fixed_affine, fixed_mask.shape)
        return laid, laid_mask, part

    def lies_at(transform: Array, turn: Array) -> Array:
        """Where the middle of the brain comes to lie, template mm, (3,)."""
        middle = np.append(centre_of_mass(moving_mask, moving_affine), 1.0)
        at: Array = (transform @ turn @ middle)[:3]
        return at

    def overlap(transform: Array, turn: Array) -> float:
        """Of the brain, enlarged to the volume of what is covered of the template, with that."""
        covered = lay(transform, turn)[2]
        growth = float(np.clip(np.cbrt(covered.sum() / moving_mask.sum()), 0.5, 2.0))
        _, grown, beside = lay(_scaled(growth, lies_at(transform, turn)) @ transform, turn)
        return _dice(grown, beside)

    def fits(laid: Array, laid_mask: Array, part: Array) -> float:
        return _correlation(
            np.where(laid_mask, laid, 0), np.where(part, fixed, 0), laid_mask | part
        )

    upright = shown(moving_affine)
    tries = [coarse(*upright, pitch) for pitch in START_PITCH]
    world_to_template = fine(*upright, min(tries, key=lambda pair: pair[0])[1])
    laid, laid_mask, part = lay(world_to_template, np.eye(4))
    alike = fits(laid, laid_mask, part)
    misfit = _misfit(
        world_to_template, lies_at(world_to_template, np.eye(4)), part,
        overlap(world_to_template, np.eye(4)),
    )  # fmt: skip
    if (
        misfit is None and sequence in OTHER
        and _correlation(laid, fixed, laid_mask & fixed_mask) < REVERSED
    ):  # fmt: skip
        raise InputError(
            f"labelled {sequence}, but its contrast is that of a {OTHER[sequence]} scan.",
            code="SCAN-SEQUENCE", where=where,
            hint="Correct its suffix, or `sequence` in the manifest, and index again. If the label "
            "is right, --set prepare.registration=none only centres it.",
        )  # fmt: skip

    def fits_turned() -> bool:
        """Whether the brain lies on the template when turned by right angles, and fits better."""
        better = []
        for turn in _right_angles(fixed_com + shift):
            there = shown(turn @ moving_affine)
            _, pose = coarse(*there, 0.0)
            better.append((fits(*lay(np.linalg.inv(_matrix(pose)), turn)), turn, there, pose))
        better.sort(key=lambda found: -found[0])
        for found, turn, there, pose in better[:MOST_TURNS]:
            if found < alike + BETTER_POSE:
                break
            # It must fit itself: scans of another contrast fit nowhere.
            turned = fine(*there, pose)
            good = fits(*lay(turned, turn)) > max(alike + BETTER_POSE, LIKELY_POSE)
            if good and overlap(turned, turn) >= MIN_OVERLAP:
                return True
        return False

    if (misfit is not None or alike < LIKELY_POSE) and fits_turned():
        cause = "Its field of view may cut too much of the brain, or" if cut else "Probably"
        raise InputError(
            "the brain fits the template better when its axes are turned by right angles from "
            "where its header says that they lie.",
            code="SCAN-REGISTRATION", where=where,
            hint=f"{cause} the header's orientation is wrong: convert the scan anew. "
            "--set prepare.registration=none only centres it.",
        )  # fmt: skip
    if misfit is not None:
        raise InputError(
            misfit, code="SCAN-REGISTRATION", where=where,
            hint="Look at the scan; --set prepare.registration=none only centres it.",
        )  # fmt: skip
    return world_to_template


def _dice(one: Array, other: Array) -> float:
    return 2.0 * float((one & other).sum()) / float(max(one.sum() + other.sum(), 1))


def _scaled(factor: float, centre: Array) -> Array:
    """(4, 4) scaling about a point."""
    out = np.diag([factor, factor, factor, 1.0])
    out[:3, 3] = (1.0 - factor) * centre
    return out


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


def cut_faces(mask: Array, affine: Array) -> tuple[Face, ...]:
    """The faces of the grid (X, Y, Z) that a brain is cut at."""
    face_cm2 = 10.0 * voxel_ml(affine) / voxel_sides(affine)
    return tuple(
        (axis, end) for axis in range(3) for end in (0, 1)
        if mask.take(-end, axis=axis).sum() * face_cm2[axis] > CUT_CM2
    )  # fmt: skip


def _seen(
    cut: tuple[Face, ...], shape: tuple[int, ...], affine: Array, grid: Array,
    grid_shape: tuple[int, ...],
) -> Array:  # fmt: skip
    """Which voxels of another grid lie on this side of the faces that cut the brain, bool.

    `affine` leads from the scan's voxels, `shape` of them, to the world of `grid`.
    """
    seen = np.ones(grid_shape, bool)
    to_scan = np.linalg.solve(affine, grid)
    for axis, end in cut:
        steps = np.ix_(*(np.arange(n) * k for n, k in zip(grid_shape, to_scan[axis], strict=False)))
        index = steps[0] + steps[1] + steps[2] + to_scan[axis, 3]
        seen &= index <= shape[axis] - 0.5 if end else index >= -0.5
    return seen


def _axis_aligned(
    image: Array, mask: Array, affine: Array, cut: tuple[Face, ...]
) -> tuple[Array, Array, Array]:
    """The brain on an axis-aligned world grid (ITK takes no sheared affine); cut, it goes on."""
    if cut:
        pad = [[0, 0], [0, 0], [0, 0]]
        for axis, end in cut:
            pad[axis][end] = int(np.ceil(CONTINUED_MM / voxel_sides(affine)[axis]))
        image, mask = np.pad(image, pad, mode="edge"), np.pad(mask, pad, mode="edge")
        affine = np.array(affine, dtype=np.float64)
        affine[:3, 3] -= affine[:3, :3] @ np.array([low for low, _ in pad], float)
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
    covered: Any = None,
    shrink: int,
    sigma_mm: float,
    iterations: int,
    correlate: bool = False,
) -> tuple[float, Any]:
    """One level of the search; (metric, lower is better; the transform found).

    `covered` is where `moving` is known, everywhere when None.
    """
    import SimpleITK as sitk  # noqa: N813

    method = sitk.ImageRegistrationMethod()
    # One thread and every voxel: the same scan gives the same alignment on any worker.
    method.SetNumberOfThreads(1)
    method.SetNumberOfWorkUnits(1)
    if correlate:
        method.SetMetricAsCorrelation()
    else:
        method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
    if covered is not None:
        method.SetMetricMovingMask(covered)
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


def _misfit(world_to_template: Array, centre: Array, part: Array, overlap: float) -> str | None:
    """Why no head in a scanner could lie so; None where one could.

    Args:
        world_to_template: (4, 4).
        centre: (3,) where it puts the brain's centre of mass, template mm.
        part: What the scan's field of view holds of the template's brain, bool on its grid.
        overlap: Of the two, at one volume.
    """
    _, _, fixed_affine = template(WORK_MM)
    angle = rotation_degrees(world_to_template)
    shift = float(np.linalg.norm(centre - centre_of_mass(part, fixed_affine)))
    if angle <= MAX_ROTATION_DEG and shift <= MAX_SHIFT_MM and overlap >= MIN_OVERLAP:
        return None
    return (
        f"the best alignment with the template turns {angle:.0f}°, shifts {shift:.0f} mm and "
        f"overlaps {overlap:.3f}; expected at most {MAX_ROTATION_DEG:.0f}°, "
        f"{MAX_SHIFT_MM:.0f} mm and at least {MIN_OVERLAP}."
    )
