"""The pages stand alone, say the truth in words, and are written whatever happened."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest
from fake_lake import fake_lake

from pipelines.catalog import Catalog
from pipelines.evaluate import EvaluationSummary, evaluate
from pipelines.lake import Lake
from pipelines.report import Written, charts, write_report
from pipelines.report import pages as report_pages
from pipelines.report import scan as report_scan
from pipelines.run_figures import run_figures
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import StorageError


class Page(HTMLParser):
    """Tags with attributes, and the text a reader sees."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        if tag in ("td", "th", "p", "li", "dt", "dd", "h1", "h2"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data


def read(uri: str) -> Page:
    page = Page(Path(uri).read_text(encoding="utf-8"))
    assert page.open == []
    return page


def beside(written: Written, scan_id: str) -> Page:
    return read(str(Path(written.uri).parent / f"scan-{scan_id}.html"))


#: A grid that the settings left in the lake may have.
GRID = (48, 56, 48)


@dataclass(frozen=True)
class Made:
    """A lake with a report, and what was done to it."""

    lake: Lake
    config: SgcdConfig
    written: Written
    page: Page
    found: EvaluationSummary
    rows: list[dict[str, Any]]


def results(catalog: Catalog) -> list[dict[str, Any]]:
    rows = catalog.rows("results").to_pylist()
    for row in rows:
        del row["recorded_at"]
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    lake, config = fake_lake(
        str(tmp_path_factory.mktemp("my lake")), lambda scan, truth: 0.7 * truth + 0.3 * scan,
        shape=GRID, traveling=1,
    )  # fmt: skip
    catalog = Catalog(lake)
    rows = [r for r in results(catalog) if r["site"] == "A" and r["subject"] != "x0"]
    rows[0] |= {"status": "flagged", "code": "FLAG-ANATOMY", "message": "edges moved",
                "gradient_correlation": 0.5}  # fmt: skip
    empty = dict.fromkeys(("output_uri", "model_grid_uri", "output_sha256"))
    rows[1] |= {"status": "quarantined", "code": "SCAN-QUARANTINED", "message": None} | empty
    catalog.append("results", rows[:2])
    evil = {"site": "<script>alert(1)</script>", "message": "<img src=x onerror=alert(1)>"}
    bad = {"scan_id": "f" * 32, "uri": "/x", "status": "failed", "code": "SCAN-CORRUPT"}
    catalog.append("scans", [bad | evil])
    found = evaluate(lake, "target-T", 1, config, training_sites=["T", "A"])
    written = write_report(lake, "target-T", 1)
    return Made(lake, config, written, read(written.uri), found, rows)


def test_the_verdict_and_the_numbers_are_on_the_page(made: Made) -> None:
    page, verdict = made.page, made.found.verdict
    assert len(verdict) == 4
    for sentence in verdict:
        assert sentence in page.text
    assert "Closer to the truth than the raw scans in" in page.text
    for words in ("A, T1w", "B, T1w", "never seen in training", "SSIM", "PSNR", "Wasserstein"):
        assert words in page.text


def every_page(made: Made) -> list[Page]:
    return [read(str(p)) for p in sorted(Path(made.written.uri).parent.glob("*.html"))]


def test_nothing_is_fetched_and_only_the_pages_own_script_runs(made: Made) -> None:
    for page in every_page(made):
        assert not [t for t, _ in page.tags if t in ("link", "iframe", "object")]
        for tag, attributes in page.tags:
            for name, value in attributes.items():
                assert not name.startswith("on")
                if name == "src" or name == "srcset":
                    assert (value or "").startswith("data:image/webp;base64,")
                if name == "href":
                    assert tag == "a" and re.match(r"#|index\.html$|scan-\w+\.html$", value or "")
        policy = [a for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
        content = policy[0]["content"] or ""
        assert "default-src 'none'" in content and re.search(r"script-src 'sha256-[^']+'$", content)


def test_names_are_shown_as_text_and_not_as_markup(made: Made) -> None:
    assert "<script>alert(1)</script>" in made.page.text
    assert "<img src=x onerror=alert(1)>" in made.page.text
    alone = beside(made.written, "f" * 32)
    assert "<img src=x onerror=alert(1)>" in alone.text and "SCAN-CORRUPT" in alone.text
    source = Path(made.written.uri).read_text()
    assert "<script>alert" not in source  # not in the rows for the script either


def test_flags_and_failures_have_a_code_and_a_reason(made: Made) -> None:
    for words in ("FLAG-ANATOMY", "for example: edges moved", "SCAN-CORRUPT"):
        assert words in made.page.text
    # without a message of its own the code's meaning is given
    assert "SCAN-QUARANTINED This scan ended its worker three times" in made.page.text


def test_every_scan_is_in_the_table_and_has_a_page(made: Made) -> None:
    source = Path(made.written.uri).read_text()
    rows = json.loads(re.search(r'id="rows">(.*?)</script>', source, re.S)[1])  # type: ignore[index]
    scans = Catalog(made.lake).rows("scans").to_pylist()
    assert {row[-1] for row in rows} == {scan["scan_id"][:8] for scan in scans}
    assert made.written.scans == made.written.pages == len(scans) == len(rows)
    for row in rows:
        assert (Path(made.written.uri).parent / row[0]).is_file()
    assert sum(row[5] == "flagged" for row in rows) == 1


def test_histograms_matrices_and_charts_are_drawn(made: Made) -> None:
    charts = [a["aria-label"] or "" for t, a in made.page.tags if t == "svg" and "aria-label" in a]
    for words in ("T1w intensities of A: before, after and at T", "SSIM by site: A: raw"):
        assert any(label.startswith(words) for label in charts), words
    assert "T1w, before" in made.page.text and "T1w, after" in made.page.text


def test_the_run_in_mlflow_gets_the_same_figures_as_files(made: Made) -> None:
    drawn = run_figures(made.lake, made.found)
    assert set(drawn) == {"measures_T1w", "histograms_T1w", "distances_T1w"}
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())


def test_a_scans_page_has_planes_change_guards_and_provenance(made: Made) -> None:
    flagged = made.rows[0]
    page = beside(made.written, flagged["scan_id"])
    alts = [a["alt"] or "" for t, a in page.tags if t == "img"]
    for what in ("Before harmonization", "After harmonization", "Change, after less before"):
        for plane in ("sagittal", "coronal", "axial"):
            assert any(alt.startswith(f"{what}, {plane}") for alt in alts), (what, plane)
    assert not any("Uncertainty" in alt for alt in alts)  # none was drawn
    for words in ("FLAG-ANATOMY", "edges moved", "flagged below 0.75", flagged["output_sha256"],
                  flagged["output_uri"]):  # fmt: skip
        assert words in page.text
    assert "not the one that was written" not in page.text
    quarantined = beside(made.written, made.rows[1]["scan_id"])
    assert "This scan ended its worker three times" in quarantined.text
    alts = [a["alt"] or "" for t, a in quarantined.tags if t == "img"]
    assert len(alts) == 3 and all(alt.startswith("Before") for alt in alts)


def test_a_traveling_subject_is_shown_beside_its_truth(made: Made) -> None:
    scans = Catalog(made.lake).rows("scans").to_pylist()
    traveler = next(s for s in scans if s["subject"] == "x0" and s["site"] == "B")
    page = beside(made.written, traveler["scan_id"])
    assert any((a.get("alt") or "").startswith("The same person") for _, a in page.tags)
    assert "Against the truth" in page.text and "Nyúl" in page.text


def test_the_same_report_again_writes_only_what_changed(made: Made) -> None:
    folder = Path(made.written.uri).parent
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("scan-*.html")}
    again = write_report(made.lake, "target-T", 1)
    assert (again.new, again.pages) == (0, made.written.pages)
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("scan-*.html")} == before
    row = next(r for r in results(Catalog(made.lake)) if r["site"] == "B")
    Catalog(made.lake).append("results", [row | {"status": "flagged", "code": "FLAG-VOLUMES"}])
    third = write_report(made.lake, "target-T", 1)
    assert 1 <= third.new <= 3  # itself, and neighbours that name its status
    assert "FLAG-VOLUMES" in beside(third, row["scan_id"]).text


def test_a_file_that_was_changed_afterwards_is_told(made: Made, tmp_path: Path) -> None:
    row = next(r for r in results(Catalog(made.lake)) if r["site"] == "B")
    Catalog(made.lake).append("results", [row | {"output_sha256": "0" * 64}])
    written = write_report(made.lake, "target-T", 1, out=str(tmp_path), pages="flagged")
    assert "not the one that was written" in beside(written, row["scan_id"]).text


def test_without_pages_the_histograms_are_still_there(made: Made, tmp_path: Path) -> None:
    written = write_report(made.lake, "target-T", 1, out=str(tmp_path / "r"), pages="none")
    assert written.pages == 0
    assert [p.name for p in (tmp_path / "r").glob("*.html")] == ["index.html"]
    assert "T1w intensities of A" in Path(written.uri).read_text()


def test_scans_with_a_page_of_their_own_do_not_stand_for_their_sites(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panels(which: Literal["all", "flagged", "none"], most: int) -> list[str]:
        monkeypatch.setattr(report_pages, "HISTOGRAM_SCANS", most)
        out = str(tmp_path / f"{which}{most}")
        found = Path(write_report(made.lake, "target-T", 1, out=out, pages=which).uri).read_text()
        return re.findall(r"T1w intensities of \w.*?</figure>", found, re.DOTALL)

    assert len(panels("none", 1)) == 2
    for most in (1, 2):
        assert panels("flagged", most) == panels("none", most) != panels("all", most)


def test_a_page_says_what_was_done_and_no_more(made: Made) -> None:
    bad, good = made.rows[1], made.rows[2]
    assert (
        "brought to the look of T by target-T version 1"
        in beside(made.written, good["scan_id"]).text
    )
    failed = beside(made.written, bad["scan_id"]).text
    assert "Scanned at A." in failed and "brought to" not in failed
    own = next(r for r in results(Catalog(made.lake)) if r["site"] == "T" and r["output_uri"])
    assert "Scanned at T, harmonized by target-T" in beside(made.written, own["scan_id"]).text


def test_long_names_of_sites_are_told_apart() -> None:
    names = [f"University_Hospital_{who}" for who in ("A", "B")]
    assert len({charts.shortened(name) for name in names}) == 2
    assert all(len(charts.shortened(name)) == 13 for name in names)
    assert charts.shortened("siteA") == "siteA"


def test_every_picture_is_described_and_the_page_fits_a_phone(made: Made) -> None:
    for page in every_page(made):
        for tag, attributes in page.tags:
            if tag == "img":
                assert len(attributes.get("alt") or "") > 10
        assert ("html", {"lang": "en"}) in page.tags
        assert any("width=device-width" in (a.get("content") or "") for _, a in page.tags)


def test_a_lake_without_results_still_gets_a_page(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    for model, version in (("target-T", 1), (None, None)):
        page = read(write_report(lake, model, version).uri)
        assert "Nothing was harmonized: no scan was indexed yet." in page.text


def test_a_run_in_which_every_scan_failed_gets_a_page(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    row: dict[str, Any] = {
        "scan_id": "s1", "model": "m", "model_version": 2, "target": "T", "site": "A",
        "sequence": "T1w", "status": "failed", "code": "SCAN-NO-BRAIN", "message": "212 ml",
    }  # fmt: skip
    catalog = Catalog(lake)
    catalog.append("results", [row])
    run = {"run_id": "r", "command": "harmonize", "status": "failed",
           "summary": '{"code": "STORE-WRITE"}'}  # fmt: skip
    catalog.append("runs", [run])
    out = str(tmp_path / "elsewhere")
    written = write_report(lake, "m", 2, out=out)
    assert written.uri == f"{out}/index.html"
    page = read(written.uri)
    assert "SCAN-NO-BRAIN" in page.text and "212 ml" in page.text
    assert "No scan was harmonized: all failed" in page.text
    catalog.append("results", [row | {"scan_id": "s2", "status": "ok", "code": None}])
    assert "Nothing was compared yet: run sgcd evaluate" in read(
        write_report(lake, "m", 2, out=out).uri
    ).text.replace("`", "")
    assert "The last sgcd harmonize (–) ended failed: STORE-WRITE Writing to the store" in page.text
    assert "212 ml" in beside(written, "s1").text


def test_a_table_that_cannot_be_read_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    lake, _ = fake_lake(str(tmp_path), lambda scan, truth: truth, sites=("A",), traveling=0)
    log = next(Path(lake.table("results")).glob("_delta_log/*.json"))
    log.write_text("{")
    page = read(write_report(lake, "target-T", 1, pages="none").uri)
    assert "The table results could not be read" in page.text
    assert "not harmonized" in page.text


def test_an_unreadable_scan_is_tried_again(tmp_path: Path) -> None:
    lake, _ = fake_lake(
        str(tmp_path), lambda scan, truth: truth, sites=("A",), traveling=0, shape=GRID
    )
    scan = next(s for s in Catalog(lake).rows("scans").to_pylist() if s["site"] == "A")
    kept = Path(scan["uri"]).read_bytes()
    Path(scan["uri"]).unlink()
    first = write_report(lake, "target-T", 1)
    assert "Not everything could be drawn. [SCAN-MISSING]" in beside(first, scan["scan_id"]).text
    Path(scan["uri"]).write_bytes(kept)
    second = write_report(lake, "target-T", 1)
    assert second.new == 1
    assert "could be drawn" not in beside(second, scan["scan_id"]).text


@pytest.mark.parametrize("which", ["all", "none"])
def test_histograms_that_a_store_did_not_give_are_read_next_time(
    which: report_pages.Which, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, _ = fake_lake(
        str(tmp_path), lambda scan, truth: truth, sites=("A",), traveling=0, shape=GRID
    )

    def down(*_: object) -> None:
        raise StorageError("does not answer.")

    with monkeypatch.context() as patch:
        for module in (report_pages, report_scan):
            patch.setattr(module, "read_histograms", down)
        without = write_report(lake, "target-T", 1, pages=which)
    assert "T1w intensities of A" not in Path(without.uri).read_text()
    found = write_report(lake, "target-T", 1, pages=which)
    assert "T1w intensities of A" in Path(found.uri).read_text()
    assert write_report(lake, "target-T", 1, pages=which).new == 0


def test_an_uncertainty_map_is_drawn(tmp_path: Path) -> None:
    lake, _ = fake_lake(
        str(tmp_path), lambda scan, truth: truth, sites=("A",), traveling=0, shape=GRID
    )
    row = next(r for r in results(Catalog(lake)) if r["site"] == "A")
    more = {"uncertainty_uri": row["output_uri"], "uncertainty_mean": 0.0123}
    Catalog(lake).append("results", [row | more])
    page = beside(write_report(lake, "target-T", 1), row["scan_id"])
    assert any((a.get("alt") or "").startswith("Uncertainty, axial") for _, a in page.tags)
    assert "0.0123" in page.text


def test_the_site_classifier_is_shown_with_chance_beside_it(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path), create=True)
    base = {"model": "m", "model_version": 1, "sequence": "T1w", "metric": "site_f1.mri-dino",
            "before": 0.9, "n": 12}  # fmt: skip
    figures = {"raw": (0.9, 0.85), "sgcd": (0.41, 0.35), "chance": (0.25, 0.25)}
    rows = [
        base | {"method": m, "after": mean, "low": low, "high": 2 * mean - low}
        for m, (mean, low) in figures.items()
    ]
    Catalog(lake).append("site_metrics", rows)
    page = read(write_report(lake, "m", 1).uri)
    assert "T1w mri-dino F1 0.90 ± 0.05 – 0.41 ± 0.06 0.25 –" in page.text
    assert "Not asked yet" not in page.text


def test_a_page_that_was_deleted_is_written_again(made: Made) -> None:
    write_report(made.lake, "target-T", 1)
    gone = Path(made.written.uri).parent / f"scan-{made.rows[2]['scan_id']}.html"
    gone.unlink()
    assert write_report(made.lake, "target-T", 1).new == 1 and gone.is_file()


@pytest.mark.s3
def test_the_whole_way_on_s3(s3_server: Any) -> None:
    from sgcd_core.io.store import Store

    lake, config = fake_lake(
        s3_server.uri("report-lake"), lambda scan, truth: truth * 0.999, sites=("A",),
        shape=GRID, traveling=1,
    )  # fmt: skip
    assert evaluate(lake, "target-T", 1, config).pairs == 1
    written = write_report(lake, "target-T", 1)
    assert written.uri == lake.report("target-T-v1/index.html")
    page = Page(Store().read_bytes(written.uri).decode())
    assert "Closer to the truth than the raw scans in 4 of 4" in page.text
    assert write_report(lake, "target-T", 1).new == 0


def test_a_scan_that_is_not_prepared_yet_is_no_trouble(caplog):
    report_scan.note_unread("a", "SCAN-MISSING")
    assert caplog.records == []
    report_scan.note_unread("a", "STORE-UNREACHABLE")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_command_of_a_scan_s_page_can_be_pasted(made: Made) -> None:
    pages = [page for page in every_page(made) if "sgcd serve" in page.text]
    assert pages and all(f"sgcd serve --lake '{made.lake.uri}'" in page.text for page in pages)
