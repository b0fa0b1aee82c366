"""Which scans a site's look is measured on, and where it is kept."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipelines.lake import Lake
from ray_jobs.site_looks import MOST_SCANS, _sample, look_uri


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
    assert uri == "/lake/prepared/r/looks-3/St.%20Mary%27s%2F3T_T2w.json"
