"""From a subject and a scanner to a scan, and to the truth on any grid; no files."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipelines.cohort.anatomy import CENTRE
from pipelines.cohort.physics import signal
from pipelines.cohort.scanner import Acquisition, Scanner
from pipelines.cohort.subject import Subject
from pipelines.cohort.tissues import (
    SULCAL_CLASS,
    TRUTH,
    VENTRICLE_CLASS,
    Tissue,
    relaxation_arrays,
    truth_table,
)
from sgcd_core.errors import ConfigError

Array = NDArray[np.float32]
Affine = NDArray[np.float64]
BRAIN_FIELD = np.array([192.0, 228.0, 188.0])
HEAD_FIELD = np.array([208.0, 256.0, 256.0])
_FWHM = 2 * math.sqrt(2 * math.log(2))


def render_scan(
    subject: Subject,
    scanner: Scanner,
    sequence: str,
    mm: float,
    rng: np.random.Generator,
    *,
    head: bool = False,
    shift: float = 0.0,
) -> tuple[Array, Affine]:
    """One scan, float32 in stored orientation, raw intensities ≥ 0; voxel → world mm RAS+.

    Outside the brain the scan is exactly 0 unless `head`. See `render_acquisition`.
    """
    scan, _, affine = render_acquisition(
        subject, scanner, sequence, mm, rng, head=head, shift=shift
    )
    return scan, affine


def render_acquisition(
    subject: Subject,
    scanner: Scanner,
    sequence: str,
    mm: float,
    rng: np.random.Generator,
    *,
    head: bool = False,
    shift: float = 0.0,
) -> tuple[Array, Array, Affine]:
    """One scan, the same acquisition without its noise, and their affine, voxel → mm RAS+.

    Both float32 in stored orientation, raw intensities ≥ 0. Deterministic in its arguments.

    Args:
        subject: Who.
        scanner: Where.
        sequence: BIDS suffix, a key of `scanner.acquisitions`.
        mm: Nominal voxel side; the scanner's own sides are factors of it.
        rng: Noise, and what of coil and position varies from scan to scan.
        head: Keep what lies outside the brain (the anatomy must hold it).
        shift: Standard deviation of a rigid repositioning, mm and degrees.

    Raises:
        ConfigError: The scanner has no such sequence.
    """
    import nibabel as nib

    if sequence not in scanner.acquisitions:
        raise ConfigError(f"this scanner takes {', '.join(scanner.acquisitions)}.",
                          where=sequence)  # fmt: skip
    how = scanner.acquisitions[sequence]
    shape, affine = scan_grid(scanner, how, mm, head)
    grid = _points(subject, shape, affine @ np.eye(4), _move(rng, shift))
    box = _signals(subject, scanner, how)
    sides = np.asarray(how.voxel) * mm
    inside = subject.anatomy.fill(subject.anatomy.brain.astype(np.float32))
    image, hull = _sample([_blur(box, sides / subject.anatomy.mm), inside], grid)
    white = float(_white_signal(scanner, how))
    image = _kspace(image / np.float32(white), how)
    image = np.maximum(image, 0) * _bias(scanner, shape, affine, rng)
    sigma = np.float32(how.noise)
    real = image + sigma * rng.standard_normal(shape, dtype=np.float32)
    imaginary = sigma * rng.standard_normal(shape, dtype=np.float32)
    noisy = np.sqrt(real * real + imaginary * imaginary)
    start = nib.orientations.io_orientation(np.diag([1.0, 1, 1, 1]))
    turn = nib.orientations.ornt_transform(
        start, nib.orientations.axcodes2ornt(scanner.orientation)
    )

    def stored(values: Array) -> Array:
        values = np.float32(how.gain) * values ** np.float32(how.gamma)
        if not head:
            values = values * (hull > 0.5)
        turned = nib.orientations.apply_orientation(values, turn)
        return np.ascontiguousarray(turned, dtype=np.float32)

    return stored(noisy), stored(image), affine @ nib.orientations.inv_ornt_aff(turn, shape)


def scan_grid(
    scanner: Scanner, how: Acquisition, mm: float, head: bool = False
) -> tuple[tuple[int, int, int], Affine]:
    """Shape and affine (mm RAS+) of a scanner's grid, axes near R A S before reordering."""
    sides = np.asarray(how.voxel) * mm
    field = HEAD_FIELD if head else BRAIN_FIELD
    count = np.ceil(field / sides).astype(int)
    tilt = math.radians(scanner.tilt)
    turn = np.array([[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)],
                     [0, math.sin(tilt), math.cos(tilt)]])  # fmt: skip
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(sides)
    centre = CENTRE + np.asarray(scanner.offset) - (np.array([0, 0, 36.0]) if head else 0.0)
    affine[:3, 3] = centre - affine[:3, :3] @ ((count - 1) / 2)
    return (int(count[0]), int(count[1]), int(count[2])), affine


def render_truth(subject: Subject, mm: float) -> tuple[NDArray[np.uint8], Affine]:
    """Tissue classes (`tissues.TRUTH`) of a subject, uint8 (X, Y, Z), isotropic RAS+ grid.

    The class that fills most of each voxel; 0 outside the brain.
    """
    count = np.ceil(BRAIN_FIELD / mm).astype(int)
    affine = np.diag([mm, mm, mm, 1.0])
    affine[:3, 3] = CENTRE - mm * (count - 1) / 2
    shape = (int(count[0]), int(count[1]), int(count[2]))
    grid = _points(subject, shape, affine, np.eye(4))
    sides = np.full(3, mm / subject.anatomy.mm)
    anatomy = subject.anatomy
    best = np.zeros(shape, np.float32)
    out = np.zeros(shape, np.uint8)
    for number, part in enumerate(class_fractions(subject), start=1):
        (share,) = _sample([_blur(anatomy.fill(part), sides)], grid)
        wins = share > best
        out[wins] = number
        best[wins] = share[wins]
    (hull,) = _sample([anatomy.fill(anatomy.brain.astype(np.float32))], grid)
    out[hull <= 0.5] = 0
    out[(hull > 0.5) & (out == 0)] = SULCAL_CLASS
    return out, affine


def class_fractions(subject: Subject) -> list[Array]:
    """Share of each class of `tissues.TRUTH`, in order, at the anatomy's voxels (N,), age in."""
    anatomy, fluid = subject.anatomy, subject.fluid
    first, other = truth_table()[anatomy.main], truth_table()[anatomy.second]
    sulcal = anatomy.to_sulcus < anatomy.to_ventricle
    out = []
    for number in TRUTH:
        part = (first == number) * subject.share + (other == number) * (1 - subject.share)
        part = part * (1 - fluid)
        if number in (SULCAL_CLASS, VENTRICLE_CLASS):
            part = part + fluid * (sulcal == (number == SULCAL_CLASS))
        out.append((part * anatomy.brain).astype(np.float32))
    return out


def _signals(subject: Subject, scanner: Scanner, how: Acquisition) -> Array:
    """Signal of every voxel of the anatomy's box: the mixture of what lies in it."""
    anatomy = subject.anatomy
    density, t1, t2 = relaxation_arrays(scanner.field_strength)
    field = scanner.field_strength

    def of(tissue: NDArray[np.uint8]) -> Array:
        return signal(how.protocol, density[tissue] * subject.proton_density,
                      t1[tissue] * subject.t1, t2[tissue] * subject.t2, field)  # fmt: skip

    total = of(anatomy.main)
    mixed = np.flatnonzero(subject.share < 1)
    if mixed.size:
        share = subject.share[mixed]
        other = signal(
            how.protocol, density[anatomy.second[mixed]] * subject.proton_density[mixed],
            t1[anatomy.second[mixed]] * subject.t1[mixed],
            t2[anatomy.second[mixed]] * subject.t2[mixed], field,
        )  # fmt: skip
        total[mixed] = share * total[mixed] + (1 - share) * other
    csf = int(Tissue.SULCAL_CSF)
    water = signal(how.protocol, density[csf : csf + 1], t1[csf : csf + 1], t2[csf : csf + 1],
                   field)  # fmt: skip
    total += subject.fluid * (water[0] - total)
    return anatomy.fill(total)


def _white_signal(scanner: Scanner, how: Acquisition) -> np.float32:
    density, t1, t2 = relaxation_arrays(scanner.field_strength)
    one = slice(int(Tissue.WHITE), int(Tissue.WHITE) + 1)
    value = signal(how.protocol, density[one], t1[one], t2[one], scanner.field_strength)
    return np.float32(value[0])


def _blur(box: Array, sides: NDArray[np.float64]) -> Array:
    """Point spread of voxels of `sides` (in voxels of the box): Gaussian, FWHM 0.9 of a side.

    Done before the warp, whose stretching (a tenth) changes it less than scanners differ.
    """
    from scipy.ndimage import gaussian_filter

    out: Array = gaussian_filter(box, np.maximum(0.9 * sides / _FWHM, 0.4), truncate=2.5)
    return out


def _move(rng: np.random.Generator, shift: float) -> Affine:
    """A rigid repositioning of the head, scanner world → subject world."""
    from scipy.spatial.transform import Rotation

    move = np.eye(4)
    if shift > 0:
        turn = Rotation.from_euler("xyz", rng.normal(0, shift, 3), degrees=True).as_matrix()
        move[:3, :3] = turn
        move[:3, 3] = CENTRE - turn @ CENTRE + rng.normal(0, shift, 3)
    return move


def _points(
    subject: Subject, shape: tuple[int, int, int], affine: Affine, move: Affine
) -> tuple[NDArray[np.float32], tuple[int, int, int]]:
    """Where each voxel lies in the anatomy's box: (X·Y·Z, 3) voxel coordinates, and the shape."""
    world = subject.pose @ move @ affine
    to_warp = np.linalg.inv(subject.warp_affine) @ world
    coarse = _lattice(shape, to_warp)
    moved = _grid_sample(subject.displacement, coarse, edge=True)
    to_box = np.linalg.inv(subject.anatomy.affine)
    points = _lattice(shape, to_box @ world)
    points += np.float32(1 / subject.anatomy.mm) * moved.T
    return points, shape


def _lattice(shape: tuple[int, int, int], affine: Affine) -> NDArray[np.float32]:
    """Affine image of every voxel, float32 (X·Y·Z, 3)."""
    matrix = affine.astype(np.float32)
    i, j, k = (np.arange(s, dtype=np.float32) for s in shape)
    out = (
        (i[:, None] * matrix[:3, 0])[:, None, None, :]
        + (j[:, None] * matrix[:3, 1])[None, :, None, :]
        + ((k[:, None] * matrix[:3, 2]) + matrix[:3, 3])[None, None, :, :]
    )
    return np.ascontiguousarray(out.reshape(-1, 3))


def _sample(
    boxes: list[Array], grid: tuple[NDArray[np.float32], tuple[int, int, int]]
) -> list[Array]:
    """Boxes at the points of a grid, linear, 0 outside."""
    points, shape = grid
    values = _grid_sample(np.stack(boxes), points, edge=False)
    return [np.ascontiguousarray(v).reshape(shape) for v in values]


def _grid_sample(channels: Array, points: NDArray[np.float32], *, edge: bool) -> Array:
    """Trilinear values (C, P) of channels (C, X, Y, Z) at voxel coordinates (P, 3)."""
    import torch

    size = np.asarray(channels.shape[1:], np.float32)
    unit = (points * (2 / (size - 1)) - 1)[:, ::-1]
    out = torch.nn.functional.grid_sample(
        torch.from_numpy(np.ascontiguousarray(channels))[None],
        torch.from_numpy(np.ascontiguousarray(unit, np.float32))[None, None, None],
        mode="bilinear", padding_mode="border" if edge else "zeros", align_corners=True,
    )  # fmt: skip
    return np.asarray(out[0, :, 0, 0].numpy())


def _bias(
    scanner: Scanner, shape: tuple[int, int, int], affine: Affine, rng: np.random.Generator
) -> Array:
    """Smooth multiplicative sensitivity around 1, in scanner coordinates."""
    wobble = 1 + scanner.bias_wobble * rng.normal(0, 1, 9)
    c = (np.asarray(scanner.bias) * wobble).astype(np.float32)
    unit = affine.copy()
    unit[:3, 3] -= CENTRE
    u = (_lattice(shape, unit) / np.float32(110.0)).reshape(*shape, 3)
    x, y, z = u[..., 0], u[..., 1], u[..., 2]
    log = c[0] * x + c[1] * y + c[2] * z + c[3] * x * x + c[4] * y * y + c[5] * z * z
    log += c[6] * x * y + c[7] * y * z + c[8] * x * z
    # the expected square over a head, so that the field averages to about 1
    log -= np.float32(0.18) * (c[3] + c[4] + c[5])
    return np.asarray(np.exp(log))


def _kspace(image: Array, how: Acquisition) -> Array:
    """Fermi window and edge amplification in k-space: mild ringing, blur or sharpening."""
    from scipy.fft import irfftn, next_fast_len, rfftn

    size = [next_fast_len(s, real=True) for s in image.shape]
    spectrum = rfftn(image, size)
    axes = [np.fft.fftfreq(size[0]), np.fft.fftfreq(size[1]), np.fft.rfftfreq(size[2])]
    for axis, frequency in enumerate(axes):
        radius = np.abs(frequency) * 2
        window = 1 / (1 + np.exp((radius - how.cutoff) / 0.03)) * (1 + how.sharpen * radius**2)
        spectrum *= window.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    x, y, z = image.shape
    out: Array = irfftn(spectrum, size)[:x, :y, :z].astype(np.float32, copy=False)
    return out
