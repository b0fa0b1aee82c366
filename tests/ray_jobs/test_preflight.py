"""Before work begins: what does not fit is refused with the number needed, what may fit is not."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import S3Server

from pipelines import lake_check
from pipelines.lake import Lake
from pipelines.lake_check import check_lake, clock_finding, require_lake
from ray_jobs import cli
from ray_jobs.preflight import (
    NODE_SECONDS,
    Need,
    findings_of,
    growth,
    need_of,
    node_findings,
    require_nodes,
    require_room,
    versions,
)
from sgcd_core.config import load_config
from sgcd_core.errors import ConfigError, StorageError
from sgcd_core.io.store import Store

NODE = {"CPU": 4.0, "GPU": 1.0, "memory": 8e9, "object_store_memory": 1e9}


def failures(need: Need, *nodes: dict[str, float]) -> dict[str, str]:
    found = findings_of(list(nodes or (NODE, NODE)), need)
    return {finding.check: finding.found for finding in found if finding.answer == "fail"}


def test_what_fits_is_not_refused() -> None:
    need = Need(workers=2, cpus=1, gpus=1, memory=8e9, feeding=0.5, object_store=1e9)
    assert failures(need) == {}


@pytest.mark.parametrize(
    ("need", "check", "number"),
    [
        (Need(workers=8, feeding=0.5), "cpus", "needs 8.5 CPUs at once, the cluster has 8"),
        (Need(workers=3, gpus=1), "gpus", "needs 3 GPUs at once, the cluster has 2"),
        (Need(workers=3, memory=5e9), "memory", "needs 5.0 GB of memory for each of 3 workers"),
        (Need(object_store=2e9), "object store", "needs an object store of 2.00 GB"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_number_needed(
    need: Need, check: str, number: str
) -> None:
    found = failures(need)
    assert list(found) == [check] and number in found[check]


def test_a_worker_must_fit_on_one_node() -> None:
    """Two halves of a worker on two nodes are no worker."""
    assert "room for 0" in failures(Need(memory=9e9))["memory"]
    apart = ({"CPU": 4.0, "memory": 8e9}, {"GPU": 1.0, "CPU": 0.5, "memory": 8e9})
    assert "memory" in failures(Need(gpus=1), *apart)


def cluster(*nodes: dict[str, float]) -> Any:
    return SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes])


def test_a_cluster_that_grows_is_measured_by_what_it_may_become(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = {"memory": 16e9, "object_store_memory": 1e9}
    need = Need(workers=4, gpus=1, memory=10e9)
    monkeypatch.delenv("SGCD_CLUSTER_MAX", raising=False)
    with pytest.raises(StorageError, match="SGCD_CLUSTER_MAX"):
        require_room(cluster(head), need)
    groups = [{"nodes": 4, "CPU": 8, "GPU": 1, "memory": 32e9}]
    monkeypatch.setenv("SGCD_CLUSTER_MAX", json.dumps(groups))
    assert growth() == [{"CPU": 8, "GPU": 1, "memory": 32e9}] * 4
    require_room(cluster(head), need)
    with pytest.raises(StorageError, match="needs 5 GPUs at once, the cluster has 4"):
        require_room(cluster(head), Need(workers=5, gpus=1))
    monkeypatch.setenv("SGCD_CLUSTER_MAX", "16 nodes")
    with pytest.raises(ConfigError, match="SGCD_CLUSTER_MAX"):
        require_room(cluster(head), need)


def test_larger_grids_batches_and_networks_need_more() -> None:
    tiny, paper = load_config("tiny"), load_config("paper")
    for command in ("harmonize", "train", "tune"):
        assert need_of(command, paper).memory > need_of(command, tiny).memory > 1e9
    assert need_of("train", paper, gpus=True).memory < need_of("train", paper).memory
    large = load_config("tiny", settings=["global_stage.batch_size=64"])
    assert need_of("train", large).object_store > need_of("train", tiny).object_store
    assert need_of("train", large, workers=8).memory < need_of("train", large).memory
    # A step of the paper's preset must fit into the store of a Ray that is started here.
    from ray_jobs.session import OBJECT_STORE_BYTES

    assert need_of("tune", paper).object_store < OBJECT_STORE_BYTES


def test_a_folder_that_can_be_written_is_fit_and_left_clean(tmp_lake: Lake) -> None:
    before = sorted(Path(tmp_lake.uri).rglob("*"))
    assert [(f.check, f.answer) for f in check_lake(tmp_lake.uri)] == [
        ("store", "ok"), ("clock", "ok"),
    ]  # fmt: skip
    assert sorted(Path(tmp_lake.uri).rglob("*")) == before


def test_a_place_that_cannot_be_written_is_refused_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError) as caught:
        require_lake(str(tmp_path / "file"))
    assert caught.value.code.startswith("STORE-")


@pytest.mark.parametrize(("seconds", "answer"), [(0, "ok"), (-120, "warn"), (3600, "fail")])
def test_a_clock_that_is_off_is_said(
    seconds: int, answer: str, tmp_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = datetime.now(UTC) + timedelta(seconds=seconds)
    monkeypatch.setattr(Store, "modified", lambda self, uri: moved)
    (clock,) = (f for f in check_lake(tmp_lake.uri) if f.check == "clock")
    assert clock.answer == answer
    if seconds:
        side = "behind" if seconds > 0 else "ahead of"
        assert side in clock.found and str(abs(seconds))[:2] in clock.found
    assert clock_finding(30, "x").answer == "warn"


def test_a_store_that_never_answers_costs_only_the_deadline(
    tmp_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()
    monkeypatch.setattr(lake_check, "_access", lambda uri: stuck.wait(60) and [])
    started = time.monotonic()
    found = check_lake(tmp_lake.uri, seconds=0.3)
    stuck.set()
    assert time.monotonic() - started < 5
    assert (found[-1].answer, found[-1].code) == ("fail", "STORE-UNREACHABLE")


@pytest.mark.s3
def test_credentials_and_conditional_writes_of_a_bucket(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = s3_server.uri("lake")
    assert [f.check for f in check_lake(uri) if f.answer == "ok"] == [
        "credentials", "store", "clock",
    ]  # fmt: skip
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError) as caught:
        require_lake(uri)
    assert caught.value.code == "STORE-DENIED" and "wrong" not in str(caught.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    (finding,) = check_lake(uri)
    assert (finding.check, finding.answer) == ("credentials", "fail")


def test_doctor_tells_of_the_lake(tmp_lake: Lake, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--lake", tmp_lake.uri, "--json"]) == 0
    checks = {row["check"]: row["answer"] for row in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["store"] == checks["clock"] == "ok" and "torch" in checks
    assert cli.main(["doctor", "--lake", "/proc/none", "--json"]) == 69


class FakeRay:
    """A `ray` whose nodes answer as told; one that does not answer is late."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "NodeID": "0" * 56, "NodeManagerAddress": name} for name in self.answers
        ]

    def remote(self, **_: Any) -> Any:
        names = iter(self.answers)
        handle = SimpleNamespace(remote=lambda lake, seconds: next(names))
        return lambda function: SimpleNamespace(options=lambda **_: handle)

    def wait(self, asked: list[str], *, timeout: float, **_: Any) -> tuple[list[str], list[str]]:
        self.waited = timeout
        late = [name for name in asked if self.answers[name] is None]
        return [name for name in asked if name not in late], late

    def get(self, name: str) -> Any:
        if isinstance(self.answers[name], Exception):
            raise self.answers[name]
        return self.answers[name]


def test_nodes_with_another_program_or_no_access_are_named() -> None:
    from ray.exceptions import RaySystemError

    denied = lake_check.Finding("store", "fail", "no rights.", "STORE-DENIED")
    fine = {"version": versions(), "lake": []}
    ray = FakeRay(
        good=fine, old=fine | {"version": versions() | {"sgcd-lake": "0.0.1"}},
        closed=fine | {"lake": [denied]}, bare=RaySystemError("no module"), slow=None,
    )  # fmt: skip
    found = node_findings(ray, "lake")
    said = {f.found.split()[1]: (f.answer, f.code) for f in found if f.answer == "fail"}
    assert said == {
        "old": ("fail", "CLUSTER"), "closed:": ("fail", "STORE-DENIED"),
        "bare": ("fail", "CLUSTER"),
    }  # fmt: skip
    (late,) = (f for f in found if f.answer == "warn")
    assert "slow" in late.found
    assert [f.answer for f in node_findings(FakeRay(good=fine), None)] == ["ok"]


def test_all_of_it_takes_five_seconds_at_most() -> None:
    """What a slow store took is taken from what the nodes have."""
    ray = FakeRay(silent=None)
    require_nodes(ray, "lake", time.monotonic())
    assert 4 < ray.waited < 5
    require_nodes(ray, "lake", time.monotonic() - lake_check.DEADLINE_SECONDS)
    assert NODE_SECONDS <= ray.waited < 5 - lake_check.DEADLINE_SECONDS


def test_what_is_not_refused_is_said(
    tmp_lake: Lake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ray_jobs import session as module

    finding = lake_check.Finding("clock", "warn", "this machine's clock is 90 s behind the store's")
    monkeypatch.setattr(module, "require_lake", lambda uri: [finding])
    monkeypatch.setattr(
        module, "_connect", lambda *_: (_ for _ in ()).throw(StorageError("no", code="CLUSTER"))
    )
    with pytest.raises(StorageError), module.session(lake=tmp_lake):
        pass
    assert "90 s behind" in caplog.text


@pytest.mark.slow
@pytest.mark.ray
def test_doctor_asks_every_node_of_a_cluster(ray_cluster: Any, tmp_lake: Lake) -> None:
    """As a job on it: RAY_ADDRESS is set there."""
    job = ray_cluster.sgcd("submit", "--json", "doctor", "--lake", tmp_lake.uri, "--json")
    _, err = job.communicate(timeout=120)
    assert job.returncode == 0, err[-2000:]
    document = json.loads(next(line for line in err.splitlines() if line.startswith('{"command"')))
    found = {row["check"]: row for row in document["checks"]}
    assert found["nodes"]["answer"] in ("ok", "warn"), found  # warn: a node slower than 4 s
    assert "2 CPUs" in found["cpus"]["found"] and found["memory"]["answer"] == "ok"
