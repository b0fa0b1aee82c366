"""The scheduled job: a target is learned once, a stranger is only inferred, two at once agree."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from head_node import RayCluster
from small_lake import SETTINGS, make_global_model, make_site

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from ray_jobs import cli
from ray_jobs.models import models
from ray_jobs.new_site import NewSite, require_scans, the_model
from ray_jobs.parser import build_parser
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import InputError, ModelError, UsageError


def scan(site: str, sequence: str = "T1w", split: str = "train", **more: Any) -> dict[str, Any]:
    return {"site": site, "sequence": sequence, "split": split, "status": "ok"} | more


def test_a_target_with_too_few_scans_is_refused_with_the_number_needed() -> None:
    scans = [scan("A")] * 4 + [scan("B")] * 3 + [scan("B", split="test")] * 5
    require_scans(scans, "A", ["T1w", "T2w"], 4, "lake")  # no T2w at all: for tune to say
    with pytest.raises(InputError, match=r"3 T1w; 4 of each") as caught:
        require_scans(scans, "B", ["T1w", "T2w"], 4, "lake")
    assert caught.value.code == "TARGET-FEW"
    with pytest.raises(InputError, match=r"0 T1w, 0 T2w"):
        require_scans([scan("C", status="failed")], "C", ["T1w", "T2w"], 1, "lake")
    with pytest.raises(InputError) as caught:
        require_scans(scans, "D", ["T1w"], 1, "lake")
    assert caught.value.code == "TARGET-UNKNOWN" and "A, B" in str(caught.value)


def add_model(lake: Lake, name: str) -> None:
    folder = Path(lake.model(name, 1))
    folder.mkdir(parents=True)
    (folder / "pack.json").write_text(json.dumps({"meta": {"kind": "target"}}))


def test_the_only_target_model_needs_no_name(tmp_lake: Lake) -> None:
    with pytest.raises(ModelError, match="--target SITE"):
        the_model(tmp_lake, None)
    add_model(tmp_lake, "global")
    add_model(tmp_lake, "target-A")
    assert the_model(tmp_lake, None) == "target-A"
    assert the_model(tmp_lake, "global@1") == "global@1"
    add_model(tmp_lake, "target-B")
    with pytest.raises(UsageError, match="target-A, target-B"):
        the_model(tmp_lake, None)


def test_a_sequence_that_the_model_does_not_know_is_refused_before_any_work(
    tmp_lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_global_model(tmp_lake.uri)
    source = make_site(tmp_path / "a", "A", 1)
    Catalog(tmp_lake).append("scans", [scan("A", scan_id="s", uri="/s.nii.gz")])
    for words in (
        ["harmonize", "--model", "global"],
        ["new-site", str(source), "--model", "global"],
        ["new-site", str(source), "--target", "A"],
    ):
        assert cli.main([*words, "--lake", tmp_lake.uri, "--sequences", "t1w"]) == 65
        assert "[SCAN-SEQUENCE] the model knows T1w, T2w, not 't1w'" in capsys.readouterr().err
    # one that it knows and the lake lacks is no mistake
    words = ["harmonize", "--model", "global", "--lake", tmp_lake.uri, "--sequences", "T2w"]
    assert cli.main(words) == 0
    assert "nothing to harmonize with global@1: 0 to do" in capsys.readouterr().out


def test_a_dry_run_counts_the_sequences_asked_for(
    tmp_lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_global_model(tmp_lake.uri)
    source = make_site(tmp_path / "a", "A", 1)
    Catalog(tmp_lake).append("scans", [
        scan("A", scan_id=f"s{number}", uri=f"/s{number}.nii.gz", sequence=sequence)
        for number, sequence in enumerate(("T1w", "T2w", "T2w"))
    ])  # fmt: skip
    words = ["new-site", str(source), "--lake", tmp_lake.uri, "--model", "global", "--dry-run"]
    for sequences, waiting in (([], 3), (["--sequences", "T1w"], 1)):
        assert cli.main([*words, *sequences]) == 0
        assert f"would add 1 scan, and harmonize what is new and {waiting} listed" in (
            capsys.readouterr().out
        )


def test_a_dry_run_refuses_what_the_run_would_refuse(
    tmp_lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_global_model(tmp_lake.uri)
    source = make_site(tmp_path / "a", "A", 1)
    Catalog(tmp_lake).append("scans", [scan("B", scan_id="s", uri="/s.nii.gz")])
    words = ["new-site", str(source), "--lake", tmp_lake.uri, "--dry-run"]
    for more, code, said in (
        (["--target", "B"], 65, "TARGET-FEW"),
        (["--target", "C"], 65, "TARGET-UNKNOWN"),
        (["--target", "B", "--min-scans", "1"], 0, ""),
        (["--target", "A"], 0, ""),  # its scans are new
        (["--target", "A", "--set", "guard.max_outlier_score=x"], 78, "guard.max_outlier_score"),
    ):
        assert cli.main([*words, *more]) == code
        assert said in capsys.readouterr().err
    # a run says so before it lists a scan
    assert cli.main([*words[:-1], "--target", "A", "--set", "guard.max_outlier_score=x"]) == 78
    assert len(Catalog(tmp_lake).rows("scans")) == 1


def test_stage_2_has_as_many_workers_as_can_share_its_batch(tmp_lake: Lake) -> None:
    parent = SgcdConfig()
    words = ["new-site", "src", "--lake", tmp_lake.uri, "--target", "A"]
    for batch, asked, given in ((1, 2, 1), (6, 4, 3), (2, 2, 2)):
        more = ["--workers", str(asked), "--set", f"target_stage.batch_size={batch}"]
        args = build_parser().parse_args([*words, *more])
        job = NewSite(args, tmp_lake, "target-A", None)  # type: ignore[arg-type]
        assert job._trainers(parent) == ["--workers", str(given)]
        assert job.ray[-2:] == ["--workers", str(asked)]
    args = build_parser().parse_args(words)
    job = NewSite(args, tmp_lake, "target-A", None)  # type: ignore[arg-type]
    assert job._trainers(parent) == []


@dataclass
class Place:
    lake: str
    first: Path
    second: Path
    cluster: RayCluster

    @property
    def catalog(self) -> Catalog:
        return Catalog(Lake(self.lake))

    def submit(self, *words: str) -> Any:
        job = ["new-site", *words, "--lake", self.lake, "--wait", "5"]
        return self.cluster.sgcd("submit", *job)

    def run(self, *words: str) -> tuple[int, str]:
        process = self.submit(*words)
        out, err = process.communicate(timeout=240)
        return process.returncode, out + err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, ray_cluster: RayCluster) -> Iterator[Place]:
    """A lake with a global model, and a site A it was tuned to by the job."""
    root = tmp_path_factory.mktemp("sites")
    lake = str(root / "lake")
    make_global_model(lake)
    here = Place(lake, make_site(root / "a", "A", 3), make_site(root / "b", "B", 2, 3), ray_cluster)
    words = ["--target", "A", "--sequences", "T1w", "--min-scans", "3", "--workers", "2"]
    settings = [s for s in SETTINGS if s.startswith("target_stage")]
    words += [word for setting in settings for word in ("--set", setting)]
    code, text = here.run(str(here.first), *words)
    assert code == 0, text[-3000:]
    yield here


@pytest.mark.slow
@pytest.mark.ray
def test_a_target_is_learned_once_and_every_scan_brought_to_it(place: Place) -> None:
    assert models(Lake(place.lake)) == {"global": [1], "target-A": [1]}
    results = place.catalog.history("results").to_pylist()
    assert Counter((r["site"], r["model"]) for r in results) == {("A", "target-A"): 3}
    assert {r["status"] for r in results} <= {"ok", "flagged"}


@pytest.mark.slow
@pytest.mark.ray
def test_two_jobs_at_once_for_a_stranger_do_its_scans_once(place: Place) -> None:
    """No training, every scan of the new site exactly once, each job ends well."""
    jobs = [place.submit(str(place.second), "--workers", "1") for _ in range(2)]
    texts = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], texts
    results = place.catalog.history("results").to_pylist()
    assert Counter((r["site"], r["model_version"]) for r in results) == {("A", 1): 3, ("B", 1): 2}
    assert len({r["scan_id"] for r in results}) == 5
    assert models(Lake(place.lake)) == {"global": [1], "target-A": [1]}
    ends = [out for out, _ in texts]
    assert sorted("nothing new" in out for out in ends) == [False, True]
    # the row that says so is the newest of each scan; the first job's figures were kept
    runs = place.catalog.rows("runs", where={"command": "evaluate"}).to_pylist()
    assert len(runs) == 2  # one for the target, one for the stranger


@pytest.mark.slow
@pytest.mark.ray
def test_the_same_job_again_changes_nothing(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, without a cluster: where nothing is to do no Ray is started."""
    versions = [place.catalog.version(table) for table in ("scans", "results", "metrics")]
    code = cli.main(["new-site", str(place.second), "--lake", place.lake, "--json"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0 and document["counts"] == {} and document["index"]["new"] == 0
    assert document["sites"] == ["B"] and Path(document["report"]).exists()
    assert versions == [place.catalog.version(table) for table in ("scans", "results", "metrics")]
    import ray

    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.ray
def test_a_target_with_too_few_scans_fails_before_any_work(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(place.second), "--lake", place.lake, "--target", "B", "--sequences", "T1w"]
    assert cli.main(["new-site", *words]) == 65
    assert "[TARGET-FEW]" in capsys.readouterr().err
    assert "target-B" not in models(Lake(place.lake))


@pytest.mark.slow
@pytest.mark.ray
def test_a_dry_run_says_what_is_new_and_changes_nothing(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    third = make_site(tmp_path / "c", "C", 1, 7)
    before = place.catalog.version("scans")
    assert cli.main(["new-site", str(third), "--lake", place.lake, "--dry-run"]) == 0
    assert (
        "would add 1 scan, and harmonize what is new and 0 listed before" in capsys.readouterr().out
    )
    assert place.catalog.version("scans") == before
