"""What was tracked can be read back from MLflow, and MLflow's trouble harms nothing."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.lake import Lake
from pipelines.tracking import Tracker, flatten, tracking_uri
from sgcd_core.config import SgcdConfig


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """One lake for all: making MLflow's database takes seconds."""
    return Lake(str(tmp_path_factory.mktemp("lake dir")))


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def client(lake: Lake) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(lake))


def test_a_run_holds_settings_metrics_figures_and_the_model(lake: Lake) -> None:
    config = SgcdConfig(seed=7)
    with Tracker.start(lake, "train", config, {"code_version": "1.2"}) as tracker:
        for step in range(3):
            tracker.log_metrics({"loss": 3.0 - step, "São (3 T)/T1w": 20.0}, step)
        tracker.log_figure("montage", b"\x89PNG")
        tracker.log_pack({"weights.safetensors": b"w", "sub/record.json": b"{}"})
        run_id = tracker.run_id
    got = client(lake).get_run(run_id)
    assert got.info.status == "FINISHED"
    assert got.data.params["seed"] == "7"
    assert got.data.params["prepare.mm"] == "4.0"
    assert got.data.params["config_digest"] == config.digest()
    assert got.data.tags["code_version"] == "1.2"
    history = client(lake).get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert got.data.metrics["São _3 T_/T1w"] == 20.0
    folder = Path(client(lake).download_artifacts(run_id, ""))
    assert (folder / "figures/montage.png").read_bytes() == b"\x89PNG"
    assert (folder / "modelpack/sub/record.json").read_bytes() == b"{}"
    assert (Path(lake.uri) / "mlflow.db").exists()
    assert (Path(lake.uri) / "mlflow-artifacts") in folder.parents


def test_registering_again_moves_the_alias_and_adds_nothing(lake: Lake) -> None:
    with Tracker.start(lake, "tune") as tracker:
        tracker.log_pack({"weights.safetensors": b"w"})
        tracker.register("target-A", 4, "candidate")
        tracker.register("target-A", 5, "candidate")
        tracker.register("target-A", 4, "candidate")
    known = client(lake).search_model_versions("name = 'target-A'")
    assert sorted(v.tags["lake_version"] for v in known) == ["4", "5"]
    aliased = client(lake).get_model_version_by_alias("target-A", "candidate")
    assert aliased.tags["lake_version"] == "4"


def test_a_run_that_raises_is_marked_failed_and_raises(lake: Lake) -> None:
    with pytest.raises(ZeroDivisionError), Tracker.start(lake, "harmonize") as tracker:
        run_id = tracker.run_id
        raise ZeroDivisionError
    assert client(lake).get_run(run_id).info.status == "FAILED"


def test_a_server_that_is_down_is_a_warning(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), Tracker.start(lake, "train") as tracker:
        tracker.log_metrics({"loss": 1.0})
        tracker.log_figure("x", b"")
        tracker.register("m", 1)
    assert time.monotonic() - started < 40
    assert tracker.run_id is None
    warnings = [r for r in caplog.records if r.name == "pipelines.registry"]
    assert len(warnings) == 1
    assert "the work goes on" in warnings[0].getMessage()


def test_a_database_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "lake").write_bytes(b"a file where the folder should be")
    with Tracker.start(Lake(str(tmp_path / "lake")), "train") as tracker:
        tracker.log_metrics({"loss": 1.0})
    assert tracker.run_id is None


def test_a_lake_on_s3_tracks_under_the_users_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert tracking_uri(Lake("s3://b/lake")) == f"sqlite:///{tmp_path}/sgcd/mlflow.db"


def test_importing_the_module_does_not_import_mlflow() -> None:
    code = "import sys, pipelines.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}
