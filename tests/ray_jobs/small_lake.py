"""Small data sets and a model that learned nothing: enough to run every command for real."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SETTINGS = [
    "prepare.shape=[24,24,24]", "prepare.mm=8", "prepare.bias_correction=none",
    "prepare.registration=none", "network.channels=[8,16]",
    "network.attention_levels=[false,true]", "network.head_channels=8",
    "target_stage.encoder=statistics", "target_stage.steps=1", "target_stage.precision=fp32",
    "global_stage.precision=fp32",
]  # fmt: skip


def make_site(folder: Path, site: str, subjects: int, first: int = 0) -> Path:
    """A BIDS data set of T1w scans: the template at 3 mm, each subject a little different."""
    from sgcd_core.io.nifti import encode_nifti
    from sgcd_core.volume.template import template

    image, mask, affine = template(3.0)
    lines = ["participant_id\tsite"]
    for number in range(first, first + subjects):
        name = f"sub-{site}{number}"
        curve = 1 + 0.05 * number
        scan = np.where(mask, 40 + 600 * image**curve, 0)
        (folder / name / "anat").mkdir(parents=True)
        (folder / name / "anat" / f"{name}_T1w.nii.gz").write_bytes(encode_nifti(scan, affine))
        lines.append(f"{name}\t{site}")
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")
    (folder / "dataset_description.json").write_text(
        json.dumps({"Name": site, "BIDSVersion": "1.10.0"})
    )
    return folder


def make_global_model(lake: str) -> None:
    """A `global` model that learned nothing: enough to be tuned and to harmonize with."""
    import torch

    from pipelines.lake import Lake
    from sgcd_core.config import load_config
    from sgcd_core.global_stage import GlobalStage
    from sgcd_core.io.store import Store
    from sgcd_core.modelpack import save_modelpack
    from sgcd_core.style.look import LOOK_SIZE
    from sgcd_core.style.outlier import OutlierModel, style_features
    from sgcd_core.volume.condition import Goals

    config = load_config("tiny", settings=SETTINGS)
    rng = np.random.default_rng(0)
    mask = np.ones(config.prepare.shape, bool)
    features = [style_features(rng.uniform(0, 1, mask.shape).astype(np.float32), mask)] * 3
    stage = GlobalStage(config, 1, "cpu")
    meta = {
        "name": "global", "kind": "global", "target": None, "training_sites": ["A"],
        "sequences": ["T1w"],
    }  # fmt: skip
    common = Goals(torch.zeros(len(config.sequences), LOOK_SIZE))
    pack = stage.pack(OutlierModel.fit(features, [0, 0, 0]), common, meta)
    save_modelpack(Lake.open(lake, create=True).model("global", 1), pack, Store())
