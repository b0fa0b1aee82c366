"""Tries are counted in the store, whoever makes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.lake import Lake
from pipelines.ledger import MAX_ATTEMPTS, begin_attempt, count_attempts, end_attempts, model_key


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
