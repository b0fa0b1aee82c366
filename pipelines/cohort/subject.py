"""A digital person: anatomy, warp, age, and the micro-structure every scanner sees alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.cohort.anatomy import CENTRE, SULCUS_WALLS, VENTRICLE_WALLS, Anatomy
from pipelines.cohort.tissues import FIRST_HEAD_TISSUE, Tissue
from pipelines.cohort.warp import random_displacement, smooth_noise

Array = NDArray[np.float32]
WARP_MM = 4.0
AGES = (20.0, 80.0)
#: Intracranial volume, ml: mean and standard deviation.
INTRACRANIAL_ML = {"F": (1380.0, 90.0), "M": (1560.0, 100.0)}
#: Fluids as parts of the brain hull at twenty and at eighty.
SULCAL, VENTRICLES = (0.15, 0.26), (0.011, 0.042)


@dataclass(frozen=True)
class Subject:
    """All that is the same at every scanner.

    Attributes:
        name: BIDS label.
        age: Years.
        sex: `F` or `M`.
        anatomy: Where the tissue comes from.
        pose: (4, 4) subject world mm RAS+ → anatomy world, before the warp.
        displacement: float32 (3, X, Y, Z), mm, added to points of anatomy world.
        warp_affine: Voxel of `displacement` → anatomy world, mm.
        share: float32 (N,) in [0, 1], part of the main tissue in each voxel, the rest being the
            second one: the anatomy's, less where fluid gave way.
        fluid: float32 (N,) in [0, 1], part of each tissue voxel that age turned to CSF.
        proton_density: float32 (N,), factor around 1.
        t1: float32 (N,), factor around 1.
        t2: float32 (N,), factor around 1.
    """

    name: str
    age: float
    sex: str
    anatomy: Anatomy
    pose: NDArray[np.float64]
    displacement: Array
    warp_affine: NDArray[np.float64]
    share: Array
    fluid: Array
    proton_density: Array
    t1: Array
    t2: Array


def random_subject(
    anatomy: Anatomy,
    rng: np.random.Generator,
    *,
    name: str = "001",
    age: float | None = None,
    sex: str | None = None,
) -> Subject:
    """Draw a person from an anatomy. Deterministic in `rng`.

    Args:
        anatomy: Starting point.
        rng: Source of every choice.
        name: BIDS label.
        age: Years; drawn from 20 to 80 when None.
        sex: `F` or `M`; drawn when None.
    """
    draws = rng.uniform(size=2)
    years = float(round(AGES[0] + (AGES[1] - AGES[0]) * draws[0], 1)) if age is None else age
    kind = ("F" if draws[1] < 0.5 else "M") if sex is None else sex
    warp_shape, warp_affine = _warp_grid(anatomy)
    displacement = random_displacement(rng, warp_shape, WARP_MM)
    pose = _pose(rng, kind, float(anatomy.brain.sum()) * anatomy.mm**3 / 1000.0)
    fluid, share = _ageing(anatomy, rng, years)
    density, t1, t2 = _microstructure(anatomy, rng, years)
    return Subject(name, years, kind, anatomy, pose, displacement, warp_affine, share, fluid,
                   density, t1, t2)  # fmt: skip


def _warp_grid(anatomy: Anatomy) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """A grid of `WARP_MM` over the anatomy's box and 16 mm around it."""
    extent = np.asarray(anatomy.shape) * anatomy.mm
    count = np.ceil((extent + 32.0) / WARP_MM).astype(int) + 1
    affine = np.diag([WARP_MM, WARP_MM, WARP_MM, 1.0])
    affine[:3, 3] = anatomy.affine[:3, 3] - 16.0
    return (int(count[0]), int(count[1]), int(count[2])), affine


def _pose(rng: np.random.Generator, sex: str, anatomy_ml: float) -> NDArray[np.float64]:
    """Position in the scanner (5 degrees, 5 mm), head size by sex, and a little of each axis.

    Head sizes are drawn around the usual intracranial volumes (Buckner 2004, NeuroImage 23:724),
    whatever the anatomy's own: the ICBM152 template, for one, is larger than most heads.
    """
    from scipy.spatial.transform import Rotation

    mean_ml, spread_ml = INTRACRANIAL_ML[sex]
    volume = np.clip(rng.normal(mean_ml, spread_ml), 1100.0, 1900.0)
    scale = np.cbrt(volume / anatomy_ml) * rng.normal(1.0, 0.015, 3).clip(0.96, 1.04)
    turn = Rotation.from_euler("xyz", rng.normal(0, 4.0, 3).clip(-9, 9), degrees=True).as_matrix()
    linear = np.diag(1.0 / scale) @ turn
    pose = np.eye(4)
    pose[:3, :3] = linear
    pose[:3, 3] = CENTRE - linear @ (CENTRE + rng.normal(0, 3.0, 3))
    return pose


def _ageing(anatomy: Anatomy, rng: np.random.Generator, age: float) -> tuple[Array, Array]:
    """Fluid takes the place of tissue with the years: sulci widen, cortex thins, ventricles grow.

    The two fluids get the volume usual at this age, within a few percent from person to person,
    by moving their borders; an anatomy of another age is thereby brought to this one. Loss is
    slow before fifty and faster after (Fjell 2013, NeuroImage 81:335), and a little faster in
    front.

    Returns:
        `fluid`: part of each tissue voxel that became fluid, and `share`: of the main tissue in
        each voxel, less than the anatomy's where fluid gave way.
    """
    years = float(np.clip((age - AGES[0]) / (AGES[1] - AGES[0]), 0, 1))
    course = 0.6 * years + 0.4 * years**2
    noise = np.exp(rng.normal(0, 1, 2) * (0.05, 0.12))
    # a hull that fits tightly, as the template's does, cannot hold the usual sulcal fluid
    fit = min(1.0, float(np.interp(0.8, SULCUS_WALLS, anatomy.sulcus_curve)) / SULCAL[1])
    sulci = (SULCAL[0] + (SULCAL[1] - SULCAL[0]) * course) * noise[0] * fit
    ventricles = (VENTRICLES[0] + (VENTRICLES[1] - VENTRICLES[0]) * course) * noise[1]
    rim = np.float32(np.interp(sulci, anatomy.sulcus_curve, SULCUS_WALLS))
    wall = np.float32(np.interp(ventricles, anatomy.ventricle_curve, VENTRICLE_WALLS))
    y = (anatomy.index // anatomy.shape[2]) % anatomy.shape[1]
    front = np.float32(0.15) * (y.astype(np.float32) / anatomy.shape[1] - np.float32(0.5))
    mm = np.float32(anatomy.mm)
    sulcal = np.clip((rim + front - anatomy.to_sulcus) / mm + 0.5, 0, 1)
    inner = np.clip((wall - anatomy.to_ventricle) / mm + 0.5, 0, 1)
    # fluid outside the hull, in whole heads, lies at no border that could move
    is_sulcus = (anatomy.main == Tissue.SULCAL_CSF) & anatomy.brain
    is_ventricle = np.isin(anatomy.main, (Tissue.VENTRICLE, Tissue.CHOROID_PLEXUS))
    tissue = ~(is_sulcus | is_ventricle)
    fluid = np.where(tissue, np.minimum(sulcal + inner, 1), 0).astype(np.float32)
    left = np.where(is_sulcus, sulcal, np.where(is_ventricle, inner, 1))
    return fluid, (anatomy.share * left).astype(np.float32)


def _microstructure(
    anatomy: Anatomy, rng: np.random.Generator, age: float
) -> tuple[Array, Array, Array]:
    """Factors on proton density, T1 and T2: broad and fine texture, myelin depth, iron by age.

    Iron shortens T2 of the basal ganglia with age (Hallgren 1958); white matter loses myelin
    late in life, so its T1 rises (Yeatman 2014, Nat Commun 5:4932).
    """
    brain = anatomy.main < FIRST_HEAD_TISSUE
    years = np.float32(np.clip((age - AGES[0]) / (AGES[1] - AGES[0]), 0, 1))
    fine = smooth_noise(rng, anatomy.shape, 0.8 / anatomy.mm).reshape(-1)[anatomy.index]
    middle = _broad(anatomy, rng, 5.0)
    broad = _broad(anatomy, rng, 18.0)
    water = _broad(anatomy, rng, 12.0)
    persons = rng.normal(0, 1, (3, 64)).astype(np.float32)[:, : len(Tissue)]
    fluid = np.isin(anatomy.main, (Tissue.SULCAL_CSF, Tissue.VENTRICLE))
    amount = np.where(fluid, np.float32(0.3), np.float32(1.0)) * brain
    t1 = 0.025 * fine + 0.025 * middle + 0.02 * broad
    t2 = 0.030 * fine + 0.020 * middle + 0.02 * water
    density = 0.012 * fine + 0.010 * water
    t1 += 0.015 * persons[0][anatomy.main]
    t2 += 0.020 * persons[1][anatomy.main]
    rim = np.isin(anatomy.main, (Tissue.CORTEX, Tissue.CEREBELLUM_CORTEX))
    t1 += np.where(rim, 0.10 * (0.35 - anatomy.depth), 0).astype(np.float32)
    white = anatomy.main == Tissue.WHITE
    t1 += np.where(white, 0.05 * years - 0.10 * (anatomy.depth - 0.9), 0).astype(np.float32)
    iron = np.isin(anatomy.main, (Tissue.PALLIDUM, Tissue.PUTAMEN, Tissue.CAUDATE))
    t2 -= np.where(iron, 0.10 * years, 0).astype(np.float32)
    caps = np.exp(-np.clip(anatomy.to_ventricle, 0, 30) / np.float32(2.5))
    t2 += np.where(white, 0.5 * years**2 * caps, 0).astype(np.float32)

    def factor(change: NDArray[np.generic]) -> Array:
        return np.asarray(np.clip(1 + amount * change, 0.6, 1.8), np.float32)

    return factor(density), factor(t1), factor(t2)


def _broad(anatomy: Anatomy, rng: np.random.Generator, length: float) -> Array:
    """A Gaussian random field of correlation `length` mm at the anatomy's voxels (N,)."""
    import torch

    spacing = max(anatomy.mm, length / 2.0)
    coarse = [int(np.ceil(s * anatomy.mm / spacing)) + 1 for s in anatomy.shape]
    field = smooth_noise(rng, (coarse[0], coarse[1], coarse[2]), length / spacing)
    wide = torch.nn.functional.interpolate(
        torch.from_numpy(field)[None, None], anatomy.shape, mode="trilinear", align_corners=True
    )
    out: Array = wide.numpy().reshape(-1)[anatomy.index]
    return out
