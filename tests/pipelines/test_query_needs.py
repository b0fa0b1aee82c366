"""What a statement is given may be more than it needs, never less: its answer stays the same."""

from __future__ import annotations

import json
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from pipelines.query_needs import find_needs
from sgcd_core.errors import UsageError

VIEWS: dict[str, tuple[str, ...]] = {
    "results": ("target", "site", "sequence"), "metrics": ("target", "site", "sequence"),
    "scans": (),
}  # fmt: skip
PLACES = [(t, s, q) for t in ("T", None) for s in ("A", "B", None) for q in ("T1w", "T2w")]
ROWS = [
    {"target": t, "site": s, "sequence": q, "x": number, "scan": number % 5}
    for number, (t, s, q) in enumerate(PLACES)
]
TABLES = {
    "results": pa.Table.from_pylist(ROWS),
    "metrics": pa.Table.from_pylist([row | {"scan": row["scan"] + 2} for row in ROWS]),
    "scans": pa.Table.from_pylist([{"scan": number, "age": 20 + number} for number in range(6)]),
}


ENGINE = duckdb.connect(":memory:", config={"threads": 1})


def needs_of(sql: str) -> dict[str, Any]:
    found = ENGINE.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    return find_needs(json.loads(found[0][0]), VIEWS)


def answer(sql: str, tables: dict[str, pa.Table]) -> list[tuple[Any, ...]]:
    for name, table in tables.items():
        ENGINE.register(name, table)
    return sorted(ENGINE.execute(sql).fetchall(), key=repr)


def given(needs: dict[str, Any]) -> dict[str, pa.Table]:
    """The tables as a statement with these needs gets them."""
    found = {name: table.slice(0, 0) for name, table in TABLES.items()}
    for name, filters in needs.items():
        rows = [r for r in TABLES[name].to_pylist() if all(r[c] in v for c, v in filters.items())]
        found[name] = pa.Table.from_pylist(rows, schema=TABLES[name].schema)
    return found


PRUNED = {
    "SELECT * FROM results WHERE site = 'A'": {"results": {"site": ["A"]}},
    "SELECT * FROM results AS r WHERE 'A' = R.Site AND x > 1": {"results": {"site": ["A"]}},
    "FROM results WHERE target = 'T' AND site IN ('A', 'B') AND site = 'B' AND sequence = 'T1w'": {
        "results": {"target": ["T"], "site": ["B"], "sequence": ["T1w"]}
    },
    "SELECT * FROM results r JOIN metrics m USING (x) WHERE r.site = 'A' AND m.site = 'B'": {
        "results": {"site": ["A"]}, "metrics": {"site": ["B"]},
    },
    "SELECT * FROM scans s LEFT JOIN results r USING (scan) WHERE r.site = 'A'": {
        "scans": {}, "results": {"site": ["A"]},
    },
    "SELECT * FROM results WHERE site = 'A' UNION ALL SELECT * FROM results WHERE site = 'B'": {
        "results": {"site": ["A", "B"]}
    },
    "WITH a AS (SELECT * FROM results WHERE site = 'A') SELECT count(*) FROM a": {
        "results": {"site": ["A"]}
    },
    "SELECT * FROM scans WHERE scan IN (SELECT scan FROM results WHERE target = 'T')": {
        "scans": {}, "results": {"target": ["T"]},
    },
    "SELECT * FROM results WHERE site = 'A' AND site = 'B'": {"results": {"site": []}},
}  # fmt: skip

WHOLE = [
    "SELECT * FROM results WHERE site = 'A' OR x = 3",
    "SELECT * FROM results WHERE NOT (site = 'A')",
    "SELECT * FROM results WHERE site <> 'A'",
    "SELECT * FROM results WHERE site IS NULL",
    "SELECT * FROM results WHERE coalesce(site, 'A') = 'A'",
    "SELECT * FROM results WHERE site = sequence",
    "SELECT * FROM results WHERE site IN ('A', NULL)",
    "SELECT * FROM results WHERE site NOT IN ('A')",
    "SELECT * FROM results WHERE site = 'a' COLLATE NOCASE",
    "SELECT * FROM results WHERE site = ANY (['A'])",
    "SELECT count(*) FILTER (WHERE site = 'A') FROM results",
    "SELECT site, count(*) FROM results GROUP BY site HAVING site = 'A'",
    "SELECT * FROM scans LEFT JOIN results r USING (scan) WHERE r.site IS NULL",
    "SELECT * FROM scans LEFT JOIN results r ON scans.scan = r.scan AND r.site = 'A'",
    "SELECT * FROM scans s WHERE NOT EXISTS (SELECT 1 FROM results r WHERE r.scan = s.scan)",
    "SELECT * FROM results a FULL JOIN metrics b USING (x, site) WHERE a.site = 'A'",
    "SELECT * FROM results a POSITIONAL JOIN metrics b WHERE a.site = 'A'",
    "SELECT * FROM results a ASOF JOIN metrics b ON a.x >= b.x WHERE b.site = 'A'",
    "SELECT * FROM scans s ANTI JOIN results r ON s.scan = r.scan AND r.site = 'A'",
    "SELECT * FROM results, (SELECT max(x) AS top FROM results) WHERE x = top",
    "WITH results AS (SELECT x, 'A' AS site FROM results) FROM results WHERE site = 'A'",
    "SELECT *, row_number() OVER (ORDER BY x) AS n FROM results QUALIFY n = 1 AND site = 'A'",
    "SELECT * FROM (SELECT *, rank() OVER (ORDER BY x) AS n FROM results) WHERE site = 'A'",
    "SELECT * FROM results r(site, target) WHERE site = 'T'",
    "SELECT target FROM results WHERE target = 'T' UNION SELECT site FROM results",
]


@pytest.mark.parametrize("sql", [*PRUNED, *WHOLE])
def test_the_answer_is_that_of_the_whole_tables(sql: str) -> None:
    assert answer(sql, given(needs_of(sql))) == answer(sql, TABLES)


@pytest.mark.parametrize("sql", PRUNED)
def test_only_the_partitions_that_matter_are_asked_for(sql: str) -> None:
    assert needs_of(sql) == PRUNED[sql]


@pytest.mark.parametrize("sql", WHOLE)
def test_what_is_not_plainly_a_filter_asks_for_all(sql: str) -> None:
    assert needs_of(sql)["scans" if "results" not in needs_of(sql) else "results"] == {}


def test_tables_that_are_not_read_are_not_asked_for() -> None:
    assert needs_of("SELECT 1 -- FROM results") == {}
    assert needs_of("SELECT 'results'") == {}


@pytest.mark.parametrize(
    ("sql", "code", "said"),
    [
        ("FROM resluts", "QUERY-INVALID", "no table 'resluts'; nearest: results"),
        ("FROM other.results", "QUERY-INVALID", "no table 'other.results'"),
        ("FROM '/tmp/a.csv'", "QUERY-REFUSED", "files"),
        ("FROM a, query('SELECT 1')", "QUERY-", ""),
        ("SELECT (SELECT max(content) FROM read_text('a'))", "QUERY-REFUSED", "read_text"),
        ("FROM results AT (VERSION => 1)", "QUERY-REFUSED", "--as-of"),
    ],
)
def test_what_is_no_table_of_the_catalog_is_refused(sql: str, code: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        needs_of(sql)
    assert caught.value.code.startswith(code)
    assert said in str(caught.value)
