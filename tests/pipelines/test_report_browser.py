"""The pages in headless Chromium: as a reader sees and operates them."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fake_lake import fake_lake
from PIL import Image
from playwright.sync_api import expect

from pipelines.catalog import Catalog
from pipelines.evaluate import evaluate
from pipelines.lake import Lake
from pipelines.report import write_report
from pipelines.report.cohort import cohort_content
from pipelines.report.render import render
from pipelines.report.source import Source
from pipelines.report.state import ScanPage
from pipelines.schemas import RESULTS, SCANS
from pipelines.viewer.server import Server
from pipelines.viewer.site import LIBRARY, STATIC

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = pytest.mark.browser


@contextmanager
def opened(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """A page that may say nothing in the console and ask for nothing elsewhere."""
    context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **options})
    page = context.new_page()
    page.set_default_timeout(60_000)
    said: list[str] = []
    page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert said == []
    own = address.split("/")[2] if address.startswith("http") else ""
    for url in asked:
        assert url.startswith(("data:", "blob:", f"http://{own}/" if own else "file:")), url


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    made, config = fake_lake(
        str(tmp_path_factory.mktemp("lake")), lambda scan, truth: 0.7 * truth + 0.3 * scan,
        traveling=1, shape=(48, 56, 48),
    )  # fmt: skip
    rows = Catalog(made).rows("results").to_pylist()
    row = next(r for r in rows if r["subject"] == "x0" and r["site"] == "A")
    del row["recorded_at"]
    flag = {"status": "flagged", "code": "FLAG-ANATOMY", "message": "edges moved",
            "gradient_correlation": 0.7, "volume_drift": 0.04, "outlier_score": 1.0,
            "uncertainty_uri": row["output_uri"], "uncertainty_mean": 0.01}  # fmt: skip
    Catalog(made).append("results", [row | flag])
    evaluate(made, "target-T", 1, config, training_sites=["T", "A"])
    write_report(made, "target-T", 1)
    return made


@pytest.fixture(scope="module")
def scan_id(lake: Lake) -> str:
    """A flagged scan with a truth and an uncertainty map."""
    rows = Catalog(lake).rows("results").to_pylist()
    return str(next(r["scan_id"] for r in rows if r["status"] == "flagged"))


def address(lake: Lake, page: str = "index.html") -> str:
    return Path(lake.report(f"target-T-v1/{page}")).as_uri()


def many_scans(count: int, with_pages: bool = True) -> bytes:
    """The cohort's page of so many scans, from rows alone."""
    rng = np.random.default_rng(0)
    scans, results = [], {}
    for n in range(count):
        scan: dict[str, Any] = dict.fromkeys(c.name for c in SCANS.columns)
        result: dict[str, Any] = dict.fromkeys(c.name for c in RESULTS.columns)
        known = {"scan_id": f"{n:032x}", "dataset": "big", "subject": f"{n:04}",
                 "site": f"site{n % 25:02}", "sequence": ("T1w", "T2w")[n % 2]}  # fmt: skip
        scans.append(scan | known | {"status": "ok", "uri": f"s3://bucket/{n}.nii.gz"})
        status = "failed" if n % 100 == 7 else "ok"
        code = "SCAN-NO-BRAIN" if status == "failed" else None
        scores = {"gradient_correlation": float(rng.uniform(0.7, 1)), "outlier_score": 1.0}
        results[known["scan_id"]] = result | known | scores | {"status": status, "code": code}
    source = Source(Lake("s3://bucket/lake"), "target-T", 1, "T", scans, results)
    paged = scans if with_pages else []
    pages = {s["scan_id"]: ScanPage(f"scan-{s['scan_id']}.html", "") for s in paged}
    return render("cohort.html", "cohort.js", **cohort_content(source, pages))


def overflow(page: Page) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


def violations(page: Page) -> list[str]:
    """What axe-core finds wrong by WCAG 2.2 A and AA, contrast included."""
    from axe_playwright_python.sync_playwright import Axe

    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    # Styles and scripts of others are refused by the page's own policy; this one is only a probe.
    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": tags}})
    assert "color-contrast" in {rule["id"] for rule in found.response["passes"]}
    return [
        f"{v['id']}: {node['html'][:120]} {node['failureSummary'][:200]}"
        for v in found.response["violations"]
        for node in v["nodes"]
    ]


def test_the_cohort_page_draws_its_figures_and_says_nothing(browser: Browser, lake: Lake) -> None:
    with opened(browser, address(lake)) as page:
        assert page.locator(".panels svg").count() >= 6  # four measures, two histograms
        for chart in page.locator(".panels svg").all():
            box = chart.bounding_box()
            assert box is not None and box["width"] > 100 and box["height"] > 40
        broken = page.evaluate("[...document.images].filter(i => !i.naturalWidth).length")
        assert broken == 0 and page.locator("img").count() >= 6
        assert overflow(page) <= 0


def test_the_table_filters_sorts_and_leads_to_the_scan(
    browser: Browser, lake: Lake, scan_id: str
) -> None:
    with opened(browser, address(lake)) as page:
        rows = page.locator("#table tbody tr")
        everything = rows.count()
        page.get_by_label("Status").select_option("flagged")
        assert rows.count() == 1 and page.locator("#count").inner_text().startswith("1 of ")
        page.get_by_role("button", name="Clear").click()
        expect(rows).to_have_count(everything)
        page.get_by_label("Search").fill("x0 T1w")
        assert 0 < rows.count() < everything
        page.get_by_label("Search").fill(scan_id)
        assert rows.count() == 1
        for word in ("html", scan_id[9:]):  # of addresses, which are not shown
            page.get_by_label("Search").fill(word)
            assert rows.count() == 0
        page.get_by_label("Search").fill("no such scan")
        assert rows.count() == 0
        page.get_by_role("button", name="Clear").click()
        page.get_by_role("button", name="List the scans with FLAG-ANATOMY").click()
        expect(rows).to_have_count(1)
        page.get_by_role("button", name="Clear").click()
        page.get_by_role("button", name="Subject").click()
        assert page.locator("th[aria-sort=ascending]").inner_text().startswith("Subject")
        first = rows.first.inner_text()
        page.get_by_role("button", name="Subject").focus()
        page.keyboard.press("Enter")
        assert page.locator("th[aria-sort=descending]").count() == 1
        assert rows.first.inner_text() != first
        page.get_by_label("Status").select_option("flagged")
        rows.first.locator("a").click()
        page.wait_for_url(f"**/scan-{scan_id}.html")


def test_slider_and_flicker_lay_after_over_before(
    browser: Browser, lake: Lake, scan_id: str
) -> None:
    with opened(browser, address(lake, f"scan-{scan_id}.html")) as page:
        over = page.locator(".compare .after").first
        clip = "e => getComputedStyle(e).clipPath"
        slider = page.locator("#slider")
        slider.focus()
        assert over.evaluate(clip) == "inset(0px 0px 0px 50%)"
        for _ in range(10):
            page.keyboard.press("ArrowLeft")
        assert over.evaluate(clip) == "inset(0px 0px 0px 40%)"
        tags = [page.locator(".compare .tag").nth(n) for n in (0, 1)]
        for key, part, seen in (("End", "100%", [True, False]), ("Home", "0%", [False, True])):
            page.keyboard.press(key)
            assert over.evaluate(clip) == f"inset(0px 0px 0px {part})"  # one of the two, whole
            assert [tag.is_visible() for tag in tags] == seen
        page.get_by_role("button", name="Flicker").press("Enter")
        assert over.evaluate("e => getComputedStyle(e).animationName") == "flicker"
        shown = "() => [...document.querySelectorAll('.compare .tag')].map(e => getComputedStyle(e)"
        for _ in range(10):  # what is on the screen has its name there, the other has not
            assert sorted(page.evaluate(shown + ".visibility)")) == ["hidden", "visible"]
            page.wait_for_timeout(150)
        page.get_by_role("button", name="Flicker").press("Enter")
        assert over.evaluate("e => getComputedStyle(e).animationName") == "none"
        page.locator(".compare .planes").hover()
        assert over.evaluate("e => getComputedStyle(e).animationName") == "flicker"
        assert page.get_by_text("Uncertainty, standard deviation over seeds").is_visible()
        assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")


def test_without_motion_nothing_flickers(browser: Browser, lake: Lake, scan_id: str) -> None:
    place = address(lake, f"scan-{scan_id}.html")
    with opened(browser, place, reduced_motion="reduce") as page:
        page.locator(".compare .planes").hover()
        over = page.locator(".compare .after").first
        assert over.evaluate("e => getComputedStyle(e).animationName") == "none"
        assert not page.get_by_role("button", name="Flicker").is_visible()
        assert "flicker" not in page.locator("main").inner_text()


def test_back_leads_to_the_rows_that_the_filters_say(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_bytes(many_scans(120))
    (tmp_path / "other.html").write_text("<title>other</title>")
    with opened(browser, (tmp_path / "index.html").as_uri()) as page:
        page.locator("#sequence").select_option("T2w")
        assert page.locator("#count").inner_text() == "60 of 120 scans"
        page.get_by_role("button", name="Next").press("Enter")
        assert page.locator("#where").inner_text() == "page 2 of 2"
        # the end of the pages costs nobody the place
        assert page.evaluate("document.activeElement.id") == "forth"
        page.keyboard.press("Enter")
        assert page.locator("#where").inner_text() == "page 2 of 2"
        page.goto((tmp_path / "other.html").as_uri())
        page.go_back()
        chosen = page.locator("#sequence").input_value()
        expect(page.locator("#count")).to_have_text(f"{60 if chosen else 120} of 120 scans")


def test_scans_are_turned_over_by_keyboard(browser: Browser, lake: Lake, scan_id: str) -> None:
    with opened(browser, address(lake, f"scan-{scan_id}.html")) as page:
        to = page.locator("a[rel=prev]").get_attribute("href")
        page.evaluate("getSelection().selectAllChildren(document.querySelector('dd'))")
        page.keyboard.press("Shift+ArrowLeft")  # a selection is changed by it
        assert page.url.endswith(f"scan-{scan_id}.html")
        page.evaluate("getSelection().empty()")
        page.keyboard.press("Shift+ArrowLeft")
        page.wait_for_url(f"**/{to}")
        page.keyboard.press("Shift+ArrowRight")
        page.wait_for_url(f"**/scan-{scan_id}.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_are_accessible(browser: Browser, lake: Lake, scan_id: str, scheme: str) -> None:
    for name in ("index.html", f"scan-{scan_id}.html"):
        # axe-core is put in by the test; the page's policy lets in no script but its own.
        with opened(browser, address(lake, name), color_scheme=scheme, bypass_csp=True) as page:
            assert violations(page) == []


def test_the_pages_fit_a_phone(browser: Browser, lake: Lake, scan_id: str) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    for name in ("index.html", f"scan-{scan_id}.html"):
        with opened(browser, address(lake, name), **phone) as page:
            assert overflow(page) <= 0


def test_a_page_prints(browser: Browser, lake: Lake, scan_id: str) -> None:
    with opened(browser, address(lake, f"scan-{scan_id}.html")) as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert not page.locator(".controls").first.is_visible()
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb(255, 255, 255)"
        assert page.pdf(format="A4")[:4] == b"%PDF"


def test_all_scans_are_printed_and_found_by_their_whole_id(
    browser: Browser, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_bytes(many_scans(120, with_pages=False))
    with opened(browser, (tmp_path / "index.html").as_uri()) as page:
        shown = page.locator("#table tbody tr")
        assert shown.count() == 50
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert shown.count() == 120
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert shown.count() == 50
        page.locator("#search").fill("f" * 32)
        assert page.locator("#count").inner_text() == "0 of 120 scans"
        page.locator("#search").fill(f"{7:032x}")  # the first digits are known of a scan
        assert page.locator("#count").inner_text() == "120 of 120 scans"


def test_two_thousand_scans_are_there_in_two_seconds(browser: Browser, tmp_path: Path) -> None:
    body = many_scans(2000)
    assert len(body) < 1_000_000
    (tmp_path / "index.html").write_bytes(body)
    with opened(browser, (tmp_path / "index.html").as_uri()) as page:
        assert page.locator("#count").inner_text() == "2000 of 2000 scans"
        ready = page.evaluate("performance.getEntriesByType('navigation')[0].domComplete")
        assert ready < 2000
        filtering = page.evaluate("""() => {
            const start = performance.now(), search = document.getElementById("search");
            search.value = "site07 failed";
            search.dispatchEvent(new Event("input"));
            document.body.getBoundingClientRect();
            return performance.now() - start;
        }""")
        assert filtering < 500
        assert page.locator("#count").inner_text() == "20 of 2000 scans"
        assert page.locator("#table tbody tr").count() == 20
        page.get_by_role("button", name="Clear").click()
        expect(page.locator("#where")).to_have_text("page 1 of 40")
        page.get_by_role("button", name="Next").click()
        assert page.locator("#where").inner_text() == "page 2 of 40"


def bright(page: Page, canvas: str) -> float:
    """Share of a canvas that shows tissue."""
    picture = Image.open(io.BytesIO(page.locator(f"#{canvas}").screenshot())).convert("L")
    return float((np.asarray(picture) > 60).mean())


def test_before_and_after_move_together_in_three_dimensions(
    browser: Browser, lake: Lake, scan_id: str
) -> None:
    if not (STATIC / LIBRARY).is_file():
        reason = "built without the 3D viewer: npm was not there"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with Server(lake) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with opened(browser, server.address) as page:
            page.wait_for_url("**/index.html")
            page.goto(page.url.replace("index", f"scan-{scan_id}"))
            page.get_by_role("link", name="Open in 3D").click()
            page.locator("#viewer[data-ready=yes]").wait_for()
            place = "id => document.getElementById(id).textContent.split(' mm')[0]"
            assert violations(page) == []
            assert bright(page, "left") > 0.02 and bright(page, "right") > 0.02
            first = page.evaluate(place, "at-left")
            assert first and first == page.evaluate(place, "at-right")
            page.locator("#left").hover(position={"x": 60, "y": 60})
            page.mouse.wheel(0, 200)
            expect(page.locator("#at-left")).not_to_contain_text(first)
            second = page.evaluate(place, "at-left")
            assert second == page.evaluate(place, "at-right")
            page.locator("[data-axis='2']").focus()
            page.keyboard.press("Home")
            third = page.evaluate(place, "at-right")
            assert third not in (first, second) and third == page.evaluate(place, "at-left")
            page.get_by_role("button", name="Show the change").click()
            page.locator("#viewer[data-overlay=change]").wait_for()
            page.get_by_role("button", name="Axial").click()
            page.locator("[data-axis='2']").fill("500")
            after = page.evaluate("document.getElementById('at-right').textContent")
            held: list[Route] = []
            page.route("**/truth.nii.gz", lambda route: held.append(route))
            with page.expect_request("**/truth.nii.gz"):
                page.get_by_label("Volume on the right").select_option("truth")
            expect(page.locator("#viewer")).to_have_attribute("aria-busy", "true")
            for _ in range(600):  # its handler may run a moment later
                if not held:
                    page.wait_for_timeout(100)
            held[0].continue_()
            expect(page.locator("#viewer")).not_to_have_attribute("aria-busy", "true")
            expect(page.locator("#at-right")).not_to_have_text(after)  # nobody moved
            assert "Same person" in str(page.locator("#right").get_attribute("aria-label"))
            page.locator("#left").press("v")  # a key of the library's, for one side alone
            page.get_by_role("button", name="3D").click()
            assert page.get_by_role("button", name="3D").get_attribute("aria-pressed") == "true"
            assert not page.locator("#trouble").is_visible()
        server.shutdown()


def test_a_volume_that_cannot_be_had_is_not_shown_as_another(
    browser: Browser, lake: Lake, scan_id: str
) -> None:
    if not (STATIC / LIBRARY).is_file():
        pytest.skip("built without the 3D viewer: npm was not there")
    with Server(lake) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(server.address)
        page.goto(page.url.replace("/index.html", f"/scan-{scan_id}.html"))
        page.get_by_role("link", name="Open in 3D").click()
        page.locator("#viewer[data-ready=yes]").wait_for()
        page.route("**/truth.nii.gz", lambda route: route.abort())
        page.get_by_label("Volume on the right").select_option("truth")
        expect(page.locator("#trouble")).to_contain_text("could not be loaded")
        assert not page.locator("#viewer").is_visible()
        page.close()
        server.shutdown()
