"""The benchmark of the model in the box, at toy size."""

import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import box_quality
from ablation_tables import overall


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


@pytest.mark.slow
def test_more_evaluations_are_scored_and_drawn_and_unshaded_scans_are_others(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(box_quality, "EVALUATIONS", box_quality.EVALUATIONS[::9])
    words = [str(tmp_path), "--preset", "tiny", "--sites", "2", "--each", "1", "--traveling", "1"]
    picture = tmp_path / "evaluations.png"
    results = []
    real = box_quality.evaluations_table
    monkeypatch.setattr(
        box_quality, "evaluations_table", lambda found: results.append(found) or real(found)
    )
    for more in ([], ["--unshaded"]):
        drawn = ["--workers", "1", "--evaluations", str(picture)]
        assert box_quality.main([*words, *drawn, *more]) == 0
        assert Image.open(picture).width > 300
        picture.unlink()
    names = ("raw", "evaluations-t100-n1", "evaluations-t180-n16")
    shaded, unshaded = ([overall(found[name]) for name in names] for found in results)
    assert shaded[1] != shaded[2]  # the sampler's settings arrive
    assert abs(shaded[0] - unshaded[0]) > 0.1  # so do the coils'
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2
