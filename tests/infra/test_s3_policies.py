"""The policies in infra/s3: each command's own requests are allowed, and little else.

The requests are those on the wire between the real program and a real S3 server. What AWS makes
of a policy is not tested: the check here knows the parts of IAM that these policies use.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import S3Server
from s3_requests import Asked, allows, listed, recorded, rights, statements

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.lake_check import check_lake
from pipelines.lease import lease
from pipelines.ledger import begin_attempt, end_attempts
from ray_jobs import cli
from ray_jobs.checkpoint import Checkpoints
from sgcd_core.io.store import Store

FOLDER = Path(__file__).resolve().parents[2] / "infra" / "s3"
NAMES = {"SOURCE_BUCKET": "lake", "LAKE_BUCKET": "lake"}  # the test server has one bucket
#: Rights that no test can make the program use, and why they are there all the same.
UNSEEN = {
    # Delta removes log entries that are older than the table keeps.
    ("s3:DeleteObject", "arn:aws:s3:::lake/lake/catalog/*/_delta_log/*"),
    # Large files go up in parts; an upload that failed is ended.
    ("s3:AbortMultipartUpload", "arn:aws:s3:::lake/lake/*"),
}


@pytest.fixture
def wire(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, make_scan: Callable[..., bytes]
) -> Iterator[list[Asked]]:
    """A source with two scans in the bucket; then everything goes through the proxy."""
    for number in range(2):
        name = f"sub-0{number}/anat/sub-0{number}_T1w.nii.gz"
        Store().write_bytes(s3_server.uri(f"bids/{name}"), make_scan(number))
    table = b"participant_id\tsite\nsub-00\tA\nsub-01\tA\n"
    Store().write_bytes(s3_server.uri("bids/participants.tsv"), table)
    with recorded(s3_server.endpoint) as (address, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        yield asked


def work(uri: str, source: str) -> None:
    """What workers and drivers do with a store, every kind of it once."""
    assert cli.main(["index", source, "--lake", uri]) == 0
    lake, store = Lake.open(uri), Store()
    assert [f.answer for f in check_lake(uri)] == ["ok"] * 3
    with lease(lake, "job", beat=0.05):
        begin_attempt(lake, "m-v1", "a" * 32)
        end_attempts(lake, "m-v1", "a" * 32)
    with lease(lake, "job"):
        pass  # the second holder deletes the first one's object
    kept = Checkpoints(lake.scratch("run"))
    kept.save(1, {"done": 1})
    kept.save(2, {"done": 2})
    kept.clear()
    for name in ("prepared/r/a/geometry.json", "models/m/1/pack.json", "reports/m.html",
                 "derivatives/m-v1/sub-00/anat/sub-00_desc-harmonized_T1w.nii.gz"):  # fmt: skip
        with suppress(FileExistsError):
            store.write_bytes(f"{uri}/{name}", b"x", if_absent=True)
    store.delete(f"{uri}/prepared/r/a/geometry.json")  # `prepare --force`
    for number in range(3):
        Catalog(lake).append("runs", [{"run_id": str(number), "command": "test"}], txn=str(number))
    assert cli.main(["status", "--lake", uri]) == 0


def refused(asked: list[Asked], policy: list[dict[str, object]]) -> set[Asked]:
    return {one for one in asked if not any(allows(statement, one) for statement in policy)}


@pytest.mark.s3
def test_a_worker_may_do_its_work_and_each_of_its_rights_is_used(
    wire: list[Asked], s3_server: S3Server
) -> None:
    work(s3_server.uri("lake"), s3_server.uri("bids"))
    policy = statements(FOLDER / "worker.json", **NAMES)
    assert len(wire) > 50 and refused(wire, policy) == set()
    unused = {
        (action, resource)
        for statement in policy
        for action in listed(statement["Action"])
        for resource in listed(statement["Resource"])
        if not any(
            one.action == action and fnmatch.fnmatchcase(one.resource, resource) for one in wire
        )
    }
    assert unused == UNSEEN


@pytest.mark.s3
def test_an_analyst_may_query_and_nothing_but_tables_and_reports_is_open(
    wire: list[Asked], s3_server: S3Server
) -> None:
    uri, policy = s3_server.uri("lake"), statements(FOLDER / "analyst.json", **NAMES)
    assert cli.main(["index", s3_server.uri("bids"), "--lake", uri]) in (0, 1)
    before = len(wire)
    assert cli.main(["query", "SELECT count(*) FROM scans", "--lake", uri]) == 0
    Store().has_any(f"{uri}/reports")
    assert len(wire) > before and refused(wire[before:], policy) == set()
    for folder in (
        "derivatives/m-v1/a.nii.gz",
        "prepared/r/a/image.nii.gz",
        "models/m/1/pack.json",
    ):
        assert refused([Asked("s3:GetObject", f"arn:aws:s3:::lake/lake/{folder}")], policy)
        closed = Asked("s3:ListBucket", "arn:aws:s3:::lake", f"lake/{folder.partition('/')[0]}/")
        assert refused([closed], policy)


@pytest.mark.s3
def test_a_reader_may_see_all_of_the_lake(wire: list[Asked], s3_server: S3Server) -> None:
    uri, policy = s3_server.uri("lake"), statements(FOLDER / "reader.json", **NAMES)
    assert cli.main(["index", s3_server.uri("bids"), "--lake", uri]) in (0, 1)
    before = len(wire)
    assert cli.main(["status", "--lake", uri]) == 0
    assert len(wire) > before and refused(wire[before:], policy) == set()


@pytest.mark.parametrize("name", ["reader", "analyst"])
def test_readers_change_nothing(name: str) -> None:
    actions = {a for s in statements(FOLDER / f"{name}.json") for a in listed(s["Action"])}
    assert actions == {"s3:GetObject", "s3:ListBucket"}


@pytest.mark.parametrize("name", ["worker", "reader", "analyst"])
def test_no_policy_reaches_outside_the_lake(name: str) -> None:
    """No wildcard action, nothing on other buckets, sources are read only."""
    policy = statements(FOLDER / f"{name}.json")
    for statement in policy:
        assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
        assert statement["Effect"] == "Allow"
        for action in listed(statement["Action"]):
            assert action.startswith("s3:") and "*" not in action
            for resource in listed(statement["Resource"]):
                inside = resource.startswith("arn:aws:s3:::LAKE-BUCKET/lake/")
                source = resource.startswith("arn:aws:s3:::SOURCE-BUCKET") and name == "worker"
                lists = action == "s3:ListBucket" and resource == "arn:aws:s3:::LAKE-BUCKET"
                assert inside or lists or (source and action in ("s3:GetObject", "s3:ListBucket"))
    assert len({statement["Sid"] for statement in policy}) == len(policy)


def test_the_check_itself_sees_what_is_not_allowed() -> None:
    """It must be able to fail: another bucket, a strict condition, a delete."""
    policy = statements(FOLDER / "reader.json", **NAMES)
    assert not refused(rights("GET", "/lake/lake/a", 200), policy)
    for request in (("GET", "/other/lake/a", 200), ("GET", "/lake/elsewhere", 200),
                    ("PUT", "/lake/lake/a", 200), ("DELETE", "/lake/lake/a", 204),
                    ("GET", "/lake/?list-type=2&prefix=other/", 200)):  # fmt: skip
        assert refused(rights(*request), policy), request
    # With `StringLike` an object that is not there would be a 403 instead of a 404.
    strict = [
        {**s, "Condition": {"StringLike": {"s3:prefix": "lake/*"}}} if "Condition" in s else s
        for s in policy
    ]
    missing = rights("HEAD", "/lake/lake/none", 404)
    assert not refused(missing, policy) and refused(missing, strict)
    with pytest.raises(ValueError, match="POST"):
        rights("POST", "/lake/?delete", 200)
