"""Commands as jobs of a cluster: logs and exit codes come back, nothing secret goes there."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientResponseError
from head_node import RayCluster
from ray.job_submission import JobStatus
from small_lake import make_global_model

from pipelines.lake import Lake
from ray_jobs import cli
from ray_jobs.submit import _named, tail
from sgcd_core.errors import StorageError

BY_ENCODER = ["--set", "target_stage.encoder=biomedclip:models/clip"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["harmonise", "--lake", "s3://b/l"], "no command that can be submitted"),
        (["submit", "status"], "no command that can be submitted"),
        (["harmonize", "--lake", "s3://b/l"], "required: --model"),
        (["status", "--lake", "s3://b/l", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["status", "--lake", "lake"], "lake would be a file or folder of some machine"),
        (["export", "--lake", "s3://b/l", "--out", "tables"], "tables would be a file or folder"),
        (["train", "--lake", "s3://b/l", "--config", "my.yaml"], "my.yaml would be a file"),
        (["evaluate", "--lake", "s3://b/l", "--model", "m", "--features", "resnet18:w.pt"], "w.pt"),
        (["evaluate", "--lake", "s3://b/l", "--model", "m", "--features", "my/w.pt"], "my/w.pt"),
        (["tune", "--lake", "s3://b/l", "--target", "A", *BY_ENCODER], "models/clip would be"),
        (["index", "s3://b/bids", "data/bids", "--lake", "s3://b/l"], "data/bids would be"),
        (["check", "~/scan.nii.gz"], "~/scan.nii.gz would be a file or folder"),
        (["check", "https://me:hush@host/scan.nii.gz"], "has a password in it"),
        (["status", "--help"], "asks for help only"),
        (["--id", "a/b", "status", "--lake", "s3://b/l"], "--id 'a/b' may hold"),
        (["--id", "", "status", "--lake", "s3://b/l"], "--id '' may hold"),
    ],
)
def test_what_the_cluster_would_refuse_is_refused_here(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", *words]) == 2
    assert said in capsys.readouterr().err


def test_what_is_read_may_lie_in_the_checkout_that_is_shipped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = str(Path(__file__).parents[2])
    job = ["train", "--config", "my.yaml", "--lake"]
    words = ["submit", "--dry-run", "--working-dir", root, *job]
    assert cli.main([*words, "s3://b/l"]) == cli.main([*words, "/shared/lake"]) == 0
    assert cli.main([*words, "lake"]) == 2  # what is written there would be lost
    assert cli.main([*words, "s3:///l"]) == 69
    assert "[STORE-ADDRESS]" in capsys.readouterr().err


def test_a_dry_run_shows_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    job = ["query", "SELECT 'a b'", "--lake", "s3://b/l"]
    assert cli.main(["submit", "--json", "--dry-run", "--env", "AWS_REGION=eu-west-1", *job]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["entrypoint"] == """sgcd query 'SELECT '"'"'a b'"'"'' --lake s3://b/l"""
    assert document["runtime_env"]["env_vars"]["AWS_REGION"] == "eu-west-1"


@pytest.mark.parametrize(
    "pair",
    [
        "AWS_SECRET_ACCESS_KEY=hush", "AWS_SESSION_TOKEN=hush", "DB_PASSWORD=hush",
        "RAY_AUTH_TOKEN=hush", "MLFLOW_TRACKING_URI=https://me:hush@host/", "TRACKED",
    ],
)  # fmt: skip
def test_secrets_are_not_sent(
    pair: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKED", "https://me:hush@host")
    words = ["submit", "--dry-run", "--env", pair, "status", "--lake", "s3://b/l"]
    assert cli.main(words) == 2
    out = capsys.readouterr()
    assert "could read it" in out.err and "hush" not in out.err + out.out


def test_a_cluster_that_is_not_there_is_69(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--address", "http://127.0.0.1:9", "status", "--lake", "s3://b/l"]
    assert cli.main(["submit", *words]) == 69
    assert "[CLUSTER] http://127.0.0.1:9" in capsys.readouterr().err


class FakeClient:
    """Jobs with their states; a log whose connection breaks as often as told."""

    def __init__(self, *, log: str = "", breaks: int = 0, **jobs: JobStatus) -> None:
        self.log, self.breaks, self.jobs = log, breaks, jobs
        self.answers: list[int] = []  # of whoever stands before the head

    def list_jobs(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(submission_id=name.replace("_", "-"), status=status)
            for name, status in self.jobs.items()
        ]

    def get_job_status(self, name: str) -> JobStatus:
        if self.jobs and name not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {name} does not exist.")
        return JobStatus.SUCCEEDED

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        if self.answers:
            raise ClientResponseError(None, (), status=self.answers.pop())  # type: ignore[arg-type]
        for place in range(0, len(self.log), 5):
            if self.breaks and place > 10:
                self.breaks -= 1
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield self.log[place : place + 5]


def test_a_name_is_joined_while_it_runs_and_numbered_after() -> None:
    ended_, runs = JobStatus.FAILED, JobStatus.RUNNING
    assert _named(FakeClient(), "nightly") == ("nightly", False)
    assert _named(FakeClient(nightly=runs, other=runs), "nightly") == ("nightly", True)
    assert _named(FakeClient(nightly=ended_, nightly_9=ended_), "nightly") == ("nightly-10", False)
    assert _named(FakeClient(nightly=ended_, nightly_2=runs), "nightly") == ("nightly-2", True)
    assert _named(FakeClient(nightly_new=runs), "nightly") == ("nightly", False)


def test_a_log_whose_connection_breaks_is_shown_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_jobs.submit.PAUSE_SECONDS", 0.0)
    log = "".join(f"line {n}\n" for n in range(9))
    tail(FakeClient(log=log, breaks=3), "job")
    assert capsys.readouterr().out == log
    with pytest.raises(StorageError, match=r"CLUSTER\] http://head:8265"):
        tail(FakeClient(log=log, breaks=99), "job", "http://head:8265")
    away = FakeClient(log=log)
    away.answers = [404, 503, 503]  # an ingress whose head is being replaced
    tail(away, "job")
    assert capsys.readouterr().out.endswith(log)
    anew = FakeClient(log=log, other=JobStatus.RUNNING)
    anew.answers = [404]
    with pytest.raises(StorageError, match="knows no job job any more"):
        tail(anew, "job")


def test_why_a_job_could_not_begin_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    client = FakeClient()
    info = SimpleNamespace(
        status=JobStatus.FAILED, driver_exit_code=None,
        message="runtime_env setup failed:\n" + "  frame\n" * 30 + "no such package\n",
    )  # fmt: skip
    client.submit_job = lambda **job: "raysubmit_1"  # type: ignore[attr-defined]
    client.get_job_info = lambda name: info  # type: ignore[attr-defined]
    monkeypatch.setattr("ray_jobs.submit.connect", lambda address: client)
    assert cli.main(["submit", "status", "--lake", "s3://b/l"]) == 69
    assert "no such package" in capsys.readouterr().out
    info.driver_exit_code, info.message = 1, "Job entrypoint command failed with exit code 1"
    assert cli.main(["submit", "status", "--lake", "s3://b/l"]) == 1
    assert "entrypoint command" not in capsys.readouterr().out  # its own log says more


@pytest.mark.slow
@pytest.mark.ray
def test_log_and_exit_code_come_back(ray_cluster: RayCluster, tmp_lake: Lake) -> None:
    done = ray_cluster.sgcd("submit", "status", "--lake", tmp_lake.uri)
    none = ray_cluster.sgcd("submit", "--json", "status", "--lake", f"{tmp_lake.uri}/none")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err[-2000:]
    assert "0 scans (0 usable)" in out and "succeeded with exit code 0" in out
    out, err = none.communicate(timeout=120)
    document = json.loads(out)  # with --json the log goes to stderr
    assert none.returncode == document["exit_code"] == 69 and document["status"] == "FAILED"
    assert "[LAKE-MISSING]" in err


@pytest.mark.slow
@pytest.mark.ray
def test_without_the_token_nothing_is_taken(ray_cluster: RayCluster, tmp_lake: Lake) -> None:
    assert ray_cluster.get("/api/jobs/", token=False) == 401
    done = ray_cluster.sgcd("submit", "status", "--lake", tmp_lake.uri, RAY_AUTH_TOKEN="b" * 32)
    _, err = done.communicate(timeout=60)
    assert done.returncode == 69 and "refuses this token" in err and "RAY_AUTH_TOKEN" in err


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_that_runs_is_joined_not_doubled(ray_cluster: RayCluster, tmp_lake: Lake) -> None:
    """The name of a scheduled job; a stopped one ends as stopped, with time to commit."""
    from ray.job_submission import JobSubmissionClient

    blocked = str(Path(tmp_lake.uri))
    lock = Path(tmp_lake.scratch("leases/new-site-global/00000001.json"))
    lock.parent.mkdir(parents=True)
    lock.write_text('{"holder": "a test", "released": false}')
    make_global_model(blocked)
    job = ["new-site", "/none", "--model", "global", "--lake", blocked]
    first = ray_cluster.sgcd("submit", "--id", "nightly", "--no-wait", *job)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 0 and "submitted job nightly" in out, err[-2000:]
    second = ray_cluster.sgcd("submit", "--id", "nightly", *job)
    assert second.stdout is not None
    # The log of the job that was there; Ray's own lines may come first.
    log = [""]
    while "waiting for a test" not in log[-1]:
        log.append(next(second.stdout, ""))
        assert log[-1], "".join(log)
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "token")
    headers = {"Authorization": f"Bearer {ray_cluster.environment['RAY_AUTH_TOKEN']}"}
    try:
        client = JobSubmissionClient(ray_cluster.dashboard, headers=headers)
        assert [j.submission_id for j in client.list_jobs()].count("nightly") == 1
        client.stop_job("nightly")
    finally:
        patch.undo()
    out, err = second.communicate(timeout=90)
    assert second.returncode == 75 and "stopped" in out, err[-2000:]
    third = ray_cluster.sgcd("submit", "--id", "nightly", "--no-wait", "status", "--lake", blocked)
    out, err = third.communicate(timeout=60)
    assert third.returncode == 0 and "submitted job nightly-2" in out, err[-2000:]
