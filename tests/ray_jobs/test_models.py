"""Which trained model is found again, and by which name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.lake import Lake
from ray_jobs.models import find_trained, next_version, resolve
from sgcd_core.errors import ModelError
from sgcd_core.modelpack import FORMAT

META = {
    "init": "box", "kind": "global", "target": None, "config_digest": "c", "data_digest": "d",
    "parent_weights": None,
}  # fmt: skip


def lake_with(folder: Path, *metas: dict[str, Any]) -> Lake:
    for version, meta in enumerate(metas, 1):
        place = folder / "models" / "global" / str(version)
        place.mkdir(parents=True)
        (place / "pack.json").write_text(json.dumps({"format": FORMAT, "meta": meta}))
    return Lake(str(folder))


def test_the_same_settings_and_scans_are_not_trained_again(tmp_path: Path) -> None:
    lake = lake_with(tmp_path, META, META | {"data_digest": "e"})
    assert find_trained(lake, "global", META) == 1
    assert next_version(lake, "global") == 3


@pytest.mark.parametrize("key", sorted(META))
def test_a_training_that_differs_in_anything_is_another_model(tmp_path: Path, key: str) -> None:
    """Among them the weights it starts from: --init scratch after --init box trains."""
    lake = lake_with(tmp_path, META)
    other = META | {key: "scratch" if key == "init" else "other"}
    assert find_trained(lake, "global", other) is None


def test_a_version_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    lake = lake_with(tmp_path, META)
    assert resolve(lake, "global") == resolve(lake, "global@1") == ("global", 1)
    for wrong in ("7", "²"):
        with pytest.raises(ModelError, match="it has 1"):
            resolve(lake, f"global@{wrong}")
    with pytest.raises(ModelError, match="it has global"):
        resolve(lake, "target-x")
