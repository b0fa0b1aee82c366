"""The lake's aliases: one truth, whoever moves them and however many at once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import S3Server

from pipelines import aliases
from pipelines.lake import Lake
from sgcd_core.errors import ModelError, UsageError


def test_moves_are_kept_and_the_last_one_counts(tmp_lake: Lake) -> None:
    assert aliases.current(tmp_lake, "m", "champion") is None
    first = aliases.move(tmp_lake, "m", "champion", 1, "x")
    second = aliases.move(tmp_lake, "m", "champion", 2, "y")
    assert first is not None and second is not None
    assert (first.number, first.previous) == (1, None)
    assert (second.number, second.previous) == (2, 1)
    assert aliases.current(tmp_lake, "m", "champion") == second
    back = aliases.move(tmp_lake, "m", "champion", 1, "x")
    assert back is not None and back.previous == 2
    assert [m.version for m in aliases.history(tmp_lake, "m", "champion")] == [1, 2, 1]
    assert aliases.aliases(tmp_lake, "m") == {"champion": 1}


def test_moving_it_where_it_is_writes_nothing(tmp_lake: Lake) -> None:
    aliases.move(tmp_lake, "m", "champion", 1, "x")
    assert aliases.move(tmp_lake, "m", "champion", 1, "x") is None
    assert len(aliases.history(tmp_lake, "m", "champion")) == 1
    # The same number with other files is another model.
    assert aliases.move(tmp_lake, "m", "champion", 1, "other") is not None


def race(lake: Lake) -> None:
    """Many move at once: each move knows the one it builds on, and one is the last."""
    versions = [1, 2, 3, 4, 5, 6]
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda v: aliases.move(lake, "m", "champion", v, str(v)), versions))
    chain = aliases.history(lake, "m", "champion")
    assert [m.number for m in chain] == [1, 2, 3, 4, 5, 6]
    assert sorted(m.version for m in chain) == versions
    assert [m.previous for m in chain] == [None, *(m.version for m in chain[:-1])]
    assert sorted((m for m in done if m), key=lambda m: m.number) == chain
    assert aliases.current(lake, "m", "champion") == chain[-1]


def test_racing_moves_on_a_disk(tmp_lake: Lake) -> None:
    race(tmp_lake)


@pytest.mark.s3
@pytest.mark.slow
def test_racing_moves_in_a_bucket(s3_server: S3Server) -> None:
    race(Lake(s3_server.uri("racing")))


def test_a_damaged_move_is_said(tmp_lake: Lake) -> None:
    aliases.move(tmp_lake, "m", "champion", 1, "x")
    file = next(Path(tmp_lake.uri).rglob("000001.json"))
    file.write_text(json.dumps({"version": 1}))
    with pytest.raises(ModelError, match="the move before it"):
        aliases.current(tmp_lake, "m", "champion")


@pytest.mark.parametrize("alias", ["latest", "candidate", "v3", "7", "a/b", "", "über", "a b"])
def test_words_that_are_no_alias(alias: str) -> None:
    with pytest.raises(UsageError):
        aliases.check_alias(alias)
