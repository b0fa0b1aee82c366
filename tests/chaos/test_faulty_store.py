"""The store against a real S3 server behind a proxy that fails: every fault, one at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import KEY, SECRET, S3Server
from faulty_s3 import FaultyS3, Plan, write_keys

from sgcd_core.errors import StorageError
from sgcd_core.io.s3 import writing
from sgcd_core.io.store import Store

pytestmark = [pytest.mark.chaos, pytest.mark.s3, pytest.mark.slow]

CONTENT = bytes(range(256)) * 12_000  # 3 MB: several pieces


def uri(s3_server: S3Server, tmp_path: Path, name: str) -> str:
    return s3_server.uri(f"chaos-{tmp_path.name}/{name}")


@pytest.mark.parametrize(
    "kind", ["503", "slow-down", "429", "500", "reset", "stall", "short", "wrong", "lost", "empty"]
)
def test_each_fault_is_survived(
    kind: str, faulty: FaultyS3, s3_server: S3Server, tmp_path: Path
) -> None:
    """Every first and second try of a request fails this way."""
    store, where = Store(), uri(s3_server, tmp_path, "x")
    store.write_bytes(uri(s3_server, tmp_path, "first"), b"the store has answered once")
    faulty.plan = Plan((kind,), share=1.0, in_a_row=1 if kind == "stall" else 2)
    store.write_bytes(where, CONTENT)
    assert store.read_bytes(where) == CONTENT
    assert store.info(where).size == len(CONTENT)
    found = {item.uri for item in store.list(where.rpartition("/")[0])}
    assert found == {where, uri(s3_server, tmp_path, "first")}
    store.delete(where)
    assert not store.exists(where)
    print(f"{kind}: {faulty.faults[kind]} of {faulty.requests} requests failed")
    assert faulty.faults[kind] >= (1 if kind in ("short", "wrong", "empty") else 4)


def test_a_broken_read_goes_on_where_it_broke(
    faulty: FaultyS3, s3_server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = uri(s3_server, tmp_path, "x")
    Store().write_bytes(where, CONTENT)
    faulty.plan = Plan(("short",), share=1.0)
    with caplog.at_level(logging.INFO, "sgcd_core"):
        assert b"".join(Store().read_chunks(where)) == CONTENT
    resumed = [r.getMessage() for r in caplog.records if "store_resume" in r.getMessage()]
    # each answer holds half of what is left
    assert [int(text.split("at=")[1].split()[0]) for text in resumed] == [
        len(CONTENT) // 2, len(CONTENT) * 3 // 4, len(CONTENT) * 7 // 8,
    ]  # fmt: skip


def test_an_object_replaced_in_the_middle_of_a_read_is_never_a_mixture(
    faulty: FaultyS3, s3_server: S3Server, tmp_path: Path
) -> None:
    where, other = uri(s3_server, tmp_path, "x"), CONTENT[::-1]
    Store().write_bytes(where, CONTENT)
    faulty.plan = Plan(("short",), share=1.0, in_a_row=1)
    pieces = Store().read_chunks(where)
    next(pieces)
    Store().write_bytes(where, other)
    with pytest.raises(StorageError, match="replaced while it was read"):
        list(pieces)
    assert Store().read_bytes(where) == other


def test_of_many_writers_one_wins_and_knows_it_though_answers_are_lost(
    faulty: FaultyS3, s3_server: S3Server, tmp_path: Path
) -> None:
    store, where = Store(), uri(s3_server, tmp_path, "claim")
    store.write_bytes(uri(s3_server, tmp_path, "first"), b"1")
    faulty.plan = Plan(("lost", "503", "reset"), share=0.6)

    def claim(i: int) -> bool:
        try:
            store.write_bytes(where, str(i).encode(), if_absent=True)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = [i for i, ok in enumerate(pool.map(claim, range(16))) if ok]
    assert len(won) == 1 and store.read_bytes(where) == str(won[0]).encode()
    assert faulty.faults["lost"] > 0


def test_a_damaged_upload_is_refused_by_the_server_and_sent_again(
    faulty: FaultyS3, s3_server: S3Server, tmp_path: Path
) -> None:
    where = uri(s3_server, tmp_path, "x")
    Store().write_bytes(uri(s3_server, tmp_path, "first"), b"1")
    faulty.plan = Plan(("garbled",), share=1.0, in_a_row=2, where=lambda m, _: m == "PUT")
    Store().write_bytes(where, CONTENT)
    assert Store().read_bytes(where) == CONTENT
    assert faulty.faults["garbled"] == 2


def test_a_large_object_in_parts_is_whole_or_not_there(
    faulty: FaultyS3, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "PART_BYTES", 5 << 20)
    store, where = Store(), uri(s3_server, tmp_path, "large")
    data = os.urandom(12 << 20)
    store.write_bytes(uri(s3_server, tmp_path, "first"), b"1")
    faulty.plan = Plan(("503", "reset", "lost"), share=0.5, in_a_row=2, seed=1)
    etag = store.write_bytes(where, data, if_absent=True)
    assert etag.endswith("-3") and store.info(where).etag == etag
    assert store.read_bytes(where) == data
    with pytest.raises(FileExistsError):
        store.write_bytes(where, data, if_absent=True)
    # parts that fail for ever leave nothing behind; a start whose answer was lost may
    client = s3_client(s3_server)
    before = client.list_multipart_uploads(Bucket=s3_server.bucket).get("Uploads")
    monkeypatch.setenv("SGCD_S3_RETRY_SECONDS", "1")
    gone = uri(s3_server, tmp_path, "gone")
    second = "partNumber=2"
    faulty.plan = Plan(("503",), 1.0, in_a_row=10**6, where=lambda m, path: second in path)
    with pytest.raises(StorageError, match="STORE-UNREACHABLE"):
        store.write_bytes(gone, data)
    assert not store.exists(gone)
    faulty.plan = Plan()
    assert client.list_multipart_uploads(Bucket=s3_server.bucket).get("Uploads") == before


def s3_client(s3_server: S3Server):  # type: ignore[no-untyped-def]
    from botocore.config import Config
    from botocore.session import get_session

    return get_session().create_client(
        "s3", endpoint_url=s3_server.endpoint, region_name="us-east-1",
        aws_access_key_id=KEY, aws_secret_access_key=SECRET,
        config=Config(request_checksum_calculation="when_required"),  # an object without any
    )  # fmt: skip


def damage(s3_server: S3Server, where: str) -> None:
    """Change a byte of an object behind the store's back; its metadata stays."""
    client, key = s3_client(s3_server), where.split("/", 3)[3]
    old = client.get_object(Bucket=s3_server.bucket, Key=key)
    body = bytearray(old["Body"].read())
    body[len(body) // 2] ^= 1
    client.put_object(
        Bucket=s3_server.bucket, Key=key, Body=bytes(body), Metadata=old["Metadata"]
    )  # fmt: skip


def test_an_object_that_was_damaged_in_the_store_is_refused(
    s3_server: S3Server, tmp_path: Path
) -> None:
    where = uri(s3_server, tmp_path, "x")
    Store().write_bytes(where, CONTENT)
    damage(s3_server, where)
    with pytest.raises(StorageError) as error:
        Store().read_bytes(where)
    assert error.value.code == "STORE-DIGEST" and error.value.hint


def test_an_object_of_others_is_compared_with_its_etag(
    faulty: FaultyS3, s3_server: S3Server, tmp_path: Path
) -> None:
    where = uri(s3_server, tmp_path, "x")
    key = where.split("/", 3)[3]
    s3_client(s3_server).put_object(Bucket=s3_server.bucket, Key=key, Body=CONTENT)
    faulty.plan = Plan(("wrong",), share=1.0, in_a_row=3)
    assert Store().read_bytes(where) == CONTENT
    assert faulty.faults["wrong"] == 3


def test_etags_that_are_no_md5_do_not_stop_reading(
    faulty: FaultyS3, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some gateways have them; seen here as the same "wrong" body each time."""
    where = uri(s3_server, tmp_path, "x")
    s3_client(s3_server).put_object(
        Bucket=s3_server.bucket, Key=where.split("/", 3)[3], Body=CONTENT
    )
    faulty.plan = Plan(("wrong",), share=1.0, in_a_row=10**6)
    got = Store().read_bytes(where)
    assert len(got) == len(CONTENT)
    before = faulty.requests
    assert Store().read_bytes(where) == got
    assert faulty.requests == before + 1  # what the etags are is remembered


def test_an_outage_ends_with_a_code_after_the_deadline(
    faulty: FaultyS3, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = uri(s3_server, tmp_path, "x")
    Store().write_bytes(where, b"1")
    monkeypatch.setenv("SGCD_S3_RETRY_SECONDS", "2")
    faulty.plan = Plan(("503", "reset"), share=1.0, in_a_row=10**6)
    actions: list[Callable[[], object]] = [
        lambda: Store().read_bytes(where),
        lambda: Store().write_bytes(where, b"2"),
        lambda: list(Store().list(where)),
        lambda: Store().info(where),
    ]
    for action in actions:
        with pytest.raises(StorageError) as error:
            action()
        assert error.value.code == "STORE-UNREACHABLE"


def test_credentials_that_end_are_an_error_of_their_own_until_others_come(
    faulty: FaultyS3, s3_server: S3Server, tmp_path: Path, keys: Path
) -> None:
    where = uri(s3_server, tmp_path, "x")
    Store().write_bytes(where, CONTENT)
    assert Store().delta_options(where)["AWS_SESSION_TOKEN"] == "old"
    faulty.expired.add("old")
    for action in (
        lambda: Store().read_bytes(where),
        lambda: Store().write_bytes(where, b"2"),
        lambda: Store().info(where),
        lambda: list(Store().list(where)),
    ):
        with pytest.raises(StorageError) as error:
            action()
        assert error.value.code == "STORE-EXPIRED" and "same command" in str(error.value.hint)
    write_keys(keys, "new")
    assert Store().read_bytes(where) == CONTENT
    assert Store().delta_options(where)["AWS_SESSION_TOKEN"] == "new"


def test_credentials_of_a_program_are_fetched_again_when_the_store_calls_them_expired(
    faulty: FaultyS3, s3_server: S3Server, tmp_path: Path, keys: Path
) -> None:
    """botocore believes them good for another hour; the store knows better."""
    keys.unlink()
    token = tmp_path / "token"
    token.write_text("old")
    answer = (
        '{"Version": 1, "AccessKeyId": "temporary", "SecretAccessKey": "s", '
        '"SessionToken": "%s", "Expiration": "2999-01-01T00:00:00Z"}'
    )
    program = tmp_path / "program.sh"
    program.write_text(f"printf '{answer}' \"$(cat {token})\"\n")
    (tmp_path / "config").write_text(f"[default]\ncredential_process = sh {program}\n")
    where = uri(s3_server, tmp_path, "x")
    Store().write_bytes(where, CONTENT)
    faulty.expired.add("old")
    token.write_text("new")
    assert Store().info(where).size == len(CONTENT)
    assert Store().read_bytes(where) == CONTENT
    assert Store().delta_options(where)["AWS_SESSION_TOKEN"] == "new"
    assert faulty.faults["expired"] == 1
