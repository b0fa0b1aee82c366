"""`sgcd promote`: checked, shown, written in the lake, mirrored in MLflow; and found again."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import aliases
from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.tracking import Tracker, tracking_uri
from ray_jobs.cli import execute, main
from ray_jobs.context import track_files
from ray_jobs.models import alias_of, pinned, resolve
from sgcd_core.errors import ModelError, UsageError
from sgcd_core.io.store import sha256_hex
from sgcd_core.modelpack import FORMAT

NAME = "target-A"


def write_pack(lake: Lake, version: int, name: str = NAME, **meta: Any) -> Path:
    """A model as far as promoting looks at it: files with right digests."""
    folder = Path(lake.model(name, version))
    folder.mkdir(parents=True)
    weights = f"weights {version} of {lake.uri}".encode()
    (folder / "network.safetensors").write_bytes(weights)
    body = {
        "format": FORMAT, "sha256": {"network.safetensors": sha256_hex(weights)},
        "meta": {"name": name, "version": version, "kind": "target", "target": "A", **meta},
    }  # fmt: skip
    (folder / "pack.json").write_text(json.dumps(body))
    return folder


@pytest.fixture
def lake(tmp_lake: Lake, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """A lake with two versions, and an MLflow that takes no connection."""
    write_pack(tmp_lake, 1, steps=100)
    write_pack(tmp_lake, 2, steps=200)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    return tmp_lake


def promote(lake: Lake, *words: str) -> Any:
    return execute(["promote", *words, "--lake", lake.uri])[1]


def test_without_mlflow_the_lake_alone_serves(lake: Lake) -> None:
    started = time.monotonic()
    done = promote(lake, f"{NAME}@1")
    assert "moved champion of target-A to version 1" in done.summary
    assert "MLflow does not show it yet" in done.summary and done.exit_code == 0
    assert resolve(lake, f"{NAME}@champion") == (NAME, 1)
    done = promote(lake, f"{NAME}@latest")
    assert "from version 1 to version 2" in done.summary
    assert any("steps" in line and "100" in line and "200" in line for line in done.lines)
    assert resolve(lake, f"{NAME}@champion") == (NAME, 2)
    assert time.monotonic() - started < 60
    runs = Catalog(lake).rows("runs").to_pylist()
    kept = [json.loads(r["summary"]) for r in runs if r["command"] == "promote"]
    assert sorted((k["version"], k["previous"] or 0) for k in kept) == [(1, 0), (2, 1)]


def test_rolling_back_is_promoting_the_old_one(lake: Lake) -> None:
    for version in (1, 2, 1):
        promote(lake, f"{NAME}@{version}")
    assert resolve(lake, f"{NAME}@champion") == (NAME, 1)
    assert [m.version for m in aliases.history(lake, NAME, "champion")] == [1, 2, 1]


def test_status_shows_what_stands_behind_each_alias(lake: Lake) -> None:
    row = {"scan_id": "a", "uri": "/a.nii.gz", "site": "A", "sequence": "T1w", "status": "ok"}
    Catalog(lake).append("scans", [row, row | {"scan_id": "b", "site": None, "status": "failed"}])
    Catalog(lake).append("results", [{"scan_id": "a", "model": NAME, "model_version": 1,
                                      "status": "flagged", "code": "FLAG-VOLUMES"}])  # fmt: skip
    promote(lake, f"{NAME}@1")
    status = execute(["status", "--lake", lake.uri])[1]
    lines = [line.split() for line in status.lines]
    assert [NAME, "1,", "2", "champion:", "1"] in lines
    assert ["A", "T1w", "1", "1", "0"] in lines and ["-", "T1w", "1", "0", "0"] in lines
    assert [f"{NAME}@1", "flagged", "FLAG-VOLUMES", "1"] in lines
    assert status.summary.startswith("2 scans (1 usable), 0 prepared, 1 model, 1 result (1 fl")


def test_promoting_again_changes_nothing(lake: Lake) -> None:
    promote(lake, f"{NAME}@2")
    again = promote(lake, f"{NAME}@v2")
    assert "is version 2 already" in again.summary
    assert len(aliases.history(lake, NAME, "champion")) == 1


def test_a_dry_run_shows_and_changes_nothing(lake: Lake) -> None:
    promote(lake, f"{NAME}@1")
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(lake.uri).rglob("*") if p.is_file())
    done = promote(lake, f"{NAME}@2", "--dry-run")
    assert "would move champion of target-A from version 1 to version 2" in done.summary
    assert any("not evaluated" in line for line in done.lines)
    after = sorted((p, p.stat().st_mtime_ns) for p in Path(lake.uri).rglob("*") if p.is_file())
    assert after == before


def test_what_was_measured_is_shown(lake: Lake) -> None:
    rows = [
        {
            "site": site, "sequence": "T1w", "model": NAME, "model_version": version,
            "method": "sgcd", "metric": "psnr", "before": 20.0, "after": 20.0 + version + more,
            "n": 2,
        }
        for version in (1, 2) for site, more in (("B", 0.0), ("C", 1.0))
    ]  # fmt: skip
    Catalog(lake).append("site_metrics", rows)
    promote(lake, f"{NAME}@1")
    lines = promote(lake, f"{NAME}@2", "--dry-run").lines
    assert any(line.split()[-3:] == ["T1w", "21.5", "22.5"] for line in lines)


@pytest.mark.parametrize(
    ("reference", "code"), [(f"{NAME}@3", "MODEL-MISSING"), ("other@1", "MODEL-MISSING")]
)
def test_what_is_not_there_is_refused(lake: Lake, reference: str, code: str) -> None:
    with pytest.raises(ModelError) as caught:
        promote(lake, reference)
    assert caught.value.code == code and caught.value.exit_code == 65


@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_model_with_wrong_digests_is_refused(lake: Lake, how: str) -> None:
    file = Path(lake.model(NAME, 2)) / "network.safetensors"
    file.write_bytes(b"other") if how == "changed" else file.unlink()
    with pytest.raises(ModelError) as caught:
        promote(lake, f"{NAME}@2")
    assert caught.value.code == "MODEL-DIGEST"
    assert aliases.current(lake, NAME, "champion") is None


def test_a_version_must_be_named(lake: Lake) -> None:
    promote(lake, f"{NAME}@1")
    with pytest.raises(UsageError, match=r"it has 1 \(champion\), 2"):
        promote(lake, NAME)
    words = ["promote", f"{NAME}@1", "--alias", "latest", "--lake", lake.uri]
    assert main(words) == 2


def test_files_that_changed_after_the_promotion_are_not_used(lake: Lake) -> None:
    promote(lake, f"{NAME}@1")
    file = Path(lake.model(NAME, 1)) / "pack.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ModelError, match="was changed after it was promoted"):
        resolve(lake, f"{NAME}@champion")


def test_names_of_versions_and_aliases(lake: Lake) -> None:
    assert resolve(lake, f"{NAME}@candidate") == resolve(lake, NAME) == (NAME, 2)
    assert alias_of(f"{NAME}@champion") == "champion"
    assert {alias_of(f"{NAME}{w}") for w in ("", "@2", "@v2", "@latest", "@candidate")} == {None}
    assert pinned(f"{NAME}@champion", NAME, 2) == f"{NAME}@2"
    assert pinned(NAME, NAME, 2) == NAME


def test_an_unknown_alias_lists_those_there_are(
    lake: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    promote(lake, f"{NAME}@1", "--alias", "trial")
    caplog.clear()
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError, match=r"aliases: trial \(1\)"):
        resolve(lake, f"{NAME}@champion")
    assert len(caplog.records) == 1  # MLflow is away: one line
    assert time.monotonic() - started < 30


def test_a_server_that_hangs_costs_a_bounded_time(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        started = time.monotonic()
        with caplog.at_level(logging.WARNING):
            assert promote(lake, f"{NAME}@1").data["mirrored"] is False
        assert time.monotonic() - started < 60
    assert len([r for r in caplog.records if "tracking=off" in r.getMessage()]) == 1
    assert resolve(lake, f"{NAME}@champion") == (NAME, 1)


def test_without_mlflow_installed(lake: Lake) -> None:
    """A process in which `import mlflow` fails."""
    promote(lake, f"{NAME}@1")
    code = (
        "import sys; sys.modules['mlflow'] = None\n"
        "from pipelines.lake import Lake; from ray_jobs.cli import execute\n"
        "from ray_jobs.models import resolve\n"
        f"lake = {lake.uri!r}\n"
        f"done = execute(['promote', '{NAME}@2', '--lake', lake])[1]\n"
        f"assert not done.data['mirrored'], done\n"
        f"assert resolve(Lake(lake), '{NAME}@champion') == ('{NAME}', 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tracking=off") == 1


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow on SQLite, one for all: making its database takes seconds."""
    yield f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def tracked_lake(lake: Lake, database: str, monkeypatch: pytest.MonkeyPatch) -> Lake:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    return lake


def client(lake: Lake) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(lake))


@pytest.mark.slow
def test_the_alias_is_mirrored_with_the_files(tracked_lake: Lake) -> None:
    """Also that of a version that was trained where MLflow did not answer."""
    lake = tracked_lake
    done = promote(lake, f"{NAME}@1")
    assert done.data["mirrored"] and "MLflow" not in done.summary
    found = client(lake).get_model_version_by_alias(NAME, "champion")
    assert (found.tags["lake_version"], found.tags["lake"]) == ("1", lake.uri)
    folder = Path(client(lake).download_artifacts(found.run_id, "modelpack"))
    own = Path(lake.model(NAME, 1))
    assert {p.name: sha256_hex(p.read_bytes()) for p in folder.iterdir()} == {
        p.name: sha256_hex(p.read_bytes()) for p in own.iterdir()
    }
    promote(lake, f"{NAME}@2")
    promote(lake, f"{NAME}@1")
    found = client(lake).get_model_version_by_alias(NAME, "champion")
    assert found.tags["lake_version"] == "1"
    assert len(client(lake).search_model_versions(f"name = '{NAME}'")) == 2


@pytest.mark.slow
def test_where_they_disagree_the_lake_counts(
    tracked_lake: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    """The second lake of one server has its own name there, and neither moves the other's."""
    lake = tracked_lake
    for version in (1, 2):
        promote(lake, f"{NAME}@{version}")
    mlflow = client(lake)
    models = mlflow.search_registered_models()
    (mine,) = [m.name for m in models if m.tags["lake"] == lake.uri]
    first = next(m for m in models if m.name == NAME)
    assert mine != NAME and mine.startswith(f"{NAME}.") and first.tags["lake"] != lake.uri
    (one,) = [
        v.version for v in mlflow.search_model_versions(f"name = '{mine}'")
        if v.tags["lake_version"] == "1"
    ]  # fmt: skip
    mlflow.set_registered_model_alias(mine, "champion", one)  # somebody clicks in MLflow
    assert resolve(lake, f"{NAME}@champion") == (NAME, 2)
    with caplog.at_level(logging.WARNING), Tracker.start(lake, "harmonize") as tracker:
        tracker.compare_alias(NAME, "champion", 2)
    assert "the lake says version 2, which counts; MLflow says 1" in caplog.text
    promote(lake, f"{NAME}@2")  # nothing moves in the lake, and MLflow is put right
    found = mlflow.get_model_version_by_alias(mine, "champion")
    assert found.tags["lake_version"] == "2"


@pytest.mark.slow
def test_an_alias_that_only_mlflow_knows_is_used_and_said(
    tracked_lake: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    lake = tracked_lake
    with Tracker.start(lake, "tune") as tracker:
        track_files(tracker, lake, NAME, 1, "shadow")
    with caplog.at_level(logging.WARNING):
        assert resolve(lake, f"{NAME}@shadow") == (NAME, 1)
    assert "only MLflow knows this alias" in caplog.text


@pytest.mark.slow
def test_a_database_of_a_newer_mlflow_is_a_warning(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    file = tmp_path / "newer.db"
    with sqlite3.connect(file) as newer:
        newer.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        newer.execute("INSERT INTO alembic_version VALUES ('ffffffffffff')")
        newer.execute("CREATE TABLE experiments (experiment_id INTEGER)")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    assert promote(lake, f"{NAME}@1").data["mirrored"] is False
    assert resolve(lake, f"{NAME}@champion") == (NAME, 1)
