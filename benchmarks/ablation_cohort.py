"""The cohort of the ablations: the scans `sgcd cohort` would write, prepared, as arrays.

Training subjects were scanned at one site each; traveling test subjects, of anatomies no training
saw, at every site, one of them never in training. A file a subject, so that an interrupted run
goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.cohort import render_scan
from pipelines.cohort.make import draw_subject
from pipelines.cohort.plan import CohortRequest, Member, choose_anatomies, plan_members
from pipelines.cohort.scanner import Scanner
from pipelines.cohort.subject import Subject
from ray_jobs.volume_stream import Looks, Survey
from sgcd_core.batch import Batch, make_batch
from sgcd_core.config import PrepareConfig, SgcdConfig
from sgcd_core.io.nifti import NiftiScan
from sgcd_core.style.look import SiteLook, blend, leave_out, measure_look, voxels
from sgcd_core.style.outlier import style_features
from sgcd_core.volume.prepare import Prepared, prepare_scan
from sgcd_core.volume.resample import voxel_sides

Look = NDArray[np.float32]


#: In the names of arrays of a second scan.
AGAIN = "_again"


@dataclass(frozen=True)
class Plan:
    """What a cohort consists of.

    Attributes:
        request: Arguments as of `sgcd cohort`.
        anatomies: Addresses by name.
        prepare: How scans are brought onto the model grid.
        rescanned: Site at which traveling subjects are scanned twice; empty: none.
        shaded: False for coils without a bias field, what a perfect correction would leave.
    """

    request: CohortRequest
    anatomies: dict[str, str]
    prepare: PrepareConfig
    rescanned: str = ""
    shaded: bool = True

    @classmethod
    def of(
        cls, anatomy: str | None, prepare: PrepareConfig, *, sites: int, each: int, traveling: int,
        seed: int, mm: float = 2.0, rescanned: str = "", shaded: bool = True,
    ) -> Plan:  # fmt: skip
        """Plan `each` training subjects at every one of `sites`, and one unseen site."""
        found, train, test = choose_anatomies(anatomy, None, None)
        request = CohortRequest(
            subjects=each * sites, sites=sites, traveling=traveling, unseen_sites=1,
            anatomies=tuple(sorted(found)), train_anatomies=train, test_anatomies=test, mm=mm,
            seed=seed,
        )  # fmt: skip
        return cls(request, found, prepare, rescanned, shaded)

    @property
    def members(self) -> list[Member]:
        """Subjects; those of one anatomy follow each other, since reading one takes long."""
        return sorted(plan_members(self.request)[0], key=lambda m: m.anatomy)

    @property
    def scanners(self) -> list[Scanner]:
        """Scanners, the unseen one last."""
        found = plan_members(self.request)[1]
        if self.shaded:
            return found
        return [s.model_copy(update={"bias": (0.0,) * len(s.bias)}) for s in found]

    def digest(self) -> str:
        """16 hex digits that any change of the scans changes."""
        text = self.request.model_dump_json() + self.prepare.digest() + self.rescanned
        text += "" if self.shaded else " unshaded"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepared(
    subject: Subject, scanner: Scanner, sequence: str, mm: float, rng: np.random.Generator,
    config: PrepareConfig, placed: NDArray[np.float64] | None = None,
) -> Prepared:  # fmt: skip
    """One digital scan on the model grid, rounded as its file would be.

    A digital head lies in the same place at every scanner: `placed`, world → template as found for
    another scan of it, lays both on the same voxels.
    """
    data, affine = render_scan(subject, scanner, sequence, mm, rng)
    x, y, z = (float(side) for side in voxel_sides(affine))
    stored = np.clip(np.rint(data), 0, 32767).astype(np.float32)
    scan = NiftiScan(stored, affine, stored.shape, (x, y, z), None, affine, 0, 1, "int16", "")
    return prepare_scan(scan, config, sequence=sequence, placed=placed)


def make_member(folder: Path, plan: Plan, member: Member) -> Path:
    """Render and prepare all scans of a subject, once."""
    path = folder / f"{member.label}.npz"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    request, arrays = plan.request, {}
    subject = draw_subject(request, member, plan.anatomies[member.anatomy])
    placed: NDArray[np.float64] | None = None
    for number, scanner in enumerate(plan.scanners):
        if scanner.site not in member.sites:
            continue
        for index, sequence in enumerate(request.sequences):
            again = member.split == "test" and scanner.site == plan.rescanned
            for extra, name in enumerate(("", AGAIN) if again else ("",)):
                key = [request.seed, 41, member.number, number, index] + [1] * extra
                rng = np.random.default_rng(key)
                scan = prepared(subject, scanner, sequence, request.mm, rng, plan.prepare, placed)
                placed = np.array(scan.geometry.world_to_template)
                arrays[f"{scanner.site}_{sequence}{name}_image"] = scan.image
                arrays[f"{scanner.site}_{sequence}{name}_mask"] = scan.mask
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    with os.fdopen(handle, "wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)
    return path


@dataclass(frozen=True, eq=False)
class Scan:
    """A prepared scan; `look` is its own."""

    scan_id: str
    subject: str
    site: str
    sequence: str
    split: str
    image: NDArray[np.float32]
    mask: NDArray[np.bool_]
    look: Look

    def row(self) -> dict[str, Any]:
        """As the schedule of a training takes it."""
        return {"scan_id": self.scan_id, "site": self.site, "sequence": self.sequence}


class Cohort:
    """All scans of a plan, read from `folder`, and what training and harmonizing need to know.

    Args:
        folder: Where `make_member` wrote.
        plan: The plan.
        target: Site whose look is wanted.
    """

    def __init__(self, folder: Path, plan: Plan, target: str) -> None:
        self.target, self.sequences = target, plan.request.sequences
        self.rescans: dict[tuple[str, str], tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
        self.training_sites = [s.site for s in plan.scanners[: plan.request.sites]]
        self.scans: dict[str, Scan] = {}
        sides = {
            (scanner.site, sequence): max(made.voxel) * plan.request.mm
            for scanner in plan.scanners for sequence, made in scanner.acquisitions.items()
        }  # fmt: skip
        for member in sorted(plan.members, key=lambda m: m.number):
            with np.load(folder / f"{member.label}.npz") as arrays:
                for site in member.sites:
                    for sequence in self.sequences:
                        name = f"{site}_{sequence}"
                        image, mask = arrays[f"{name}_image"], arrays[f"{name}_mask"]
                        look = measure_look(
                            image, mask, plan.prepare.mm, sequence, voxel_mm=sides[site, sequence]
                        ).vector()
                        scan_id = f"{member.label}_{name}"
                        self.scans[scan_id] = Scan(scan_id, member.label, site, sequence,
                                                   member.split, image, mask, look)  # fmt: skip
                        if f"{name}{AGAIN}_image" in arrays:
                            self.rescans[member.label, sequence] = (
                                arrays[f"{name}{AGAIN}_image"], arrays[f"{name}{AGAIN}_mask"],
                            )  # fmt: skip

    @property
    def training(self) -> list[Scan]:
        """Scans to learn from."""
        return [scan for scan in self.scans.values() if scan.split == "train"]

    @property
    def test(self) -> list[Scan]:
        """Scans to harmonize: the traveling subjects' at all sites but the target."""
        return [s for s in self.scans.values() if s.split == "test" and s.site != self.target]

    @property
    def few(self) -> list[Scan]:
        """Those of `test` from one seen site and the unseen one."""
        sites = [site for site in self.training_sites if site != self.target][:1]
        return [s for s in self.test if s.site in sites or s.site not in self.training_sites]

    def truth(self, scan: Scan) -> Scan:
        """The subject's own scan at the target."""
        return self.scans[f"{scan.subject}_{self.target}_{scan.sequence}"]

    @cached_property
    def survey(self) -> Survey:
        """Measures of the training scans, as `sgcd train` takes them."""
        scans = self.training
        return Survey(
            [style_features(scan.image, scan.mask) for scan in scans],
            [self.sequences.index(scan.sequence) for scan in scans],
            self._looks(scans),
        )

    def _looks(self, scans: list[Scan]) -> Looks:
        groups: dict[tuple[str, int], list[Scan]] = {}
        for scan in scans:
            key = (scan.site, self.sequences.index(scan.sequence))
            groups.setdefault(key, []).append(scan)
        return {
            key: SiteLook(
                len(group), np.mean([scan.look for scan in group], axis=0),
                len({scan.subject for scan in group}),
            )
            for key, group in sorted(groups.items())
        }  # fmt: skip

    @cached_property
    def site_looks(self) -> Looks:
        """Looks of all sites; of test scans only where there is no other (`ray_jobs.site_looks`)"""
        return self._looks([s for s in self.scans.values() if s.split == "test"]) | dict(
            self.survey.looks
        )

    def site_look(self, scan: Scan) -> SiteLook:
        """The look of the scan's site and sequence."""
        return self.site_looks[scan.site, self.sequences.index(scan.sequence)]

    def batches(
        self, schedule: list[dict[str, Any]], role: str, size: int, config: SgcdConfig
    ) -> Iterator[Batch]:
        """Batches of `size` scans in the order of `schedule_steps`, with looks as
        `ray_jobs.volume_stream.load_packed` gives them.
        """
        for first in range(0, len(schedule), size):
            rows = [row["scans"][role] for row in schedule[first : first + size]]
            scans = [self.scans[scan_id] for scan_id, *_ in rows]
            looks, sources, subjects = [], [], []
            for scan, (_, index, seed, site) in zip(scans, rows, strict=True):
                theirs = self.survey.looks[site, index]
                looks.append(leave_out(theirs.mean, theirs.scans, scan.look))
                part = float(np.random.default_rng(seed).uniform())
                sources.append(blend(theirs.mean, scan.look, part))
                subjects.append(theirs.subjects)
            yield make_batch(
                [s.image for s in scans], [s.mask for s in scans], [s.sequence for s in scans],
                [row[2] for row in rows], config.sequences, looks, sources, subjects,
                [float(voxels(s.look)) for s in scans],
            )  # fmt: skip
