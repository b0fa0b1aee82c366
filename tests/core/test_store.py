"""Store: local files and a real S3 server behave alike; errors come fast and with a code."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sgcd_core.errors import InputError, SgcdError, StorageError
from sgcd_core.io.s3.client import connection
from sgcd_core.io.s3.reading import READS
from sgcd_core.io.store import ObjectInfo, Store, file_name, join, s3_path, sha256_hex, trimmed

if TYPE_CHECKING:
    from tests.conftest import S3Server

ODD_NAMES = [
    "plain.bin",
    "with space.bin",
    "hash#1.bin",
    "100%25.bin",
    "größe-脳.bin",
    "a+b&c=d.bin",
]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place: a folder, or a prefix of a real S3 server."""
    if request.param == "local":
        return str(tmp_path / "root")
    server: S3Server = request.getfixturevalue("s3_server")
    return server.uri(f"store-{tmp_path.name}")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_what_is_written_is_read_back_and_listed_under_its_own_name(root: str, name: str) -> None:
    store, uri = Store(), join(root, "a folder", name)
    etag = store.write_bytes(uri, name.encode())
    assert store.read_bytes(uri) == name.encode()
    assert store.info(uri) == ObjectInfo(uri, len(name.encode()), etag)
    assert [o.uri for o in store.list(root)] == [uri]
    store.delete(uri)
    assert not store.exists(uri)
    store.delete(uri)  # absent is fine


def test_an_overwrite_changes_the_etag_and_the_content(root: str) -> None:
    store, uri = Store(), join(root, "x")
    first = store.write_bytes(uri, b"one")
    assert store.write_bytes(uri, b"two") != first
    assert store.read_bytes(uri) == b"two"


def test_of_many_writers_exactly_one_creates_the_object(root: str) -> None:
    store, uri = Store(), join(root, "claim")

    def claim(i: int) -> bool:
        try:
            store.write_bytes(uri, str(i).encode(), if_absent=True)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(12) as pool:
        won = [i for i, ok in enumerate(pool.map(claim, range(24))) if ok]
    assert len(won) == 1
    assert store.read_bytes(uri) == str(won[0]).encode()


def test_listing_is_sorted_deep_and_never_reaches_a_sibling(root: str) -> None:
    store = Store()
    for key in ("sub-1/b", "sub-1/anat/a", "sub-10/c", "sub-1.txt"):
        store.write_bytes(join(root, key), b".")
    listed = [o.uri for o in store.list(join(root, "sub-1"))]
    assert listed == [join(root, "sub-1/anat/a"), join(root, "sub-1/b")]
    assert [o.uri for o in store.list(join(root, "sub-1/b"))] == [join(root, "sub-1/b")]
    assert list(store.list(join(root, "sub-2"))) == []
    assert store.has_any(join(root, "sub-10"))
    assert not store.has_any(join(root, "sub-"))


def test_a_missing_object_and_a_long_one_are_refused_by_code(root: str) -> None:
    store, uri = Store(), join(root, "x")
    with pytest.raises(InputError) as missing:
        store.read_bytes(uri)
    assert missing.value.code == "SCAN-MISSING"
    store.write_bytes(uri, bytes(1000))
    assert len(store.read_bytes(uri, max_bytes=1000)) == 1000
    with pytest.raises(InputError) as big:
        store.read_bytes(uri, max_bytes=999)
    assert big.value.code == "SCAN-TOO-BIG"


def test_a_folder_is_not_an_object(root: str) -> None:
    store = Store()
    store.write_bytes(join(root, "folder/x"), b"1")
    assert not store.exists(join(root, "folder"))
    with pytest.raises(InputError):
        store.read_bytes(join(root, "folder"))


def test_a_pickled_store_works(root: str) -> None:
    Store().write_bytes(join(root, "x"), b"1")
    assert pickle.loads(pickle.dumps(Store())).read_bytes(join(root, "x")) == b"1"


def test_a_forked_child_reads_too(root: str) -> None:
    store = Store()
    store.write_bytes(join(root, "x"), b"1")
    child = os.fork()
    if child == 0:
        os._exit(0 if store.read_bytes(join(root, "x")) == b"1" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_file_addresses_are_decoded_and_plain_paths_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a b#%20.bin"
    path.write_bytes(b"1")
    store = Store()
    assert store.read_bytes(path.as_uri()) == b"1"
    assert store.read_bytes(str(path)) == b"1"
    assert [o.uri for o in store.list(tmp_path.as_uri())] == [str(path)]
    assert join(tmp_path.as_uri(), "x%41") == str(tmp_path / "x%41")


def test_join() -> None:
    assert join("s3://b/", "/k//", "", "x") == "s3://b/k/x"
    assert join("/", "a") == "/a"
    assert join("a", "b/") == "a/b"


def test_a_reader_sees_the_old_or_the_new_content_only(tmp_path: Path) -> None:
    store, uri = Store(), str(tmp_path / "x")
    versions = {bytes([i]) * 200_000 for i in range(4)}
    store.write_bytes(uri, next(iter(versions)))
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for data in versions:
                store.write_bytes(uri, data)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        assert all(store.read_bytes(uri) in versions for _ in range(100))
    finally:
        stop.set()
        writer.join()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]  # no temporary file is left


def test_loops_of_links_end_and_a_broken_one_is_listed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"1")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    broken = {"gone": "nowhere", "itself": "itself", "through a file": "real/x/y"}
    for name, target in broken.items():
        (tmp_path / name).symlink_to(target)
    listed = {Path(o.uri).name: o.etag for o in Store().list(str(tmp_path))}
    assert set(listed) == {"x", *broken}
    assert not any(listed[name] for name in broken)


def test_a_link_takes_nothing_from_the_folder_it_leads_to(tmp_path: Path) -> None:
    """Whatever order the file system names them in; two folders that link to each other end."""
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(b"1")
        (tmp_path / name / "link").symlink_to(tmp_path / other)
    listed = [o.uri.removeprefix(f"{tmp_path}/") for o in Store().list(str(tmp_path))]
    assert listed == ["a/link/x", "a/x", "b/link/x", "b/x"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_denied(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1")
    path.chmod(0)
    with pytest.raises(StorageError) as denied:
        Store().read_bytes(str(path))
    assert denied.value.code == "STORE-DENIED"


@pytest.mark.parametrize(
    "uri", ["gs://bucket/x", "https://host/x.nii", "file://elsewhere/x", "s3://", "s3://b ad!/x"]
)
def test_other_addresses_are_refused_with_advice(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGCD_S3_ANON", "1")
    with pytest.raises(StorageError) as error:
        Store().read_bytes(uri)
    assert error.value.code == "STORE-ADDRESS"
    assert error.value.hint


def test_a_name_of_any_length_and_script_can_be_a_files(tmp_path: Path) -> None:
    assert file_name("Univ/A 3T") == "Univ%2FA%203T" and len(file_name("x" * 240)) == 240
    names = [file_name(text) for text in ("Ж" * 40, "Ж" * 41, "Ж" * 42, "Ж" * 41 + "A", "x" * 300)]
    assert names[0] == "%D0%96" * 40 and len(set(names)) == len(names)
    for name in names:
        Store().write_bytes(str(tmp_path / f"{name}_T1w.json"), b"")


@pytest.mark.parametrize("uri", ["s3://", "s3:///", "s3:///lake", "s3:////lake/x"])
def test_an_address_without_a_bucket_leads_nowhere(uri: str) -> None:
    """An empty variable in it leads to no other bucket and to no local folder."""
    for use in (trimmed, s3_path, lambda uri: join(uri, "catalog")):
        with pytest.raises(StorageError, match="STORE-ADDRESS"):
            use(uri)


def test_writing_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    with pytest.raises(StorageError) as error:
        Store().write_bytes(str(tmp_path / "x" / "y"), b"1")
    assert error.value.code == "STORE-WRITE"


def _raises_in(seconds: float, uri: str, *, writing: bool = False) -> SgcdError:
    """The error, which comes before trouble would be given up (60 s): nothing is tried again."""
    start = time.monotonic()
    with pytest.raises(SgcdError) as error:
        Store().write_bytes(uri, b"1") if writing else Store().read_bytes(uri)
    assert time.monotonic() - start < seconds
    assert "lake-test-secret" not in str(error.value)
    return error.value


def test_an_endpoint_that_refuses_or_hangs_is_unreachable_in_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SGCD_S3_ANON", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert _raises_in(40, "s3://lake/x").code == "STORE-UNREACHABLE"
    assert _raises_in(40, "s3://lake/x", writing=True).code == "STORE-UNREACHABLE"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not an address")
    assert _raises_in(40, "s3://lake/x").code == "STORE-UNREACHABLE"


@contextmanager
def answering(monkeypatch: pytest.MonkeyPatch, *answers: bytes) -> Iterator[None]:
    """A store that gives these answers, one a connection, all of which are asked for."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answer in answers:
                peer, _ = server.accept()
                with peer:
                    peer.recv(65536)
                    peer.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("SGCD_S3_ANON", "1")
        monkeypatch.setenv("SGCD_S3_RETRY_SECONDS", "5")
        yield
        thread.join(5)
        assert not thread.is_alive()


def answer(status: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """An answer of HTTP, `length` being what it says its body has."""
    size = f"Content-Length: {len(body) if length is None else length}"
    lines = [f"HTTP/1.1 {status}", 'ETag: "e"', size, "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_transient_errors_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers 503, then breaks off half way, then answers whole."""
    short, whole = answer("200 OK", b"01234", length=10), answer("200 OK", b"0123456789")
    with answering(monkeypatch, answer("503 Slow Down", b""), short, whole):
        assert Store().read_bytes("s3://lake/x") == b"0123456789"


def test_a_digest_that_others_left_beside_their_object_is_not_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Theirs may be written otherwise, or be that of the unpacked file."""
    theirs = f"x-amz-meta-sha256: {sha256_hex(b'scan').upper()}"
    with answering(monkeypatch, answer("200 OK", b"scan", theirs)):
        assert Store().read_bytes("s3://lake/x") == b"scan"
    ours = f"x-amz-meta-sha256: {sha256_hex(b'other')}", "x-amz-meta-sgcd-writer: word"
    with (
        answering(monkeypatch, *[answer("200 OK", b"scan", *ours)] * READS),
        pytest.raises(StorageError, match="STORE-DIGEST"),
    ):
        Store().read_bytes("s3://lake/x")


def test_an_archived_object_is_to_be_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b"<?xml version='1.0'?><Error><Code>InvalidObjectState</Code></Error>"
    with (
        answering(monkeypatch, answer("403 Forbidden", body)),
        pytest.raises(StorageError, match=r"the object is archived .*Restore it") as archived,
    ):
        Store().read_bytes("s3://lake/x")
    assert archived.value.code == "STORE-DENIED"


@pytest.mark.s3
def test_wrong_keys_are_denied_and_unknown_buckets_named(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _raises_in(40, "s3://no-such-bucket/x").code == "SCAN-MISSING"
    with pytest.raises(StorageError) as empty:
        list(Store().list("s3://no-such-bucket/x"))
    assert empty.value.code == "STORE-EMPTY"
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert _raises_in(40, s3_server.uri("x")).code == "STORE-DENIED"
        assert _raises_in(40, s3_server.uri("x"), writing=True).code == "STORE-DENIED"
        with pytest.raises(StorageError) as denied:
            list(Store().list(s3_server.uri("x")))
        assert denied.value.code == "STORE-DENIED"
    with monkeypatch.context() as patch:
        patch.setenv("SGCD_S3_ANON", "1")
        assert _raises_in(40, s3_server.uri("x")).code == "STORE-DENIED"


@pytest.mark.s3
def test_open_data_is_read_without_keys_and_nothing_is_signed(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    from conftest import PUBLIC
    from deltalake import DeltaTable, write_deltalake

    root, store = f"s3://{PUBLIC}/ixi", Store()
    store.write_bytes(f"{root}/sub-1.nii.gz", b"scan")
    table, options = f"{root}/table", store.delta_options(f"{root}/table")
    write_deltalake(table, pa.table({"n": [1, 2]}), storage_options=options)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SGCD_S3_ANON", "1")
    signed: list[bool] = []
    events = connection().client.meta.events
    events.register("before-send.s3", lambda request, **_: signed.append(
        "Authorization" in request.headers
    ))  # fmt: skip
    assert store.read_bytes(f"{root}/sub-1.nii.gz") == b"scan"
    assert f"{root}/sub-1.nii.gz" in [item.uri for item in store.list(root)]
    assert signed and not any(signed)
    found = DeltaTable(table, storage_options=store.delta_options(table))
    assert found.to_pyarrow_table().num_rows == 2
    for refused in (lambda: store.write_bytes(f"{root}/new", b"x"),
                    lambda: store.read_bytes(s3_server.uri("private"))):  # fmt: skip
        with pytest.raises(StorageError) as caught:
            refused()
        assert caught.value.code == "STORE-DENIED"


@pytest.mark.s3
def test_listing_goes_on_past_one_page(s3_server: S3Server) -> None:
    store, prefix = Store(), s3_server.uri("many")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: store.write_bytes(f"{prefix}/{i:04d}", b"."), range(1005)))
    listed = [o.uri for o in store.list(prefix)]
    assert listed == [f"{prefix}/{i:04d}" for i in range(1005)]


@pytest.mark.s3
def test_delta_reaches_the_same_store(s3_server: S3Server) -> None:
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake

    uri, options = s3_server.uri("delta-table"), Store().delta_options(s3_server.uri())
    for _ in range(2):
        write_deltalake(uri, pa.table({"a": [1]}), mode="append", storage_options=options)
    assert DeltaTable(uri, storage_options=options).to_pyarrow_table().num_rows == 2
    assert Store().has_any(uri)


def test_sha256_hex() -> None:
    assert sha256_hex(b"").startswith("e3b0c44298fc1c14")


def test_an_empty_address_is_not_the_folder_one_is_in(tmp_path: Path) -> None:
    for uri in ("", "  "):
        with pytest.raises(StorageError, match=r"STORE-ADDRESS.*empty"):
            trimmed(uri)
    assert trimmed("/") == trimmed("//") == "/" and join(trimmed("/"), "catalog") == "/catalog"
    assert trimmed("/lake//") == "/lake"
