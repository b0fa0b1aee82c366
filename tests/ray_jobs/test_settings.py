"""Settings a lake remembers: how its scans were prepared, so that nobody repeats it."""

from __future__ import annotations

from argparse import Namespace

import pytest

from pipelines.lake import Lake
from ray_jobs.settings import from_args, preparation_line, remember
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import ConfigError
from sgcd_core.io.store import Store


def words(*settings: str, preset: str | None = None) -> Namespace:
    return Namespace(preset=preset, config=None, settings=list(settings))


def test_later_commands_start_from_how_the_scans_were_prepared(tmp_lake: Lake) -> None:
    assert from_args(words(), tmp_lake) == SgcdConfig()
    first = from_args(words("prepare.brain_extraction=deepbet", preset="small"), tmp_lake)
    remember(tmp_lake, first)
    assert from_args(words(), tmp_lake) == first
    later = from_args(words("global_stage.steps=7"), tmp_lake)
    assert later.prepare == first.prepare and later.global_stage.steps == 7
    assert from_args(words(preset="small"), tmp_lake) == first


def test_the_users_own_words_win(tmp_lake: Lake) -> None:
    remember(tmp_lake, from_args(words("prepare.brain_extraction=deepbet"), tmp_lake))
    mine = from_args(words("prepare.brain_extraction=auto"), tmp_lake)
    assert mine.prepare == SgcdConfig().prepare
    other = from_args(words(preset="small"), tmp_lake)  # another preset: from nothing
    assert (other.prepare.brain_extraction, other.prepare.mm) == ("auto", 2.0)


def test_what_is_no_preparation_is_not_remembered(tmp_lake: Lake) -> None:
    remember(tmp_lake, from_args(words("global_stage.steps=7", "seed=3"), tmp_lake))
    assert from_args(words(), tmp_lake) == SgcdConfig()


def test_the_line_names_what_was_changed(tmp_lake: Lake) -> None:
    assert preparation_line(SgcdConfig()) == []
    changed = from_args(words("prepare.brain_extraction=deepbet", "sequences=[T1w]"), tmp_lake)
    (line,) = preparation_line(changed)
    assert line.endswith("prepare.brain_extraction=deepbet, sequences=['T1w']")


def test_a_damaged_file_is_said(tmp_lake: Lake) -> None:
    Store().write_bytes(tmp_lake.prepared_with, b'{"preset": 1')
    with pytest.raises(ConfigError) as caught:
        from_args(words(), tmp_lake)
    assert caught.value.code == "CONFIG-FILE"
