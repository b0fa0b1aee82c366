"""Every statement of docs/cookbook.md runs, and says what can be reckoned by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from analyst_lake import analyst_lake

from pipelines.lake import Lake
from pipelines.query import run_query

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cookbook.md"
SECTIONS = re.findall(r"^## (.+?)\n.*?```sql\n(.+?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return analyst_lake(str(tmp_path_factory.mktemp("analyst") / "lake"))


def moved(rows: Rows) -> None:
    assert [r["site"] for r in rows] == ["siteC", "siteB", "siteA"]
    assert rows[0]["moved"] == pytest.approx(0.16)


def flagged(rows: Rows) -> None:
    assert [(r["status"], r["code"], r["subject"]) for r in rows] == [
        ("failed", "SCAN-CORRUPT", "07"), ("flagged", "FLAG-VOLUMES", "05"),
    ]  # fmt: skip
    assert rows[0]["uri"] == "/bids/sub-07_T1w.nii.gz"


def through(rows: Rows) -> None:
    assert [(r["site"], r["scans"], r["ok"], r["flagged"], r["lost"]) for r in rows] == [
        ("siteC", 2, 1, 0, 1), ("siteB", 3, 2, 1, 0), ("siteA", 2, 2, 0, 0),
    ]  # fmt: skip
    assert rows[1]["percent_ok"] == pytest.approx(66.7)


def by_age(rows: Rows) -> None:
    assert [(r["age_from"], r["scans"], r["better"]) for r in rows] == [(20, 2, 2), (60, 3, 2)]
    assert rows[0]["gain"] == pytest.approx(0.03)
    assert rows[1]["gain"] == pytest.approx((-0.01 + 0.10 + 0.20) / 3)


def versions(rows: Rows) -> None:
    assert [(r["site"], r["scans"]) for r in rows] == [("siteB", 3), ("siteC", 2)]
    assert rows[0]["change"] == pytest.approx(0.01)
    assert rows[1]["change"] == pytest.approx((-0.02 + 0.10) / 2)


def ended(rows: Rows) -> None:
    assert [(r["subject"], r["was"], r["is_now"]) for r in rows] == [
        ("07", "failed", "ok"), ("05", "flagged", "ok"), ("06", "ok", "flagged"),
    ]  # fmt: skip
    assert rows[2]["now_because"] == "FLAG-VOLUMES"


def waiting(rows: Rows) -> None:
    assert rows == [{"site": "siteC", "sequence": "T1w", "waiting": 1}]


def strangest(rows: Rows) -> None:
    assert [(r["site"], r["subject"]) for r in rows][:3] == [
        ("siteA", "02"), ("siteA", "01"), ("siteB", "05"),
    ]  # fmt: skip


def time_spent(rows: Rows) -> None:
    assert [r["phase"] for r in rows] == ["model", "prepare", "read", "write"]
    assert rows[0]["median_s"] == 4.0
    assert rows[0]["hours"] == pytest.approx(28 / 3600)


def one_scan(rows: Rows) -> None:
    assert [(r["model_version"], r["status"]) for r in rows] == [
        (1, "failed"), (1, "ok"), (2, "ok"),
    ]  # fmt: skip


def unlike(rows: Rows) -> None:
    assert [r["site"] for r in rows] == ["siteA", "siteB", "siteC"]
    assert rows[2]["subjects"] == 3
    assert rows[2]["share_female"] == pytest.approx(0.33)


def last_runs(rows: Rows) -> None:
    assert [(r["command"], r["seconds"]) for r in rows] == [("harmonize", 90.0), ("index", 90.0)]


def again(rows: Rows) -> None:
    assert [(r["subject"], r["tries"], r["status"]) for r in rows] == [
        ("06", 3, "ok"), ("03", 2, "ok"),
    ]  # fmt: skip
    assert rows[0]["before"] == "raised (OSError), lost"


ANSWERS: list[Callable[[Rows], None]] = [
    moved, flagged, through, by_age, versions, ended, waiting, strangest, time_spent, one_scan,
    unlike, last_runs, again,
]  # fmt: skip


def test_every_question_has_an_answer() -> None:
    assert len(SECTIONS) == len(ANSWERS) == PAGE.read_text().count("\n## ") >= 10


@pytest.mark.parametrize(
    ("sql", "check"),
    [(sql, check) for (_, sql), check in zip(SECTIONS, ANSWERS, strict=True)],
    ids=[check.__name__ for check in ANSWERS],
)
def test_the_statement_answers_the_question(
    lake: Lake, sql: str, check: Callable[[Rows], None]
) -> None:
    check(run_query(lake, sql).to_pylist())
