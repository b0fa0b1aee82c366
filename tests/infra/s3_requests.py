"""What a program asks of S3, seen on the wire, in a policy's words; and what a policy allows."""

from __future__ import annotations

import fnmatch
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Asked:
    """One right that was needed: an action on a bucket or object, listing with its prefix.

    `prefix` is None where the request has no such thing. AWS answers 404 for an object that is
    not there only to those who may list the bucket, so such an answer needs that right too.
    """

    action: str
    resource: str
    prefix: str | None = None


def rights(method: str, target: str, status: int) -> list[Asked]:
    """The rights that one request needs.

    Raises:
        ValueError: A request nobody foresaw: the policies may not allow it.
    """
    parts = urlsplit(target)
    bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
    query = parse_qs(parts.query, keep_blank_values=True)
    here = f"arn:aws:s3:::{bucket}/{key}"
    if not key:
        if method == "GET" and "list-type" in query:
            prefix = query.get("prefix", [None])[0]
            return [Asked("s3:ListBucket", f"arn:aws:s3:::{bucket}", prefix)]
        raise ValueError(f"{method} {target}")
    if method in ("GET", "HEAD"):
        found = [Asked("s3:GetObject", here)]
        if status == 404:
            found.append(Asked("s3:ListBucket", f"arn:aws:s3:::{bucket}"))
        return found
    if method == "PUT" or (method == "POST" and ("uploads" in query or "uploadId" in query)):
        return [Asked("s3:PutObject", here)]
    if method == "DELETE":
        action = "s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject"
        return [Asked(action, here)]
    raise ValueError(f"{method} {target}")


@contextmanager
def recorded(endpoint: str) -> Iterator[tuple[str, list[Asked]]]:
    """Address of a proxy before `endpoint`, and the rights that requests through it needed."""
    to = urlsplit(endpoint).netloc
    asked: list[Asked] = []

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server = http.client.HTTPConnection(to, timeout=30)
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # the signature covers the host's name
                if name.lower() != "connection":
                    server.putheader(name, value)
            server.endheaders(body)
            answer = server.getresponse()
            data = answer.read()
            asked.extend(rights(self.command, self.path, answer.status))
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            server.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}", asked
    finally:
        proxy.shutdown()
        proxy.server_close()


def statements(path: Path, **names: str) -> list[dict[str, Any]]:
    """The statements of a policy, its placeholders filled in."""
    text = path.read_text(encoding="utf-8")
    for placeholder, name in names.items():
        text = text.replace(placeholder.replace("_", "-"), name)
    found: list[dict[str, Any]] = json.loads(text)["Statement"]
    return found


def listed(value: str | list[str]) -> list[str]:
    """One value or several, as IAM writes them."""
    return [value] if isinstance(value, str) else value


def allows(statement: dict[str, Any], asked: Asked) -> bool:
    """Whether one Allow statement gives a right. Knows the one condition that we use."""
    assert statement["Effect"] == "Allow"
    conditions = dict(statement.get("Condition", {}))
    if_exists = conditions.pop("StringLikeIfExists", {})
    strict = conditions.pop("StringLike", {})
    assert not conditions, "a condition this check does not know"
    if asked.action not in listed(statement["Action"]):
        return False
    if not any(fnmatch.fnmatchcase(asked.resource, r) for r in listed(statement["Resource"])):
        return False
    for values, absent in ((if_exists, True), (strict, False)):
        if not values:
            continue
        assert set(values) == {"s3:prefix"}
        patterns = listed(values["s3:prefix"])
        if asked.prefix is None:
            if not absent:
                return False
        elif not any(fnmatch.fnmatchcase(asked.prefix, pattern) for pattern in patterns):
            return False
    return True
