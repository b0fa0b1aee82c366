"""The page stands alone, says the truth in words, and is written whatever happened."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_lake import fake_lake

from pipelines.catalog import Catalog
from pipelines.evaluate import evaluate
from pipelines.lake import Lake
from pipelines.report import write_report


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
        if tag not in ("img", "meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        if tag in ("td", "th", "p", "li", "dt", "dd", "h1", "h2"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(uri: str) -> Page:
    page = Page(Path(uri).read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, list[str]]:
    lake, config = fake_lake(
        str(tmp_path_factory.mktemp("lake")), lambda scan, truth: 0.7 * truth + 0.3 * scan
    )
    catalog = Catalog(lake)
    rows = catalog.rows("results").to_pylist()
    for row in rows:
        del row["recorded_at"]
    rows[0] |= {"status": "flagged", "code": "FLAG-ANATOMY", "message": "edges moved"}
    rows[1] |= {"status": "quarantined", "code": "SCAN-QUARANTINED", "message": None}
    catalog.append("results", rows[:2])
    evil = {"site": "<script>alert(1)</script>", "message": "<img src=x onerror=alert(1)>"}
    bad = {"scan_id": "f" * 32, "uri": "/x", "status": "failed", "code": "SCAN-CORRUPT"}
    catalog.append("scans", [bad | evil])
    found = evaluate(lake, "target-T", 1, config, training_sites=["T", "A"])
    return read(write_report(lake, "target-T", 1)), found.verdict


def test_the_verdict_and_the_numbers_are_on_the_page(made: tuple[Page, list[str]]) -> None:
    page, verdict = made
    assert len(verdict) == 4
    for sentence in verdict:
        assert sentence in page.text
    assert "Closer to the truth than the raw scans in" in page.text
    for words in ("A, T1w", "B, T1w", "never seen in training", "SSIM", "PSNR", "Wasserstein"):
        assert words in page.text


def test_nothing_is_fetched_and_nothing_runs(made: tuple[Page, list[str]]) -> None:
    page, _ = made
    assert not [t for t, _ in page.tags if t in ("script", "link", "iframe", "object", "form")]
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset"):
                assert (value or "").startswith("data:image/png;base64,")
    policy = [a for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in (policy[0]["content"] or "")


def test_names_are_shown_as_text_and_not_as_markup(made: tuple[Page, list[str]]) -> None:
    page, _ = made
    assert "<script>alert(1)</script>" in page.text
    assert "<img src=x onerror=alert(1)>" in page.text


def test_flags_and_failures_have_a_code_and_a_reason(made: tuple[Page, list[str]]) -> None:
    page, _ = made
    for words in ("FLAG-ANATOMY edges moved", "SCAN-CORRUPT"):
        assert words in page.text
    # without a message of its own the code's meaning is given
    assert "SCAN-QUARANTINED This scan ended its worker three times" in page.text


def test_every_picture_is_described_and_the_page_fits_a_phone(
    made: tuple[Page, list[str]],
) -> None:
    page, _ = made
    pictures = [a for t, a in page.tags if t == "img"]
    assert len(pictures) >= 8
    assert all(len(a.get("alt") or "") > 10 for a in pictures)
    assert ("html", {"lang": "en"}) in page.tags
    assert any("width=device-width" in (a.get("content") or "") for _, a in page.tags)


def test_a_lake_without_results_still_gets_a_page(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    page = read(write_report(lake, "target-T", 1))
    assert "Nothing was harmonized: no scan was indexed yet." in page.text


def test_a_run_in_which_every_scan_failed_gets_a_page(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    row: dict[str, Any] = {
        "scan_id": "s1", "model": "m", "model_version": 2, "target": "T", "site": "A",
        "sequence": "T1w", "status": "failed", "code": "SCAN-NO-BRAIN", "message": "212 ml",
    }  # fmt: skip
    Catalog(lake).append("results", [row])
    out = str(tmp_path / "elsewhere" / "page.html")
    assert write_report(lake, "m", 2, out=out) == out
    page = read(out)
    assert "SCAN-NO-BRAIN 212 ml" in page.text
    assert "No scan has a truth to compare with" in page.text


@pytest.mark.s3
def test_the_whole_way_on_s3(s3_server: Any) -> None:
    from sgcd_core.io.store import Store

    lake, config = fake_lake(
        s3_server.uri("report-lake"), lambda scan, truth: truth * 0.999, sites=("A",)
    )
    assert evaluate(lake, "target-T", 1, config).pairs == 2
    uri = write_report(lake, "target-T", 1)
    assert uri == lake.report("target-T-v1.html")
    page = Page(Store().read_bytes(uri).decode())
    assert "Closer to the truth than the raw scans in 4 of 4" in page.text
