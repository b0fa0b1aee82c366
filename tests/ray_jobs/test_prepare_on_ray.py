"""`sgcd prepare` on Ray: a scan that hangs costs itself alone, a stopped run nobody."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.ledger import MAX_ATTEMPTS, begin_attempt, count_attempts
from pipelines.training_data import prepared_ids
from ray_jobs import cli
from ray_jobs import prepare as module
from ray_jobs.parser import build_parser
from ray_jobs.prepare import PrepareJob
from sgcd_core.config import PrepareConfig
from sgcd_core.io.store import sha256_hex

SETTINGS = ("shape=[24,24,24]", "mm=8", "bias_correction=none", "registration=none",
            "brain_extraction=none")  # fmt: skip
SET = [word for item in SETTINGS for word in ("--set", f"prepare.{item}")]
CONFIG = PrepareConfig(
    shape=(24, 24, 24), mm=8, bias_correction="none", registration="none", brain_extraction="none"
)


@pytest.fixture
def lake(tmp_path: Path, make_scan: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> Lake:
    """Three usable scans in the index."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = Lake.open(str(tmp_path / "lake"), create=True)
    for number in range(3):
        data = make_scan(number)
        path = tmp_path / f"sub-{number}_T1w.nii.gz"
        path.write_bytes(data)
        _index(found, sha256_hex(data)[:32], number, path)
    return found


def _index(lake: Lake, scan_id: str, number: int, path: Path) -> None:
    Catalog(lake).append("scans", [{
        "scan_id": scan_id, "dataset": "d", "subject": str(number), "session": None, "site": "A",
        "sequence": "T1w", "split": "train", "uri": str(path), "status": "ok",
    }])  # fmt: skip


def _prepare(lake: Lake, *words: str) -> int:
    return cli.main(["prepare", "--lake", lake.uri, *SET, *words])


def _ready(lake: Lake) -> int:
    return len(prepared_ids(lake, CONFIG.digest()))


@pytest.mark.ray
@pytest.mark.slow
def test_a_scan_that_hangs_is_failed_and_the_others_are_prepared(
    lake: Lake, tmp_path: Path, capsys: Any
) -> None:
    pipe = tmp_path / "sub-9_T1w.nii.gz"
    os.mkfifo(pipe)  # whoever opens it waits for ever
    _index(lake, "9" * 32, 9, pipe)
    assert _prepare(lake, "--scan-deadline", "15", "--workers", "2") == 1
    assert "SCAN-DEADLINE" in capsys.readouterr().out
    assert _ready(lake) == 3
    assert count_attempts(lake, PrepareJob(lake, CONFIG).key, "9" * 32) == 0


@pytest.mark.ray
def test_what_was_set_aside_is_prepared_with_force(lake: Lake, capsys: Any) -> None:
    key = PrepareJob(lake, CONFIG).key
    first = Catalog(lake).rows("scans")["scan_id"].to_pylist()[0]
    for _ in range(MAX_ATTEMPTS):
        begin_attempt(lake, key, first)
    assert _prepare(lake) == 1
    assert "SCAN-QUARANTINED" in capsys.readouterr().out
    assert _ready(lake) == 2
    assert _prepare(lake, "--force") == 0
    assert _ready(lake) == 3


def test_where_nothing_is_prepared_no_training_is_suggested(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def failing(ray: Any, todo: list[dict[str, Any]], *_: Any) -> Iterator[dict[str, Any]]:
        yield from (scan | {"status": "failed", "code": "SCAN-NO-BRAIN"} for scan in todo)

    monkeypatch.setattr(module, "prepare_stream", failing)
    monkeypatch.setattr(module, "session", lambda *_: nullcontext())
    assert _prepare(lake) == 1
    out = capsys.readouterr().out
    assert "3 SCAN-NO-BRAIN" in out and out.strip().endswith(f"next: sgcd report --lake {lake.uri}")
    empty = Lake.open(str(tmp_path / "empty"), create=True)
    row = {"scan_id": "f" * 32, "uri": "/x", "status": "failed", "code": "SCAN-CORRUPT"}
    Catalog(empty).append("scans", [row])
    assert _prepare(empty) == 0
    out = capsys.readouterr().out
    assert "no scan can be used" in out and "sgcd train" not in out


@pytest.mark.ray
def test_a_run_that_is_stopped_counts_against_no_scan(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan_ids = Catalog(lake).rows("scans")["scan_id"].to_pylist()

    def stopped(_ray: Any, todo: Any, job: PrepareJob, *_: Any) -> Any:
        for row in todo:
            begin_attempt(lake, job.key, row["scan_id"], job.run)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(module, "prepare_stream", stopped)
    with pytest.raises(KeyboardInterrupt):
        module.run(build_parser().parse_args(["prepare", "--lake", lake.uri, *SET]))
    key = PrepareJob(lake, CONFIG).key
    assert [count_attempts(lake, key, scan_id) for scan_id in scan_ids] == [0, 0, 0]


def test_a_mix_of_extracted_brains_and_heads_is_said() -> None:
    assert module._mixed({"given": {"A"}, "here": set()}) == []
    (note,) = module._mixed({"given": {"B", "A"}, "here": {"C"}})
    assert "scans of A, B came brain-extracted, those of C were extracted here" in note
