"""Training, tuning and scoring one row of the ablations, in this process.

Models are kept by what made them, so rows that differ only in what comes later share one. The
steps are those of `sgcd train`, `sgcd tune` and `sgcd harmonize`, without Ray and files between.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from ablation_cohort import Cohort, Plan, Scan
from ablation_list import ABLATIONS, Ablation, evaluations
from numpy.typing import NDArray

from ray_jobs.loop import schedule_steps
from ray_jobs.train_global import stage_digest
from ray_jobs.tune_target import LATER as AFTER_STAGE2
from ray_jobs.volume_stream import common_goals, site_goals
from sgcd_core.batch import make_batch
from sgcd_core.box import Box, find_box, load_box, load_composition
from sgcd_core.config import SgcdConfig
from sgcd_core.diffusion.network import build_network
from sgcd_core.errors import SgcdError
from sgcd_core.global_stage import GlobalStage
from sgcd_core.harmonizer import Harmonizer
from sgcd_core.inversions import Inversions
from sgcd_core.metrics import measure_all
from sgcd_core.modelpack import ModelPack, has_modelpack, load_modelpack, save_modelpack
from sgcd_core.style.encoder import load_encoder
from sgcd_core.style.look import OWN_PART, blend, voxels
from sgcd_core.style.outlier import OutlierModel
from sgcd_core.target_stage import TargetStage
from sgcd_core.volume.condition import Goals, LookMatcher, build_condition, from_network

Row = dict[str, Any]
#: Changes when what a result holds does.
FORMAT = 1
_COHORTS: dict[tuple[Path, str], Cohort] = {}


@dataclass(frozen=True)
class Work:
    """A run of the ablations.

    Attributes:
        folder: Cohort, models and results lie here.
        plan: The cohort.
        preset: Of all rows.
        base: `key=value` of all rows, the numbers of steps among them.
        target: Site whose look is wanted.
    """

    folder: Path
    plan: Plan
    preset: str
    base: tuple[str, ...]
    target: str = "siteA"

    @property
    def cohort(self) -> Cohort:
        """The cohort, made before; kept in memory."""
        key = (self.cohort_folder, self.target)
        if key not in _COHORTS:
            _COHORTS.clear()
            _COHORTS[key] = Cohort(self.cohort_folder, self.plan, self.target)
        return _COHORTS[key]

    @property
    def cohort_folder(self) -> Path:
        """Where its subjects lie."""
        return self.folder / f"cohort-{self.plan.digest()}"

    def configs(self, ablation: Ablation) -> tuple[SgcdConfig, SgcdConfig]:
        """Settings of training and of use."""
        return (
            ablation.trained_config(self.preset, self.base),
            ablation.config(self.preset, self.base),
        )

    def start(self, ablation: Ablation) -> str:
        """`box` or `scratch`: where Stage 1 of the row starts."""
        config, _ = self.configs(ablation)
        return "box" if ablation.start == "box" and fitting_box(config) else "scratch"

    def stage1_key(self, ablation: Ablation) -> str:
        """What made the row's Stage 1 model."""
        config, _ = self.configs(ablation)
        return _digest(FORMAT, self.plan.digest(), stage_digest(config), self.start(ablation),
                       _weights(self.preset))  # fmt: skip

    def stage2_key(self, ablation: Ablation) -> str:
        """What made the row's Stage 2 model."""
        config, _ = self.configs(ablation)
        return _digest(self.stage1_key(ablation), self.target, stage_digest(config, AFTER_STAGE2))

    def result_key(self, ablation: Ablation) -> str:
        """What made the row's figures."""
        _, config = self.configs(ablation)
        return _digest(self.stage2_key(ablation), config.digest(), ablation.stage2,
                       ablation.network, ablation.group, ablation.at_target)  # fmt: skip

    def result_file(self, ablation: Ablation) -> Path:
        """Where the row's figures are kept."""
        return self.folder / "results" / f"{ablation.name}.json"

    def result(self, ablation: Ablation) -> Row | None:
        """The row's figures, if these very ones were taken."""
        path = self.result_file(ablation)
        if not path.exists():
            return None
        found: Row = json.loads(path.read_text())
        if found["key"] != self.result_key(ablation):
            return None
        return found | {"evaluations": evaluations(ablation, self.configs(ablation)[1])}

    def model(self, key: str) -> str:
        """Folder of a model."""
        return str(self.folder / "models" / key)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


@lru_cache(maxsize=4)
def _weights(preset: str) -> str:
    """Digest of what comes with the package."""
    folder, found = files("sgcd_core") / "weights", hashlib.sha256()
    for name in (f"{preset}.safetensors", "composition.safetensors"):
        if (folder / name).is_file():
            found.update((folder / name).read_bytes())
    return found.hexdigest()[:16]


def fitting_box(config: SgcdConfig) -> Box | None:
    """The box, where every weight has the shape that the settings' network wants."""
    box = find_box(config)
    if box is None:
        return None
    wanted = {name: value.shape for name, value in build_network(config).state_dict().items()}
    return box if {name: value.shape for name, value in box.network.items()} == wanted else None


def train(work: Work, ablation: Ablation) -> None:
    """Stage 1 of the row, unless its model is there."""
    folder = work.model(work.stage1_key(ablation))
    if has_modelpack(folder):
        return
    config, _ = work.configs(ablation)
    cohort, stage_config = work.cohort, config.global_stage
    box = fitting_box(config) if work.start(ablation) == "box" else None
    started = time.perf_counter()
    stage = GlobalStage(config, stage_config.steps, box=box)
    schedule = schedule_steps(
        {"scan": [scan.row() for scan in cohort.training]}, config, stage_config.steps,
        stage_config.batch_size, site_balance=stage_config.site_balance,
    )  # fmt: skip
    for batch in cohort.batches(schedule, "scan", stage_config.batch_size, config):
        losses = stage.step(batch)
    survey = cohort.survey
    outliers = OutlierModel.fit(survey.features, survey.sequences)
    common = common_goals(survey.looks, len(config.sequences))
    meta = {"training_sites": cohort.training_sites, "scans": len(cohort.training),
            "start": work.start(ablation), "losses": losses}  # fmt: skip
    _save(folder, stage.pack(outliers, common, meta), started)


def tune(work: Work, ablation: Ablation) -> None:
    """Stage 2 of the row, unless it has none or its model is there."""
    folder = work.model(work.stage2_key(ablation))
    if not ablation.stage2 or has_modelpack(folder):
        return
    config, _ = work.configs(ablation)
    cohort, stage_config = work.cohort, config.target_stage
    parent = load_modelpack(work.model(work.stage1_key(ablation)))
    encoder = load_encoder(stage_config.encoder, precision_name=stage_config.precision)
    common = Goals.from_state(parent.state, "common")
    goals = site_goals(cohort.survey.looks, work.target, common)
    started = time.perf_counter()
    kept = Inversions(f"{folder}-inversions")
    stage = TargetStage(parent, config, work.target, encoder, goals, inversions=kept)
    own = [scan for scan in cohort.training if scan.site == work.target]
    others = [scan for scan in cohort.training if scan.site != work.target]
    once = [
        {"scans": {"target": (scan.scan_id, cohort.sequences.index(scan.sequence), n, scan.site)}}
        for n, scan in enumerate(own)
    ]  # fmt: skip
    stage.measure_target(cohort.batches(once, "target", 1, config))
    roles = {"source": [s.row() for s in others or own], "target": [s.row() for s in own]}
    size = stage_config.batch_size
    schedule = schedule_steps(roles, config, stage_config.steps, size)
    for source, target in zip(
        cohort.batches(schedule, "source", size, config),
        cohort.batches(schedule, "target", size, config),
        strict=True,
    ):
        losses = stage.step(source, target)
    _save(folder, stage.pack({"losses": losses}), started)


def _save(folder: str, pack: ModelPack, started: float) -> None:
    pack.meta["seconds"] = round(time.perf_counter() - started, 1)
    save_modelpack(folder, pack)


def score(work: Work, ablation: Ablation) -> None:
    """Harmonize the test scans by the row's model and write its figures."""
    config, used = work.configs(ablation)
    result: Row = {
        "key": work.result_key(ablation), "name": ablation.name, "settings": ablation.settings,
        "sampling": ablation.sampling, "start": work.start(ablation),
        "steps": config.global_stage.steps if ablation.network else 0,
        "tune_steps": config.target_stage.steps if ablation.stage2 and ablation.network else 0,
        "train_seconds": 0.0, "tune_seconds": 0.0,
    }  # fmt: skip
    if ablation.network:
        pack = load_modelpack(work.model(work.stage1_key(ablation)))
        result["train_seconds"] = pack.meta["seconds"]
        if ablation.stage2:
            pack = load_modelpack(work.model(work.stage2_key(ablation)))
            result["tune_seconds"] = pack.meta["seconds"]
        pack = replace(pack, config=used)
        if ablation.at_target:
            pack = replace(pack, state=pack.state | target_goals(work.cohort).state("common"))
        method = _by_model(pack, work.cohort)
    else:
        result["start"] = ""
        method = WITHOUT_NETWORK[ablation.name](used, work.cohort)
    scans = work.cohort.test if ablation.group == "variant" else work.cohort.few
    started = time.perf_counter()
    result["rows"] = scored(ablation.name, work.cohort, scans, method)
    result["scan_seconds"] = round((time.perf_counter() - started) / len(scans), 2)
    _write(work.result_file(ablation), result)


def _by_model(pack: ModelPack, cohort: Cohort) -> Callable[[Scan], NDArray[np.float32]]:
    harmonizer = Harmonizer(pack)

    def method(scan: Scan) -> NDArray[np.float32]:
        site = cohort.site_look(scan)
        return harmonizer.harmonize(
            scan.image, scan.mask, scan.sequence, scan.scan_id, site_look=site.mean,
            site_subjects=site.subjects, voxel_mm=float(voxels(scan.look)),
        ).image  # fmt: skip

    return method


def by_matching(config: SgcdConfig, cohort: Cohort) -> Callable[[Scan], NDArray[np.float32]]:
    """What the network is told, without the network."""
    matcher = LookMatcher(
        config.condition.match, config.prepare.mm, config.sequences, load_composition()
    )

    def method(scan: Scan) -> NDArray[np.float32]:
        site = cohort.site_look(scan)
        source = blend(site.mean, scan.look, OWN_PART)
        batch = make_batch(
            [scan.image], [scan.mask], [scan.sequence], [0], config.sequences, [source], [source],
            [site.subjects],
        )  # fmt: skip
        goals = target_goals(cohort)
        assert goals.subjects is not None
        look, subjects = goals.looks[batch["sequence"]], goals.subjects[batch["sequence"]]
        told = build_condition(batch, config.condition, matcher, look, subjects=subjects).content
        assert told is not None
        return np.asarray(from_network(told)[0, 0].numpy(), np.float32)

    return method


def from_the_box(
    config: SgcdConfig, cohort: Cohort, *, unet: bool = True
) -> Callable[[Scan], NDArray[np.float32]]:
    """The network of the box, asked for the target's look; without its U-Net, its look filter."""
    stage = GlobalStage(config, 1, box=load_box(config))
    if not unet:
        stage.network.silence()
    outliers = OutlierModel.fit(cohort.survey.features, cohort.survey.sequences)
    return _by_model(stage.pack(outliers, target_goals(cohort), {}), cohort)


def target_goals(cohort: Cohort) -> Goals:
    """The target's look in each sequence."""
    looks = cohort.survey.looks
    return site_goals(looks, cohort.target, common_goals(looks, len(cohort.sequences)))


def scored(
    name: str, cohort: Cohort, scans: Iterable[Scan], method: Callable[[Scan], NDArray[np.float32]]
) -> list[Row]:
    """Measures of scans by one method, rows as `pipelines.verdict.summarize` takes them."""
    return [row for scan in scans for row in _measures(name, cohort, scan, method(scan))]


def _measures(name: str, cohort: Cohort, scan: Scan, image: NDArray[np.float32]) -> list[Row]:
    goal = cohort.truth(scan)
    return [
        {"subject": scan.subject, "site": scan.site, "sequence": scan.sequence,
         "seen": scan.site in cohort.training_sites, "method": name, "metric": metric,
         "value": value}
        for metric, value in measure_all(image, goal.image, scan.mask & goal.mask).items()
    ]  # fmt: skip


#: Rows without a network of their own.
WITHOUT_NETWORK: dict[
    str, Callable[[SgcdConfig, Cohort], Callable[[Scan], NDArray[np.float32]]]
] = {
    "raw": lambda config, cohort: lambda scan: scan.image,
    "matched": by_matching,
    "filtered": partial(from_the_box, unet=False),
}


def _write(path: Path, result: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, path)


#: What is done for rows in turn, and what tells whether two rows need the same.
PHASES: dict[str, tuple[Callable[[Work, Ablation], None], Callable[[Work, Ablation], str]]] = {
    "train": (train, Work.stage1_key),
    "tune": (tune, Work.stage2_key),
    "score": (score, lambda _, ablation: ablation.name),
}


def attempt(work: Work, phase: str, name: str) -> tuple[str, float, str]:
    """One phase of one row: its name, seconds, and the code of what stopped it, if anything did.

    A row that cannot be trained is a result too: the code is written down in its place.
    """
    ablation, started = ABLATIONS[name], time.perf_counter()
    try:
        PHASES[phase][0](work, ablation)
    except SgcdError as error:
        return name, time.perf_counter() - started, error.code
    return name, time.perf_counter() - started, ""


def write_failure(work: Work, ablation: Ablation, code: str) -> None:
    """The row's result, when a stage of it stopped."""
    _write(
        work.result_file(ablation),
        {"key": work.result_key(ablation), "name": ablation.name, "error": code, "rows": [],
         "settings": ablation.settings, "sampling": ablation.sampling},
    )  # fmt: skip
