"""What is written is a BIDS derivative data set, by the word of the official validator."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from one_scan import CONFIG, Site, model_pack

from pipelines.bids_links import Links, link_names
from pipelines.catalog import Catalog
from pipelines.cite import citation
from pipelines.dataset_files import write_description, write_participants
from pipelines.derivative import stems
from pipelines.harmonize import Job, harmonize_scan
from pipelines.prepare import save_prepared
from ray_jobs.harmonize import describe
from sgcd_core.errors import ModelError
from sgcd_core.harmonizer import Harmonizer
from sgcd_core.io.nifti import encode_nifti, read_nifti
from sgcd_core.io.store import Store
from sgcd_core.modelpack import save_modelpack
from sgcd_core.volume.prepare import Prepared

pytestmark = pytest.mark.slow

PEOPLE = (
    "participant_id\tage\tsex\tHandedness\nsub-01\t34\tF\tR\nsub-02\t51\tM\tL\nsub-09\t1\tF\tR\n"
)


def validate(root: Path) -> list[dict[str, Any]]:
    """Issues that the official validator finds; fails where an issue is an error."""
    program = Path(sys.executable).with_name("bids-validator-deno")
    if not program.exists():
        pytest.skip("bids-validator-deno is not installed")
    done = subprocess.run([program, str(root), "--format", "json"], capture_output=True, text=True)
    issues = json.loads(done.stdout)["issues"]["issues"]
    errors = [issue for issue in issues if issue["severity"] == "error"]
    assert not errors and done.returncode == 0, json.dumps(errors, indent=1)
    return list(issues)


def check_warnings(issues: list[dict[str, Any]]) -> None:
    """What the validator recommends is there, but for what only the owner of the scans can say."""
    left = {
        (issue["code"], issue.get("subCode")) for issue in issues
        # It wants the table as a whole described, beside its columns.
        if not (issue["location"].endswith(".tsv") and issue.get("subCode") == "Description")
    }  # fmt: skip
    assert left <= {("TOO_FEW_AUTHORS", None)}


class Dataset:
    """Two subjects, one with sessions; T1w and T2w; a lesion mask; harmonized with a toy model."""

    def __init__(self, folder: Path) -> None:
        self.site = site = Site(folder)
        self.bids, self.lake = folder / "bids", site.lake
        site.write_mask("sub-01_ses-2_run-1_label-lesion_mask.nii.gz")
        second = self.bids / "sub-02/anat"
        second.mkdir(parents=True)
        names = {
            "a": site.file, "b": site.folder / "sub-01_ses-2_run-1_T2w.nii.gz",
            "c": second / "sub-02_T1w.nii.gz",
        }  # fmt: skip
        (self.bids / "participants.tsv").write_text(PEOPLE)
        (self.bids / "participants.json").write_text(
            json.dumps({"Handedness": {"Description": "hand they write with"}})
        )
        (self.bids / "dataset_description.json").write_text(
            json.dumps({"Name": "n", "BIDSVersion": "1.10.0", "DatasetDOI": "doi:10.1/x"})
        )
        self.scans: list[dict[str, Any]] = []
        for letter, file in names.items():
            if file != site.file:  # other bytes: a scan is named by its content
                brighter = site.scan.data * (1.01 if letter == "b" else 1.02)
                file.write_bytes(encode_nifti(brighter, site.scan))
            row = site.row | {
                "scan_id": read_nifti(str(file)).sha256[:32], "uri": str(file),
                "age": None, "sex": None,
                "sequence": "T2w" if "T2w" in file.name else "T1w", "status": "ok",
            }  # fmt: skip
            if letter == "c":
                row |= {"subject": "02", "session": None}
            prepared = Prepared(site.image, site.model_mask, site.mask, site.geometry)
            recipe = self.lake.prepared(CONFIG.prepare.digest(), row["scan_id"])
            save_prepared(recipe, site.scan, prepared, Store())
            self.scans.append(row)
        catalog = Catalog(self.lake)
        catalog.append("scans", self.scans)
        table = catalog.rows("scans")
        self.scans = table.to_pylist()
        pack = model_pack(folder / "train", kind="global", scans=9, steps=3, init="scratch")
        save_modelpack(self.lake.model("global", 1), pack)
        job = Job(
            lake=self.lake, model="global", version=1, target=None, config=CONFIG,
            code_version="1.2.3", batch_id="b", samples=2,
        )  # fmt: skip
        self.root = Path(self.lake.derivatives(job.key))
        links = write_description(str(self.root), job.key, "1.2.3", self.scans)
        self.job = Job(**{**job.__dict__, "links": links})
        model = Harmonizer(pack)
        named = {row["scan_id"]: row["stem"] for row in stems(table).to_pylist()}
        rows = [harmonize_scan(s, self.job, model, named[s["scan_id"]]) for s in self.scans]
        assert {row["status"] for row in rows} <= {"ok", "flagged"}
        catalog.append("results", rows)
        describe(self.lake, "global", 1)

    def sidecar(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / name).read_text())
        return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Dataset(tmp_path_factory.mktemp("one"))
    torch.set_num_threads(before)


def test_the_official_validator_finds_no_error(data: Dataset) -> None:
    check_warnings(validate(data.root))


def test_names_sources_by_bids_uris_that_resolve(data: Dataset) -> None:
    description = data.sidecar("dataset_description.json")
    assert description["DatasetType"] == "derivative"
    (generator,) = description["GeneratedBy"]
    assert (generator["Name"], generator["Version"]) == ("sgcd-lake", "1.2.3")
    assert description["SourceDatasets"] == [{"URL": data.bids.as_uri(), "DOI": "doi:10.1/x"}]
    links = description["DatasetLinks"]
    assert links == {"bids": data.bids.as_uri()}
    stem = "sub-01/ses-2/anat/sub-01_ses-2_run-1"
    native = data.sidecar(f"{stem}_desc-harmonized_T1w.json")
    assert native["Sources"] == [
        f"bids:bids:{stem}_T1w.nii.gz", f"bids:bids:{stem}_label-lesion_mask.nii.gz",
    ]  # fmt: skip
    assert native["LesionMask"] == native["Sources"][1]
    spread = data.sidecar(f"{stem}_desc-harmonizedstd_T1w.json")
    grid = f"{stem}_space-MNI152rigid_desc-harmonizedstd_T1w.nii.gz"
    assert spread["Sources"] == [f"bids:bids:{stem}_T1w.nii.gz", f"bids::{grid}"]
    bases = {"": data.root} | {name: Path(uri.removeprefix("file://"))
                               for name, uri in links.items()}  # fmt: skip
    for file in data.root.rglob("*desc-*.json"):
        for source in json.loads(file.read_text())["Sources"]:
            _, name, path = source.split(":", 2)
            assert (bases[name] / path).is_file()


def test_every_image_has_a_sidecar_that_says_its_grid(data: Dataset) -> None:
    images = sorted(data.root.rglob("*.nii.gz"))
    assert len(images) == 12  # three scans: two grids, image and uncertainty
    for image in images:
        sidecar = json.loads(image.with_name(image.name.replace(".nii.gz", ".json")).read_text())
        assert sidecar["SkullStripped"] is True
        assert ("SpatialReference" in sidecar) == ("space-MNI152rigid" in image.name)


def test_participants_are_carried_over_for_who_is_here(data: Dataset) -> None:
    lines = (data.root / "participants.tsv").read_text().splitlines()
    assert lines == ["participant_id\tage\tsex\tHandedness", "sub-01\t34\tF\tR", "sub-02\t51\tM\tL"]
    columns = data.sidecar("participants.json")
    assert columns["Handedness"] == {"Description": "hand they write with"}
    assert columns["age"]["Units"] == "years"


def test_participants_of_other_runs_stay(data: Dataset, tmp_path: Path) -> None:
    """Jobs for single participants may have a lake each and write to one data set."""
    (tmp_path / "participants.tsv").write_text("participant_id\tgroup\nsub-02\tx\nsub-03\ty\n")
    (tmp_path / "participants.json").write_text('{"group": {"Description": "arm"}}')
    one = [scan for scan in data.scans if scan["subject"] == "02"]
    write_participants(str(tmp_path), iter(one))
    assert (tmp_path / "participants.tsv").read_text().splitlines() == [
        "participant_id\tage\tsex\tHandedness\tgroup", "sub-02\t51\tM\tL\tn/a",
        "sub-03\tn/a\tn/a\tn/a\ty",
    ]  # fmt: skip
    columns = json.loads((tmp_path / "participants.json").read_text())
    assert columns["group"] == {"Description": "arm"} and "Handedness" in columns
    write_participants(str(tmp_path), iter(one), gone={"sub-02", "sub-03"})
    lines = (tmp_path / "participants.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["participant_id", "sub-02"]


def test_describing_again_touches_nothing(data: Dataset) -> None:
    def state() -> list[tuple[str, int]]:
        return sorted((str(p), p.stat().st_mtime_ns) for p in data.root.rglob("*") if p.is_file())

    before = state()
    assert write_description(str(data.root), data.job.key, "1.2.3", data.scans) == data.job.links
    describe(data.lake, "global", 1)
    assert state() == before


def test_a_second_data_set_leaves_the_names_of_the_first(data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "dataset_description.json").write_bytes(
        (data.root / "dataset_description.json").read_bytes()
    )
    first = next(scan for scan in data.scans if scan["subject"] == "01")
    more = dict(first, uri="s3://bucket/bids/sub-01/anat/sub-01_T1w.nii.gz")
    links = write_description(str(tmp_path), data.job.key, "2", [more, *data.scans])
    named = links.dataset_links()
    assert named.pop("bids") == data.bids.as_uri()
    ((name, uri),) = named.items()
    found = json.loads((tmp_path / "dataset_description.json").read_text())
    assert len(found["SourceDatasets"]) == 2
    assert name.startswith("bids-") and uri == "s3://bucket/bids"
    assert links.uri(more["uri"]) == f"bids:{name}:sub-01/anat/sub-01_T1w.nii.gz"


def test_the_methods_paragraph_says_what_was_done(data: Dataset) -> None:
    text = citation(data.lake, "global", 1)
    assert text == (data.root / "logs/CITATION.md").read_text()
    for part in (
        "3 scans (T1w 2, T2w 1) of 2 participants from 1 site (A 3)", "SGCD Lake 1.2.3",
        "model global, version 1, preset tiny", "16×16×16 voxels of 8 mm", "3 steps on 9 scans",
        "fresh weights", "In 2 scans a lesion mask was honoured",
        "For 3 scans the standard deviation over seeds", "doi:10.1109/TMI.2010.2046908",
    ):  # fmt: skip
        assert part in text, part
    told = "brought from the look of its site" in text, "the scan so matched" in text
    assert told == (data.job.config.condition.match != "none",) * 2
    assert "tuned to" not in text  # a global model was not
    numbers = [line.split(".")[0] for line in text.split("# References")[1].split("\n") if line]
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)]
    assert all(f"[{n}]" in text for n in numbers)


def test_nothing_harmonized_is_nothing_to_cite(data: Dataset) -> None:
    with pytest.raises(ModelError, match="there is no model"):
        citation(data.lake, "global", 2)


def test_the_container_is_named_where_the_environment_does(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGCD_CONTAINER_TYPE", "docker")
    monkeypatch.setenv("SGCD_CONTAINER_TAG", "sgcd-lake:1.2.3")
    write_description(str(tmp_path), data.job.key, "1.2.3", data.scans)
    found = json.loads((tmp_path / "dataset_description.json").read_text())
    container = {"Type": "docker", "Tag": "sgcd-lake:1.2.3"}
    assert found["GeneratedBy"][0]["Container"] == container


def test_addresses_outside_of_every_data_set_stay_uris() -> None:
    links = Links("/out", {"/d": "d", "/d/derivatives/x": "x"})
    assert links.uri("/d/derivatives/x/a.nii") == "bids:x:a.nii"
    assert links.uri("/d/a b.nii") == "bids:d:a b.nii"
    assert links.uri("/dd/a.nii") == "file:///dd/a.nii"
    assert links.uri("s3://b/a.nii") == "s3://b/a.nii"
    assert links.uri("/out/sub-1/a.nii") == "bids::sub-1/a.nii"
    assert link_names(["/a/raw", "/b/raw"], {"/b/raw": "raw"})["/b/raw"] == "raw"
