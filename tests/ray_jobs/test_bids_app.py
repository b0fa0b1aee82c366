"""The BIDS App form, end to end with a toy model: what users of fMRIPrep and MRIQC type."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import AFFINE

from ray_jobs import cli
from ray_jobs.bids_parser import build_bids_parser, gigabytes, is_bids_app
from ray_jobs.session import session
from sgcd_core.config import load_config
from sgcd_core.io.nifti import encode_nifti
from sgcd_core.modelpack import save_modelpack

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

from one_scan import model_pack
from test_bids_dataset import check_warnings, validate

SETTINGS = [
    "prepare.shape=[24, 24, 24]", "prepare.mm=8", "prepare.bias_correction=none",
    "prepare.registration=none", "network.channels=[8, 16]",
    "network.attention_levels=[false, true]", "network.head_channels=8", "network.patch=1",
    "network.norm_groups=4", "condition.match=histogram", "global_stage.precision=fp32",
    "target_stage.precision=fp32",
]  # fmt: skip


class App:
    """A BIDS data set of three subjects, one scan of which is damaged, and the app to run on it."""

    def __init__(self, folder: Path, scan: Callable[..., bytes]) -> None:
        self.bids, self.out, self.work = folder / "ds", folder / "out", folder / "work"
        names = [
            "sub-01/ses-1/anat/sub-01_ses-1_T1w", "sub-01/ses-1/anat/sub-01_ses-1_T2w",
            "sub-01/ses-2/anat/sub-01_ses-2_acq-x_T1w", "sub-02/anat/sub-02_T1w",
            "sub-03/anat/sub-03_T1w",
        ]  # fmt: skip
        for seed, name in enumerate(names):
            file = self.bids / f"{name}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(scan(seed) if "sub-03" not in name else scan(seed)[:-3000])
        (self.bids / "participants.tsv").write_text(
            "participant_id\tsite\tage\nsub-01\tA\t30\nsub-02\tA\t40\nsub-03\tB\t50\n"
        )
        (self.bids / "README").write_text("Made by a test, of no person at all.\n")
        (self.bids / "dataset_description.json").write_text(
            json.dumps({"Name": "ds", "BIDSVersion": "1.10.0", "Authors": ["A. Test"]})
        )
        self.model = folder / "lake/models/global/4"
        config = load_config("tiny", settings=SETTINGS)
        pack = model_pack(
            folder / "train", config, kind="global", version=4, sequences=["T1w", "T2w"],
            training_sites=["A"],
        )  # fmt: skip
        save_modelpack(str(self.model), pack)
        (folder / "lake/sgcd-lake.json").write_text('{"sgcd_lake": 1}')

    def run(self, level: str, *words: str, model: str | None = None) -> int:
        return cli.main([
            str(self.bids), str(self.out), level, "--model", model or str(self.model),
            "-w", str(self.work), "--nprocs", "1", *words,
        ])  # fmt: skip

    def images(self) -> list[str]:
        found = self.out.rglob("*_desc-harmonized_*.nii.gz")
        return sorted(p.name for p in found if "space-" not in p.name)

    def state(self) -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in self.out.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def scan(head_voxels: np.ndarray) -> Callable[..., bytes]:
    def make(seed: int) -> bytes:
        voxels = head_voxels.copy()
        noise = np.random.default_rng(seed).integers(-20, 20, voxels.shape)
        return encode_nifti(np.where(voxels > 0, voxels + noise, 0).astype(np.float32), AFFINE)

    return make


@pytest.fixture(scope="module")
def app(
    tmp_path_factory: pytest.TempPathFactory, scan: Callable[..., bytes]
) -> Iterator[App]:  # fmt: skip
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    patch.delenv("RAY_ADDRESS", raising=False)
    with session():
        yield App(tmp_path_factory.mktemp("app"), scan)
    patch.undo()


@pytest.mark.slow
@pytest.mark.ray
def test_the_way_of_a_user(app: App, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In one test, since each step goes on from the one before."""
    # One participant, by the model's folder; the validator sees the input.
    assert app.run("participant", "--participant-label", "01") == 0, capsys.readouterr().err
    first = [
        "sub-01_ses-1_desc-harmonized_T1w.nii.gz", "sub-01_ses-1_desc-harmonized_T2w.nii.gz",
        "sub-01_ses-2_acq-x_desc-harmonized_T1w.nii.gz",
    ]  # fmt: skip
    assert app.images() == first
    check_warnings(validate(app.out))
    people = (app.out / "participants.tsv").read_text()
    assert people == "participant_id\tsite\tage\nsub-01\tA\t30\n"
    sidecar = next(app.out.rglob("sub-01_ses-1_desc-harmonized_T1w.json")).read_text()
    assert json.loads(sidecar)["Sources"] == ["bids:ds:sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"]
    assert json.loads(sidecar)["ModelVersion"] == 4
    # Again: nothing moves.
    before = app.state()
    assert app.run("participant", "--participant_label", "sub-01", "--skip-bids-validation") == 0
    assert app.state() == before
    # The others by name in a lake; one scan is damaged: a row, and exit 1.
    capsys.readouterr()
    words = ["--participant-label", "02", "03", "--lake", str(app.model.parents[2])]
    code = app.run("participant", *words, "--skip_bids_validation", "--json", model="global@4")
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 1 and document["counts"].get("failed") == 1 and document["scans"] == 2
    assert app.images() == [*first, "sub-02_desc-harmonized_T1w.nii.gz"]
    assert "3 scans" not in (app.out / "logs/CITATION.md").read_text().split("were")[0]
    # What somebody took away comes again.
    lost = next(app.out.rglob("sub-02_desc-harmonized_T1w.nii.gz"))
    body = lost.read_bytes()
    looks = {path: path.stat().st_mtime_ns for path in app.work.rglob("looks-*/*.json")}
    lost.unlink()
    assert app.run("participant", "--participant-label", "02", "--skip-bids-validation") == 0
    assert lost.read_bytes() == body
    assert looks and all(path.stat().st_mtime_ns == time for path, time in looks.items())
    # The group level: tables, a page, and still a valid data set.
    assert app.run("group") == 0, capsys.readouterr().err
    table = (app.out / "group_T1w.tsv").read_text().splitlines()
    assert len(table) == 1 + 4 and table[0].startswith("bids_name\tstatus")
    assert "<html" in (app.out / "report/index.html").read_text()[:500]
    check_warnings(validate(app.out))
    # Sessions and filters choose.
    filters = tmp_path / "filter.json"
    filters.write_text(json.dumps({"t1w": {"session": "2"}, "t2w": {"session": "2"}}))
    for words in (["--bids-filter-file", str(filters)], ["--session-id", "2"]):
        capsys.readouterr()
        words += ["--skip-bids-validation", "--json"]
        assert app.run("participant", *words) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["scans"] == 1


def test_words_that_cannot_be_followed(app_files: App, capsys: pytest.CaptureFixture[str]) -> None:
    app = app_files
    words = ["--skip-bids-validation", "--participant-label"]
    assert app.run("participant", *words, "01", model="global@champion") == 2
    assert "--lake" in capsys.readouterr().err
    assert app.run("group") == 2
    assert "level participant first" in capsys.readouterr().err
    assert app.run("participant", *words, "01", "99") == 65
    assert "there is no T1w or T2w scan of sub-99" in capsys.readouterr().err
    assert app.run("participant", "--skip-bids-validation", "--session-id", "7") == 65
    assert "ses-7" in capsys.readouterr().err
    assert app.run("participant", *words, "01", model=str(app.model.parent / "5")) == 65
    (app.bids / "dataset_description.json").unlink()
    assert app.run("participant") == 65
    assert "BIDS-INVALID" in capsys.readouterr().err
    same = [str(app.bids), str(app.bids), "participant", "--model", "m"]
    assert cli.main(same) == 2
    assert not app.out.exists()


def test_no_folder_in_which_scans_are_looked_for_is_written_to(
    app_files: App, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app, before = app_files, sorted(app_files.bids.rglob("*"))
    (tmp_path / "link").symlink_to(app.bids)
    words = ["participant", "--model", str(app.model), "--skip-bids-validation", "--dry-run", "-w"]
    for out, work in (
        ("ds", "work"), ("ds/out", "work"), ("link/out", "work"), ("ds/sub-01/derivative", "work"),
        ("out", "ds/work"), ("ds/derivatives/sgcd", "link"),
    ):  # fmt: skip
        folders = [str(app.bids), str(tmp_path / out)]
        assert cli.main([*folders, *words, str(tmp_path / work)]) == 2, (out, work)
        assert "lies in BIDS_DIR" in capsys.readouterr().err
    assert sorted(app.bids.rglob("*")) == before


def test_a_dry_run_writes_to_the_work_folder_only(app_files: App) -> None:
    app, before = app_files, sorted(app_files.bids.rglob("*"))
    app.out = app.bids / "derivatives/sgcd"
    assert app.run("participant", "--skip-bids-validation", "--dry-run") == 0
    assert sorted(app.bids.rglob("*")) == before
    (lake,) = app.work.iterdir()
    assert {path.name for path in lake.iterdir()} == {"sgcd-lake.json", "catalog", "models"}


@pytest.fixture
def app_files(tmp_path: Path, scan: Callable[..., bytes]) -> App:
    return App(tmp_path, scan)


def test_flags_as_fmriprep_and_mriqc_spell_them() -> None:
    common = ["/in", "/out", "participant", "--model", "m@champion"]
    one = build_bids_parser().parse_args([
        *common, "--participant-label", "01", "sub-02", "--session-id", "a", "--nprocs", "4",
        "--mem", "16G", "-w", "/w", "--skip-bids-validation", "--bids-filter-file", "f", "-vv",
    ])  # fmt: skip
    two = build_bids_parser().parse_args([
        *common, "--participant_label", "01", "sub-02", "--session_id", "a", "--n_cpus", "4",
        "--mem_gb", "16", "--work-dir", "/w", "--skip_bids_validation", "--bids_filter_file", "f",
        "-v", "-v",
    ])  # fmt: skip
    assert vars(one) == vars(two)
    assert one.participants == ["01", "sub-02"] and one.mem == 16


def test_sizes_with_and_without_units() -> None:
    sizes = {"16G": 16, "16GB": 16, "16000M": 16, "16000": 16, "8": 8, "0.5T": 500, "12GiB": 12}
    assert {text: gigabytes(text) for text in sizes} == pytest.approx(sizes)


def test_which_form_is_meant() -> None:
    assert is_bids_app(["/in", "/out", "participant"])
    assert is_bids_app(["--model", "m", "/in", "/out", "group"])
    assert not is_bids_app(["index", "participant", "--lake", "l"])
    assert not is_bids_app(["--help"]) and not is_bids_app([])
    assert cli.main(["/in", "/out", "participant"]) == 2  # no model
    assert cli.main(["/in", "/out", "participant", "--help"]) == 0
