"""What was tracked can be read back from MLflow, and MLflow's trouble harms nothing."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import registry
from pipelines.lake import Lake
from pipelines.tracking import EXPERIMENT, Tracker, flatten, metric_name, tracking_uri
from ray_jobs import context
from sgcd_core.config import SgcdConfig
from sgcd_core.io.store import sha256_hex


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


def write_pack(lake: Lake, name: str, version: int = 1, text: str = "new") -> dict[str, bytes]:
    """A model as far as the registry looks at it."""
    folder = Path(lake.model(name, version))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pack.json").write_text(text)
    return {"pack.json": text.encode()}


def track(lake: Lake, name: str, text: str) -> str:
    """A run that trains version 1 of a model; its id."""
    with Tracker.start(lake, "train") as tracker:
        tracker.log_pack(write_pack(lake, name, text=text))
        tracker.register(name, 1, "candidate")
    return str(tracker.run_id)


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
    assert got.data.metrics[metric_name("São (3 T)/T1w")] == 20.0
    folder = Path(client(lake).download_artifacts(run_id, ""))
    assert (folder / "figures/montage.png").read_bytes() == b"\x89PNG"
    assert (folder / "modelpack/sub/record.json").read_bytes() == b"{}"
    assert (Path(lake.uri) / "mlflow.db").exists()
    assert (Path(lake.uri) / "mlflow-artifacts") in folder.parents


def test_registering_again_moves_the_alias_and_adds_nothing(lake: Lake) -> None:
    for version in (4, 5):
        write_pack(lake, "target-A", version)
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


def test_a_database_without_room_is_one_line_with_the_reason(tmp_path: Path) -> None:
    """MLflow prints a traceback of what it raises, too."""
    code = """
import resource, sys
from pipelines.lake import Lake
from pipelines.tracking import Tracker

for limit in (-1, 0):  # the database is made, then nothing may grow
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with Tracker.start(Lake(sys.argv[1]), "train") as tracker:
        tracker.log_metrics({"loss": 1.0})
    print(tracker.run_id)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert [line == "None" for line in done.stdout.splitlines()] == [False, True]
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "MLflow cannot use its database: disk I/O error; the work goes on" in done.stderr


def test_a_lake_on_s3_tracks_under_the_users_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert tracking_uri(Lake("s3://b/lake")) == f"sqlite:///{tmp_path}/sgcd/mlflow.db"


def test_a_lake_made_anew_at_the_same_address_is_not_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/central/mlflow.db")
    lake = Lake(str(tmp_path / "lake"))
    track(lake, "global", "old")
    mlflow = client(lake)
    mlflow.set_registered_model_alias("global", "champion", "1")
    assert registry.alias_version(mlflow, lake, "global", "champion") == 1
    shutil.rmtree(lake.uri)
    assert registry.alias_version(mlflow, lake, "global", "champion") is None  # no model yet
    run_id = track(lake, "global", "new")
    found = mlflow.get_model_version_by_alias("global", "candidate")
    assert (found.run_id, found.tags["pack_sha256"]) == (run_id, sha256_hex(b"new"))
    assert registry.alias_version(mlflow, lake, "global", "champion") is None
    registry.point_alias(mlflow, lake, "global", "champion", 1)
    assert mlflow.get_model_version_by_alias("global", "champion").run_id == run_id
    # One that an earlier release registered: its own artifact says whether it is the lake's.
    mlflow.delete_model_version_tag("global", found.version, "pack_sha256")
    mlflow.delete_model_version_tag("global", "1", "pack_sha256")
    assert registry.find_version(mlflow, lake, "global", 1) == str(found.version)
    assert registry.alias_version(mlflow, lake, "global", "candidate") == 1
    shutil.rmtree(tmp_path / "central/mlflow-artifacts")
    assert registry.find_version(mlflow, lake, "global", 1) is None


def test_a_copied_and_a_moved_lake_leave_the_first_ones_folder_alone(tmp_path: Path) -> None:
    first, copied, moved = (tmp_path / word for word in "ABC")
    track(Lake(str(first)), "global", "A")
    shutil.copytree(first, copied)
    before = sorted(first.rglob("*"))
    run_id = track(Lake(str(copied)), "global", "B")
    assert sorted(first.rglob("*")) == before
    (pack,) = copied.glob(f"mlflow-artifacts/**/{run_id}/**/pack.json")
    assert pack.read_text() == "B"
    shutil.rmtree(first)
    copied.rename(moved)
    for text in ("C", "D"):
        run_id = track(Lake(str(moved)), "global", text)
        assert list(moved.glob(f"mlflow-artifacts/**/{run_id}/**/pack.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["C"]


def test_a_relative_database_and_a_lake_with_a_question_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    lake = Lake(str(tmp_path / "what?x=1" / "lake"))
    assert client(lake).get_run(track(lake, "global", "new")).info.status == "FINISHED"
    assert sorted(os.listdir()) == ["data", "what?x=1"]
    assert os.listdir("what?x=1") == ["lake"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///data/sgcd/mlflow.db")
    run_id = track(lake, "global", "new")
    assert client(lake).get_run(run_id).info.status == "FINISHED"
    assert list(tmp_path.glob(f"data/sgcd/mlflow-artifacts/**/{run_id}/**/pack.json"))


def test_a_site_of_any_name_is_registered(lake: Lake) -> None:
    sites = ("St. Mary's", "St. Mary_s", "GE:3T", "GE_3T", "a b", "Zürich 50%", "x" * 245)
    for site in sites:
        name = f"target-{site}"
        track(lake, name, site)
        assert registry.alias_version(client(lake), lake, name, "candidate") == 1
    known = {model.name for model in client(lake).search_registered_models()}
    assert {"target-St. Mary_s", "target-GE_3T", "target-a b", "target-Zürich 50%"} <= known
    assert f"target-GE_3T-{sha256_hex(b'target-GE:3T')[:8]}" in known


def test_a_site_of_any_name_keeps_its_measures(lake: Lake) -> None:
    sites = (
        "A", "A/", "/A", "//A", "A//B", "A/B", "A_/B", ".", "..", "..A", "", " ", "A(3", "A[3",
        "A\n", "x" * 250 + "A", "x" * 250 + "B", "/" * 300,
    )  # fmt: skip
    names = [f"{site}/T1w/sgcd/ssim" for site in sites]
    with Tracker.start(lake, "evaluate") as tracker:
        tracker.log_metrics({name: float(number) for number, name in enumerate(names)})
    run = client(lake).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert [run.data.metrics[metric_name(name)] for name in names] == list(range(len(names)))
    assert metric_name("Site A-1.5:x/T1w/sgcd/ssim") == "Site A-1.5:x/T1w/sgcd/ssim"
    assert metric_name("A(3/T1w") == f"A_3-{sha256_hex(b'A(3')[:8]}/T1w"


def test_the_losses_of_many_steps_are_few_requests(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    sent: list[int] = []
    send = MlflowClient.log_batch

    def log_batch(self: MlflowClient, run_id: str, metrics: Any = (), **more: Any) -> None:
        sent.append(len(metrics))
        send(self, run_id, metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    history = [{"step": float(n), "loss": 1.0 / (n + 1), "noise": float(n)} for n in range(700)]
    with Tracker.start(lake, "train") as tracker:
        monkeypatch.setattr(context, "track_files", lambda *_: None)
        context.track_training(tracker, lake, "global", 1, history)
    assert [n for n in sent if n] == [1000, 400]
    for name in ("loss", "noise"):
        found = client(lake).get_metric_history(str(tracker.run_id), name)
        assert [(m.step, m.value) for m in found] == [(r["step"], r[name]) for r in history]


def test_a_refusal_is_said_once_and_the_run_still_ends(
    lake: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Tracker.start(lake, "train") as tracker:
        tracker.log_pack(write_pack(lake, "global"))
        tracker.register("global", 1, "no alias")
        tracker.register("global", 1, "no alias")
    assert client(lake).get_run(tracker.run_id).info.status == "FINISHED"
    (text,) = [r.getMessage() for r in caplog.records if r.name == "pipelines.registry"]
    assert "what=register" in text and "INVALID_PARAMETER_VALUE, Invalid alias name" in text


def test_an_experiment_that_was_deleted_is_named(
    lake: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = client(lake)
    with Tracker.start(lake, "train"):
        known = mlflow.get_experiment_by_name(EXPERIMENT)
    mlflow.delete_experiment(known.experiment_id)
    with caplog.at_level(logging.WARNING), Tracker.start(lake, "train") as tracker:
        tracker.log_metrics({"loss": 1.0})
    mlflow.restore_experiment(known.experiment_id)  # the lake is everybody's
    assert tracker.run_id is None
    (text,) = [r.getMessage() for r in caplog.records if r.name == "pipelines.registry"]
    assert "refuses: INVALID_PARAMETER_VALUE, The experiment" in text and "active" in text


def test_nothing_more_is_asked_of_a_server_that_is_lost(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    gone = MlflowClient(tracking_uri="http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING), Tracker.start(lake, "train") as tracker:
        monkeypatch.setattr(tracker._client, "log_batch", gone.log_batch)
        tracker.log_metrics({"loss": 1.0})
    assert client(lake).get_run(tracker.run_id).info.status == "RUNNING"
    (text,) = [r.getMessage() for r in caplog.records if r.name == "pipelines.registry"]
    assert "does not answer" in text and "secret" not in text


def test_importing_the_module_does_not_import_mlflow() -> None:
    code = "import sys, pipelines.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}
