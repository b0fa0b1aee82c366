"""A small server for one person: GET only, one machine, a secret in the address.

Scans are patients: other users of a shared machine can reach its loopback address, so the first
visit needs the token that `sgcd serve` prints, which then lives in a cookie.
"""

from __future__ import annotations

import errno
import hmac
import logging
import secrets
import socket
import sys
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipelines.lake import Lake
from pipelines.viewer.site import Answer, Site
from sgcd_core.errors import UsageError

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Server(ThreadingHTTPServer):
    """Serves one lake until it is shut down.

    Args:
        lake: Whose reports and scans.
        host: Address to listen on.
        port: Port; 0 for a free one.

    Raises:
        UsageError: The address or port cannot be had.
    """

    daemon_threads = True

    def __init__(self, lake: Lake, host: str = "127.0.0.1", port: int = 0) -> None:
        if not host:
            raise UsageError("--host names no address.", hint="127.0.0.1 is this machine alone.")
        self.site, self.token = Site(lake), secrets.token_urlsafe(24)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            of_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
            raise UsageError(
                f"cannot listen on {host} port {port}: {error.strerror or type(error).__name__}.",
                hint="Choose another one with --port, or 0 for any that is free." if of_port
                else "--host takes a name or an address of this machine.",
            ) from error  # fmt: skip
        self.host = host

    @property
    def address(self) -> str:
        """What to open in a browser; holds the token."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """Name of the cookie; cookies do not tell ports apart."""
        return f"sgcd-{self.server_port}"

    def knows(self, host: str | None) -> bool:
        """Whether a Host header means this server: a foreign name may be a rebound one."""
        if self.host not in LOOPBACK:
            return True
        try:
            return urlsplit(f"//{host or ''}").hostname in LOOPBACK
        except ValueError:  # no host at all
            return False

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing, where a browser went away in the middle of an answer."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            log.exception("event=request_failed")


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "sgcd", ""
    timeout = 60

    def do_GET(self) -> None:
        """Check who asks, then answer."""
        if not self.server.knows(self.headers.get("Host")):
            self._send(_refused(421, "This server goes by another name."))
            return
        address = urlsplit(self.path)
        given = parse_qs(address.query).get("token", [""])[0]
        if given and hmac.compare_digest(given.encode(), self.server.token.encode()):
            # The token leaves the address, so that it is in no history, bookmark or referrer.
            place = "/" + address.path.lstrip("/")  # two slashes would lead to another host
            self._send(Answer(status=303, location=place), new_cookie=True)
        elif not self._is_known():
            text = "Open the address that `sgcd serve` printed: it holds the key to these scans."
            self._send(_refused(403, text))
        else:
            self._send(self.server.site.answer(address.path))

    def _refuse(self) -> None:
        self._send(_refused(405, "Only GET is answered here."), allow=True)
        self.close_connection = True  # a body may follow, unread

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse  # noqa: N815

    def _is_known(self) -> bool:
        try:
            cookies = SimpleCookie(self.headers.get("Cookie", ""))
        except CookieError:
            return False
        found = cookies.get(self.server.cookie)
        value = "" if found is None else found.value
        return hmac.compare_digest(value.encode(), self.server.token.encode())

    def _send(self, answer: Answer, *, new_cookie: bool = False, allow: bool = False) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        if answer.policy:
            self.send_header("Content-Security-Policy", answer.policy)
        if answer.location:
            self.send_header("Location", answer.location)
        if allow:
            self.send_header("Allow", "GET")
        if new_cookie:
            value = f"{self.server.cookie}={self.server.token}"
            self.send_header("Set-Cookie", f"{value}; HttpOnly; SameSite=Strict; Path=/")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        """To the log at debug level, without the query: it may hold the token."""
        log.debug("event=request method=%s path=%s", self.command, urlsplit(self.path).path)


def _refused(status: int, text: str) -> Answer:
    return Answer(text.encode() + b"\n", "text/plain; charset=utf-8", status)
