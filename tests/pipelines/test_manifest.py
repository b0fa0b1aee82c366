"""`sgcd index`: one row a scan, the site from where it is said, and nothing read twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.ledger import model_key
from pipelines.manifest import IndexResult, index_sources
from ray_jobs.models import target_model
from sgcd_core.errors import InputError, UsageError
from sgcd_core.io.store import Store

if TYPE_CHECKING:
    from tests.conftest import S3Server

MakeScan = Callable[..., bytes]
NAME = "sub-{0}/anat/sub-{0}_T1w.nii.gz"


class CountingStore(Store):
    """Counts how many scans are read."""

    def __init__(self) -> None:
        self.scans_read = 0

    def read_bytes(self, uri: str, *, max_bytes: int | None = None) -> bytes:
        self.scans_read += uri.endswith((".nii", ".nii.gz"))
        return super().read_bytes(uri, max_bytes=max_bytes)


@pytest.fixture
def tree(tmp_path: Path, make_scan: MakeScan) -> Path:
    """Two subjects with sites, one of them cut short, and one without a site."""
    root = tmp_path / "bids"
    for i, subject in enumerate(("1", "2", "3")):
        path = root / NAME.format(subject)
        path.parent.mkdir(parents=True)
        path.write_bytes(make_scan(i) if subject != "2" else make_scan(i)[:-30])
    (root / "participants.tsv").write_text(
        "participant_id\tage\tsex\tsite\tsplit\nsub-1\t40\tF\tA\ttest\nsub-2\t50\tM\tB\tn/a\n"
    )
    return root


def by_subject(result: IndexResult) -> dict[str, dict[str, Any]]:
    return {row["subject"]: row for row in result.rows}


def remembered(*results: IndexResult) -> list[dict[str, Any]]:
    """What the catalog holds after appending these results: the latest row of each scan_id."""
    return list({row["scan_id"]: row for result in results for row in result.rows}.values())


def test_each_scan_has_one_row_whatever_its_state(tree: Path) -> None:
    result = index_sources([str(tree)])
    rows = by_subject(result)
    assert [(s, r["status"], r["code"]) for s, r in rows.items()] == [
        ("1", "ok", None), ("2", "failed", "SCAN-TRUNCATED"), ("3", "failed", "SCAN-NO-SITE"),
    ]  # fmt: skip
    one = rows["1"]
    assert (one["site"], one["age"], one["sex"], one["split"]) == ("A", 40, "F", "test")
    assert (one["dataset"], one["sequence"], one["shape"]) == ("bids", "T1w", [60, 70, 60])
    assert len({row["scan_id"] for row in result.rows}) == 3
    assert result.failed == 2


def test_rows_fit_the_catalog(tree: Path, tmp_lake: Lake) -> None:
    from pipelines.catalog import Catalog

    catalog = Catalog(tmp_lake)
    first = index_sources([str(tree)])
    catalog.append("scans", first.rows)
    stored = catalog.rows("scans").to_pylist()
    assert len(stored) == 3
    again = index_sources([str(tree)], known=stored)
    assert again.rows == []
    assert len(again.unchanged) == 3


def test_an_unchanged_scan_is_not_read_again_but_new_facts_are_taken(tree: Path) -> None:
    store = CountingStore()
    first = index_sources([str(tree)], store=store)
    assert store.scans_read == 3
    (tree / "participants.tsv").write_text("participant_id\tsite\nsub-1\tnew\nsub-3\tC\n")
    second = index_sources([str(tree)], store=store, known=remembered(first))
    assert store.scans_read == 5  # the two that failed are tried again
    rows = by_subject(second)
    assert rows["1"]["site"] == "new"
    assert rows["1"]["scan_id"] == by_subject(first)["1"]["scan_id"]
    assert rows["1"]["shape"] == [60, 70, 60]
    assert rows["3"]["status"] == "ok"


def test_a_replaced_and_a_removed_file_leave_no_usable_row_behind(
    tree: Path, make_scan: MakeScan
) -> None:
    (tree / "participants.tsv").write_text("participant_id\tsite\nsub-1\tA\nsub-3\tC\n")
    first = index_sources([str(tree)])
    old = by_subject(first)
    (tree / NAME.format("1")).write_bytes(make_scan(77))
    (tree / NAME.format("3")).unlink()
    second = index_sources([str(tree)], known=remembered(first))
    states = {row["scan_id"]: (row["status"], row["code"]) for row in second.rows}
    assert states[old["1"]["scan_id"]] == ("failed", "SCAN-REPLACED")
    assert states[old["3"]["scan_id"]] == ("failed", "SCAN-MISSING")
    assert sum(state == ("ok", None) for state in states.values()) == 1


def test_a_repaired_file_leaves_no_row_that_says_it_cannot_be_used(
    tree: Path, make_scan: MakeScan
) -> None:
    first = index_sources([str(tree)])
    (tree / NAME.format("2")).write_bytes(make_scan(1))
    second = index_sources([str(tree)], known=remembered(first))
    states = {row["scan_id"]: row["code"] for row in second.rows}
    assert states[by_subject(first)["2"]["scan_id"]] == "SCAN-REPLACED"
    assert sorted(map(str, states.values())) == ["None", "SCAN-REPLACED"]
    third = index_sources([str(tree)], known=remembered(first, second))
    assert third.rows == []


def test_equal_bytes_under_two_names_are_two_rows(tree: Path) -> None:
    shutil.copytree(tree / "sub-1", tree / "sub-0")
    (tree / "sub-0/anat/sub-1_T1w.nii.gz").rename(tree / "sub-0/anat/sub-0_T1w.nii.gz")
    with (tree / "participants.tsv").open("a") as file:
        file.write("sub-0\t40\tF\tA\tn/a\n")
    fresh = by_subject(index_sources([str(tree)]))
    assert fresh["0"]["status"] == "ok"  # the first listed keeps the scan
    assert fresh["1"]["code"] == "SCAN-DUPLICATE"
    assert fresh["0"]["scan_id"] != fresh["1"]["scan_id"]

    (tree / "sub-0").rename(tree.parent / "aside")
    first = index_sources([str(tree)])
    (tree.parent / "aside").rename(tree / "sub-0")
    later = index_sources([str(tree)], known=remembered(first))
    assert by_subject(later)["0"]["code"] == "SCAN-DUPLICATE"  # the known address keeps the scan
    assert str(tree / NAME.format("1")) in later.unchanged
    third = index_sources([str(tree)], known=remembered(first, later))
    assert third.rows == []


def test_one_file_under_two_addresses_need_not_be_removed(
    tmp_path: Path, make_scan: MakeScan
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.nii.gz").write_bytes(make_scan(1))
    (tmp_path / "y.nii.gz").write_bytes(make_scan(1))
    table = tmp_path / "scans.csv"
    table.write_text(
        "uri,subject,sequence,site\na/x.nii.gz,1,T1w,A\na/../a/x.nii.gz,2,T1w,A\ny.nii.gz,3,T1w,A\n"
    )
    rows = by_subject(index_sources([str(table)]))
    assert [rows[s]["code"] for s in "123"] == [None, "SCAN-DUPLICATE", "SCAN-DUPLICATE"]
    assert "List it under one address" in rows["2"]["message"]
    assert "Remove one of the two" in rows["3"]["message"]


def test_a_moved_file_keeps_its_scan_id(tree: Path) -> None:
    first = index_sources([str(tree)])
    moved = tree.rename(tree.parent / "moved")
    second = by_subject(index_sources([str(moved)], known=remembered(first)))
    assert second["1"]["status"] == "ok"
    assert second["1"]["scan_id"] == by_subject(first)["1"]["scan_id"]
    assert second["1"]["uri"].startswith(str(moved))


def test_a_moved_data_set_keeps_its_name(tree: Path, tmp_path: Path, make_scan: MakeScan) -> None:
    first = index_sources([str(tree)])
    there = tmp_path / "elsewhere" / tree.name
    shutil.copytree(tree, there)
    known = remembered(first)
    copied = index_sources([str(there)], known=known)  # the first is still there
    assert all(row["dataset"].startswith("bids-") for row in copied.rows)
    shutil.rmtree(tree)
    (there / NAME.format("4")).parent.mkdir(parents=True)
    (there / NAME.format("4")).write_bytes(make_scan(9))
    moved = index_sources([str(there)], known=known)
    assert {row["dataset"] for row in moved.rows} == {"bids"} and len(moved.rows) == 4
    known = remembered(first, moved)
    other = tmp_path / "third" / tree.name  # a failed row of the first place is no claim
    (other / NAME.format("8")).parent.mkdir(parents=True)
    (other / NAME.format("8")).write_bytes(make_scan(8))
    both = index_sources([str(there), str(other)], known=known)
    third = {row["dataset"] for row in both.rows if str(other) in row["uri"]}
    assert third and "bids" not in third
    (there / NAME.format("4")).unlink()
    left = index_sources([str(there)], known=known)
    assert {row["dataset"] for row in left.rows if row["status"] == "ok"} <= {"bids"}


def test_who_takes_the_place_of_a_moved_data_set_has_another_name(
    tree: Path, tmp_path: Path, make_scan: MakeScan
) -> None:
    first = index_sources([str(tree)])
    (tmp_path / "archive").mkdir()
    there = tree.rename(tmp_path / "archive" / tree.name)
    (tree / NAME.format("1")).parent.mkdir(parents=True)
    (tree / NAME.format("1")).write_bytes(make_scan(70))
    rows = index_sources([str(tree), str(there)], known=remembered(first)).rows
    names = {root: {r["dataset"] for r in rows if r["uri"].startswith(f"{root}/")
                    and r["code"] != "SCAN-REPLACED"} for root in (tree, there)}  # fmt: skip
    assert not names[tree] & names[there] and all(names.values())


def test_a_data_set_of_other_scans_is_another(
    tree: Path, tmp_path: Path, make_scan: MakeScan
) -> None:
    known = remembered(index_sources([str(tree)]))
    there = tmp_path / "elsewhere" / tree.name
    shutil.copytree(tree, there)
    shutil.rmtree(tree)
    (there / NAME.format("1")).unlink()  # another data set, as far as can be told
    other = index_sources([str(there)], known=known)
    assert all(row["dataset"].startswith("bids-") for row in other.rows)


def test_two_data_sets_in_folders_of_one_name_are_told_apart(
    tree: Path, tmp_path: Path, make_scan: MakeScan
) -> None:
    other = tmp_path / "aaa" / tree.name  # comes first by address
    (other / NAME.format("1")).parent.mkdir(parents=True)
    (other / NAME.format("1")).write_bytes(make_scan(50))
    (other / "participants.tsv").write_text("participant_id\tsite\nsub-1\tB\n")
    first = index_sources([str(tree)])
    second = index_sources([str(other)], known=remembered(first))
    assert {row["dataset"] for row in first.rows} == {"bids"}
    (row,) = second.rows
    assert row["dataset"].startswith("bids-") and row["subject"] == "1"
    third = index_sources([str(other), str(tree)], known=remembered(first, second))
    assert [row for row in third.rows if row["status"] == "ok"] == []  # names stay
    both = index_sources([str(tree), str(other)])
    assert len({(row["dataset"], row["subject"]) for row in both.rows}) == len(both.rows)


def test_flat_folders_of_one_name_are_told_apart(tmp_path: Path, make_scan: MakeScan) -> None:
    sources = [tmp_path / study / "nifti" for study in ("b", "a")]
    for i, source in enumerate(sources):
        source.mkdir(parents=True)
        (source / "sub-01_T1w.nii.gz").write_bytes(make_scan(i))
    earlier, later = (str(source) for source in sources)
    first = index_sources([earlier], site_from="name:B")
    second = index_sources([later], site_from="name:A", known=remembered(first))
    assert [row["dataset"] for row in first.rows] == ["nifti"]
    assert second.rows[0]["dataset"].startswith("nifti-")
    for source, site in ((earlier, "B"), (later, "A")):
        again = index_sources([source], site_from=f"name:{site}", known=remembered(first, second))
        assert (again.rows, len(again.unchanged)) == ([], 1)  # names stay
    # rows of a lake whose scans do not say who listed them
    old = [row | {"listed_in": None} for row in first.rows]
    assert index_sources([later], known=old).rows[0]["dataset"] == second.rows[0]["dataset"]
    assert index_sources([earlier], known=old).rows[0]["dataset"] == "nifti"


def two_manifests(tmp_path: Path, make_scan: MakeScan, column: str = "") -> list[str]:
    """bonn/scans.csv and oslo/scans.csv, one subject 01 each, their scans somewhere else."""
    found = []
    (tmp_path / "raw").mkdir(exist_ok=True)
    for site in ("bonn", "oslo"):
        scan, table = tmp_path / "raw" / f"{site}.nii.gz", tmp_path / site / "scans.csv"
        table.parent.mkdir(exist_ok=True)
        scan.write_bytes(make_scan(len(site) + ord(site[0])))
        head, value = (",dataset", f",{column}") if column else ("", "")
        table.write_text(f"uri,subject,sequence,site{head}\n{scan},01,T1w,{site}{value}\n")
        found.append(str(table))
    return found


@pytest.mark.parametrize("said", [True, False], ids=["", "rows do not say who listed them"])
def test_manifests_of_one_name_are_told_apart(
    tmp_path: Path, make_scan: MakeScan, said: bool
) -> None:
    bonn, oslo = two_manifests(tmp_path, make_scan)
    first = index_sources([oslo])
    known = [row if said else row | {"listed_in": None} for row in remembered(first)]
    second = index_sources([bonn], known=known)
    assert [row["dataset"] for row in first.rows] == ["scans"]
    assert second.rows[0]["dataset"].startswith("scans-")
    both = index_sources([bonn, oslo], known=[*known, *second.rows])
    assert len(both.unchanged) == (2 if said else 1)  # names stay
    assert {row["dataset"] for row in both.rows} <= {"scans"}


def test_a_manifest_stays_one_data_set_whatever_it_lists_next(
    tmp_path: Path, make_scan: MakeScan
) -> None:
    table, _ = two_manifests(tmp_path, make_scan)
    first = index_sources([table])
    Path(table).write_text(f"uri,subject,sequence,site\n{tmp_path}/raw/oslo.nii.gz,01,T1w,oslo\n")
    (row,) = index_sources([table], known=remembered(first)).rows
    assert (row["dataset"], row["status"]) == ("scans", "ok")


def test_a_column_dataset_makes_one_of_two_manifests(tmp_path: Path, make_scan: MakeScan) -> None:
    sources = two_manifests(tmp_path, make_scan, "travelers")
    first = index_sources(sources[:1])
    second = index_sources(sources[1:], known=remembered(first))
    assert {row["dataset"] for row in (*first.rows, *second.rows)} == {"travelers"}


def test_sites_come_from_where_the_user_says(tree: Path, make_scan: MakeScan) -> None:
    folder = tree / "sub-4" / "ses-x" / "anat"
    folder.mkdir(parents=True)
    (folder / "sub-4_ses-x_T1w.nii.gz").write_bytes(make_scan(9))
    fields = {"InstitutionName": "General Hospital", "MagneticFieldStrength": 3,
              "Manufacturer": "M", "ManufacturersModelName": "N"}  # fmt: skip
    (folder / "sub-4_ses-x_T1w.json").write_text(json.dumps(fields))
    (tree / "sub-4" / "sub-4_sessions.tsv").write_text("session_id\tsite\nses-x\ttravel\n")
    with (tree / "participants.tsv").open("a") as file:
        file.write("sub-4\t20\tM\thome\tn/a\n")
    found = {how: by_subject(index_sources([str(tree)], site_from=how))["4"]
             for how in ("auto", "participants", "session", "sidecar", "name:One")}  # fmt: skip
    assert {how: row["site"] for how, row in found.items()} == {
        "auto": "travel", "participants": "home", "session": "travel",
        "sidecar": "General Hospital", "name:One": "One",
    }  # fmt: skip
    row = found["auto"]
    assert (row["field_strength"], row["manufacturer"], row["model_name"]) == (3, "M", "N")
    assert row["sidecar_uri"].endswith("sub-4_ses-x_T1w.json")
    for wrong in ("moon", "name:", ""):
        with pytest.raises(UsageError):
            index_sources([str(tree)], site_from=wrong)


def test_a_manifest_lists_scans_anywhere(tmp_path: Path, make_scan: MakeScan) -> None:
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("a b.nii.gz", "c,d.nii.gz", "e.nii.gz", "f.nii.gz")):
        (tmp_path / "in" / name).write_bytes(make_scan(i))
    table = tmp_path / "scans.csv"
    table.write_text(
        "\ufeffURI,subject,sequence,site,session,age,extra\n"
        "in/a b.nii.gz,sub-1,T1w,A,ses-x,33,zzz\n"
        '"in/c,d.nii.gz",2,T2w,B,,,\n'
        f"{(tmp_path / 'in/e.nii.gz').as_uri()},3,FLAIR,A,,,\n"
        "in/f.nii.gz,4,T1w,n/a,,,\n"
        "in/missing.nii.gz,5,T1w,A,,,\n"
    )
    result = index_sources([str(table)])
    rows = by_subject(result)
    assert {s: r["code"] for s, r in rows.items()} == {
        "1": None, "2": None, "3": "SCAN-SEQUENCE", "4": "SCAN-NO-SITE", "5": "SCAN-MISSING",
    }  # fmt: skip
    assert (rows["1"]["session"], rows["1"]["age"], rows["1"]["dataset"]) == ("x", 33, "scans")
    assert rows["2"]["uri"] == str(tmp_path / "in/c,d.nii.gz")
    assert "1 other column not used" in result.notes[0]
    store = CountingStore()
    again = index_sources([str(table)], store=store, known=remembered(result))
    assert again.rows == []


def test_a_site_whose_name_no_folder_can_have_is_refused_and_takes_no_other_along(
    tmp_path: Path, make_scan: MakeScan, tmp_lake: Lake
) -> None:
    sites = ["Ж" * 41, "北" * 27, "x" * 179 + "/", "Ж" * 42, "x" * 181, "Ж" * 90]
    table = tmp_path / "scans.csv"
    lines = [f"{i}.nii.gz,{i},T1w,{site}\n" for i, site in enumerate(sites)]
    table.write_text(f"uri,subject,sequence,site\n{''.join(lines)}6.nii.gz,6,{'Ж' * 90},A\n")
    for i in range(7):
        (tmp_path / f"{i}.nii.gz").write_bytes(make_scan(i)[: -30 if i == 5 else None])
    rows = index_sources([str(table)]).rows
    codes = ["SCAN-NO-SITE", "SCAN-NO-SITE", "SCAN-TRUNCATED", "SCAN-SEQUENCE"]
    assert [row["code"] for row in rows] == [None] * 3 + codes
    assert "name of the site is too long" in rows[3]["message"]

    named = [row["site"] for row in rows]
    assert named == [*sites[:3], None, None, None, "A"]
    dashed = tmp_path / "dashed.csv"  # an option, in a command
    dashed.write_text("uri,subject,sequence,site\n0.nii.gz,0,T1w,-x\n")
    (dash,) = index_sources([str(dashed)]).rows
    assert dash["code"] == "SCAN-NO-SITE" and "begin with -" in dash["message"]
    for row in rows:  # as `harmonize` commits them, tuned to the site itself
        about = {name: row[name] for name in ("scan_id", "site", "sequence")}
        more = {"model": "m", "model_version": 1, "target": row["site"], "status": "failed"}
        Catalog(tmp_lake).append("results", [about | more])
    assert Catalog(tmp_lake).rows("results").num_rows == 7
    for site in sites[:3]:
        digests = "-".join(["0" * 16] * 3)
        word = target_model(site).removeprefix("target-")
        for folder in (f"tune-{digests}-{word}", model_key(target_model(site), 9999)):
            Path(tmp_lake.scratch(folder)).mkdir(parents=True)

    # lakes of before have them as usable
    known = [r | {"site": sites[i] if i < 6 else "A", "status": "ok"} for i, r in enumerate(rows)]
    again = by_subject(index_sources([str(table)], known=known))
    assert [again[i]["site"] for i in "345"] == [None] * 3
    (tmp_path / "3.nii.gz").rename(tmp_path / "sub-3_T1w.nii.gz")
    (tmp_path / "sub-3_T1w.nii.gz").write_bytes(make_scan(9))
    gone = index_sources([str(tmp_path)], known=known)
    assert [r["site"] for r in gone.rows if r["code"] == "SCAN-MISSING"] == [None]


def test_a_manifest_loses_no_row_without_a_word(tmp_path: Path, make_scan: MakeScan) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.nii.gz").write_bytes(make_scan(ord(name)))
    table, head = tmp_path / "scans.csv", "uri,subject,sequence,site\n"
    table.write_text(f"{head}a.nii.gz,1,T1w,A\na.nii.gz,2,T1w,A\nb.nii.gz,3,T2w,A\n")
    result = index_sources([str(table)])
    assert sorted(by_subject(result)) == ["1", "3"]
    assert "1 row of a file that a row before names" in result.notes[0]
    again = index_sources([str(table)], sequences=("T2w",), known=remembered(result))
    assert (again.rows, len(again.unchanged)) == ([], 1)  # T1w is as it was
    table.write_text(f"{head}a.nii.gz,1,T1w,A\n,2,T1w,A\n,3,T1w,A\n")
    with pytest.raises(InputError, match="2 of its rows, the first being line 3") as error:
        index_sources([str(table)])
    assert error.value.code == "MANIFEST-COLUMN"


def test_a_manifest_of_a_european_spreadsheet_keeps_its_ages_and_says_what_it_cannot_use(
    tmp_path: Path, make_scan: MakeScan
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.nii.gz").write_bytes(make_scan(ord(name)))
    table = tmp_path / "scans.csv"
    table.write_text(
        "uri;subject;sequence;site;age;sex;split\n"
        "a.nii.gz;1;T1w;A;34,5;w;testing\nb.nii.gz;2;T1w;A;61,25;F;train\n"
    )
    result = index_sources([str(table)])
    rows = by_subject(result)
    assert (rows["1"]["age"], rows["1"]["sex"], rows["1"]["split"]) == (34.5, None, "test")
    assert (rows["2"]["age"], rows["2"]["sex"], rows["2"]["split"]) == (61.25, "F", "train")
    assert [note.split(" of ")[1].split()[0] for note in result.notes] == ["split", "sex"]
    assert all(f"line 2 of {table}" in note for note in result.notes)


def test_a_manifest_without_its_columns_says_which(tmp_path: Path) -> None:
    table = tmp_path / "scans.csv"
    table.write_text("uri;subject\nx.nii;1\n")
    with pytest.raises(InputError) as error:
        index_sources([str(table)])
    assert error.value.code == "MANIFEST-COLUMN"
    assert "sequence, site" in str(error.value)


def test_a_source_with_nothing_in_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "scan.txt").write_text("no scan")
    for name, said in (("empty", "nothing lies"), ("nowhere", "nothing lies"),
                       ("other", "with a BIDS name")):  # fmt: skip
        source = tmp_path / name
        with pytest.raises(InputError, match=said) as error:
            index_sources([str(source)])
        assert error.value.code == "STORE-EMPTY"
        assert str(source) in str(error.value)
    with pytest.raises(InputError) as missing:
        index_sources([str(tmp_path / "no.csv")])
    assert missing.value.code == "SCAN-MISSING"


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.s3
def test_real_scans_index_alike_from_a_folder_and_from_s3(
    data_dir: Path, s3_server: S3Server
) -> None:
    root, prefix, store = data_dir / "real", s3_server.uri("real"), Store()
    for path in [*root.glob("*.*"), *root.glob("sub-*/anat/*")]:
        store.write_bytes(f"{prefix}/{path.relative_to(root)}", path.read_bytes())
    local, remote = index_sources([str(root)]), index_sources([prefix])
    assert len(local.rows) == 31
    assert {row["code"] for row in local.rows if row["status"] == "failed"} == {"SCAN-COARSE"}
    sites = {row["site"] for row in local.rows}
    assert sites == {"novosibirsk", "ucla", "ixi-hammersmith", "ixi-guys", "cmu", "tcga-du",
                     "ljubljana"}  # fmt: skip
    ages = by_subject(local)
    assert ages["IXI013"]["age"] == 46.71
    assert ages["CSI1"]["age"] is None
    differ = ("uri", "etag", "listed_in", "indexed_at")
    bare = [[{k: v for k, v in row.items() if k not in differ} for row in result.rows]
            for result in (local, remote)]  # fmt: skip
    assert bare[0] == bare[1]
    counting = CountingStore()
    again = index_sources([prefix], store=counting, known=remembered(remote))
    assert again.rows == []
    assert counting.scans_read == 6  # only those that failed


def test_links_take_no_scan_away_and_end_no_index(tree: Path) -> None:
    """Which folder the file system names first does not count."""
    for number, folder in enumerate(("code", "sourcedata", "stimuli", "phenotype")):
        (tree / folder).mkdir()
        (tree / folder / "example").symlink_to(tree / f"sub-{number % 2 * 2 + 1}")
    itself = tree / "sub-1/anat/sub-1_T2w.nii.gz"
    itself.symlink_to(itself.name)
    result = index_sources([str(tree)])
    assert [(row["subject"], row["sequence"], row["code"]) for row in result.rows] == [
        ("1", "T1w", None), ("1", "T2w", "SCAN-MISSING"), ("2", "T1w", "SCAN-TRUNCATED"),
        ("3", "T1w", "SCAN-NO-SITE"),
    ]  # fmt: skip
