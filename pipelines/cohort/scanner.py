"""Digital scanners: what a site does to every brain it sees."""

from __future__ import annotations

import math

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipelines.cohort.physics import Protocol

ORIENTATIONS = ("RAS", "LAS", "LPS", "PSR", "RSA", "LIA", "ASR", "LPI")


class Acquisition(BaseModel):
    """One sequence of one scanner.

    Attributes:
        protocol: Timing.
        voxel: Voxel sides along R, A, S as factors of the nominal side.
        noise: Standard deviation of each channel of the complex noise, parts of white matter.
        gamma: Exponent of the reconstruction's intensity transfer.
        gain: Stored units for white matter.
        cutoff: Radius of the Fermi window in k-space, parts of the Nyquist frequency.
        sharpen: Amplification at the edge of k-space; negative smooths.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    protocol: Protocol
    voxel: tuple[float, float, float]
    noise: float
    gamma: float
    gain: float
    cutoff: float
    sharpen: float


class Scanner(BaseModel):
    """A site: its magnet, coil, protocols and the way it stores images.

    Attributes:
        site: Label.
        field_strength: Tesla.
        model: Made-up model name for the sidecar.
        bias: Coefficients of the log sensitivity over x, y, z, x², y², z², xy, yz, xz with
            x, y, z in [−1, 1] over 110 mm from the isocentre.
        bias_wobble: How much these vary from scan to scan, a part of their size.
        orientation: Axis codes of stored voxels.
        tilt: Obliquity of the slices about the left-right axis, degrees.
        offset: Shift of the field of view, mm.
        acquisitions: By BIDS suffix.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    site: str
    field_strength: float
    model: str
    bias: tuple[float, ...]
    bias_wobble: float
    orientation: str
    tilt: float
    offset: tuple[float, float, float]
    acquisitions: dict[str, Acquisition]


def random_scanner(
    rng: np.random.Generator,
    *,
    site: str = "siteA",
    strength: float = 1.0,
    field_strength: float | None = None,
) -> Scanner:
    """Draw a scanner. Deterministic in `rng`.

    Args:
        rng: Source of every choice.
        site: Label.
        strength: 0 an ideal scanner, 1 the spread of common ones, above 1 an unusual one: scales
            bias field, noise, gamma and filtering. Protocols and fields vary at any strength.
        field_strength: 1.5 or 3 tesla; drawn when None.
    """
    field = float(rng.choice([1.5, 3.0])) if field_strength is None else field_strength
    coil = rng.normal(0, 1, 9) * np.array([0.8, 0.8, 0.8, 1, 1, 1, 0.5, 0.5, 0.5])
    size = strength * rng.uniform(0.08, 0.20) * (1.3 if field > 2 else 0.8)
    bias = coil / np.sqrt((coil**2).mean()) * size
    # an array of coils near the head: brighter rim, darker middle
    bias[3:6] = np.abs(bias[3:6])
    tilt = float(rng.choice([0.0, rng.uniform(-12, 12)]))
    return Scanner(
        site=site,
        field_strength=field,
        model=f"Digital {'MR15' if field < 2 else 'MR30'}-{int(rng.integers(10, 99))}",
        bias=tuple(round(float(b), 4) for b in bias),
        bias_wobble=0.12,
        orientation=str(rng.choice(ORIENTATIONS)),
        tilt=round(tilt, 2),
        offset=tuple(round(float(o), 1) for o in rng.normal(0, 2, 3)),
        acquisitions={
            "T1w": _t1w(rng, field, strength),
            "T2w": _t2w(rng, field, strength),
        },
    )


def _t1w(rng: np.random.Generator, field: float, strength: float) -> Acquisition:
    high = field > 2
    if rng.uniform() < (0.8 if high else 0.5):
        readouts = int(rng.integers(150, 193))
        spacing = float(rng.uniform(6.3, 7.8))
        ti = max(rng.uniform(800, 1100), readouts / 2 * spacing + 40)
        protocol = Protocol(
            kind="mprage", tr=round(rng.uniform(1800, 2600)), te=round(rng.uniform(2.1, 4.0), 2),
            ti=round(ti), flip=round(rng.uniform(7, 11)), readouts=readouts,
            echo_spacing=round(spacing, 2),
        )  # fmt: skip
    else:
        protocol = Protocol(
            kind="spoiled_gradient_echo", tr=round(rng.uniform(10, 24), 1),
            te=round(rng.uniform(2.4, 5.0), 2), flip=round(rng.uniform(20, 30)),
        )  # fmt: skip
    voxel = _voxel(rng, 1.3)
    return _acquisition(rng, protocol, voxel, 0.025 if high else 0.04, strength)


def _t2w(rng: np.random.Generator, field: float, strength: float) -> Acquisition:
    high = field > 2
    protocol = Protocol(
        kind="spin_echo", tr=round(rng.uniform(2800, 6500)),
        te=round(rng.uniform(75, 115) if high else rng.uniform(80, 125)),
    )  # fmt: skip
    voxel = _voxel(rng, 1.6)
    return _acquisition(rng, protocol, voxel, 0.03 if high else 0.05, strength)


def _voxel(rng: np.random.Generator, longest: float) -> tuple[float, float, float]:
    """Isotropic, or thicker along one axis and finer in the other two."""
    if rng.uniform() < 0.35:
        return (1.0, 1.0, 1.0)
    thick = rng.uniform(1.05, longest)
    fine = rng.uniform(0.85, 1.0)
    axis = int(rng.choice(3, p=[0.3, 0.15, 0.55]))
    sides = [round(float(thick if a == axis else fine), 3) for a in range(3)]
    return (sides[0], sides[1], sides[2])


def _acquisition(
    rng: np.random.Generator,
    protocol: Protocol,
    voxel: tuple[float, float, float],
    noise: float,
    strength: float,
) -> Acquisition:
    # common scanners differ little in their transfer; an unusual one does so for certain
    bend = (
        np.clip(rng.normal(0, 0.16), -0.2, 0.2)
        if strength <= 1.3
        else rng.choice([-1, 1]) * rng.uniform(0.16, 0.3)
    )
    gamma = math.exp(strength * bend)
    return Acquisition(
        protocol=protocol,
        voxel=voxel,
        noise=round(float(noise * strength**0.5 * rng.uniform(0.5, 1.4)), 4),
        gamma=round(min(max(gamma, 0.45), 2.0), 3),
        gain=round(float(np.exp(rng.uniform(np.log(150), np.log(2500)))), 1),
        cutoff=round(float(rng.uniform(0.85, 1.15) - 0.1 * min(strength, 2.0)), 3),
        sharpen=round(float(strength * rng.normal(0.0, 0.35)), 3),
    )


def random_sites(
    seed: int, sites: int, unseen: int, *, mild: float = 1.0, unusual: float = 1.6
) -> list[Scanner]:
    """The scanners of a cohort: `sites` that training visits, then `unseen` that it does not.

    Fields alternate from a drawn start, so two or more sites always hold both 1.5 and 3 T.
    """
    start = int(np.random.default_rng([seed, 11]).integers(2))
    scanners = []
    for number in range(sites + unseen):
        rng = np.random.default_rng([seed, 12, number])
        field = (1.5, 3.0)[(start + number) % 2]
        strength = mild * rng.uniform(0.6, 1.2) if number < sites else unusual
        scanners.append(
            random_scanner(rng, site=site_name(number), strength=strength, field_strength=field)
        )
    return scanners


def site_name(number: int) -> str:
    """siteA … siteZ, then siteAA …"""
    letters = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        letters = chr(65 + rest) + letters
    return "site" + letters
