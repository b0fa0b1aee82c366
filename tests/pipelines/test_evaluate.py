"""A perfect model is closer everywhere, a useless one is said to be, and nothing counts twice."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_lake import add_scan, brain, fake_lake, make_config

import pipelines.evaluate as evaluation
from pipelines.catalog import Catalog
from pipelines.evaluate import SPLIT, evaluate, find_truth
from pipelines.lake import Lake
from pipelines.record_figures import record_figures
from pipelines.tissue import evaluate_tissue
from pipelines.verdict import SITE_DISTANCE, summarize
from ray_jobs.evaluate import distance_table
from sgcd_core.errors import ModelError, StorageError


def perfect(scan, truth):
    return truth * 0.999


def useless(scan, truth):
    return 1 - scan


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    lake, config = fake_lake(str(tmp_path_factory.mktemp("good")), perfect)
    return lake, evaluate(lake, "target-T", 1, config, training_sites=["T", "A"]), config


def test_each_test_scan_is_scored_by_each_method_on_each_measure(good):
    lake, found, _ = good
    rows = Catalog(lake).frame("metrics")
    assert found.written
    assert found.pairs == 4  # two people at A and B
    assert len(rows) == 4 * 3 * 4
    assert set(rows.method) == {"raw", "nyul", "sgcd"}
    assert set(rows.site) == {"A", "B"}
    assert set(rows[rows.site == "A"].seen) == {True}
    assert set(rows[rows.site == "B"].seen) == {False}
    assert (rows.reference != rows.scan_id).all()
    assert rows.subject.str.startswith("x").all(), "training subjects are not scored"


def test_a_perfect_model_is_closer_than_raw_and_nyul_on_everything(good):
    _, found, _ = good
    assert all(line.closer("sgcd", "raw") for line in found.summary.lines)
    assert all(line.closer("sgcd", "nyul") for line in found.summary.lines)
    assert not any("NOT" in sentence for sentence in found.verdict)
    heads = [sentence.split(":")[0] for sentence in found.verdict]
    assert (
        heads
        == ["T1w, sites seen in training (2 subjects)"] * 2
        + ["T1w, sites never seen in training (2 subjects)"] * 2
    )


def test_site_metrics_hold_before_after_and_an_interval(good):
    lake, _, _ = good
    rows = Catalog(lake).frame("site_metrics")
    ssim = rows[(rows.metric == "ssim") & (rows.method == "sgcd")]
    assert sorted(ssim.site) == ["A", "B"]
    assert (ssim.after > ssim.before).all()
    assert ((ssim.low <= ssim.after) & (ssim.after <= ssim.high)).all()
    assert set(ssim.n) == {2}
    distance = rows[(rows.metric == SITE_DISTANCE) & (rows.method == "sgcd")]
    assert (distance.after < 0.5 * distance.before).all()
    assert set(distance.n) == {5}  # three training and two traveling people


def test_evaluating_again_adds_nothing(good):
    lake, first, config = good
    before = {t: Catalog(lake).version(t) for t in ("metrics", "site_metrics")}
    again = evaluate(lake, "target-T", 1, config, training_sites=["T", "A"])
    assert again.written is False
    assert {t: Catalog(lake).version(t) for t in before} == before
    assert again.verdict == first.verdict


def test_a_useless_model_is_said_to_be(tmp_path):
    lake, config = fake_lake(str(tmp_path), useless, sites=("A",))
    found = evaluate(lake, "target-T", 1, config, training_sites=["T", "A"])
    assert len(found.verdict) == 2
    for rival, sentence in zip(("the raw scans", "Nyúl"), found.verdict, strict=True):
        assert f"SGCD is NOT closer than {rival} on SSIM" in sentence
        assert "SGCD is closer" not in sentence


def test_a_copy_is_not_closer_than_raw(tmp_path):
    lake, config = fake_lake(str(tmp_path), lambda scan, truth: scan, sites=("A",))
    found = evaluate(lake, "target-T", 1, config)
    assert found.verdict[0].startswith("T1w, all sites (2 subjects): SGCD is NOT closer than the")
    assert "; " not in found.verdict[0]


def test_without_traveling_subjects_the_sites_are_still_compared(tmp_path):
    lake, config = fake_lake(str(tmp_path), perfect, traveling=0)
    found = evaluate(lake, "target-T", 1, config)
    assert found.pairs == 0
    assert found.verdict[0].startswith("No scan has a truth to compare with")
    sgcd = [r for r in found.site_rows if r["method"] == "sgcd"]
    assert {r["site"] for r in sgcd} == {"A", "B"}
    assert all(r["after"] < r["before"] for r in sgcd)
    nearer, *rivals = found.verdict[1:]
    assert nearer.startswith("T1w: SGCD brings the mean histogram nearer to T's at A (0.")
    assert " and B (0." in nearer and "NOT" not in nearer
    assert all("a classical method comes nearer than SGCD at " in text for text in rivals)


def test_a_model_that_takes_sites_away_is_said_to_without_traveling_subjects(tmp_path):
    lake, config = fake_lake(str(tmp_path), useless, traveling=0)
    found = evaluate(lake, "target-T", 1, config)
    apart, rivals = found.verdict[1:]
    assert apart.startswith("T1w: SGCD brings the mean histogram nearer to T's at B (0.")
    assert "; SGCD does NOT bring it nearer to T's at A (0." in apart
    assert "(0." in rivals and " of Nyúl)" in rivals
    lines = distance_table(found.site_rows)
    assert lines[0].split()[:5] == ["site", "sequence", "seen", "measure", "subjects"]
    assert {line.split()[0] for line in lines[2:]} == {"A", "B"}
    assert all("site_wasserstein" in line for line in lines[2:])


def test_one_unreadable_output_is_named_and_the_others_are_scored(tmp_path):
    lake, config = fake_lake(str(tmp_path), perfect, sites=("A",))
    rows = Catalog(lake).rows("results").to_pylist()
    bad = next(r for r in rows if r["subject"] == "x0" and r["site"] == "A")
    Path(bad["model_grid_uri"]).write_bytes(b"not a scan")
    found = evaluate(lake, "target-T", 1, config)
    assert found.pairs == 1
    assert list(found.skipped) == [bad["scan_id"]]
    assert found.skipped[bad["scan_id"]].startswith("SCAN-")


def test_the_truth_only_serves_for_comparison(tmp_path):
    """Nyúl's output for a test scan does not change when the subject's target scan does."""
    numbers = []
    for seed in (100, 200):
        lake, config = fake_lake(str(tmp_path / str(seed)), perfect, sites=("A",), traveling=1)
        other, mask = brain(seed, "T1w")
        row = add_scan(
            lake, config, other, mask, subject="x0", site="T", sequence="T1w", split="test"
        )
        catalog = Catalog(lake)
        old = next(s for s in catalog.rows("scans").to_pylist() if s["uri"] == row["uri"])
        gone = {"scan_id": old["scan_id"], "status": "failed", "code": "SCAN-REPLACED"}
        catalog.append("scans", [row, row | gone])
        found = evaluate(lake, "target-T", 1, config)
        nyul = [r for r in found.site_rows if r["method"] == "nyul"]
        numbers.append([r["after"] for r in nyul if r["metric"] == SITE_DISTANCE])
    assert numbers[0] == numbers[1]


def test_a_scan_training_may_have_seen_is_no_truth():
    scan = {"dataset": "d", "subject": "1", "sequence": "T1w", "site": "A", "split": "test"}
    base = scan | {"site": "T", "status": "ok", "session": "1", "scan_id": "t"}
    assert find_truth(scan, [base], "T") == base
    assert find_truth(scan, [base | {"split": "train"}], "T") is None
    assert find_truth(scan, [base | {"dataset": "other"}], "T") is None
    assert find_truth(scan, [base | {"sequence": "T2w"}], "T") is None
    assert find_truth(scan | {"split": "train"}, [base], "T") is None


@pytest.mark.parametrize("split", ["train", None])
def test_a_subject_that_was_trained_on_is_scored_at_no_site_and_it_is_said(split, tmp_path):
    lake, config = fake_lake(str(tmp_path), perfect, sites=("A",))
    catalog = Catalog(lake)
    scans = catalog.rows("scans").to_pylist()
    mine = [s for s in scans if s["subject"] == "x0"]
    (scan,), (truth,) = ([s for s in mine if s["site"] == site] for site in "AT")
    assert find_truth(scan, scans, "T") == truth
    other = scan | {"scan_id": "9" * 32, "uri": f"{lake.uri}/raw/again.nii.gz", "split": split}
    catalog.append("scans", [other | {"recorded_at": None}])
    assert find_truth(scan, [*scans, other], "T") is None
    assert find_truth(scan, [*scans, other | {"dataset": "another"}], "T") == truth
    replaced = other | {"status": "failed", "code": "SCAN-REPLACED"}
    assert find_truth(scan, [*scans, replaced], "T") == truth
    voxels, tissues = (task(lake, "target-T", 1, config) for task in (evaluate, evaluate_tissue))
    assert voxels.pairs == tissues.pairs == 1
    assert voxels.skipped == tissues.skipped == {scan["scan_id"]: SPLIT}
    assert set(catalog.frame("metrics").subject) == {"x1"}


def test_nothing_harmonized_is_an_error(tmp_path):
    with pytest.raises(ModelError) as caught:
        evaluate(Lake(str(tmp_path)), "m", 1, make_config())
    assert caught.value.code == "MODEL-MISSING"


def test_infinite_and_missing_values_are_summarized():
    base = {"site": "A", "sequence": "T1w", "seen": None, "metric": "psnr", "subject": "1"}
    rows = [
        base | {"method": "sgcd", "value": np.inf},
        base | {"method": "raw", "value": 20.0},
        base | {"method": "nyul", "value": None},
    ]
    summary = summarize(rows)
    assert "PSNR (∞ against 20.00)" in summary.verdict[0]
    assert summary.lines[0].closer("sgcd", "nyul") is False


def test_against_several_classical_methods_the_best_of_each_measure_counts():
    values = {
        "raw": (20.0, 0.8), "nyul": (22.0, 0.9), "histogram": (25.0, 0.85), "sgcd": (24.0, 0.95),
    }  # fmt: skip
    rows = [
        {"subject": subject, "site": "B", "sequence": "T1w", "seen": True, "method": method,
         "metric": metric, "value": value + 0.01 * number}
        for method, pair in values.items()
        for metric, value in zip(("psnr", "ssim"), pair, strict=True)
        for number, subject in enumerate("ab")
    ]  # fmt: skip
    summary = summarize(rows)
    raw, classical = summary.verdict
    assert "closer than the raw scans on" in raw and "NOT" not in raw
    assert "closer than every classical method on SSIM (0.9550 against 0.9050 of Nyúl)" in classical
    assert (
        "NOT closer than the best of the classical methods on PSNR "
        "(24.01 against 25.01 of histogram matching)" in classical
    )
    assert "the raw scans in 2 of 2 and than every classical method in 1 of 2" in summary.headline


def test_an_evaluation_that_skipped_a_scan_is_completed_by_the_next(tmp_path):
    lake, config = fake_lake(str(tmp_path), perfect)
    results = Catalog(lake).rows("results").to_pylist()
    result = next(r for r in results if r["subject"] == "x0" and r["site"] == "A")
    output = Path(result["model_grid_uri"])
    data = output.read_bytes()
    output.unlink()
    first = evaluate(lake, "target-T", 1, config)
    assert first.skipped == {result["scan_id"]: "SCAN-MISSING"}
    output.write_bytes(data)
    second = evaluate(lake, "target-T", 1, config)
    assert second.skipped == {} and second.written
    assert result["scan_id"] in set(Catalog(lake).frame("metrics").scan_id)
    assert not evaluate(lake, "target-T", 1, config).written


def test_a_scan_that_the_store_did_not_give_takes_no_figure_back(tmp_path):
    lake, config = fake_lake(str(tmp_path), perfect)
    catalog = Catalog(lake)

    def subjects() -> list[int]:
        rows = catalog.rows("site_metrics", where={"metric": "psnr", "method": "sgcd"})
        return rows.sort_by("site")["n"].to_pylist()

    evaluate(lake, "target-T", 1, config)
    assert subjects() == [2, 2]
    scan = catalog.rows("metrics", where={"site": "A"})["scan_id"][0].as_py()
    result = catalog.rows("results", where={"scan_id": scan}).to_pylist()[0]
    output = Path(result["model_grid_uri"])
    output.rename(output.with_suffix(".away"))
    before = catalog.version("metrics"), catalog.version("site_metrics")
    missed = evaluate(lake, "target-T", 1, config)
    assert missed.skipped == {scan: "SCAN-MISSING"} and not missed.written
    assert subjects() == [2, 2]
    shutil.rmtree(Path(lake.uri) / "prepared")
    nothing = evaluate(lake, "target-T", 1, config)
    assert nothing.pairs == 0 and "could not be read" in nothing.verdict[0]
    assert (catalog.version("metrics"), catalog.version("site_metrics")) == before


def test_figures_that_no_longer_count_leave_the_tables_and_stay_in_their_history(tmp_path):
    lake, config = fake_lake(str(tmp_path), perfect)
    catalog = Catalog(lake)
    evaluate(lake, "target-T", 1, config, methods=("raw", "nyul"))
    before = catalog.rows("metrics")
    scans = catalog.rows("scans").to_pylist()
    moved = next(s for s in scans if s["split"] == "test" and s["site"] == "A")
    named = [s for s in scans if s["site"] == "B"]
    catalog.append("scans", [
        moved | {"split": "train", "recorded_at": None},
        *(s | {"site": "Bonn", "recorded_at": None} for s in named),
    ])  # fmt: skip
    evaluate(lake, "target-T", 1, config, methods=("raw", "zscore"))
    rows = catalog.query("SELECT DISTINCT scan_id, site, method FROM metrics").to_pylist()
    assert moved["scan_id"] not in {row["scan_id"] for row in rows}
    assert {row["site"] for row in rows} == {"A", "Bonn"}
    assert {row["method"] for row in rows} == {"raw", "zscore", "sgcd"}
    sites = catalog.rows("site_metrics")
    assert set(sites["site"].to_pylist()) == {"A", "Bonn"}
    assert set(sites["method"].to_pylist()) == {"raw", "zscore", "sgcd"}
    every = catalog.history("metrics")
    assert every.num_rows > before.num_rows
    assert every["value"].null_count > 0, "taken back by rows without a number"
    assert {"B", "Bonn"} <= set(catalog.history("site_metrics")["site"].to_pylist())


def test_figures_that_did_not_change_are_not_written_again(tmp_path):
    lake, config = fake_lake(str(tmp_path), perfect)
    catalog = Catalog(lake)
    evaluate(lake, "target-T", 1, config)
    rows = catalog.history("metrics").num_rows
    evaluate(lake, "target-T", 1, config, methods=("raw", "nyul", "zscore"))
    more = catalog.rows("metrics", where={"method": "zscore"}).num_rows
    assert catalog.history("metrics").num_rows == rows + more > rows


def test_subjects_of_two_data_sets_are_two_though_they_have_one_label():
    rows = [
        {"scan_id": f"{dataset}{n}", "dataset": dataset, "subject": f"0{n}", "site": "A",
         "sequence": "T1w", "seen": True, "method": method, "metric": "psnr", "value": value}
        for dataset, value in (("x", 20.0), ("y", 30.0))
        for n in (1, 2)
        for method in ("raw", "sgcd")
    ]  # fmt: skip
    (line,) = summarize(rows).lines
    assert (line.n, line.scans) == (4, 4)
    assert line.by_method["sgcd"].low < 25 < line.by_method["sgcd"].high


def test_the_scan_of_a_replaced_file_is_not_evaluated_any_more(tmp_path):
    lake, config = fake_lake(str(tmp_path), perfect)
    catalog = Catalog(lake)
    scan = next(s for s in catalog.rows("scans").to_pylist()
                if s["split"] == "test" and s["site"] == "A")  # fmt: skip
    scan = {k: v for k, v in scan.items() if k != "recorded_at"}
    catalog.append("scans", [scan | {"status": "failed", "code": "SCAN-REPLACED"}])
    found = evaluate(lake, "target-T", 1, config)
    assert found.pairs == 3
    assert scan["scan_id"] not in set(catalog.frame("metrics").scan_id)


def test_a_store_that_hides_the_targets_scans_changes_no_figure(tmp_path, monkeypatch):
    lake, config = fake_lake(str(tmp_path), perfect)
    catalog = Catalog(lake)
    evaluate(lake, "target-T", 1, config)
    before = catalog.version("metrics"), catalog.version("site_metrics")
    rows = catalog.rows("scans").to_pylist()
    hidden = {s["scan_id"] for s in rows if s["site"] == "T" and s["split"] != "test"}
    real = evaluation.load_prepared

    def load(lake, recipe, scan_id):
        if scan_id in hidden:
            raise StorageError("no answer.", code="STORE-UNREACHABLE")
        return real(lake, recipe, scan_id)

    monkeypatch.setattr(evaluation, "load_prepared", load)
    found = evaluate(lake, "target-T", 1, config)
    assert set(found.skipped) == hidden and not found.written
    assert (catalog.version("metrics"), catalog.version("site_metrics")) == before


def test_what_is_no_number_is_no_figure(tmp_lake: Lake) -> None:
    catalog, version = Catalog(tmp_lake), {"model": "m", "model_version": 1}
    row = version | {
        "scan_id": "s", "site": "A", "sequence": "T1w", "method": "sgcd", "metric": "ap.gmm",
        "reference": "truth",
    }  # fmt: skip
    rows = [row | {"region": "grey matter", "value": 0.5}, row | {"region": "csf", "value": 0.7}]
    site = version | {"site": "A", "sequence": "T1w", "method": "sgcd", "metric": "ap.csf"}
    sites = [site | {"before": math.nan, "after": 0.5, "low": math.nan, "high": 0.6, "n": 2}]

    def record() -> tuple[bool, bool]:
        return (
            record_figures(catalog, "metrics", version, rows, lambda _: True),
            record_figures(catalog, "site_metrics", version, sites, lambda _: True),
        )

    assert record() == (True, True)
    rows[1]["value"] = math.nan  # the reference lacks that tissue now
    assert record() == (True, False)
    assert record() == (False, False)
    found = catalog.query("SELECT avg(value) AS mean, count(*) AS n FROM metrics")
    assert found.to_pylist() == [{"mean": 0.5, "n": 1}]
    (found,) = catalog.rows("site_metrics").to_pylist()
    assert (found["before"], found["after"], found["low"]) == (None, 0.5, None)


def test_the_verdict_names_the_sites_that_the_mean_hides():
    def rows(site, ours, raw):
        return [
            {"scan_id": f"{site}{n}", "subject": f"{n}", "site": site, "sequence": "T1w",
             "seen": True, "metric": "psnr", "method": method, "value": value + n}
            for n in range(2) for method, value in (("sgcd", ours), ("raw", raw))
        ]  # fmt: skip

    mixed = summarize([*rows("A", 30, 20), *rows("B", 25, 26), *rows("C", 30, 20)]).verdict
    assert len(mixed) == 2 and "SGCD is closer than the raw scans on PSNR" in mixed[0]
    assert mixed[1] == (
        "T1w, sites seen in training (2 subjects): taken alone SGCD is NOT closer than the raw "
        "scans at B on PSNR."
    )
    assert len(summarize([*rows("A", 30, 20), *rows("B", 27, 26)]).verdict) == 1
    assert len(summarize(rows("B", 25, 26)).verdict) == 1, "the mean is that site's"
