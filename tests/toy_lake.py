"""A lake after every step of the way, made by the commands themselves: small, with real Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from ray_jobs import cli
from ray_jobs.session import session

SETTINGS = [
    "prepare.shape=[24,24,24]", "prepare.mm=8", "prepare.bias_correction=none",
    "prepare.registration=none", "network.channels=[8,16]",
    "network.attention_levels=[false,true]", "network.head_channels=8", "global_stage.steps=6",
    "global_stage.checkpoint_every=4", "target_stage.steps=2", "target_stage.encoder=statistics",
]  # fmt: skip
SET = [word for setting in SETTINGS for word in ("--set", setting)]
TARGET = "siteA"


@dataclass
class Place:
    cohort: Path
    lake: Path

    def sgcd(self, *words: str) -> int:
        return cli.main([*words, "--lake", str(self.lake)])

    @property
    def catalog(self) -> Catalog:
        return Catalog(Lake(str(self.lake)))


def settle(patch: pytest.MonkeyPatch, root: Path) -> None:
    """An environment that names no server and no cluster; MLflow of S3 lakes lies in `root`."""
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    patch.delenv("RAY_ADDRESS", raising=False)
    patch.setenv("XDG_DATA_HOME", str(root / "home"))


def make_toy_lake(root: Path) -> Place:
    """The lake in `root`; one scan in the middle of the cohort is damaged."""
    here = Place(root / "cohort", root / "lake")
    words = ["--subjects", "4", "--sites", "2", "--traveling", "1", "--unseen-sites", "1"]
    assert cli.main(["cohort", str(here.cohort), *words, "--mm", "2.6", "--workers", "1"]) == 0
    damaged = sorted(here.cohort.glob("sub-*/**/*_T1w.nii.gz"))[3]
    damaged.write_bytes(damaged.read_bytes()[:-5000])
    with pytest.MonkeyPatch.context() as patch, session():
        settle(patch, root)
        assert here.sgcd("index", str(here.cohort)) == 1  # one scan cannot be used
        assert here.sgcd("prepare", *SET) == 0
        assert here.sgcd("train", *SET) == 0
        assert here.sgcd("suggest-target", *SET) == 0
        assert here.sgcd("tune", "--target", TARGET) == 0
        assert here.sgcd("harmonize", "--model", f"target-{TARGET}") == 1
        assert here.sgcd("evaluate", "--model", f"target-{TARGET}") == 0
        assert here.sgcd("report", "--model", f"target-{TARGET}") == 0
    return here
