"""`sgcd check`: one row a scan, whatever is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines.check import check_uris, render_lines
from sgcd_core.io.store import Store

if TYPE_CHECKING:
    from tests.conftest import S3Server


def test_files_folders_and_mistakes_each_get_their_rows(
    tmp_path: Path, make_scan: Callable[..., bytes]
) -> None:
    good, cut = tmp_path / "a b#%.nii.gz", tmp_path / "more" / "cut.nii.gz"
    cut.parent.mkdir()
    good.write_bytes(make_scan())
    cut.write_bytes(make_scan()[:-20])
    (tmp_path / "more" / "derivatives").mkdir()
    (tmp_path / "more" / "derivatives" / "x.nii.gz").write_bytes(b"")
    (tmp_path / "text.txt").write_text("hello")
    uris = [str(good), str(cut.parent), str(tmp_path / "none.nii.gz"), str(tmp_path / "nowhere"),
            str(tmp_path / "text.txt"), "gs://bucket/x"]  # fmt: skip
    ticks: list[tuple[int, int]] = []
    rows = check_uris(uris, progress=lambda done, total: ticks.append((done, total)))
    assert [(r["usable"], r["code"]) for r in rows] == [
        (True, None), (False, "SCAN-TRUNCATED"), (False, "SCAN-MISSING"), (False, "STORE-EMPTY"),
        (False, "SCAN-UNREADABLE"), (False, "STORE-ADDRESS"),
    ]  # fmt: skip
    assert rows[0]["shape"] == [60, 70, 60]
    assert rows[0]["voxel_mm"] == [2, 2, 2]
    assert rows[0]["orientation"] == "LAS"
    assert ticks[-1] == (6, 6)
    lines = render_lines(rows)
    assert lines[0].startswith("ok") and str(good) in lines[0]
    assert all(row["code"] in "\n".join(lines) for row in rows if row["code"])


def test_endings_in_capitals_are_images_too(
    tmp_path: Path, make_scan: Callable[..., bytes]
) -> None:
    (tmp_path / "a_T1w.NII.GZ").write_bytes(make_scan())
    (tmp_path / "b_T1w.nii.gz").write_bytes(make_scan())
    rows = check_uris([str(tmp_path)])
    assert [(Path(r["uri"]).name, r["usable"]) for r in rows] == [
        ("a_T1w.NII.GZ", True), ("b_T1w.nii.gz", True),
    ]  # fmt: skip


def test_warnings_are_told_and_do_not_make_a_scan_unfit(
    tmp_path: Path, make_scan: Callable[..., bytes]
) -> None:
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(make_scan() + b"trailing bytes")
    (row,) = check_uris([str(path)])
    assert row["usable"]
    assert [w["code"] for w in row["warnings"]] == ["SCAN-CORRUPT"]
    assert "note SCAN-CORRUPT" in "\n".join(render_lines([row]))


@pytest.mark.s3
def test_s3_gives_the_same_rows(s3_server: S3Server, make_scan: Callable[..., bytes]) -> None:
    prefix = s3_server.uri("check")
    Store().write_bytes(f"{prefix}/x.nii.gz", make_scan())
    rows = check_uris([prefix, f"{prefix}/y.nii.gz"])
    assert [(r["uri"], r["code"]) for r in rows] == [
        (f"{prefix}/x.nii.gz", None), (f"{prefix}/y.nii.gz", "SCAN-MISSING"),
    ]  # fmt: skip


@pytest.mark.real
def test_real_scans(data_dir: Path) -> None:
    folders = [str(data_dir / "real" / f"sub-{name}") for name in ("UCLA01", "IXI013", "MS12")]
    rows = check_uris(folders)
    found = {row["uri"].rpartition("/")[2]: row["code"] for row in rows}
    assert found == {
        "sub-UCLA01_T1w.nii.gz": None, "sub-UCLA01_acq-inplane_T2w.nii.gz": "SCAN-COARSE",
        "sub-IXI013_T1w.nii.gz": None, "sub-MS12_T1w.nii.gz": None, "sub-MS12_T2w.nii.gz": None,
    }  # fmt: skip
