"""Tries are counted in the store, whoever makes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipelines.lake import Lake
from pipelines.ledger import (
    MAX_ATTEMPTS,
    attempt,
    begin_attempt,
    count_attempts,
    end_attempts,
    forget_attempts,
    forgive_attempts,
    model_key,
    note_late,
    taken_back,
)
from pipelines.turns import Turns
from sgcd_core.errors import StorageError


def test_tries_count_up_across_processes_that_remember_nothing(tmp_path: Path) -> None:
    lake, key = Lake(str(tmp_path)), model_key("target-A", 2)
    assert [begin_attempt(Lake(str(tmp_path)), key, "s1") for _ in range(3)] == [1, 2, 3]
    assert count_attempts(lake, key, "s1") == 3


def test_scans_and_models_are_counted_apart(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    begin_attempt(lake, model_key("m", 1), "s1")
    assert begin_attempt(lake, model_key("m", 1), "s10") == 1
    assert begin_attempt(lake, model_key("m", 11), "s1") == 1
    assert count_attempts(lake, model_key("m", 1), "s1") == 1


def test_a_scan_that_ended_starts_anew_and_others_keep_their_count(tmp_path: Path) -> None:
    lake, key = Lake(str(tmp_path)), model_key("m", 1)
    for scan_id in ("s1", "s10"):
        begin_attempt(lake, key, scan_id)
    end_attempts(lake, key, "s1")
    assert count_attempts(lake, key, "s1") == 0
    assert begin_attempt(lake, key, "s1") == 1
    assert begin_attempt(lake, key, "s10") == 2


def test_counting_stops_above_the_limit(tmp_path: Path) -> None:
    lake, key = Lake(str(tmp_path)), model_key("m", 1)
    tries = [begin_attempt(lake, key, "s1") for _ in range(MAX_ATTEMPTS + 4)]
    assert tries[: MAX_ATTEMPTS + 1] == list(range(1, MAX_ATTEMPTS + 2))
    assert all(number > MAX_ATTEMPTS for number in tries[MAX_ATTEMPTS:])
    assert count_attempts(lake, key, "s1") == MAX_ATTEMPTS + 1


def test_racing_tries_get_different_numbers(tmp_path: Path) -> None:
    lake, key = Lake(str(tmp_path)), model_key("m", 1)
    with ThreadPoolExecutor(3) as pool:
        numbers = list(pool.map(lambda _: begin_attempt(lake, key, "s1"), range(3)))
    assert sorted(numbers) == [1, 2, 3]


def test_a_scan_tried_before_runs_alone(tmp_path: Path) -> None:
    lake, turns = Lake(str(tmp_path)), Turns()
    with attempt(lake, "k", "a", "run", turns) as first:
        assert first.number == 1

    def new() -> int:
        with attempt(lake, "k", "c", "run", turns) as this:
            return this.number

    with ThreadPoolExecutor(1) as pool:
        with attempt(lake, "k", "a", "run", turns) as again:
            assert again.number == 2
            waiting = pool.submit(new)
            assert not wait([waiting], timeout=0.2).done
            assert count_attempts(lake, "k", "c") == 0, "who waits is not counted"
        assert waiting.result(10) == 1


def test_the_row_of_a_try_that_ended_outlives_its_driver(tmp_path: Path) -> None:
    lake, turns = Lake(str(tmp_path)), Turns()
    row = {"scan_id": "a", "status": "ok", "finished_at": datetime.now(UTC), "seconds_read": 0.5}
    with attempt(lake, "k", "a", "first", turns) as this:
        this.keep(row, "settings")
    with attempt(lake, "k", "a", "second", turns) as again:
        assert again.kept("settings") == row
        assert again.kept("other settings") is None
    end_attempts(lake, "k", "a")
    with attempt(lake, "k", "a", "third", turns) as anew:
        assert anew.number == 1 and anew.kept("settings") is None


def test_a_late_try_is_remembered_until_more_time_is_allowed(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    begin_attempt(lake, "k", "a")
    note_late(lake, "k", "a", 60.0)
    with attempt(lake, "k", "a", "run", Turns()) as again:
        assert again.number == 2
        assert again.was_late(60.0) and again.was_late(30.0) and not again.was_late(120.0)


def test_a_run_that_is_stopped_takes_back_the_tries_it_cut_short(tmp_path: Path) -> None:
    lake, turns = Lake(str(tmp_path)), Turns()
    for scan_id, run in (("killer", "mine"), ("killer", "mine"), ("cut", "mine"), ("x", "other")):
        begin_attempt(lake, "k", scan_id, run)
    with attempt(lake, "k", "ended", "mine", turns) as this:
        this.keep({"finished_at": datetime.now(UTC)}, "s")
    forgive_attempts(lake, "k", "mine")
    left = {scan_id: count_attempts(lake, "k", scan_id) for scan_id in ("killer", "cut", "x")}
    assert left == {"killer": 1, "cut": 0, "x": 1}
    assert count_attempts(lake, "k", "ended") == 1


def test_forcing_forgets_the_tries_of_the_scans_asked_for(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    for scan_id in ("a", "b"):
        begin_attempt(lake, "k", scan_id)
    forget_attempts(lake, "k", {"a"})
    assert (count_attempts(lake, "k", "a"), count_attempts(lake, "k", "b")) == (0, 1)


def test_a_try_tells_what_became_of_those_before_it(tmp_path: Path) -> None:
    lake, turns = Lake(str(tmp_path)), Turns()
    begin_attempt(lake, "k", "a", "first")
    with attempt(lake, "k", "a", "first", turns) as this:
        assert [(t["attempt"], t["ended"]) for t in this.earlier()] == [(1, "lost")]
        this.keep({"finished_at": datetime.now(UTC)}, "settings")
    begin_attempt(lake, "k", "a", "second")
    note_late(lake, "k", "a", 60.0)
    with attempt(lake, "k", "a", "third", turns) as last:
        told = last.earlier()
    assert [(t["attempt"], t["batch_id"], t["ended"]) for t in told] == [
        (1, "first", "lost"), (2, "first", "uncommitted"), (3, "second", "late"),
    ]  # fmt: skip
    assert all(t["worker"] and t["started_at"] <= datetime.now(UTC) for t in told)
    assert told[1]["started_at"] == this.started_at  # keeping its row did not move its start
    assert last.number == 4 > MAX_ATTEMPTS


def test_a_scan_that_another_job_settles_meanwhile_can_be_tried(tmp_path: Path) -> None:
    """Two jobs harmonize one scan; the other commits it between this one's count and look."""
    lake = Lake(str(tmp_path))
    begin_attempt(lake, "k", "a", "other")
    note_late(lake, "k", "a", 60.0)
    with attempt(lake, "k", "a", "mine", Turns()) as this:
        end_attempts(lake, "k", "a")
        assert this.number == 2
        assert this.earlier() == [] and this.kept("settings") is None
        assert not this.was_late(1.0)


def test_a_cluster_that_gives_up_counts_against_no_scan(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    for code, left in (("CLUSTER", 0), ("STORE-WRITE", 1)):
        with pytest.raises(StorageError), taken_back(lake, "mine", "k"):
            begin_attempt(lake, "k", code, "mine")
            raise StorageError("no workers", code=code)
        assert count_attempts(lake, "k", code) == left
