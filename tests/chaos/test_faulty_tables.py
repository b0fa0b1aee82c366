"""The tables on a real S3 server while credentials change, at request after request."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import S3Server
from faulty_s3 import FaultyS3, write_keys

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.optimize import optimize
from sgcd_core.errors import StorageError

pytestmark = [pytest.mark.chaos, pytest.mark.s3, pytest.mark.slow]


@pytest.fixture
def catalog(faulty: FaultyS3, keys: Path, s3_server: S3Server, tmp_path: Path) -> Catalog:
    """A catalog with two commits of one attempt each."""
    found = Catalog(Lake.open(s3_server.uri(f"tables-{tmp_path.name}"), create=True))
    for number in range(2):
        append(found, number)
    return found


def append(catalog: Catalog, number: int, named: bool = True) -> bool:
    row = {
        "scan_id": f"{number:032d}", "model": "global", "model_version": 1, "batch_id": "b",
        "attempt": 1,
    }  # fmt: skip
    return catalog.append("attempts", [row], txn=f"batch-{number}" if named else None)


def append_next(catalog: Catalog, round: int) -> None:
    """What `append` says is not asked: refused once its rows are in, it says False."""
    append(catalog, 2 + round)


def scans(catalog: Catalog) -> list[int]:
    return sorted(int(s) for s in catalog.history("attempts")["scan_id"].to_pylist())


#: What is done in a round, counted from 0, and what it returns.
OPERATIONS: dict[str, tuple[Callable[[Catalog, int], Any], Any]] = {
    "append": (append_next, None),
    "append unnamed": (lambda catalog, round: append(catalog, 2 + round, named=False), True),
    "append again": (lambda catalog, round: append(catalog, 1), False),
    "history": (lambda catalog, round: scans(catalog), [0, 1]),
    "a version": (lambda catalog, round: catalog.history("attempts", as_of=1).num_rows, 1),
    "version": (lambda catalog, round: catalog.version("attempts"), 2),
    "tables": (lambda catalog, round: sum(table["rows"] for table in catalog.tables()), 2),
    "optimize": (
        lambda catalog, round: [u.rows for u in optimize(catalog, keep=timedelta(days=2))], [2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_credentials_replaced_before_any_request_of_a_table_cost_nothing(
    name: str, faulty: FaultyS3, keys: Path, catalog: Catalog
) -> None:
    """A round replaces them before the first request, the next one `step` requests later."""
    operation, expected = OPERATIONS[name]
    adds = name in ("append", "append unnamed")
    step = 7 if adds else 3  # each append makes the next one longer by a few
    token, rounds, replaced = "old", 0, True
    while replaced:
        old, token = token, str(rounds)

        def replace(old: str = old, token: str = token) -> None:
            write_keys(keys, token)
            faulty.expired.add(old)

        reached = faulty.at_request(1 + step * rounds, replace)
        assert operation(catalog, rounds) == expected
        replaced = reached.is_set()
        faulty.on_request = lambda method, path: None
        rounds += 1
    print(f"{name}: {rounds} rounds, {faulty.faults['expired']} requests refused")
    assert rounds > 3 and faulty.faults["expired"] >= rounds - 1
    assert scans(catalog) == list(range(2 + rounds if adds else 2))


@pytest.mark.parametrize("name", OPERATIONS)
def test_credentials_that_nobody_replaces_are_an_error(
    name: str, faulty: FaultyS3, catalog: Catalog
) -> None:
    faulty.expired.add("old")
    with pytest.raises(StorageError) as error:
        OPERATIONS[name][0](catalog, 0)
    assert error.value.code == "STORE-EXPIRED"
