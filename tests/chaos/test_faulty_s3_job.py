"""A job whose S3 fails: one terminal row a scan, the calm run's bytes, the same command goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import small_s3_job as small
from conftest import S3Server
from faulty_s3 import FaultyS3, Plan, write_keys

from sgcd_core.errors import StorageError

pytestmark = [pytest.mark.chaos, pytest.mark.s3, pytest.mark.slow]


@pytest.fixture(scope="module")
def source(s3_server: S3Server) -> str:
    uri = s3_server.uri("chaos-bids")
    small.write_source(uri)
    return uri


@pytest.fixture(scope="module")
def calm(s3_server: S3Server, source: str) -> dict[str, str]:
    """The outputs of a run that nothing disturbs."""
    lake = s3_server.uri("chaos-calm")
    rows = small.run(lake, source)
    assert len(rows) == small.SCANS and {r["status"] for r in rows} <= {"ok", "flagged"}
    assert small.run(lake, source) == []
    outputs = small.outputs(lake)
    assert len(outputs) >= 3 * small.SCANS  # two volumes and a sidecar each
    assert len(set(outputs.values())) == len(outputs)
    return outputs


def check_finished(lake: str, calm: dict[str, str]) -> None:
    """One terminal row for every scan, each naming what is there; the calm run's bytes."""
    rows = small.results(lake)
    assert Counter(row["subject"] for row in rows) == {str(n): 1 for n in range(small.SCANS)}
    assert {row["status"] for row in rows} <= {"ok", "flagged"}
    small.check_rows_name_what_is_there(lake)
    assert small.outputs(lake) == calm


def until_done(lake: str, source: str, limit: int = 5) -> tuple[int, int]:
    """Run the same command until nothing is left; (runs, scans worked on)."""
    worked = 0
    for number in range(1, limit + 1):
        try:
            rows = small.run(lake, source)
        except StorageError:
            continue
        worked += len(rows)
        if all(row["status"] in ("ok", "flagged") for row in rows):
            return number, worked
    raise AssertionError(f"not done after {limit} runs")


def not_a_listing(method: str, path: str) -> bool:
    """A listing has no digest, and delta-rs, unlike the store, gives up on half a one."""
    return "list-type=" not in path


def not_the_tables(method: str, path: str) -> bool:
    """Delta's own files carry no digest that its reader compares."""
    return "/catalog/" not in path and not_a_listing(method, path)


FAULTS = {
    "20 % 503 or reset": Plan(("503", "slow-down", "429", "reset"), 0.2),
    "20 % of answers lost": Plan(("lost",), 0.2),
    "4 % stalls": Plan(("stall",), 0.04, in_a_row=1),
    "30 % short reads": Plan(("short",), 0.3, where=not_a_listing),
    "30 % wrong bodies with 200": Plan(("wrong", "empty"), 0.3, where=not_the_tables),
    "30 % damaged uploads": Plan(("garbled",), 0.3, where=not_the_tables),
    "all of them": Plan(
        ("503", "429", "reset", "lost", "short", "wrong", "garbled"), 0.2, where=not_the_tables
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_job_survives(
    name: str, faulty: FaultyS3, s3_server: S3Server, source: str, calm: dict[str, str]
) -> None:
    lake = s3_server.uri(f"chaos-{list(FAULTS).index(name)}")
    faulty.plan = FAULTS[name]
    runs, worked = until_done(lake, source)
    faulty.plan = Plan()
    served = sum(faulty.faults.values())
    print(
        f"{name}: {served} of {faulty.requests} requests failed, {runs} run(s), "
        f"{worked - small.SCANS} scans redone"
    )
    assert served >= 3
    assert runs == 1 and worked == small.SCANS  # retries inside the store were enough
    check_finished(lake, calm)


def test_credentials_that_others_renew_in_time_cost_nothing(
    faulty: FaultyS3, s3_server: S3Server, source: str, calm: dict[str, str], keys: Path
) -> None:
    lake = s3_server.uri("chaos-renewed")

    def rotate() -> None:
        write_keys(keys, "new")
        faulty.expired.add("old")

    faulty.at_volume(3, rotate)
    runs, worked = until_done(lake, source)
    print(f"renewed mid-run: {faulty.faults['expired']} refusals, {runs} run(s), {worked} scans")
    assert (runs, worked) == (1, small.SCANS) and faulty.expired == {"old"}
    check_finished(lake, calm)


def test_credentials_that_end_stop_the_job_with_a_code_and_new_ones_finish_it(
    faulty: FaultyS3, s3_server: S3Server, source: str, calm: dict[str, str], keys: Path
) -> None:
    lake = s3_server.uri("chaos-expired")
    faulty.at_volume(4, lambda: faulty.expired.add("old"))
    with pytest.raises(StorageError) as error:
        small.run(lake, source)
    assert error.value.code == "STORE-EXPIRED"
    write_keys(keys, "new")
    small.check_rows_name_what_is_there(lake)
    before = len(small.results(lake))
    assert 0 < before < small.SCANS
    runs, worked = until_done(lake, source)
    redone = 3 - before  # three volumes were written
    print(f"expired mid-run: {before} rows kept, {worked} scans in {runs} run(s), {redone} redone")
    assert runs == 1 and worked == small.SCANS - before
    check_finished(lake, calm)


def test_an_outage_in_the_middle_costs_what_was_not_committed(
    faulty: FaultyS3, s3_server: S3Server, source: str, calm: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    lake = s3_server.uri("chaos-outage")
    monkeypatch.setenv("SGCD_S3_RETRY_SECONDS", "1")
    dark = Plan(("reset", "503"), share=1.0, in_a_row=10**9)
    faulty.at_volume(4, lambda: setattr(faulty, "plan", dark))
    with pytest.raises(StorageError) as error:
        small.run(lake, source)
    assert error.value.code in ("STORE-UNREACHABLE", "STORE-WRITE")
    faulty.plan = Plan()
    small.check_rows_name_what_is_there(lake)
    before = len(small.results(lake))
    runs, worked = until_done(lake, source)
    print(f"outage: {before} rows kept, {worked} scans in {runs} run(s), {3 - before} redone")
    assert before == 2 and runs == 1 and worked == small.SCANS - before
    check_finished(lake, calm)


@pytest.mark.parametrize("point", small.POINTS)
def test_a_crash_between_the_writes_leaves_nothing_that_a_row_names(
    point: str, s3_server: S3Server, source: str, calm: dict[str, str]
) -> None:
    """The process ends at once; rows are committed by twos, so scan 2 was never committed."""
    lake = s3_server.uri(f"chaos-crash-{small.POINTS.index(point)}")
    program = Path(small.__file__)
    done = subprocess.run(
        [sys.executable, str(program), lake, source, point], timeout=600, check=False,
        cwd=program.parents[2], env={**os.environ, "PYTHONPATH": str(program.parents[2])},
    )  # fmt: skip
    assert done.returncode == 9
    small.check_rows_name_what_is_there(lake)
    before = len(small.results(lake))
    written = sum(
        name.endswith("_desc-harmonized_T1w.nii.gz") and "space-" not in name
        for name in small.outputs(lake)
    )
    assert before == (2 if point == "after row" else 0)
    assert written == (1 if point == "before volume" else 2)
    rows = small.run(lake, source)
    print(f"crash {point}: {before} rows kept, {written - before} scans redone")
    assert len(rows) == small.SCANS - before
    check_finished(lake, calm)
