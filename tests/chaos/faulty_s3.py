"""A reverse proxy before a real S3 server that fails by a seeded plan. For tests.

Whether a request fails depends on the seed, its method, its path and how often that was asked
before, so a plan is the same however many threads ask. A fault is never repeated more than
`in_a_row` times for one path, as no store fails for ever.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

#: Answers that are S3's own words for "not now".
REFUSALS = {
    "503": (503, "ServiceUnavailable"),
    "slow-down": (503, "SlowDown"),
    "429": (429, "TooManyRequests"),
    "500": (500, "InternalError"),
    "expired": (403, "ExpiredToken"),
    "denied": (403, "AccessDenied"),
}
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}
_SIGNED_ANEW = {"authorization", "x-amz-date", "x-amz-content-sha256", "x-amz-security-token"}


@dataclass(frozen=True)
class Plan:
    """Which requests fail, and how.

    Attributes:
        kinds: Of `REFUSALS`, or `reset` (before the server hears of it), `lost` (the server does
            it, the answer is lost), `stall` (silence), `short` (the body breaks off), `wrong`
            (another body of the same length with 200), `garbled` (the upload is damaged on the
            way), `empty` (200 and no body).
        share: Of the requests that `where` admits.
        where: (method, path and query) → whether such a request may fail.
        in_a_row: Most faults for one method and path before it is answered.
    """

    kinds: tuple[str, ...] = ()
    share: float = 0.2
    seed: int = 0
    where: Callable[[str, str], bool] = lambda method, path: True
    in_a_row: int = 3


@dataclass
class FaultyS3:
    """The proxy; a context manager. `plan` may be changed while it runs.

    Attributes:
        upstream: Endpoint of the real server.
        key, secret: Of the real server, for requests with a session token, which are signed anew.
        expired: Session tokens that are answered 403 ExpiredToken.
        faults: How many of each kind were served.
        requests: How many requests came.
    """

    upstream: str
    key: str
    secret: str
    plan: Plan = field(default_factory=Plan)
    expired: set[str] = field(default_factory=set)
    faults: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    stall_seconds: float = 2.5
    on_request: Callable[[str, str], None] = lambda method, path: None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: Counter[tuple[str, str]] = Counter()
        self._row: Counter[tuple[str, str]] = Counter()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyS3:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._server.shutdown()
        self._server.server_close()

    def at_request(
        self, count: int, action: Callable[[], object],
        counts: Callable[[str, str], bool] = lambda method, path: True,
    ) -> threading.Event:  # fmt: skip
        """Do `action` once, when the `count`th request that `counts` begins; says whether it has.

        That request is judged after the action.
        """
        left, reached = iter(range(count - 1)), threading.Event()

        def watch(method: str, path: str) -> None:
            if counts(method, path):
                with self._lock:  # several clients ask at once
                    if next(left, None) is None and not reached.is_set():
                        action()
                        reached.set()

        self.on_request = watch
        return reached

    def at_volume(self, count: int, action: Callable[[], object]) -> None:
        """Do `action` once, when the upload of the `count`th output on a scan's own grid begins."""

        def counts(method: str, path: str) -> bool:
            name = path.split("?")[0].rpartition("/")[2]
            ours = name.endswith("desc-harmonized_T1w.nii.gz") and "space-" not in name
            return method == "PUT" and ours

        self.at_request(count, action, counts)

    def fault(self, method: str, path: str, token: str) -> str | None:
        """The fault of the request that has just come, None for none."""
        self.on_request(method, path)
        with self._lock:
            self.requests += 1
            if token in self.expired:
                self.faults["expired"] += 1
                return "expired"
            plan, key = self.plan, (method, urlsplit(path).path)
            self._asked[key] += 1
            if not plan.kinds or not plan.where(method, path):
                return None
            rng = random.Random(f"{plan.seed}/{method}/{key[1]}/{self._asked[key]}")
            if self._row[key] >= plan.in_a_row or rng.random() >= plan.share:
                self._row[key] = 0
                return None
            self._row[key] += 1
            kind = rng.choice(plan.kinds)
            self.faults[kind] += 1
            return kind


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyS3
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = self.headers.get("x-amz-security-token", "")
        fault = self.owner.fault(self.command, self.path, token)
        if fault in REFUSALS:
            self._answer(*REFUSALS[fault])
        elif fault == "reset":
            self._reset()
        elif fault == "stall":
            time.sleep(self.owner.stall_seconds)
            self._reset()
        else:
            if fault == "garbled" and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            self._forward(body, token, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815

    def _forward(self, body: bytes, token: str, fault: str | None) -> None:
        address = urlsplit(self.owner.upstream)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        if token:
            headers = self._signed_anew(headers, body)
        server = HTTPConnection(address.hostname or "", address.port, timeout=30)
        try:
            server.request(self.command, self.path, body=body, headers=headers)
            answer = server.getresponse()
            data = answer.read()
        finally:
            server.close()
        if fault == "lost":
            self._reset()
            return
        length = answer.headers.get("Content-Length") or "0"
        size = int(length) if self.command == "HEAD" else len(data)
        if answer.status in (200, 206) and self.command == "GET":
            if fault == "wrong" and data:
                middle = len(data) // 2
                data = data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :]
            if fault == "short":
                data = data[: len(data) // 2]
            if fault == "empty":
                data, size = b"", 0
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in _HOP | {"date", "server"}:
                self.send_header(name, value)
        if answer.status != 204:
            self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # the client had enough
                self.wfile.write(data)
        if fault == "short":
            self.close_connection = True

    def _signed_anew(self, headers: dict[str, str], body: bytes) -> dict[str, str]:
        kept = {k: v for k, v in headers.items() if k.lower() not in _SIGNED_ANEW | {"host"}}
        request = AWSRequest(self.command, self.owner.upstream + self.path, kept, body)
        keys = Credentials(self.owner.key, self.owner.secret)
        S3SigV4Auth(keys, "s3", "us-east-1").add_auth(request)
        return dict(request.headers.items())

    def _answer(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>test</Message></Error>"
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        with contextlib.suppress(ConnectionError):  # the client had enough
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text.encode())

    def _reset(self) -> None:
        """Close so that the client sees "connection reset by peer"."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # it was reset
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass


def go_through(proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process's stores through `proxy`, with limits that suit a test."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setenv("SGCD_S3_TIMEOUT_SECONDS", "1")
    monkeypatch.setenv("SGCD_S3_RETRY_SECONDS", "30")


def write_keys(file: Path, token: str) -> None:
    """A credentials file as AWS tools read it, with a session token."""
    keys = "[default]\naws_access_key_id = temporary\naws_secret_access_key = s\n"
    beside = file.with_suffix(".new")
    beside.write_text(f"{keys}aws_session_token = {token}\n")
    beside.replace(file)  # nobody reads half of it


def keys_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> Path:
    """A credentials file with that token, and no keys in the environment; returns the file."""
    file = folder / "credentials"
    write_keys(file, token)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return file
