"""The site is built without a warning, no link is broken, and no page loads from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
#: Attributes by which a page makes a browser fetch something; links that are only followed are not.
LOADS = {
    "script": ("src",), "link": ("href",), "img": ("src", "srcset"), "iframe": ("src",),
    "source": ("src", "srcset"), "video": ("src", "poster"), "audio": ("src",), "embed": ("src",),
    "object": ("data",), "image": ("href", "xlink:href"), "use": ("href", "xlink:href"),
    "input": ("src",), "track": ("src",), "base": ("href",), "form": ("action",),
}  # fmt: skip
ELSEWHERE = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//|^\s*(?:https?|ftp|wss?):", re.I)
IN_CSS = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", re.I)


class Page(HTMLParser):
    """What a page names: ids, links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = [a or b for a, b in IN_CSS.findall(text)]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.ids.add(value or "")
            elif name == "href" and tag == "a":
                self.links.append(value or "")
            elif name in LOADS.get(tag, ()):
                self.loads.append(value or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Its builder gets no way out, so that building needs no network."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html",
         "-d", out / "doctrees", DOCS, out / "html"],
        capture_output=True, text=True, check=False, env=_offline(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out / "html"


def _offline() -> dict[str, str]:
    nowhere = "http://127.0.0.1:9"  # discard: whoever asks gets no answer
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere)
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "HOME", "TMPDIR")}
    return kept | proxies


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_there(site: Path) -> None:
    for source in DOCS.glob("*.md"):
        assert (site / f"{source.stem}.html").is_file()


def test_no_link_is_broken(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages.get(goal)
            lost = known is not None and parts.fragment and parts.fragment not in known.ids
            if not goal.is_file() or lost:
                broken.append(f"{path.relative_to(site)} → {link}")
    assert broken == []
    assert sum(len(page.links) for page in pages.values()) > 100


def test_links_between_pages_hold_on_a_code_host_too() -> None:
    """There a link is a path from the page's own folder."""
    broken = []
    for path in (*DOCS.glob("**/*.md"), DOCS.parent / "README.md"):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if not urlsplit(link).scheme and not (path.parent / unquote(link)).exists():
                broken.append(f"{path.name} → {link}")
    assert broken == []


def test_no_page_loads_anything_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    found = [(path.name, load) for path, page in pages.items() for load in page.loads]
    for sheet in site.rglob("*.css"):
        found += [(sheet.name, a or b) for a, b in IN_CSS.findall(sheet.read_text())]
    assert [one for one in found if ELSEWHERE.match(one[1])] == []
    assert len(found) > 50


def test_the_check_would_find_a_font_of_another_host() -> None:
    page = Page(
        '<link href="//fonts.example.org/x.css"><style>@import "https://x.org/y.css"</style>'
    )
    assert [bool(ELSEWHERE.match(load)) for load in page.loads] == [True, True]
