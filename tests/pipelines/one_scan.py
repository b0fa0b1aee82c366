"""A data set of one scan, prepared in a lake, and a network that draws something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.catalog import to_arrow
from pipelines.harmonize import Job, Model, harmonize_scan
from pipelines.lake import Lake
from pipelines.prepare import save_prepared
from pipelines.schemas import ATTEMPTS, RESULTS
from sgcd_core.config import SgcdConfig, load_config
from sgcd_core.global_stage import GlobalStage
from sgcd_core.harmonizer import Harmonizer
from sgcd_core.io.nifti import encode_nifti, read_nifti
from sgcd_core.io.store import Store
from sgcd_core.modelpack import ModelPack
from sgcd_core.style.look import LOOK_SIZE
from sgcd_core.style.outlier import OutlierModel, style_features
from sgcd_core.volume.condition import Goals
from sgcd_core.volume.geometry import Geometry, rows
from sgcd_core.volume.prepare import Prepared
from sgcd_core.volume.transport import native_on_model_grid

NATIVE, MODEL = (36, 40, 36), (16, 16, 16)
CONFIG = load_config(
    "tiny",
    settings=[
        "prepare.shape=[16, 16, 16]", "prepare.mm=8", "network.channels=[8, 16]",
        "network.attention_levels=[false, true]", "network.head_channels=8", "network.patch=1",
        "network.norm_groups=4", "condition.match=none", "global_stage.precision=fp32",
        "target_stage.precision=fp32", "global_sampler.t_start=400",
    ],
)  # fmt: skip


class Site:
    """A data set of one scan, prepared in a lake."""

    def __init__(self, folder: Path) -> None:
        affine = np.diag([4.0, 4.0, 4.0, 1.0])
        affine[:3, 3] = -4.0 * (np.array(NATIVE) - 1) / 2
        model = np.diag([8.0, 8.0, 8.0, 1.0])
        model[:3, 3] = -8.0 * (np.array(MODEL) - 1) / 2
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in NATIVE], indexing="ij"))
        radius = np.sqrt((grid**2).sum(0))
        self.mask = radius < 0.8
        rng = np.random.default_rng(0)
        tissue = np.select([radius < 0.35, radius < 0.6], [0.85, 0.5], 0.25)
        tissue = tissue + 0.05 * rng.standard_normal(NATIVE)
        self.folder = folder / "bids/sub-01/ses-2/anat"
        self.folder.mkdir(parents=True)
        self.file = self.folder / "sub-01_ses-2_run-1_T1w.nii.gz"
        data = np.where(self.mask, np.clip(tissue, 0.01, 1) * 700, 0).astype(np.float32)
        self.file.write_bytes(encode_nifti(data, affine))
        self.scan = read_nifti(str(self.file))
        self.lesion = ((grid - np.array([0.25, 0, 0])[:, None, None, None]) ** 2).sum(0) < 0.06
        self.tries: list[dict[str, Any]] = []  # of the last run
        self.lake = Lake.open(str(folder / "lake"), create=True)
        self.geometry = Geometry(
            NATIVE, rows(affine), ((0, 1), (1, 1), (2, 1)), rows(model), MODEL, rows(np.eye(4)),
            0.0, 700.0, 1200.0,
        )  # fmt: skip
        image, model_mask = native_on_model_grid(self.scan, self.mask, self.geometry)
        self.image, self.model_mask = image.clip(0, 1), model_mask
        self.row: dict[str, Any] = {
            "scan_id": self.scan.sha256[:32], "dataset": "bids", "subject": "01", "session": "2",
            "site": "A", "sequence": "T1w", "uri": str(self.file),
        }  # fmt: skip
        prepared = Prepared(self.image, model_mask, self.mask, self.geometry)
        recipe = self.lake.prepared(CONFIG.prepare.digest(), self.row["scan_id"])
        save_prepared(recipe, self.scan, prepared, Store())

    def write_mask(self, name: str, lesion: np.ndarray | None = None) -> Path:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lesion = self.lesion if lesion is None else lesion
        file.write_bytes(encode_nifti(lesion, self.scan, dtype=np.uint8))
        return file

    def run(self, model: Model, version: int, **more: Any) -> dict[str, Any]:
        job = Job(
            lake=self.lake, model="global", version=version, target=None, config=CONFIG,
            code_version="t", batch_id="b", **more,
        )  # fmt: skip
        self.tries = []
        stem = "sub-01/ses-2/anat/sub-01_ses-2_run-1_T1w"
        row = harmonize_scan(self.row, job, model, stem, tries=self.tries)
        to_arrow(RESULTS, [row])  # every column is known and of its type
        whose = {name: row[name] for name in ("scan_id", "model", "model_version")}
        to_arrow(ATTEMPTS, [whose | item for item in self.tries])
        return row


def model_pack(folder: Path, config: SgcdConfig = CONFIG, **meta: Any) -> ModelPack:
    """A network that draws something, and something else for other noise."""
    stage = GlobalStage(config, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in stage.network.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    one = Site(folder)
    outliers = OutlierModel.fit([style_features(one.image, one.model_mask)] * 2, [0, 0])
    return stage.pack(outliers, Goals(torch.zeros(2, LOOK_SIZE)), {"name": "global", **meta})


def toy_model(folder: Path) -> Harmonizer:
    """That network, loaded."""
    return Harmonizer(model_pack(folder))
