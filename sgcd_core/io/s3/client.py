"""Where S3 is and who asks: settings, credentials and clients, the same for Store and Delta.

Settings are those of the AWS tools (environment, then ~/.aws/config and credentials), plus four of
our own. Credentials come from botocore's provider chain, and those that end are renewed by it.
"""

from __future__ import annotations

import os
import threading
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from sgcd_core.errors import ConfigError

_SETTINGS = (
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION",
    "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CA_BUNDLE", "SGCD_S3_ANON", "SGCD_S3_PATH_STYLE", "SGCD_S3_TIMEOUT_SECONDS",
)  # fmt: skip
CONNECT_SECONDS = 3
#: Silence after which a request counts as lost, unless SGCD_S3_TIMEOUT_SECONDS says otherwise.
SILENCE_SECONDS = 10.0
#: How long a request is tried again, unless SGCD_S3_RETRY_SECONDS says otherwise.
RETRY_SECONDS = 60.0
#: The same for a store that never answered this process: an address that is wrong, as a rule.
FIRST_SECONDS = 10.0


class Connection:
    """A client, and what it was made of.

    Attributes:
        client: botocore's S3 client; free to share between threads.
        endpoint: Address of the service; None for AWS itself.
        region: Region.
        path_style: Bucket in the path rather than the host name.
        anonymous: Whether requests go unsigned.
        answered: Whether the service has answered anything yet.
        etags_are_md5: False once it was seen that etags of 32 hex digits are something else here.
    """

    def __init__(self) -> None:
        import botocore
        from botocore.config import Config
        from botocore.session import get_session

        self._session = session = get_session()
        scoped: dict[str, Any] = session.get_scoped_config()
        self.endpoint = _endpoint(session, scoped)
        self.region = str(
            os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
        )
        self.path_style = _path_style(scoped, self.endpoint)
        self.anonymous = anonymous()
        # "auto" is the host name on AWS, for buckets that can be part of one; elsewhere the path.
        style = "path" if self.path_style else "virtual" if self.endpoint else "auto"
        self.answered = False
        self.etags_are_md5 = True
        self.client = session.create_client(
            "s3",
            region_name=self.region,
            endpoint_url=self.endpoint,
            config=Config(
                connect_timeout=CONNECT_SECONDS,
                read_timeout=_seconds("SGCD_S3_TIMEOUT_SECONDS", SILENCE_SECONDS),
                retries={"total_max_attempts": 1, "mode": "standard"},  # `s3` tries again itself
                max_pool_connections=32,
                tcp_keepalive=True,
                signature_version=botocore.UNSIGNED if self.anonymous else "s3v4",
                # The signature covers the body's SHA-256; newer checksum headers would shut out
                # stores that do not know them.
                request_checksum_calculation="when_required",
                s3={
                    "addressing_style": style,
                    "payload_signing_enabled": True,
                },
            ),
        )

    def credentials(self) -> tuple[str, str, str | None] | None:
        """Key, secret and token as they are now, renewed where they end; None for none."""
        if self.anonymous:
            return None
        found = self._session.get_credentials()
        if found is None:
            return None
        now = found.get_frozen_credentials()
        return now.access_key, now.secret_key, now.token

    def patience(self) -> float:
        """Seconds for which a request is tried again."""
        seconds = _seconds("SGCD_S3_RETRY_SECONDS", RETRY_SECONDS)
        return seconds if self.answered else min(seconds, FIRST_SECONDS)

    def delta_options(self, bucket: str) -> dict[str, str]:
        """These settings in the words of deltalake, for tables in `bucket`."""
        silence = _seconds("SGCD_S3_TIMEOUT_SECONDS", SILENCE_SECONDS)
        options = {
            "AWS_REGION": self.region,
            "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false" if self.path_style else "true",
            "AWS_CONDITIONAL_PUT": "etag",
            "connect_timeout": f"{CONNECT_SECONDS}s",
            "timeout": f"{6 * silence:.0f}s",  # of a whole answer, which a silence is not
            "retry_timeout": f"{_seconds('SGCD_S3_RETRY_SECONDS', RETRY_SECONDS):.0f}s",
        }
        if self.endpoint:
            plain = self.endpoint.startswith("http://")
            host = self.endpoint if self.path_style else _with_bucket(self.endpoint, bucket)
            options["AWS_ENDPOINT_URL"] = host
            options["AWS_ALLOW_HTTP"] = "true" if plain else "false"
        if self.anonymous:
            return options | {"AWS_SKIP_SIGNATURE": "true"}
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        found = self.credentials() or (None, None, None)
        return options | {n: v for n, v in zip(names, found, strict=True) if v}


def anonymous() -> bool:
    """Whether requests go unsigned."""
    return os.environ.get("SGCD_S3_ANON", "") == "1"


def _endpoint(session: Any, scoped: dict[str, Any]) -> str | None:
    """The service's address as the AWS tools look for it; None for AWS itself."""
    if str(session.get_config_variable("ignore_configured_endpoint_urls")).lower() == "true":
        return None
    services = session.full_config.get("services", {}).get(scoped.get("services"), {})
    found = (
        os.environ.get("AWS_ENDPOINT_URL_S3"),
        os.environ.get("AWS_ENDPOINT_URL"),
        services.get("s3", {}).get("endpoint_url"),
        scoped.get("endpoint_url"),
    )
    return next((url for url in found if url), None)


def _path_style(scoped: dict[str, Any], endpoint: str | None) -> bool:
    """Whether the bucket goes into the path: the default wherever an endpoint is named."""
    if said := os.environ.get("SGCD_S3_PATH_STYLE"):
        return said == "1"
    section = scoped.get("s3")
    style = section.get("addressing_style") if isinstance(section, dict) else None
    return style == "path" if style in ("path", "virtual") else endpoint is not None


def _with_bucket(endpoint: str, bucket: str) -> str:
    """`https://host` → `https://bucket.host`, as deltalake wants it where no path style is used."""
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(netloc=f"{bucket}.{parts.netloc}"))


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise ConfigError(
            "is not a number of seconds.", code="CONFIG-VALUE", where=name,
            hint=f"Give a number such as {default:g}, or unset it.",
        )  # fmt: skip
    return value


_lock = threading.Lock()
_Stamp = tuple[int, ...]
_connections: dict[tuple[int, tuple[str | None, ...]], tuple[_Stamp, Connection]] = {}


def _stamp() -> _Stamp:
    """When the AWS files last changed: what they say may be new credentials."""
    times = []
    for name, usual in (
        ("AWS_CONFIG_FILE", "~/.aws/config"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
    ):
        try:
            times.append(os.stat(os.path.expanduser(os.environ.get(name) or usual)).st_mtime_ns)
        except OSError:
            times.append(0)
    return tuple(times)


def _key() -> tuple[int, tuple[str | None, ...]]:
    return os.getpid(), tuple(os.environ.get(name) for name in _SETTINGS)


def connection() -> Connection:
    """This process's connection for the settings now in the environment and the AWS files."""
    key, stamp = _key(), _stamp()
    with _lock:
        found, made = _connections.get(key, ((), None))
        if made is None or found != stamp:
            made = Connection()
            _connections[key] = (stamp, made)
        return made


def renewed(old: Connection) -> bool:
    """Whether temporary credentials that the store refused have been replaced by others.

    Asks botocore's chain of providers anew; `connection` gives the answer from then on.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        before = old.credentials()
        if before is None or before[2] is None:
            return False  # keys without a token do not end
        key, stamp = _key(), _stamp()
        with _lock:
            made = _connections.get(key, ((), old))[1]
            if made is not old:
                return True  # another thread was first
            made = Connection()
            if made.credentials() == before:
                return False
            made.answered, made.etags_are_md5 = old.answered, old.etags_are_md5
            _connections[key] = (stamp, made)
            return True
    except (BotoCoreError, ClientError, RuntimeError):
        return False


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the parent's lock may be held by a thread that is not here
    _connections.clear()


os.register_at_fork(after_in_child=_after_fork)
