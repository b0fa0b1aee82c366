"""Where S3 is and who asks: read as the AWS tools read it, and the same for Store and Delta."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from sgcd_core.errors import ConfigError, StorageError
from sgcd_core.io import backoff as backoff_module
from sgcd_core.io.backoff import Backoff
from sgcd_core.io.digest import DigestError
from sgcd_core.io.s3.client import connection
from sgcd_core.io.store import Store


@pytest.fixture(autouse=True)
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the AWS files, and no setting in the environment."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "SGCD_S3_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


def url(bucket: str = "bucket") -> str:
    """The address that the Store would ask for an object; nothing is sent."""
    seen: list[str] = []

    def stop(request: Any, **_: object) -> None:
        seen.append(request.url)
        raise InterruptedError

    events = connection().client.meta.events
    events.register("before-send.s3", stop)
    with pytest.raises(InterruptedError):
        connection().client.get_object(Bucket=bucket, Key="k")
    events.unregister("before-send.s3", stop)
    return seen[0]


def options() -> dict[str, str]:
    return Store().delta_options("s3://bucket/table")


def test_aws_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert url() == "https://bucket.s3.eu-west-1.amazonaws.com/k"
    got = options()
    assert got["AWS_REGION"] == "eu-west-1" and "AWS_ENDPOINT_URL" not in got
    assert got["AWS_VIRTUAL_HOSTED_STYLE_REQUEST"] == "true"
    assert (got["AWS_ACCESS_KEY_ID"], got["AWS_SECRET_ACCESS_KEY"]) == ("k", "s")


def test_a_profile_says_it_all(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (aws / "config").write_text(
        "[profile scans]\nregion = default\nendpoint_url = https://rgw.example.org\n"
    )
    (aws / "credentials").write_text(
        "[scans]\naws_access_key_id = k\naws_secret_access_key = s\naws_session_token = t\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "scans")
    assert url() == "https://rgw.example.org/bucket/k"
    got = options()
    assert got["AWS_ENDPOINT_URL"] == "https://rgw.example.org"
    assert got["AWS_REGION"] == "default" and got["AWS_ALLOW_HTTP"] == "false"
    assert (got["AWS_ACCESS_KEY_ID"], got["AWS_SESSION_TOKEN"]) == ("k", "t")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://other:9000")
    assert url() == "http://other:9000/bucket/k"
    assert options()["AWS_ALLOW_HTTP"] == "true"


def test_a_services_section_wins_over_the_profiles_endpoint(aws: Path) -> None:
    (aws / "config").write_text(
        "[default]\nendpoint_url = https://all.example.org\nservices = mine\n"
        "[services mine]\ns3 =\n  endpoint_url = https://s3.example.org\n"
    )
    assert connection().endpoint == connection().client.meta.endpoint_url
    assert options()["AWS_ENDPOINT_URL"] == "https://s3.example.org"


@pytest.mark.parametrize("said", ["environment", "profile"])
def test_the_bucket_in_the_host_name_is_the_same_for_both(
    said: str, aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://oss.example.org:8443")
    if said == "environment":
        monkeypatch.setenv("SGCD_S3_PATH_STYLE", "0")
    else:
        (aws / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("SGCD_S3_ANON", "1")
    assert url() == "https://bucket.oss.example.org:8443/k"
    got = options()
    assert got["AWS_ENDPOINT_URL"] == "https://bucket.oss.example.org:8443"
    assert got["AWS_VIRTUAL_HOSTED_STYLE_REQUEST"] == "true"
    assert got["AWS_SKIP_SIGNATURE"] == "true" and "AWS_ACCESS_KEY_ID" not in got


def test_changed_credentials_are_noticed(aws: Path) -> None:
    file = aws / "credentials"
    for number in range(2):
        file.write_text(f"[default]\naws_access_key_id = k{number}\naws_secret_access_key = s\n")
        os.utime(file, ns=(number, number))
        assert options()["AWS_ACCESS_KEY_ID"] == f"k{number}"


def test_an_unknown_profile_and_a_wrong_number_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("AWS_PROFILE", "nobody")
        for ask in (options, lambda: Store().read_bytes("s3://bucket/k")):
            with pytest.raises(StorageError, match="AWS_PROFILE") as denied:
                ask()
            assert denied.value.code == "STORE-DENIED"
    for value in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv("SGCD_S3_TIMEOUT_SECONDS", value)
        with pytest.raises(ConfigError, match="SGCD_S3_TIMEOUT_SECONDS"):
            options()


def test_a_password_in_an_address_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:pa55@word@127.0.0.1:9")
    monkeypatch.setenv("SGCD_S3_ANON", "1")
    monkeypatch.setenv("SGCD_S3_RETRY_SECONDS", "0.1")
    with pytest.raises(StorageError, match=r"the store at http://127\.0\.0\.1:9 ") as caught:
        Store().read_bytes("s3://bucket/key")
    assert "pa55" not in repr(vars(caught.value)) and "word" not in str(caught.value)
    other = ConfigError("see https://me:hush@host/x", where="a://hush@b", hint="not s3://b/c@d")
    assert str(other) == "[CONFIG-VALUE] a://b: see https://host/x not s3://b/c@d"
    assert "hush" not in str(pickle.loads(pickle.dumps(other)))


def test_a_local_table_needs_no_options() -> None:
    assert Store().delta_options("/data/table") == {}


def test_waits_grow_are_drawn_from_the_whole_interval_and_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(backoff_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(backoff_module.time, "sleep", sleep)
    tries = []
    for _ in range(300):
        one = Backoff()
        waits.clear()
        start = clock[0]
        while one.again(60):
            pass
        assert clock[0] - start <= 60
        tries.append(one.tries)
        assert all(w <= min(10, 0.1 * 2 ** (n + 1)) for n, w in enumerate(waits))
    assert min(tries) >= 8 and max(tries) <= 60
    again = Backoff()
    assert again.again(0) and not again.again(0)  # two tries, whatever the deadline
    first = [(Backoff().again(60), waits[-1])[1] for _ in range(300)]
    assert min(first) < 0.02 and max(first) > 0.18  # full jitter


def test_a_digest_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(DigestError("m", "s3://b/k", "f", by_etag=True)))
    assert (error.code, error.where, error.found, error.by_etag) == (
        "STORE-DIGEST", "s3://b/k", "f", True,
    )  # fmt: skip


def test_chunks_of_a_file_are_bounded_and_checked(tmp_path: Path) -> None:
    from sgcd_core.io.store import sha256_hex

    data = os.urandom((3 << 20) + 5)
    store, path = Store(), str(tmp_path / "x")
    store.write_bytes(path, data)
    digest = sha256_hex(data)
    pieces = list(store.read_chunks(path, sha256=digest))
    assert b"".join(pieces) == data and max(map(len, pieces)) <= 1 << 20
    assert store.read_bytes(path, sha256=digest[:32]) == data
    with pytest.raises(StorageError, match="STORE-DIGEST"):
        store.read_bytes(path, sha256="0" * 64)
    Path(path).write_bytes(data[:-1])
    with pytest.raises(StorageError, match="STORE-DIGEST"):
        list(store.read_chunks(path, sha256=digest))
