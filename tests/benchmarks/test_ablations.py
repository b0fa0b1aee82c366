"""The ablations: every row really changes something, runs, is kept, and has its line."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
#: A toy: a coarse grid, few steps, no correction that takes long.
TOY = [
    "--workers", "1", "--sites", "2", "--each", "1", "--traveling", "1", "--steps", "2",
    "--tune-steps", "1", "--set", "prepare.shape=[24,32,24]", "--set", "prepare.mm=8",
    "--set", "prepare.bias_correction=none", "--set", "prepare.registration=none",
    "--set", "network.channels=[8,16,16]", "--set", "target_stage.encoder=statistics",
]  # fmt: skip


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import ablations

    return ablations


@pytest.fixture(scope="module")
def cohort_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablations")


@pytest.fixture
def work(ablations: ModuleType, cohort_folder: Path, tmp_path: Path) -> Any:
    """A run in a folder of its own; the cohort is made once for all tests."""
    args = ablations._parser().parse_args([str(cohort_folder), *TOY])
    shared = ablations.work_of(args)
    for member in shared.plan.members:
        ablations.make_member(shared.cohort_folder, shared.plan, member)
    shutil.copytree(cohort_folder, tmp_path, dirs_exist_ok=True)
    args.work = tmp_path
    return ablations.work_of(args)


def test_every_row_changes_a_setting_over_the_row_it_is_compared_with(
    ablations: ModuleType,
) -> None:
    for row in ablations.ABLATIONS.values():
        if row.against is None:
            continue
        other = ablations.ABLATIONS[row.against]
        mine, theirs = row.config("tiny"), other.config("tiny")
        if row.network and row.stage2:
            # t_0 = 999 in one evaluation is the preset itself: a point of the curve.
            assert (mine != theirs) == (row.name != "evaluations-t999-n1"), row.name
        if row.start == "box" and row.network:
            assert mine.network == theirs.network, f"{row.name} cannot start from the box"


def test_a_single_setting_is_changed_where_one_part_is_ablated(ablations: ModuleType) -> None:
    def changed(name: str) -> set[str]:
        row = ablations.ABLATIONS[name]
        mine = row.config("tiny").model_dump()
        theirs = ablations.ABLATIONS[row.against].config("tiny").model_dump()
        return {
            f"{part}.{key}" for part, values in mine.items() if isinstance(values, dict)
            for key in values if values[key] != theirs[part][key]
        }  # fmt: skip

    assert changed("no-record") == {"global_stage.weight_record"}
    assert changed("anchored") == {"target_sampler.kind"}
    assert changed("scratch-epsilon-flat") == {"global_stage.x0_weight"}
    assert changed("scratch-no-gradient") == {
        "condition.gradient_channel", "global_stage.weight_gradient",
        "target_stage.weight_anatomy",
    }  # fmt: skip


def test_rows_share_the_models_they_have_in_common(ablations: ModuleType, tmp_path: Path) -> None:
    work = ablations.work_of(ablations._parser().parse_args([str(tmp_path), *TOY]))
    full, encoder, curve, record = (
        ablations.ABLATIONS[name]
        for name in ("full", "encoder-statistics", "evaluations-t100-n4", "no-record")
    )
    assert work.stage1_key(full) == work.stage1_key(encoder) != work.stage1_key(record)
    assert work.stage2_key(full) == work.stage2_key(curve)
    assert work.result_key(full) != work.result_key(curve)


@pytest.mark.slow
def test_two_rows_run_are_kept_and_every_row_has_its_line(
    ablations: ModuleType, work: Any, tmp_path: Path
) -> None:
    names = ["raw", "no-stage2", "scratch-no-gradient"]
    assert ablations.run(work, names) == names
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert ablations.run(work, names) == []  # resumed: nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in times} == times
    results = {name: work.result(row) for name, row in ablations.ABLATIONS.items()}
    ran = results["no-stage2"]
    assert ran is not None and ran["tune_steps"] == 0 and ran["evaluations"] == 1
    # One traveling subject, two sequences, a seen and an unseen site, four measures.
    assert len(ran["rows"]) == 2 * 2 * 4
    lines = ablations.runs(results).splitlines()
    from ablation_list import VARIANTS

    assert [line.split("|")[1].strip().strip("`") for line in lines[2:]] == [
        row.name for row in VARIANTS
    ]
    assert sum("not run" in line for line in lines) == len(VARIANTS) - len(names)
    ablations.write(tmp_path / "docs", ablations.page(work, results), results)
    first = (tmp_path / "docs" / "ablations.md").read_text()
    ablations.write(tmp_path / "docs", ablations.page(work, results), results)
    assert (tmp_path / "docs" / "ablations.md").read_text() == first
    png = (tmp_path / "docs" / "images" / "ablations-psnr.png").read_bytes()
    assert png.startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_change_of_steps_makes_a_result_another_one(
    ablations: ModuleType, work: Any, tmp_path: Path
) -> None:
    args = ablations._parser().parse_args([str(tmp_path), *TOY, "--steps", "3"])
    ablations.run(work, ["no-stage2"])
    row = ablations.ABLATIONS["no-stage2"]
    assert work.result(row) is not None and ablations.work_of(args).result(row) is None


def test_a_row_that_diverges_says_so_in_its_place(
    ablations: ModuleType, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sgcd_core.errors import ModelError
    from sgcd_core.global_stage import GlobalStage

    def diverge(*_: object) -> None:
        raise ModelError("the loss is nan.", code="TRAIN-DIVERGED")

    monkeypatch.setattr(GlobalStage, "step", diverge)
    ablations.run(work, ["full"])
    result = work.result(ablations.ABLATIONS["full"])
    assert result is not None and result["error"] == "TRAIN-DIVERGED"
    assert "TRAIN-DIVERGED" in ablations.runs({"full": result})
