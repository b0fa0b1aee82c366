"""Which scans a site's look is measured on, and where it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.lake import Lake
from ray_jobs import site_looks as module
from ray_jobs.prepare import PrepareJob
from ray_jobs.site_looks import MOST_SCANS, _sample, few_notes, look_uri, site_looks
from ray_jobs.volume_stream import by_site, common_goals, site_goals
from sgcd_core.config import load_config
from sgcd_core.io.store import Store
from sgcd_core.style.look import LOOK_SIZE, SiteLook


def scan(number: int, split: str | None = "train", **more: Any) -> dict[str, Any]:
    base = {"scan_id": f"{number:04d}", "site": "A", "sequence": "T1w", "status": "ok"}
    return base | {"split": split} | more


def sample(scans: list[dict[str, Any]]) -> list[str]:
    return [row["scan_id"] for row in _sample(pa.Table.from_pylist(scans), ("A", "T1w"))]


def test_test_scans_count_only_where_a_site_has_no_other() -> None:
    mixed = [scan(1), scan(2, "test"), scan(3, status="failed"), scan(4, site="B")]
    assert sample(mixed) == ["0001"]
    alone = [scan(2, "test"), scan(5, "test"), scan(4, site="B")]
    assert sample(alone) == ["0002", "0005"]
    assert sample([scan(1, None), scan(2, "test")]) == ["0001"], "no split is free to learn from"


def test_the_sample_is_bounded_and_does_not_depend_on_the_order() -> None:
    many = [scan(n) for n in range(3 * MOST_SCANS)]
    found = sample(many)
    assert len(found) == MOST_SCANS
    assert found == sample(many[::-1])


def test_any_site_name_is_one_file() -> None:
    uri = look_uri(Lake("/lake"), "r", "St. Mary's/3T", "T2w")
    assert uri == "/lake/prepared/r/looks-4/St.%20Mary%27s%2F3T_T2w.json"


def test_a_look_is_kept_until_a_scan_it_was_measured_on_is_of_another_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("tiny")
    job = PrepareJob(Lake(str(tmp_path)), config.prepare, "batch", None)

    def mean_number(ray: Any, rows: list[dict[str, Any]], *_: Any) -> Any:
        mine = [int(row["scan_id"]) for row in rows if row["sequence"] == "T1w"]
        return {("A", 0): SiteLook(len(mine), np.full(3, np.mean(mine)), len(mine))}

    monkeypatch.setattr(module, "_measure", mean_number)

    def look(*scans: dict[str, Any]) -> float:
        table = pa.Table.from_pylist(list(scans))
        work = table.filter(pa.compute.field("site") == "A")
        return float(site_looks(None, table, work, job, config, None)["A", "T1w"].mean[0])

    assert look(scan(1), scan(3)) == 2
    assert look(scan(1), scan(3), scan(8)) == 2, "it does not depend on when scans came"
    assert look(scan(1), scan(3, site="B"), scan(9)) == 5, "a corrected site"
    assert look(scan(1), scan(3, site="B"), scan(9), scan(11)) == 5
    assert look(scan(1, sequence="T2w"), scan(9)) == 9


def test_a_look_says_how_many_people_it_is_of() -> None:
    rows = [
        {"scan_id": f"{n}", "dataset": data, "subject": subject, "site": site}
        for n, (data, subject, site) in enumerate([
            ("one", "01", "A"), ("one", "01", "A"), ("two", "01", "A"), ("one", None, "A"),
            ("one", None, "A"), ("one", "02", "B"),
        ])
    ]  # fmt: skip
    found = by_site(rows, [0, 0, 0, 0, 1, 0], [np.full(2, float(n)) for n in range(6)])
    assert {key: (look.scans, look.subjects) for key, look in found.items()} == {
        ("A", 0): (4, 3), ("A", 1): (1, 1), ("B", 0): (1, 1),
    }  # fmt: skip
    assert found["A", 0].mean.tolist() == [1.5, 1.5]


def test_goals_of_a_site_and_of_all() -> None:
    def look(value: float, subjects: int) -> SiteLook:
        return SiteLook(2 * subjects, np.full(LOOK_SIZE, value, np.float32), subjects)

    looks = {("A", 0): look(1, 3), ("B", 0): look(3, 1), ("B", 1): look(5, 2)}
    common = common_goals(looks, 3)
    assert common.looks[:, 0].tolist() == [2, 5, 0]
    assert common.subjects is not None and common.subjects.tolist() == [4, 2, 0]
    mine = site_goals(looks, "A", common)
    assert mine.looks[:, 0].tolist() == [1, 5, 0]
    assert mine.subjects is not None and float(mine.subjects[0]) == 3


def test_looks_that_earlier_versions_kept_are_read(tmp_path: Path) -> None:
    path = tmp_path / "look.json"
    path.write_text(json.dumps({"format": 4, "scans": 3, "look": [0.5, 1.0]}))
    scans = pa.Table.from_pylist([
        {"scan_id": name, "dataset": "d", "subject": subject}
        for name, subject in (("a", "1"), ("b", "1"), ("c", "2"), ("other", "3"))
    ])  # fmt: skip
    look, scan_ids = module._read(Store(), str(path), scans)
    assert (look.scans, look.subjects, look.mean.tolist(), scan_ids) == (3, 3, [0.5, 1.0], [])
    path.write_text(json.dumps({"scans": 3, "look": [0.5], "scan_ids": ["a", "b", "c"]}))
    assert module._read(Store(), str(path), scans)[0].subjects == 2  # two scans are of one person


def test_looks_of_few_people_are_named() -> None:
    looks = {
        ("B", "T2w"): SiteLook(4, np.zeros(1), 2), ("A", "T1w"): SiteLook(3, np.zeros(1), 1),
        ("A", "T2w"): SiteLook(9, np.zeros(1), 3),
    }  # fmt: skip
    one, two = few_notes(looks)
    assert one.startswith("note: the look of A in T1w is that of 1 person;")
    assert two.startswith("note: the look of B in T2w is that of 2 people;")
