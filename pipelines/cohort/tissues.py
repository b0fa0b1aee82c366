"""Tissues, their relaxation times and proton densities, and which label belongs to which tissue."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Tissue(IntEnum):
    """Tissue numbers used in arrays; 0 is air."""

    AIR = 0
    WHITE = 1
    CORTEX = 2
    SULCAL_CSF = 3
    VENTRICLE = 4
    CEREBELLUM_WHITE = 5
    CEREBELLUM_CORTEX = 6
    THALAMUS = 7
    CAUDATE = 8
    PUTAMEN = 9
    PALLIDUM = 10
    HIPPOCAMPUS = 11
    BRAIN_STEM = 12
    VENTRAL_DC = 13
    LESION = 14
    CHOROID_PLEXUS = 15
    VESSEL = 16
    # whole heads only
    SOFT_TISSUE = 17
    SKIN = 18
    BONE = 19
    MARROW = 20
    EYE = 21
    MUSCLE = 22
    MUCOSA = 23


FLUID = (Tissue.SULCAL_CSF, Tissue.VENTRICLE)
GREY_RIM = (Tissue.CORTEX, Tissue.CEREBELLUM_CORTEX)
FIRST_HEAD_TISSUE = int(Tissue.SOFT_TISSUE)


@dataclass(frozen=True)
class Relaxation:
    """Mean values of one tissue: proton density relative to water, T1 and T2 in ms."""

    proton_density: float
    t1_15: float
    t1_3: float
    t2_15: float
    t2_3: float


#: Brain: Stanisz 2005 (MRM 54:507), Wansapura 1999 (JMRI 9:531), Rooney 2007 (MRM 57:308, deep
#: grey at 1.5 T), Lu 2005 (JMRI 22:13); proton densities: Tofts 2003, Quantitative MRI of the
#: Brain. Soft tissue, fat and marrow: de Bazelaire 2004 (Radiology 230:652), Gold 2004 (AJR
#: 183:343). Where reports disagree (T1 of white matter at 3 T: 830 to 1080 ms) a middle is taken.
RELAXATION: dict[Tissue, Relaxation] = {
    Tissue.AIR: Relaxation(0.0, 1000, 1000, 50, 50),
    Tissue.WHITE: Relaxation(0.70, 650, 880, 76, 70),
    Tissue.CORTEX: Relaxation(0.83, 1120, 1430, 98, 92),
    Tissue.SULCAL_CSF: Relaxation(1.0, 4200, 4300, 1900, 1600),
    Tissue.VENTRICLE: Relaxation(1.0, 4200, 4300, 1900, 1600),
    Tissue.CEREBELLUM_WHITE: Relaxation(0.71, 680, 910, 78, 72),
    Tissue.CEREBELLUM_CORTEX: Relaxation(0.83, 1100, 1380, 96, 88),
    Tissue.THALAMUS: Relaxation(0.78, 880, 1150, 84, 75),
    Tissue.CAUDATE: Relaxation(0.82, 1060, 1330, 88, 79),
    Tissue.PUTAMEN: Relaxation(0.81, 980, 1240, 81, 71),
    Tissue.PALLIDUM: Relaxation(0.74, 760, 980, 67, 56),
    Tissue.HIPPOCAMPUS: Relaxation(0.84, 1130, 1420, 102, 95),
    Tissue.BRAIN_STEM: Relaxation(0.73, 730, 970, 80, 73),
    Tissue.VENTRAL_DC: Relaxation(0.74, 780, 1010, 78, 68),
    Tissue.LESION: Relaxation(0.85, 1050, 1350, 160, 150),
    Tissue.CHOROID_PLEXUS: Relaxation(0.90, 1500, 1850, 180, 165),
    Tissue.VESSEL: Relaxation(0.85, 1440, 1700, 60, 40),
    Tissue.SOFT_TISSUE: Relaxation(0.75, 500, 600, 60, 52),
    Tissue.SKIN: Relaxation(0.80, 330, 390, 68, 62),
    Tissue.BONE: Relaxation(0.06, 500, 550, 6, 5),
    Tissue.MARROW: Relaxation(0.60, 330, 420, 60, 55),
    Tissue.EYE: Relaxation(1.0, 3800, 4000, 1000, 800),
    Tissue.MUSCLE: Relaxation(0.78, 1000, 1350, 40, 34),
    Tissue.MUCOSA: Relaxation(0.85, 1100, 1400, 90, 80),
}

#: FreeSurfer label → tissue. 500 and above: the soft-tissue numbering of SAMSEG and CHARM.
_LABELS: dict[Tissue, tuple[int, ...]] = {
    Tissue.WHITE: (2, 41, 85, 78, 79, 251, 252, 253, 254, 255),
    Tissue.CORTEX: (3, 42),
    Tissue.SULCAL_CSF: (24, 257),
    Tissue.VENTRICLE: (4, 43, 5, 44, 14, 15, 72, 213, 221),
    Tissue.CEREBELLUM_WHITE: (7, 46),
    Tissue.CEREBELLUM_CORTEX: (8, 47),
    Tissue.THALAMUS: (9, 48, 10, 49),
    Tissue.CAUDATE: (11, 50, 26, 58),
    Tissue.PUTAMEN: (12, 51),
    Tissue.PALLIDUM: (13, 52),
    Tissue.HIPPOCAMPUS: (17, 53, 18, 54),
    Tissue.BRAIN_STEM: (16,),
    Tissue.VENTRAL_DC: (28, 60),
    Tissue.LESION: (25, 57, 77),
    Tissue.CHOROID_PLEXUS: (31, 63, 136, 137, 163, 164),
    Tissue.VESSEL: (30, 62, 502, 514),
    Tissue.SOFT_TISSUE: (507, 258, 530),
    Tissue.SKIN: (511,),
    Tissue.BONE: (515, 165, 259),
    Tissue.MARROW: (516,),
    Tissue.EYE: (506,),
    Tissue.MUSCLE: (508,),
    Tissue.MUCOSA: (509, 512),
}
#: Extra-cerebral although their tissue also occurs in the brain.
OUTSIDE_BRAIN = (502, 514)

#: The classes of the published truth: number → (name, tissues).
TRUTH: dict[int, tuple[str, tuple[Tissue, ...]]] = {
    1: ("sulcal CSF", (Tissue.SULCAL_CSF,)),
    2: ("cortical grey matter", (Tissue.CORTEX, Tissue.HIPPOCAMPUS)),
    3: ("white matter", (Tissue.WHITE, Tissue.LESION, Tissue.VESSEL)),
    4: (
        "deep grey matter",
        (Tissue.THALAMUS, Tissue.CAUDATE, Tissue.PUTAMEN, Tissue.PALLIDUM, Tissue.VENTRAL_DC),
    ),
    5: ("ventricles", (Tissue.VENTRICLE, Tissue.CHOROID_PLEXUS)),
    6: ("cerebellar grey matter", (Tissue.CEREBELLUM_CORTEX,)),
    7: ("cerebellar white matter", (Tissue.CEREBELLUM_WHITE,)),
    8: ("brain stem", (Tissue.BRAIN_STEM,)),
}
SULCAL_CLASS, VENTRICLE_CLASS = 1, 5


def label_table() -> NDArray[np.uint8]:
    """Label number (0 to 1023) → tissue. A number this project does not know becomes air."""
    table = np.zeros(1024, np.uint8)
    for tissue, labels in _LABELS.items():
        table[list(labels)] = int(tissue)
    return table


def truth_table() -> NDArray[np.uint8]:
    """Tissue → class of the published truth."""
    table = np.zeros(len(Tissue), np.uint8)
    for number, (_, tissues) in TRUTH.items():
        table[[int(t) for t in tissues]] = number
    return table


def relaxation_arrays(
    field_strength: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Proton density, T1 (ms) and T2 (ms), each indexed by tissue, at a field in tesla.

    Between and beyond 1.5 and 3 T the times follow a power law of the field (Rooney 2007).
    """
    order = [RELAXATION[t] for t in Tissue]
    x = np.log(field_strength / 1.5) / np.log(2.0)

    def between(low: list[float], high: list[float]) -> NDArray[np.float32]:
        a, b = np.asarray(low), np.asarray(high)
        return np.asarray(a * (b / a) ** x, np.float32)

    return (
        np.asarray([r.proton_density for r in order], np.float32),
        between([r.t1_15 for r in order], [r.t1_3 for r in order]),
        between([r.t2_15 for r in order], [r.t2_3 for r in order]),
    )
