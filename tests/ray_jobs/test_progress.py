"""Progress away from a terminal: JSON lines a program can read."""

from __future__ import annotations

import io
import json

import pytest

from pipelines import progress
from pipelines.progress import Progress


def test_json_lines_count_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    stream = io.StringIO()
    with Progress("harmonize", 3, stream=stream) as bar:
        for _ in range(3):
            bar.update(1, failed=1)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["done"] for line in lines] == [1, 2, 3, 3]
    assert lines[-1]["event"] == "done" and lines[-1]["failed"] == 1
    assert lines[0]["seconds_left"] is not None


def test_reach_takes_the_total_as_it_becomes_known() -> None:
    stream = io.StringIO()
    with Progress("index", None, stream=stream) as bar:
        bar.reach(4, 8)
        bar.reach(8, 8)
    last = json.loads(stream.getvalue().splitlines()[-1])
    assert (last["done"], last["total"]) == (8, 8)
