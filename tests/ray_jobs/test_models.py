"""Which trained model is found again, and by which name."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_lake import SETTINGS, make_global_model, make_site

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from ray_jobs import cli
from ray_jobs.models import find_trained, models, next_version, resolve, target_model
from sgcd_core.config import load_config
from sgcd_core.errors import ModelError
from sgcd_core.modelpack import FORMAT, load_modelpack, save_modelpack

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

from fake_lake import add_scan, brain

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


@pytest.mark.parametrize("site", ["A", "site-1.5T_b", "Клиника 1", "x:y", "O'Neill (B)"])
def test_a_target_model_is_named_after_its_site(site: str) -> None:
    assert target_model(site) == f"target-{site}"


def test_sites_that_differ_have_models_that_differ() -> None:
    sites = ["Univ/A", "Univ@A", "Univ-A", "Univ//A", "Univ\nA", "/", "@"]
    names = [target_model(site) for site in sites]
    assert len(set(names)) == len(sites) and names[0].startswith("target-Univ-A-")


def test_a_site_of_any_name_has_a_model_that_can_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake, site = Lake(str(tmp_path)), "Univ/A@3T"
    make_global_model(lake.uri)
    config = load_config("tiny", settings=SETTINGS)
    image = brain(0, "T1w", config.prepare.shape)
    rows = [
        add_scan(lake, config, *image, subject=f"{n}", site=site, sequence="T1w", split="train")
        for n in range(3)
    ]
    Catalog(lake).append("scans", rows)

    def tuned(*more: str) -> dict[str, Any]:
        """What `tune` would make, or finds made."""
        words = ["--target", site, "--sequences", "T1w", "--dry-run", "--json", *more]
        assert cli.main(["tune", "--lake", lake.uri, *words]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return document

    plan = tuned()
    name = plan["model"]
    assert plan["version"] is None and plan["target"] == site
    pack = load_modelpack(lake.model("global", 1))
    for version in (1, 2):
        meta = plan | {"target": site if version == 1 else "other"}
        save_modelpack(lake.model(name, version), replace(pack, meta=meta))
    assert models(lake)[name] == [1, 2]
    assert resolve(lake, f"{name}@1") == (name, 1)
    assert tuned()["version"] == 1  # nothing to do
    again = tuned("--force")
    assert again["version"] is None and f"would tune {name} version 3" in again["summary"]
    words = [str(make_site(tmp_path / "new", "B", 1)), "--target", site, "--dry-run", "--json"]
    assert cli.main(["new-site", "--lake", lake.uri, *words]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["model"] == name
