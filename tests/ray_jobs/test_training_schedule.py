"""Which scan is seen at which step: the same for any number of workers, and balanced."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.training_data import (
    COMPLETE,
    balanced_order,
    check_sequences,
    check_target,
    data_digest,
    training_rows,
)
from ray_jobs.loop import check_shares, schedule_steps
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import ConfigError, InputError
from sgcd_core.io.store import Store, join


def scans(**counts: int) -> list[dict[str, str]]:
    return [
        {"scan_id": f"{site}{i}", "site": site, "sequence": "T1w" if i % 2 else "T2w"}
        for site, n in counts.items()
        for i in range(n)
    ]


def test_workers_share_a_batch_alike_or_not_at_all() -> None:
    check_shares(4, 2)
    with pytest.raises(ConfigError, match="2 volumes cannot be shared by 3 workers"):
        check_shares(2, 3)


def test_what_is_left_to_learn_from_is_told_from_what_is_not_prepared(tmp_lake: Lake) -> None:
    catalog, store = Catalog(tmp_lake), Store()
    more = {"status": "ok", "split": "train", "uri": "/x"}
    catalog.append("scans", [row | more for row in scans(A=2, B=2)])

    def rows(*sequences: str, **more: Any) -> list[str]:
        return [r["scan_id"] for r in training_rows(catalog, "r", sequences=sequences, **more)]

    with pytest.raises(InputError, match="none of its 4 scans is prepared"):
        rows("T1w")
    for scan_id in ("A0", "A1", "B0"):
        store.write_bytes(join(tmp_lake.prepared("r", scan_id), COMPLETE), b"{}")
    assert rows("T1w", "T2w") == ["A0", "A1", "B0"]
    with pytest.raises(InputError, match=r"of the sites \(none\) and sequences \(T1w\) asked"):
        rows("T1w", exclude_sites=["A", "B"])
    with pytest.raises(InputError, match=r"of the sites \(B\) and sequences \(T1w\) asked for"):
        rows("T1w", sites=["A", "B"], exclude_sites=["A"])


def test_a_small_site_is_seen_as_often_as_a_large_one() -> None:
    order = balanced_order(scans(A=40, B=4), 80, seed=0)
    sites = Counter(row["site"] for row in order)
    assert sites["A"] == sites["B"] == 40


def test_without_balance_every_scan_is_seen_equally_often() -> None:
    rows = scans(A=10, B=2)
    order = balanced_order(rows, 36, seed=0, site_balance=False)
    assert set(Counter(row["scan_id"] for row in order).values()) == {3}


def test_no_scan_of_a_group_repeats_before_the_others_came() -> None:
    order = [r["scan_id"] for r in balanced_order(scans(A=6), 6, seed=3)]
    assert len(set(order)) == 6


def test_the_order_depends_on_the_seed_and_not_on_the_rows_order() -> None:
    rows = scans(A=9, B=5)
    first = balanced_order(rows, 30, seed=1)
    assert first == balanced_order(rows[::-1], 30, seed=1)
    assert first != balanced_order(rows, 30, seed=2)


def test_two_workers_see_at_each_step_what_one_sees() -> None:
    """Rank r of n takes every n-th row of a step, with the seed that the row carries."""
    schedule = schedule_steps({"scan": scans(A=7, B=3)}, SgcdConfig(), steps=5, batch=4)
    for step in range(5):
        rows = [row["scans"]["scan"] for row in schedule if row["step"] == step]
        assert len(rows) == 4
        assert sorted(rows[0::2] + rows[1::2]) == sorted(rows)
    seeds = [row["scans"]["scan"][2] for row in schedule]
    assert len(set(seeds)) == len(seeds)


def test_a_resumed_schedule_is_the_tail_of_the_whole() -> None:
    rows, config = scans(A=7, B=3), SgcdConfig()
    whole = schedule_steps({"scan": rows}, config, steps=9, batch=2)
    again = schedule_steps({"scan": rows[::-1]}, config, steps=9, batch=2)
    assert whole == again


def test_the_digest_of_the_data_sees_a_changed_site_and_not_the_order() -> None:
    rows = scans(A=3, B=2)
    assert data_digest(rows) == data_digest(rows[::-1])
    assert data_digest(rows) != data_digest([rows[0] | {"site": "C"}, *rows[1:]])


def test_a_target_that_lacks_a_sequence_is_refused_with_a_way_on() -> None:
    rows = [r for r in scans(A=4, B=4) if not (r["site"] == "A" and r["sequence"] == "T2w")]
    check_target("B", rows, ("T1w", "T2w"), "lake")
    with pytest.raises(InputError) as caught:
        check_target("A", rows, ("T1w", "T2w"), "lake")
    assert caught.value.code == "TARGET-SEQUENCE" and "--sequences T1w" in str(caught.value)
    check_target("A", [r for r in rows if r["sequence"] == "T1w"], ("T1w",), "lake")
    with pytest.raises(InputError) as caught:
        check_target("A", [r for r in rows if r["site"] == "B"], ("T1w", "T2w"), "lake")
    assert caught.value.code == "TARGET-SEQUENCE" and "T1w or T2w" in str(caught.value)


def test_a_sequence_the_model_does_not_know_is_refused() -> None:
    assert check_sequences(["T2w"], ("T1w", "T2w")) == ["T2w"]
    with pytest.raises(InputError, match="SCAN-SEQUENCE"):
        check_sequences(["FLAIR"], ("T1w", "T2w"))
