"""`sgcd harmonize` on Ray while its S3 fails: actors, driver and tables go through the proxy.

What the faults do to one process is in test_faulty_s3_job.py; here they meet several at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_rig import build_lake, harmonize, noted, set_faults
from conftest import S3Server
from faulty_s3 import FaultyS3, Plan, keys_in_a_file, write_keys

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from ray_jobs.harmonize_stream import IN_FLIGHT
from sgcd_core.io.store import Store, sha256_hex

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray, pytest.mark.s3]

SCANS, ACTORS = 24, 2
WORKERS = ("--workers", str(ACTORS))


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No cluster of others, one tracking database, and workers that find the actor's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        here = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(here))
        database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
        yield


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the actors note what they compute."""
    monkeypatch.setenv("SGCD_CHAOS", str(tmp_path))
    set_faults(tmp_path, slow=0.1)
    return tmp_path


@pytest.fixture
def lake(s3_server: S3Server, request: pytest.FixtureRequest) -> str:
    return build_lake(s3_server.uri(f"on-ray/{request.node.name}"), SCANS).uri


@pytest.fixture
def faulty(lake: str, faulty: FaultyS3) -> FaultyS3:
    """As everywhere, once the lake is there."""
    return faulty


@pytest.fixture(scope="module")
def calm(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run without faults writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGCD_CHAOS", str(tmp_path_factory.mktemp("calm")))
        here = build_lake(s3_server.uri("on-ray/calm"), SCANS).uri
        assert harmonize(here, *WORKERS) == 0
        return outputs(here)


def outputs(lake: str) -> dict[str, str]:
    """Path below the derivative → digest, of every subject's volumes; sidecars name the lake."""
    store, root = Store(), Lake(lake).derivatives("global-v1")
    return {
        item.uri.removeprefix(root): sha256_hex(store.read_bytes(item.uri))
        for item in store.list(root)
        if item.uri.endswith(".nii.gz")
    }


def check(lake: str, calm: dict[str, str]) -> None:
    """One row for each scan, and the calm run's bytes."""
    rows = Catalog(Lake(lake)).history("results").to_pylist()
    scans = Catalog(Lake(lake)).rows("scans")["scan_id"].to_pylist()
    assert sorted(row["scan_id"] for row in rows) == sorted(scans)
    assert {row["status"] for row in rows} <= {"ok", "flagged"}
    assert outputs(lake) == calm


def not_a_listing(method: str, path: str) -> bool:
    return "list-type=" not in path and "/catalog/" not in path


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Plan(("503", "slow-down", "429", "reset"), 0.2), id="refused"),
        pytest.param(Plan(("lost", "short", "wrong", "garbled"), 0.15, where=not_a_listing),
                     id="broken"),
    ],
)  # fmt: skip
def test_a_fifth_of_all_requests_fails(
    plan: Plan, calm: dict[str, str], faulty: FaultyS3, lake: str, notes: Path,
    figure: Callable[[str], None],
) -> None:  # fmt: skip
    faulty.plan = plan
    assert harmonize(lake, *WORKERS) == 0
    faulty.plan = Plan()
    redone = sum(noted(notes, "computed").values()) - SCANS
    served = sum(faulty.faults.values())
    figure(f"{served} of {faulty.requests} requests failed, {redone} scans redone")
    assert served > 50 and len(noted(notes, "workers")) == ACTORS
    assert redone <= ACTORS * IN_FLIGHT + 1
    check(lake, calm)


def test_credentials_are_renewed_while_the_actors_work(
    calm: dict[str, str], faulty: FaultyS3, lake: str, tmp_path: Path, notes: Path,
    monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None],
) -> None:  # fmt: skip
    keys = keys_in_a_file(tmp_path, monkeypatch, "old")

    def renew() -> None:
        write_keys(keys, "new")
        faulty.expired.add("old")

    faulty.at_volume(10, renew)
    assert harmonize(lake, *WORKERS) == 0
    assert faulty.expired == {"old"} and faulty.faults["expired"] > 0
    redone = sum(noted(notes, "computed").values()) - SCANS
    figure(f"credentials renewed: {faulty.faults['expired']} refusals, {redone} scans redone")
    assert redone <= ACTORS * IN_FLIGHT + 1
    check(lake, calm)


def test_credentials_that_end_leave_rows_and_new_ones_finish_the_rest(
    calm: dict[str, str], faulty: FaultyS3, lake: str, tmp_path: Path, notes: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Any, figure: Callable[[str], None],
) -> None:  # fmt: skip
    keys = keys_in_a_file(tmp_path, monkeypatch, "old")
    faulty.at_volume(10, lambda: faulty.expired.add("old"))
    assert harmonize(lake, *WORKERS) != 0
    said = capsys.readouterr()
    assert "STORE-EXPIRED" in said.out + said.err
    faulty.on_request = lambda method, path: None
    write_keys(keys, "new")
    assert harmonize(lake, *WORKERS, "--retry-failed") == 0
    redone = sum(noted(notes, "computed").values()) - SCANS
    figure(f"credentials that end: {redone} scans redone")
    assert redone <= ACTORS * IN_FLIGHT + 1
    rows = Catalog(Lake(lake)).rows("results").to_pylist()
    assert len(rows) == SCANS and {row["status"] for row in rows} <= {"ok", "flagged"}
    assert outputs(lake) == calm
