"""Signal equations: what a voxel of given proton density, T1 and T2 looks like under a protocol."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Array = NDArray[np.float32]
Kind = Literal["mprage", "spoiled_gradient_echo", "spin_echo"]


class Protocol(BaseModel):
    """Timing of one acquisition. Times in ms, angles in degrees.

    Attributes:
        kind: The signal equation.
        tr: Repetition time; for `mprage` from inversion to inversion.
        te: Echo time.
        ti: Inversion time to the centre of k-space (`mprage` only).
        flip: Excitation flip angle.
        readouts: Excitations after each inversion (`mprage` only).
        echo_spacing: Time between these (`mprage` only).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    tr: float
    te: float
    ti: float | None = None
    flip: float = 90.0
    readouts: int = 160
    echo_spacing: float = 7.0


def signal(
    protocol: Protocol, proton_density: Array, t1: Array, t2: Array, field_strength: float
) -> Array:
    """Magnitude signal, same shape as the inputs, ≥ 0, in units of the proton density.

    Args:
        protocol: Timing.
        proton_density: Relative to water, ≥ 0.
        t1: Longitudinal relaxation time, ms, within 50 to 8000.
        t2: Transverse relaxation time, ms, > 0.
        field_strength: Tesla; sets R2' (T2* = 1 / (1/T2 + R2')) for gradient echoes.

    The dependence on T1 is one smooth function of one variable: it is tabulated on 4096 points
    of T1 in float64 and looked up (relative error below 1e-3), as exponentials of millions of
    voxels are what a scan would otherwise spend its time on.
    """
    grid = np.linspace(50.0, 8000.0, 4096)
    table = longitudinal(protocol, grid).astype(np.float32)
    index = (t1 - np.float32(50.0)) * np.float32(4095 / 7950.0) + np.float32(0.5)
    weight = table[np.clip(index, 0, 4095).astype(np.int32)]
    decay = np.float32(-protocol.te) / t2
    if protocol.kind != "spin_echo":
        decay = decay - np.float32(protocol.te * r2_prime(field_strength))
    out: Array = proton_density * weight * np.exp(decay)
    return out


def r2_prime(field_strength: float) -> float:
    """Reversible dephasing R2' in 1/ms; about 3.3/s per tesla in tissue (Yablonskiy 1994)."""
    return 3.3e-3 * field_strength


def longitudinal(protocol: Protocol, t1: NDArray[np.float64]) -> NDArray[np.float64]:
    """Transverse magnetization just after excitation per unit of equilibrium, absolute value."""
    if protocol.kind == "spin_echo":
        return spin_echo(t1, protocol.tr, protocol.te)
    alpha = np.deg2rad(protocol.flip)
    if protocol.kind == "spoiled_gradient_echo":
        return spoiled_gradient_echo(t1, protocol.tr, float(alpha))
    return mprage(protocol, t1)


def spin_echo(t1: NDArray[np.float64], tr: float, te: float) -> NDArray[np.float64]:
    """90°-180° spin echo: |1 − 2 e^{−(TR−TE/2)/T1} + e^{−TR/T1}| (Bernstein 2004, Eq. 14.53)."""
    return np.abs(1.0 - 2.0 * np.exp(-(tr - te / 2) / t1) + np.exp(-tr / t1))


def spoiled_gradient_echo(t1: NDArray[np.float64], tr: float, alpha: float) -> NDArray[np.float64]:
    """Ernst's steady state: sin α (1 − E1) / (1 − cos α E1), α in radians."""
    e1 = np.exp(-tr / t1)
    return np.asarray(np.sin(alpha) * (1.0 - e1) / (1.0 - np.cos(alpha) * e1))


def mprage(protocol: Protocol, t1: NDArray[np.float64]) -> NDArray[np.float64]:
    """MPRAGE at the centre of k-space, in the steady state over inversions.

    Inversion, recovery TI − Nτ/2, N spoiled excitations during which the magnetization tends to
    M0* with the rate 1/T1* = 1/T1 − ln(cos α)/τ, recovery until TR (Deichmann 2000,
    NeuroImage 12:112; Wang 2014, PLoS ONE 9:e96899).
    """
    alpha = np.deg2rad(protocol.flip)
    tau, half = protocol.echo_spacing, protocol.readouts / 2 * protocol.echo_spacing
    before = max((protocol.ti or 0.0) - half, 1.0)
    after = max(protocol.tr - (protocol.ti or 0.0) - half, 1.0)
    rate = 1.0 / t1 - np.log(np.cos(alpha)) / tau
    driven = (1.0 - np.exp(-tau / t1)) / (1.0 - np.exp(-tau * rate))
    e_before, e_after = np.exp(-before / t1), np.exp(-after / t1)
    e_train = np.exp(-2 * half * rate)
    start = (1 - e_after + e_after * (driven * (1 - e_train) + (1 - e_before) * e_train)) / (
        1 + e_before * e_train * e_after
    )
    at_train = 1.0 - (1.0 + start) * e_before
    centre = driven + (at_train - driven) * np.exp(-half * rate)
    return np.asarray(np.abs(centre) * np.sin(alpha))
