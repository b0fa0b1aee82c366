"""What a source says before any scan is read."""

from __future__ import annotations

from pathlib import Path

from pipelines.scan_list import list_source
from sgcd_core.io.store import Store


def notes_of(table: Path, *rows: str) -> list[str]:
    table.write_text("\n".join(("uri,subject,sequence,site,split", *rows)))
    _, notes = list_source(str(table), site_from="auto", sequences=["T1w"], store=Store())
    return notes


def test_subjects_with_scans_of_several_splits_are_counted(tmp_path: Path) -> None:
    table = tmp_path / "scans.csv"
    mixed = ("a.nii,1,T1w,A,test", "b.nii,1,T1w,B,", "c.nii,2,T1w,A,train", "d.nii,2,T1w,B,test")
    (note,) = notes_of(table, *mixed, "e.nii,3,T1w,A,test")
    assert note.startswith(f"{table}: 2 subjects with scans of several splits: not scored")
    # an empty cell is train, and a scan without a subject is one of its own
    alike = ("a.nii,1,T1w,A,", "b.nii,1,T1w,B,train", "c.nii,2,T1w,A,test", "d.nii,2,T1w,B,test")
    assert notes_of(table, *alike, "e.nii,,T1w,A,test", "f.nii,,T1w,A,train") == []


def test_sessions_of_several_splits_are_counted_in_a_tree_too(tmp_path: Path) -> None:
    for session in ("1", "2"):
        folder = tmp_path / "sub-01" / f"ses-{session}" / "anat"
        folder.mkdir(parents=True)
        (folder / f"sub-01_ses-{session}_T1w.nii.gz").touch()
    table = tmp_path / "participants.tsv"
    table.write_text("participant_id\tsite\tsplit\nsub-01\tA\ttest\n")

    def notes() -> list[str]:
        return list_source(str(tmp_path), site_from="auto", sequences=["T1w"], store=Store())[1]

    assert notes() == []
    sessions = tmp_path / "sub-01" / "sub-01_sessions.tsv"
    sessions.write_text("session_id\tsplit\nses-2\ttrain\n")
    assert ["1 subject with scans of several splits" in note for note in notes()] == [True]
