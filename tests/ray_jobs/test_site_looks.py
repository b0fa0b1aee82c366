"""Which scans a site's look is measured on, and where it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.lake import Lake
from ray_jobs import site_looks as module
from ray_jobs.prepare import PrepareJob
from ray_jobs.site_looks import MOST_SCANS, _sample, look_uri, site_looks
from sgcd_core.config import load_config


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
        return {("A", 0): (len(mine), np.full(3, np.mean(mine)))}

    monkeypatch.setattr(module, "_measure", mean_number)

    def look(*scans: dict[str, Any]) -> float:
        table = pa.Table.from_pylist(list(scans))
        work = table.filter(pa.compute.field("site") == "A")
        return float(site_looks(None, table, work, job, config, None)["A", "T1w"][0])

    assert look(scan(1), scan(3)) == 2
    assert look(scan(1), scan(3), scan(8)) == 2, "it does not depend on when scans came"
    assert look(scan(1), scan(3, site="B"), scan(9)) == 5, "a corrected site"
    assert look(scan(1), scan(3, site="B"), scan(9), scan(11)) == 5
    assert look(scan(1, sequence="T2w"), scan(9)) == 9
