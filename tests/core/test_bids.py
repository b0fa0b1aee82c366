"""BIDS names, tables and sidecars."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sgcd_core.errors import InputError
from sgcd_core.io.bids import BidsTree, Sidecars, list_tree, parse_name
from sgcd_core.io.bids_tables import People, parse_age, parse_sex, parse_split
from sgcd_core.io.store import Store


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def tree_of(root: Path, **options: bool) -> BidsTree:
    return list_tree(str(root), Store(), ("T1w", "T2w"), **options)


def names(root: Path, **options: bool) -> list[str]:
    return [s.object.uri[len(str(root)) + 1 :] for s in tree_of(root, **options).scans]


def test_names_are_taken_apart() -> None:
    name = parse_name("sub-01_ses-a2_acq-mprage_run-1_T1w.nii.gz")
    assert name is not None
    assert (name.subject, name.session, name.suffix) == ("01", "a2", "T1w")
    assert name.entities == (("acq", "mprage"), ("run", "1"))
    assert parse_name("sub-01_T2w.nii") is not None
    assert parse_name("T1w.json") is not None


@pytest.mark.parametrize(
    "name",
    ["T1w.nii.gz", "sub-01.nii.gz", "sub-_T1w.nii.gz", "sub-0_1_T1w.nii.gz",
     "sub-01_T1w.nii.gz.tmp", "ses-1_sub-01_T1w.nii.gz", "sub-01_acq-a_acq-b_T1w.nii.gz",
     "sub-01_T1w.mgz", "sub-é_T1w.nii",
     "sub-01_acq-a_ses-1_T1w.nii", "../sub-01_T1w.nii.gz", "sub-01_T1w.nii.gz\n"],
)  # fmt: skip
def test_other_names_are_not_bids(name: str) -> None:
    assert parse_name(name) is None


def test_the_listing_holds_wanted_raw_images_only(tmp_path: Path) -> None:
    put(tmp_path, {
        "sub-2/anat/sub-2_T1w.nii.gz": "", "sub-2/ses-1/anat/sub-2_ses-1_T2w.nii": "",
        "sub-2/func/sub-2_task-rest_bold.nii.gz": "", "sub-2/anat/sub-2_desc-brain_mask.nii.gz": "",
        "derivatives/x/sub-2/anat/sub-2_T1w.nii.gz": "", "sourcedata/sub-2_T1w.nii.gz": "",
        "code/sub-2_T1w.nii.gz": "", ".git/sub-2_T1w.nii.gz": "",
        "sub-2/anat/._sub-2_T1w.nii.gz": "",
        "sub-3/anat/sub-2_T1w.nii.gz": "", "sub-2/anat/scan.nii.gz": "",
    })  # fmt: skip
    assert names(tmp_path) == [
        "sub-2/anat/sub-2_T1w.nii.gz",
        "sub-2/ses-1/anat/sub-2_ses-1_T2w.nii",
    ]
    notes = " ".join(tree_of(tmp_path).notes)
    assert "sub-3/anat/sub-2_T1w.nii.gz: its folders and its name disagree" in notes
    assert "1 images are not named as BIDS asks" in notes
    assert len(names(tmp_path, everything=True)) == 6
    assert names(tmp_path / "derivatives" / "x") == ["sub-2/anat/sub-2_T1w.nii.gz"]


def test_names_in_other_capitals_are_left_out_and_said(tmp_path: Path) -> None:
    ends = ("T1w.nii.gz", "T1W.nii.gz", "t1w.nii", "T1w.NII.GZ", "T1W.json", "FLAIR.nii.gz")
    put(tmp_path, {f"sub-{n}/anat/sub-{n}_{end}": "" for n, end in enumerate(ends)})
    put(tmp_path, {"SUB-7_T2w.nii.gz": ""})
    assert names(tmp_path) == ["sub-0/anat/sub-0_T1w.nii.gz"]
    (note,) = tree_of(tmp_path).notes
    assert "4 images differ from BIDS names in capitals alone" in note
    assert "T1w or T2w and .nii.gz" in note


def test_a_folder_inside_a_data_set_still_knows_its_root(tmp_path: Path) -> None:
    put(tmp_path, {
        "sub-1/anat/sub-1_T1w.nii.gz": "", "sub-10/anat/sub-10_T1w.nii.gz": "",
        "participants.tsv": "participant_id\tsite\nsub-1\tA\n",
    })  # fmt: skip
    tree = tree_of(tmp_path / "sub-1")
    assert [s.name.subject for s in tree.scans] == ["1"]
    assert tree.scans[0].root == str(tmp_path)
    assert People(tree.scans[0].root, tree.tables, Store()).of("1", None).site == "A"


@pytest.mark.parametrize(
    "source", ["", "sub-1", "sub-1/ses-2", "sub-1/ses-2/anat/sub-1_ses-2_run-1_T1w.nii.gz"]
)
def test_whatever_part_is_listed_the_same_is_known_of_a_scan(tmp_path: Path, source: str) -> None:
    image = "sub-1/ses-2/anat/sub-1_ses-2_run-1_T1w"
    put(tmp_path, {
        f"{image}.nii.gz": "", f"{image}.json": '{"Own": 1}', "T1w.json": '{"Top": 1, "Own": 0}',
        "sub-1/sub-1_run-1_T1w.json": '{"Subject": 1}',
        "sub-1/sub-1_run-2_T1w.json": '{"Other": 1}',
        "sub-1/ses-2/sub-1_ses-2_T1w.json": '{"Session": 1}',
        "participants.tsv": "participant_id\tsite\tage\nsub-1\thome\t30\n",
        "sub-1/sub-1_sessions.tsv": "session_id\tsite\tage\nses-2\tfaraway\t34\n",
    })  # fmt: skip
    tree = tree_of(tmp_path / source)
    (scan,) = tree.scans
    person = People(scan.root, tree.tables, Store(), tree.listed).of("1", "2")
    assert (person.site, person.session_site, person.age) == ("home", "faraway", 34)
    fields, deepest = Sidecars(tree, Store()).of(scan)
    assert fields == {"Top": 1, "Subject": 1, "Session": 1, "Own": 1}
    assert deepest == str(tmp_path / f"{image}.json")


def test_names_that_are_no_text_are_left_out_and_said(tmp_path: Path) -> None:
    put(tmp_path, {"sub-1/anat/sub-1_T1w.nii.gz": ""})
    folder = os.path.join(os.fsencode(tmp_path), b"k\xf6ln", b"sub-2", b"anat")
    os.makedirs(folder)
    Path(os.fsdecode(os.path.join(folder, b"sub-2_T1w.nii.gz"))).touch()
    assert names(tmp_path) == ["sub-1/anat/sub-1_T1w.nii.gz"]
    assert "1 file at addresses not in UTF-8" in " ".join(tree_of(tmp_path).notes)


def test_a_flat_prefix_of_bids_names_is_read(tmp_path: Path) -> None:
    put(tmp_path, {"sub-1_T1w.nii.gz": "", "sub-2_T1w.nii.gz": ""})
    assert names(tmp_path) == ["sub-1_T1w.nii.gz", "sub-2_T1w.nii.gz"]


@pytest.mark.parametrize(
    ("text", "years"),
    [("34,5", 34.5), ("1.234,5", None), ("12,5W", None),
     ("34", 34), ("34.5", 34.5), ("89+", 89), ("034Y", 34), ("006M", 0.5), ("0", 0), ("n/a", None),
     ("", None), (None, None), ("-4", None), ("1e9", None), ("999", None), ("forty", None)],
)  # fmt: skip
def test_ages(text: str | None, years: float | None) -> None:
    assert parse_age(text) == years


def test_sex_takes_known_values_only_and_no_word_of_split_is_free_to_learn_from() -> None:
    assert [parse_sex(s) for s in ("M", "female", "o", "n/a", "3", None)] == [
        "M", "F", "O", None, None, None,
    ]  # fmt: skip
    assert [parse_split(s) for s in ("Train", "test", "val", "", None)] == [
        "train", "test", "test", None, None,
    ]  # fmt: skip


def test_values_that_are_not_understood_are_counted_and_never_quoted(tmp_path: Path) -> None:
    put(tmp_path, {
        "participants.tsv": "participant_id\tage\tgender\tsplit\nsub-1\t34,5\tF\ttrain\n"
                            "sub-2\t>89\twoman\theld-out\nsub-3\tn/a\t2\ttset\n",
        "sub-1/sub-1_sessions.tsv": "session_id\tage\tsplit\nses-a\tforty\ttesting\n",
        "sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz": "",
    })  # fmt: skip
    tree = tree_of(tmp_path)
    people = People(str(tmp_path), tree.tables, Store())
    assert [people.of(s, "a").split for s in ("1", "2", "3")] == ["test", "test", "test"]
    assert people.of("1", None).split == "train"
    assert people.of("1", "a").age == 34.5  # the session's own is no age
    notes = sorted(people.notes)
    assert [note.split(" are ")[0] for note in notes] == [
        "2 values of age", "2 values of sex", "3 values of split",
    ]  # fmt: skip
    assert f"line 3 of {tmp_path}/participants.tsv" in notes[2]
    assert "train or test" in notes[2]
    assert not any(word in "".join(notes) for word in ("woman", "tset", "held-out", "forty", "89"))


def test_participants_are_read_whatever_wrote_them(tmp_path: Path) -> None:
    text = (
        "\ufeffparticipant_id\tAge\tSEX\tSite_ID\tsplit\tremark\r\n"
        'sub-01\t89+\tmale\tKöln\ttest\t5" lesion\r\n'
        '"02"\tn/a\tn/a\tn/a\t\t\r\n'
        "sub-03\t31\r\n\r\n"
        "sub-01\t12\tF\tother\ttrain\t\r\n"
    )
    put(tmp_path, {"participants.tsv": text})
    people = People(str(tmp_path), set(), Store())
    first = people.of("01", None)
    assert (first.age, first.sex, first.site, first.split) == (89, "M", "Köln", "test")
    assert people.of("02", "any").site is None
    assert people.of("03", None).age == 31
    assert people.of("unknown", None).site is None
    assert "sub-01 has two rows" in people.notes[0]


def test_a_table_of_participants_with_commas_is_named(tmp_path: Path) -> None:
    put(tmp_path, {"participants.tsv": "participant_id,site,age\nsub-01,A,30\n"})
    people = People(str(tmp_path), set(), Store())
    assert people.of("01", None).site is None
    (note,) = people.notes
    assert "no column participant_id" in note and "'participant_id,site,age'" in note
    assert "separated by tabs" in note


def test_sessions_carry_the_site_of_a_traveling_subject(tmp_path: Path) -> None:
    put(tmp_path, {
        "participants.tsv": "participant_id\tsite\tage\tsex\nsub-1\thome\t30\tF\n",
        "sub-1/sub-1_sessions.tsv": "session_id\tsite\tage\nses-a\tA\t31\nses-b\tn/a\tn/a\n",
    })  # fmt: skip
    people = People(str(tmp_path), {str(tmp_path / "sub-1/sub-1_sessions.tsv")}, Store())
    a, b = people.of("1", "a"), people.of("1", "b")
    assert (a.site, a.session_site, a.age, a.sex) == ("home", "A", 31, "F")
    assert (b.session_site, b.age) == (None, 30)


def test_participants_may_hold_one_row_a_session(tmp_path: Path) -> None:
    put(tmp_path, {"participants.tsv": "participant_id\tsession_id\tsite\nsub-1\tses-a\tA\n"
                   "sub-1\tses-b\tB\n"})  # fmt: skip
    people = People(str(tmp_path), set(), Store())
    assert [people.of("1", s).site for s in ("a", "b", None)] == ["A", "B", None]


@pytest.mark.parametrize("data", [b"participant_id\tsite\tsite\nsub-1\ta\tb\n", b"\xff\xfe\x00"])
def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "participants.tsv").write_bytes(data)
    with pytest.raises(InputError) as error:
        People(str(tmp_path), set(), Store())
    assert error.value.code == "BIDS-INVALID"


def test_sidecars_are_inherited_and_the_deeper_wins(tmp_path: Path) -> None:
    def js(**fields: object) -> str:
        return json.dumps(fields)

    put(tmp_path, {
        "T1w.json": js(Manufacturer="root", MagneticFieldStrength=3, InstitutionName="I"),
        "acq-x_T1w.json": js(ManufacturersModelName="x"), "T2w.json": js(Manufacturer="no"),
        "sub-1/sub-1_T1w.json": js(Manufacturer="subject"),
        "sub-1/anat/sub-1_acq-x_T1w.json": js(MagneticFieldStrength=1.5),
        "sub-1/anat/sub-1_acq-x_T1w.nii.gz": "", "sub-1/anat/sub-1_T1w.nii.gz": "",
        "sub-2/anat/sub-2_T1w.nii.gz": "", "sub-2/anat/sub-2_T1w.json": "{broken",
    })  # fmt: skip
    tree = tree_of(tmp_path)
    sidecars = Sidecars(tree, Store())
    by_name = {s.object.uri.rpartition("/")[2]: sidecars.of(s) for s in tree.scans}
    fields, uri = by_name["sub-1_acq-x_T1w.nii.gz"]
    assert fields == {"Manufacturer": "subject", "MagneticFieldStrength": 1.5,
                      "InstitutionName": "I", "ManufacturersModelName": "x"}  # fmt: skip
    assert uri is not None
    assert uri.endswith("sub-1/anat/sub-1_acq-x_T1w.json")
    assert by_name["sub-1_T1w.nii.gz"][0]["MagneticFieldStrength"] == 3
    assert by_name["sub-2_T1w.nii.gz"][0]["Manufacturer"] == "root"
    assert len(sidecars.notes) == 1


def test_images_that_are_no_magnitude_are_left_out_and_said(tmp_path: Path) -> None:
    parts = ("mag", "phase", "real", "imag")
    put(tmp_path, {f"sub-1/anat/sub-1_part-{part}_T1w.nii.gz": "" for part in parts})
    assert names(tmp_path) == ["sub-1/anat/sub-1_part-mag_T1w.nii.gz"]
    assert any("3 images of a phase" in note for note in tree_of(tmp_path).notes)
