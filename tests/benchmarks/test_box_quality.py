"""The benchmark of the model in the box, at toy size."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import box_quality


@pytest.mark.slow
def test_every_method_is_scored_against_the_truth_and_scans_are_kept(tmp_path, capsys):
    words = [str(tmp_path), "--preset", "tiny", "--sites", "2", "--each", "1", "--traveling", "1"]
    assert box_quality.main([*words, "--workers", "1"]) == 0
    first = capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    made = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(made) == 3
    # 2 sequences, seen and unseen: raw, 5 classical methods and our three, a second scan at the
    assert first.count("\n| T") == 4 * 10 + 4  # target; then the paired differences
    assert box_quality.main([*words, "--workers", "1"]) == 0
    again = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == made
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert table == [line for line in again.splitlines() if line.startswith("|")]
