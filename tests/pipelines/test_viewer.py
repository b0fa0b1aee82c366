"""`sgcd serve`: one person, one lake, GET, and nothing that the catalog does not name."""

from __future__ import annotations

import http.client
import shutil
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_lake import fake_lake

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.report import write_report
from pipelines.viewer import site
from pipelines.viewer.server import Server
from pipelines.viewer.volumes import Volumes
from sgcd_core.errors import InputError, UsageError
from sgcd_core.io.nifti import decode_nifti, read_nifti

Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def serving(lake: Lake, host: str = "127.0.0.1") -> Iterator[Server]:
    with Server(lake, host) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> Answer:
    """One request with the cookie, sent as it stands: http.client normalises no path."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    sent = {"Cookie": f"{server.cookie}={server.token}"} | headers
    connection.request(method, path, headers=sent)
    response = connection.getresponse()
    found = (response.status, dict(response.getheaders()), response.read())
    connection.close()
    return found


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    made, _ = fake_lake(
        str(tmp_path_factory.mktemp("lake")), lambda scan, truth: 0.5 * truth + 0.5 * scan,
        sites=("A",), traveling=1, shape=(48, 56, 48),
    )  # fmt: skip
    write_report(made, "target-T", 1)
    return made


@pytest.fixture(scope="module")
def server(lake: Lake) -> Iterator[Server]:
    with serving(lake) as running:
        yield running


def scan_of(lake: Lake, subject: str, site_name: str = "A") -> dict[str, Any]:
    rows = Catalog(lake).rows("results").to_pylist()
    return next(r for r in rows if r["subject"] == subject and r["site"] == site_name)


def test_without_the_token_nothing_is_shown(server: Server, lake: Lake) -> None:
    scan_id = scan_of(lake, "A0")["scan_id"]
    paths = ("/", "/reports/target-T-v1/index.html", f"/volume/target-T-v1/{scan_id}/after.nii.gz")
    for path in paths:
        for cookie in ("", f"{server.cookie}=wrong", "sgcd=;;,", f"{server.cookie}=ä"):
            status, _, body = ask(server, path, Cookie=cookie.encode().decode("latin-1"))
            assert status == 403 and b"sgcd serve" in body
    assert ask(server, "/?token=wrong", Cookie="")[0] == 403


def test_the_printed_address_gives_a_cookie_and_hides_the_token(server: Server) -> None:
    path = server.address.partition(str(server.server_port))[2]
    status, headers, _ = ask(server, path, Cookie="")
    assert (status, headers["Location"]) == (303, "/")
    assert "HttpOnly" in headers["Set-Cookie"] and "SameSite=Strict" in headers["Set-Cookie"]
    cookie = headers["Set-Cookie"].partition(";")[0]
    status, headers, _ = ask(server, "/", Cookie=cookie)
    assert (status, headers["Location"]) == (302, "/reports/target-T-v1/index.html")
    status, headers, _ = ask(server, f"//elsewhere/?token={server.token}", Cookie="")
    assert headers["Location"] == "/elsewhere/"  # not another host


def test_a_foreign_host_name_is_refused(server: Server) -> None:
    assert ask(server, "/", Host="evil.example")[0] == 421
    assert ask(server, "/", Host=f"localhost:{server.server_port}")[0] == 302


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_get_is_answered(server: Server, method: str) -> None:
    status, headers, _ = ask(server, "/", method)
    assert (status, headers["Allow"]) == (405, "GET")


def test_the_reports_are_shown_with_a_way_to_the_viewer(server: Server, lake: Lake) -> None:
    scan_id = scan_of(lake, "A0")["scan_id"]
    status, headers, body = ask(server, f"/reports/target-T-v1/scan-{scan_id}.html")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert f'href="/view/target-T-v1/{scan_id}"'.encode() in body
    assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
    stored = Path(lake.report(f"target-T-v1/scan-{scan_id}.html")).read_bytes()
    assert b"/view/" not in stored


def test_no_path_leads_out_of_the_reports(server: Server, lake: Lake, tmp_path: Path) -> None:
    (Path(lake.uri) / "reports" / "secret.txt").write_text("secret")
    (Path(lake.uri) / "index.html").write_text("secret")
    scan_id = scan_of(lake, "A0")["scan_id"]
    paths = [
        "/reports/../index.html", "/reports/%2e%2e/index.html", "/reports/..%2f../index.html",
        "/reports/%2e%2e%2findex.html", "/reports/target-T-v1/../secret.txt",
        "/reports/target-T-v1/..%2fsecret.txt", "/reports/secret.txt", "/reports/./index.html",
        "/reports//index.html", "/reports/target-T-v1/pages.json", "/reports/target-T-v1/",
        "/reports/target-T-v1%00/index.html", "/reports/..%5c/index.html", "/static/../site.py",
        "/static/%2e%2e%2fsite.py", "/static/niivue-LICENSE.txt", "/static/", "//etc/passwd",
        "/etc/passwd", "/catalog/scans", "/sgcd-lake.json", "reports", "/reports", "/view/x/y",
        f"/volume/target-T-v1/{scan_id}/image.nii.gz", f"/volume/target-T-v1/{scan_id}/after",
        f"/volume/target-T-v1/..%2f{scan_id}/after.nii.gz", "/volume/target-T-v1/a/before.nii.gz",
        f"/volume/..-v1/{scan_id}/before.nii.gz", f"/volume/none/{scan_id}/before.nii.gz",
        f"/volume/target-T-v99999999999/{scan_id}/before.nii.gz",
    ]  # fmt: skip
    for path in paths:
        status, _, body = ask(server, path)
        assert status in (400, 404, 502), path
        assert b"secret" not in body and b"root:" not in body, path


def test_before_and_after_are_the_scans_own_voxels_on_one_scale(server: Server, lake: Lake) -> None:
    row = scan_of(lake, "A0")
    base = f"/volume/target-T-v1/{row['scan_id']}"
    found = {}
    for kind in ("before", "after", "change"):
        status, _, body = ask(server, f"{base}/{kind}.nii.gz")
        assert status == 200
        found[kind] = decode_nifti(body, where=kind, max_inflated=10**8)
    output = read_nifti(row["output_uri"])
    assert np.array_equal(found["after"].data, output.data)
    assert np.array_equal(found["after"].affine, output.affine)
    difference = found["after"].data - found["before"].data
    assert np.abs(found["change"].data - difference).max() < 1e-6 < np.abs(difference).max()
    assert ask(server, f"{base}/uncertainty.nii.gz")[0] == 404  # none was drawn


def test_the_truth_is_there_for_a_traveling_subject_alone(lake: Lake) -> None:
    volumes = Volumes(lake)
    traveler, other = scan_of(lake, "x0"), scan_of(lake, "A0")
    assert volumes.available("target-T", 1, traveler["scan_id"])[-1] == "truth"
    truth = decode_nifti(
        volumes.file("target-T", 1, traveler["scan_id"], "truth"), where="t", max_inflated=10**8
    )
    own = read_nifti(scan_of(lake, "x0", "T")["output_uri"])
    assert np.corrcoef(truth.data[own.data > 0], own.data[own.data > 0])[0, 1] > 0.9
    with pytest.raises(InputError) as error:
        volumes.file("target-T", 1, other["scan_id"], "truth")
    assert error.value.code == "SCAN-MISSING"


def test_a_result_made_anew_is_shown_after_a_while(lake: Lake) -> None:
    now = 0.0
    volumes = Volumes(lake, clock=lambda: now)
    row = scan_of(lake, "A1")
    first = volumes.file("target-T", 1, row["scan_id"], "after")
    kept = Path(row["output_uri"]).read_bytes()
    shutil.copy(scan_of(lake, "A2")["output_uri"], row["output_uri"])
    try:
        assert volumes.file("target-T", 1, row["scan_id"], "after") == first
        now = 60.0
        assert volumes.file("target-T", 1, row["scan_id"], "after") != first
    finally:
        Path(row["output_uri"]).write_bytes(kept)


def test_without_the_library_the_page_says_so_and_shows_slices(
    server: Server, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "LIBRARY", "absent.js")
    status, headers, body = ask(server, f"/view/target-T-v1/{scan_of(lake, 'A0')['scan_id']}")
    assert status == 200 and "script-src 'self'" in headers["Content-Security-Policy"]
    assert b"not part of this installation" in body and b"<script" not in body
    assert body.count(b"data:image/webp") == 9  # before, after, change


def test_several_reports_are_listed(lake: Lake, tmp_path: Path) -> None:
    shutil.copytree(lake.uri, tmp_path / "lake")
    other = Lake(str(tmp_path / "lake"))
    folder = Path(other.report("a <b>-v2"))
    folder.mkdir()
    (folder / "index.html").write_text("the other")
    found = site.Site(other).answer("/")
    assert (
        b'href="/reports/a%20%3Cb%3E-v2/index.html"' in found.body and b"target-T-v1" in found.body
    )
    assert site.Site(other).answer("/reports/a%20%3Cb%3E-v2/index.html").body == b"the other"
    shutil.rmtree(tmp_path / "lake" / "reports")
    assert b"There is none yet" in site.Site(other).answer("/").body


def test_a_port_that_is_taken_is_a_usage_error(server: Server, lake: Lake) -> None:
    with pytest.raises(UsageError, match="--port"):
        Server(lake, port=server.server_port)


def test_an_address_that_is_none_of_this_machine_says_so(lake: Lake) -> None:
    for host, says in (("", "--host"), ("no-such-host.invalid", "--host")):
        with pytest.raises(UsageError, match=says) as error:
            Server(lake, host)
        assert "--port" not in str(error.value)


def test_the_other_protocol_is_served(lake: Lake) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with serving(lake, "::1") as server:
        assert server.address.startswith(f"http://[::1]:{server.server_port}/?token=")
        with pytest.raises(urllib.error.HTTPError) as refused:  # urllib keeps no cookie
            urllib.request.urlopen(server.address)
        assert refused.value.code == 403 and b"sgcd serve" in refused.value.read()


def test_a_visitor_that_goes_away_leaves_no_traceback(
    server: Server, lake: Lake, capfd: pytest.CaptureFixture[str]
) -> None:
    scan_id = scan_of(lake, "A0")["scan_id"]
    path = f"/volume/target-T-v1/{scan_id}/after.nii.gz"
    key = f"Cookie: {server.cookie}={server.token}"
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{key}\r\n\r\n"
    for _ in range(4):
        visitor = socket.create_connection(("127.0.0.1", server.server_port))
        visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        visitor.sendall(head.encode())
        visitor.close()  # with a reset
    assert ask(server, path)[0] == 200
    assert ask(server, "/", Host="[::1")[0] == 421
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.s3
def test_a_lake_in_a_bucket_is_served(s3_server: Any) -> None:
    lake, _ = fake_lake(
        s3_server.uri("viewer-lake"), lambda scan, truth: truth, sites=("A",), traveling=0,
        shape=(48, 56, 48),
    )  # fmt: skip
    write_report(lake, "target-T", 1, pages="none")
    with serving(lake) as server:
        assert ask(server, "/")[0] == 302
        assert b"target-T version 1" in ask(server, "/reports/target-T-v1/index.html")[2]
        scan_id = scan_of(lake, "A0")["scan_id"]
        status, _, body = ask(server, f"/volume/target-T-v1/{scan_id}/after.nii.gz")
        assert status == 200
        assert decode_nifti(body, where="s3", max_inflated=10**8).shape == (48, 56, 48)
