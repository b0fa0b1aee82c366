"""`sgcd index` on a lake that holds something already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.training_data import COMPLETE, prepared_ids
from ray_jobs import cli
from sgcd_core.io.nifti import encode_nifti
from sgcd_core.io.store import Store, join


def test_a_scan_whose_sequence_was_corrected_is_prepared_anew(
    tmp_path: Path, make_scan: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    source, address = tmp_path / "scans.csv", str(tmp_path / "lake")
    for number in (1, 2):
        (tmp_path / f"{number}.nii.gz").write_bytes(make_scan(number))

    def index(*sequences: str) -> None:
        lines = [f"{n}.nii.gz,{n},A,{word}" for n, word in enumerate(sequences, 1)]
        source.write_text("\n".join(["uri,subject,site,sequence", *lines]) + "\n")
        assert cli.main(["index", str(source), "--lake", address]) == 0

    index("T1w", "T1w")
    lake = Lake(address)
    rows = Catalog(lake).rows("scans").sort_by("subject")
    one, two = rows["scan_id"].to_pylist()
    for recipe in ("r1", "r2"):
        for scan_id in (one, two):
            Store().write_bytes(join(lake.prepared(recipe, scan_id), COMPLETE), b"{}")
    index("T1w", "T1w")
    assert prepared_ids(lake, "r1") == {one, two}
    assert "another subject" not in capsys.readouterr().out
    index("T2w", "T1w")
    assert "note: 1 scan of another subject, session, site or sequence" in (capsys.readouterr().out)
    assert prepared_ids(lake, "r1") == prepared_ids(lake, "r2") == {two}


def test_a_limit_of_voxel_size_can_be_raised(
    tmp_path: Path, head_voxels: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    thick = head_voxels[:, :, ::2].astype(np.float32)
    path, lake = tmp_path / "sub-1_T1w.nii.gz", str(tmp_path / "lake")
    path.write_bytes(encode_nifti(thick, np.diag([4.0, 4.0, 8.0, 1.0])))
    raised = ("--set", "prepare.max_voxel_mm=9")
    assert cli.main(["check", str(path)]) == 65
    assert cli.main(["check", str(path), *raised]) == 0
    source = tmp_path / "scans.csv"
    source.write_text(f"uri,subject,site,sequence,,\n{path},1,A,T1w,,\n")
    index = ["index", str(source), "--lake", lake]
    assert cli.main(index) == 1
    assert "SCAN-COARSE" in capsys.readouterr().out
    assert cli.main([*index, *raised]) == 0
    assert Catalog(Lake(lake)).rows("scans")["status"].to_pylist() == ["ok"]


def bids_scan(folder: Path, data: bytes, label: str = "1") -> Path:
    anat = folder / f"sub-{label}" / "anat"
    anat.mkdir(parents=True)
    (anat / f"sub-{label}_T1w.nii.gz").write_bytes(data)
    return folder


def test_no_lake_is_made_among_the_raw_data_or_where_no_address_is_given(
    tmp_path: Path, make_scan: Callable[..., bytes], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = bids_scan(tmp_path / "bids", make_scan(1))
    monkeypatch.chdir(data)
    address = data.as_uri()
    for words in ([str(data), "--lake", str(data)], [".", "--lake", f"{data}/"],
                  [address, "--lake", str(data)], [f"{address}/", "--lake", "."]):  # fmt: skip
        assert cli.main(["index", *words]) == 2
        assert "the lake would lie in the source itself" in capsys.readouterr().err
    for words in (["--lake", "", str(data)], ["--lake", "lake", ""]):
        assert cli.main(["index", *words]) == 69
        assert "STORE-ADDRESS" in capsys.readouterr().err
    assert [path.name for path in data.iterdir()] == ["sub-1"]


def test_scans_that_cannot_be_used_are_counted_again(
    tmp_path: Path, make_scan: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    data = bids_scan(tmp_path / "bids", make_scan(1))
    bids_scan(data, b"no scan", "2")
    (data / "participants.tsv").write_text("participant_id\tsite\nsub-1\tA\nsub-2\tA\n")
    words = ["index", str(data), "--lake", str(tmp_path / "lake")]
    assert cli.main(words) == 1
    assert "2 scans new or changed, 1 of them cannot be used, 0 unchanged" in (
        capsys.readouterr().out
    )
    assert cli.main(words) == 0
    assert "0 scans new or changed, 2 unchanged, 1 of them cannot be used" in (
        capsys.readouterr().out
    )
