"""`sgcd evaluate --tasks`: one door to the three tasks, with tables a person can read."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fake_lake import fake_lake

from pipelines.catalog import Catalog
from ray_jobs import cli
from sgcd_core.modelpack import ModelPack, save_modelpack


class Silent:
    run_id = None

    def log_metrics(self, values, step=None):
        self.values = values


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    # A grid that the network's settings allow, since the command reads them from the model.
    lake, config = fake_lake(
        str(tmp_path_factory.mktemp("command")), lambda scan, truth: truth, shape=(24, 32, 24)
    )
    pack = ModelPack(
        config, {"w": torch.zeros(1)}, {"s": torch.zeros(1)},
        meta={"name": "target-T", "kind": "target", "target": "T", "training_sites": ["T", "A"]},
    )  # fmt: skip
    save_modelpack(lake.model("target-T", 1), pack)
    return lake


@pytest.fixture
def sgcd(lake, capsys, monkeypatch):
    tracker = Silent()

    @contextmanager
    def tracked(*args, **tags):
        yield {}, tracker

    monkeypatch.setattr("ray_jobs.evaluate.tracked", tracked)

    def run(*words):
        code = cli.main(["evaluate", "--lake", lake.uri, "--model", "target-T", *words])
        out, err = capsys.readouterr()
        return code, out, err, getattr(tracker, "values", {})

    return run


def test_tasks_2_and_3_fill_the_tables_and_print_them(sgcd, lake):
    code, out, err, logged = sgcd("--tasks", "3,2", "--features", "statistics")
    assert code == 0, err
    assert "tissues of 4 scans compared with the target's" in out
    assert "segmented by gmm" in out and "features of statistics" in out
    assert "chance" in out and "shuffled" in out and "site_balanced_accuracy" in out
    assert "B     T1w       no    grey matter   dice" in out
    assert "ssim" not in out  # task 1 was not asked for
    metrics = set(Catalog(lake).frame("metrics").metric)
    assert metrics == {"dice.gmm", "ap.gmm"}
    assert "all/T1w/sgcd/site_f1.statistics" in logged
    code, out, _, _ = sgcd("--tasks", "2", "--segmenter", "gmm", "--json")
    document = json.loads(out)
    assert code == 0 and "already in the tables" in document["summary"]
    assert document["tissue_pairs"] == 4 and document["tasks"] == [2]


def test_without_a_word_it_is_task_1(sgcd):
    code, out, _, _ = sgcd("--json")
    document = json.loads(out)
    assert code == 0 and document["pairs"] == 4 and document["tasks"] == [1]
    assert {"verdict", "table", "rows", "skipped"} <= set(document)
    assert {row["metric"] for row in document["rows"]} >= {"ssim", "site_wasserstein"}


@pytest.mark.parametrize(
    "words",
    [("--tasks", "4"), ("--tasks", ""), ("--segmenter", "gmm"), ("--features", "statistics"),
     ("--tasks", "2", "--segmenter", "tool {input}")],
)  # fmt: skip
def test_words_that_make_no_sense_are_usage_errors(words, sgcd):
    assert sgcd(*words)[0] == 2


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_program_that_cannot_be_run_has_its_code(dry, sgcd):
    code, _, err, _ = sgcd("--tasks", "2", "--segmenter", "no-such-tool {input} {output}", *dry)
    assert code == 78 and "[SEGMENTER-FAILED]" in err.splitlines()[-1]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_missing_weights_have_their_code(dry, sgcd, tmp_path):
    code, _, err, _ = sgcd("--tasks", "3", "--features", f"{tmp_path}/resnet18.pth", *dry)
    assert code == 65 and "[ENCODER-WEIGHTS]" in err
    code, _, err, _ = sgcd("--tasks", "3", "--features", "resnet19", *dry)
    assert code == 78 and "there is no image network 'resnet19'" in err


def test_a_dry_run_with_tools_that_are_there_measures_nothing(sgcd, lake):
    words = ("--tasks", "2,3", "--segmenter", "kmeans", "--features", "statistics", "--dry-run")
    before = Catalog(lake).version("metrics")
    code, out, _, _ = sgcd(*words)
    assert code == 0 and out.startswith("would evaluate target-T@1")
    assert Catalog(lake).version("metrics") == before


def test_a_tool_that_is_missing_is_said_before_another_task(sgcd, lake):
    before = Catalog(lake).version("runs"), Catalog(lake).version("metrics")
    missing = ("--tasks", "1,2", "--segmenter", "no-such-tool {input} {output}")
    code, out, err, _ = sgcd(*missing)
    assert code == 78 and "[SEGMENTER-FAILED]" in err and "evaluate:" not in out
    assert (Catalog(lake).version("runs"), Catalog(lake).version("metrics")) == before


def test_scans_that_cannot_be_read_make_it_1_and_are_made_again_next(sgcd, lake):
    assert sgcd()[0] == 0
    (recipe,) = (p for p in (Path(lake.uri) / "prepared").iterdir() if p.is_dir())
    recipe.rename(recipe.with_suffix(".away"))
    try:
        code, out, _, _ = sgcd()
    finally:
        recipe.with_suffix(".away").rename(recipe)
    assert code == 1 and "could not be read: figures of before stay" in out
    assert f"next: sgcd prepare --lake {lake.uri}" in out
    assert sgcd()[0] == 0


def test_an_output_that_is_gone_is_made_again_by_force(sgcd, lake):
    assert sgcd()[0] == 0
    rows = Catalog(lake).rows("results").to_pylist()
    output = next(Path(row["model_grid_uri"]) for row in rows if row["site"] == "A")
    output.rename(output.with_suffix(".away"))
    try:
        code, out, _, _ = sgcd()
    finally:
        output.with_suffix(".away").rename(output)
    assert code == 1 and f"next: sgcd harmonize --lake {lake.uri} --model target-T --force" in out
