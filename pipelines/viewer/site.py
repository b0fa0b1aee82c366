"""What the server answers: a page, a picture or a volume for an address, or nothing.

Addresses are matched piece by piece; a piece is a name and never a path, and volumes are named by
the catalog alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from pipelines.lake import Lake
from pipelines.report.render import VIEWER_PLACE, render
from pipelines.report.scan import scan_content, scan_pictures
from pipelines.viewer.volumes import KINDS, Volumes
from sgcd_core.errors import InputError, SgcdError
from sgcd_core.io.store import Store, join

STATIC = Path(__file__).parent / "static"
#: The viewer's library, put here by the build.
LIBRARY = "niivue.js"
_PAGE = re.compile(r"index\.html|scan-[0-9A-Za-z]+\.html")
_REPORT = re.compile(r"(?P<model>.+)-v(?P<version>[0-9]{1,9})")
_ID = re.compile(r"[0-9A-Za-z]{1,64}")
_HTML, _SCRIPT = "text/html; charset=utf-8", "text/javascript; charset=utf-8"
#: The reports bring a stricter policy of their own; the viewer needs its scripts and volumes.
_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self' data:; img-src 'self' data: blob:; "
    "style-src 'unsafe-inline'; font-src data:; worker-src blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Answer:
    """One response.

    Attributes:
        body: Bytes.
        kind: Content type.
        status: HTTP status.
        policy: Content security policy, or None where the page has its own.
        location: Where to go instead.
    """

    body: bytes = b""
    kind: str = _HTML
    status: int = 200
    policy: str | None = None
    location: str | None = None


class Site:
    """The reports and scans of one lake.

    Args:
        lake: Folder or s3:// prefix.
    """

    def __init__(self, lake: Lake) -> None:
        self.lake, self.volumes = lake, Volumes(lake)

    def answer(self, path: str) -> Answer:
        """The response to GET `path`, percent-encoded, without its query."""
        pieces = [unquote(piece) for piece in path.split("/")[1:]]
        if any(not _is_name(piece) for piece in pieces) and pieces != [""]:
            return _nothing()
        try:
            match pieces:
                case [""]:
                    return self._home()
                case ["static", name]:
                    return _static(name)
                case ["reports", report, page] if _PAGE.fullmatch(page):
                    return self._report(report, page)
                case ["view", report, scan_id] if _ID.fullmatch(scan_id):
                    return self._view(report, scan_id)
                case ["volume", report, scan_id, file] if _ID.fullmatch(scan_id):
                    return self._volume(report, scan_id, file)
        except InputError as error:
            return _message(404, str(error))
        except SgcdError as error:
            return _message(502, str(error))
        return _nothing()

    def _home(self) -> Answer:
        """The list of reports; with one report, that one."""
        root = self.lake.report("")
        pieces = (item.uri[len(root) :].strip("/").split("/") for item in Store().list(root))
        found = sorted({p[0] for p in pieces if len(p) == 2 and p[1] == "index.html"})
        addresses = [(name, f"/reports/{quote(name, safe='')}/index.html") for name in found]
        if len(addresses) == 1:
            return Answer(status=302, location=addresses[0][1])
        page = render("home.html", title="Reports", lake=self.lake.uri, reports=addresses)
        return Answer(page)

    def _report(self, report: str, page: str) -> Answer:
        body = Store().read_bytes(join(self.lake.report(report), page))
        scan_id = page.removeprefix("scan-").removesuffix(".html")
        if page != "index.html" and _REPORT.fullmatch(report):
            link = f'<a href="/view/{quote(report, safe="")}/{scan_id}">Open in 3D</a>'
            body = body.replace(VIEWER_PLACE.encode(), link.encode())
        return Answer(body)

    def _view(self, report: str, scan_id: str) -> Answer:
        model, version = _model(report)
        here = quote(report, safe="")
        source = self.volumes.source(model, version)
        row = self.volumes.row(model, version, scan_id)
        installed = (STATIC / LIBRARY).is_file()
        volumes = self.volumes.available(model, version, scan_id) if installed else []
        pictures = {} if installed else scan_pictures(source, row)
        page = render(
            "viewer.html", **scan_content(source, row), **pictures,
            installed=installed, volumes=volumes,
            base=f"/volume/{here}/{scan_id}", back=f"/reports/{here}/scan-{scan_id}.html",
            all_scans=f"/reports/{here}/index.html",
        )  # fmt: skip
        return Answer(page, policy=_POLICY)

    def _volume(self, report: str, scan_id: str, file: str) -> Answer:
        kind = file.removesuffix(".nii.gz")
        if kind not in KINDS or file == kind:
            return _nothing()
        model, version = _model(report)
        return Answer(self.volumes.file(model, version, scan_id, kind), "application/gzip")


def _is_name(piece: str) -> bool:
    """Whether a decoded piece of an address is a name: no path, no hidden file, no control sign."""
    return bool(piece) and not piece.startswith(".") and not re.search(r"[/\\\x00-\x1f\x7f]", piece)


def _model(report: str) -> tuple[str, int]:
    found = _REPORT.fullmatch(report)
    if found is None:
        raise InputError("there is no such report.", code="SCAN-MISSING")
    return found["model"], int(found["version"])


def _static(name: str) -> Answer:
    if name in ("viewer.js", LIBRARY) and (STATIC / name).is_file():
        return Answer((STATIC / name).read_bytes(), _SCRIPT)
    return _nothing()


def _nothing() -> Answer:
    return _message(404, "There is nothing at this address.")


def _message(status: int, text: str) -> Answer:
    return Answer(text.encode() + b"\n", "text/plain; charset=utf-8", status)
