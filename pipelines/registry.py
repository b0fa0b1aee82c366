"""The lake's models in MLflow's registry: versions and aliases as a mirror for people to look at.

Nothing here decides which model is used: `pipelines.aliases` does. A server may serve many lakes,
so a registered model belongs to the lake that its tag `lake` names. A lake may be made anew at the
same address, so a version is the lake's only with the same files: the tag `pack_sha256`.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.lake import Lake
from sgcd_core.errors import InputError
from sgcd_core.io.store import Store, join, sha256_hex

log = logging.getLogger(__name__)

#: How long a server may take to take a connection.
CONNECT_SECONDS = 3.0
_PORTS = {"http": 80, "https": 443}
#: A lake's digest is put behind a name, and MLflow's databases hold 256 characters.
_LONGEST_NAME = 240


def connect(uri: str) -> Any:
    """A client of the MLflow at `uri`.

    A server is tried once, so that one that is away costs seconds and not MLflow's minutes; for
    one that takes connections and does not answer, two tries of 20 s are the limit
    (MLFLOW_HTTP_REQUEST_TIMEOUT, MLFLOW_HTTP_REQUEST_MAX_RETRIES).

    Raises:
        OSError: No server takes a connection there.
        ImportError: MLflow is not installed.
    """
    # A scan's name must not leave the machine, and a dead server must not hold up the work.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Stdout is the command's own: with --json it is one document.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    # MLflow's own name for what the store reads from the usual variables.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        os.environ.setdefault("MLFLOW_S3_ENDPOINT_URL", endpoint)
    _knock(uri)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It prints a traceback of what it raises besides, and `trouble` says it in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _knock(uri: str) -> None:
    """Raise OSError when no server takes a connection; databases and proxies are not tried."""
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(uri)
    if parts.scheme not in _PORTS or not parts.hostname:
        return
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname):
        return
    where = (parts.hostname, parts.port or _PORTS[parts.scheme])
    socket.create_connection(where, timeout=CONNECT_SECONDS).close()


def guarded(what: str, action: Callable[[], Any]) -> bool:
    """Do `action`; whatever goes wrong in MLflow becomes one warning and False."""
    return trouble(what, action) is None


def trouble(what: str, action: Callable[[], Any]) -> Exception | None:
    """Do `action`; whatever goes wrong in MLflow becomes one warning and is returned.

    MLflow hands on what its server, its database, its artifact store and their drivers raise, so
    every exception is caught; Ctrl-C is none.
    """
    started = time.monotonic()
    try:
        action()
        return None
    except Exception as error:
        log.warning(
            "tracking=off what=%s error=%s seconds=%.1f: MLflow %s; the work goes on without it",
            what, type(error).__name__, time.monotonic() - started, _said(error),
        )  # fmt: skip
        log.debug("tracking=off what=%s", what, exc_info=True)
        return error


def lost(error: BaseException | None) -> bool:
    """Whether nobody answered. MLflow wraps what `requests` says of it into an error of its own."""
    return any(
        getattr(each, "response", each) is None or isinstance(each, ConnectionError | TimeoutError)
        for each in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _said(error: Exception) -> str:
    """What a refusal gave as its reason: MLflow's code and one line, without a password."""
    for each in _chain(error):
        if isinstance(each, sqlite3.Error):
            return f"cannot use its database: {each}"
    code = getattr(error, "error_code", None)
    if code is None or lost(error):
        return "does not answer as expected"
    line = next(iter(str(error).removeprefix(f"{code}: ").splitlines()), "")
    return f"refuses: {code}, {re.sub(r'//[^/@ ]*@', '//', line)[:200]}"


def find_version(client: Any, lake: Lake, name: str, version: int) -> str | None:
    """MLflow's number of a version of the lake's model; None when it is not registered.

    A version that was registered from other files, by a lake that was here before, is not it.
    """
    registered = _registered_name(client, lake, name, create=False)
    digest = _pack_digest(lake, name, version)
    if registered is None or digest is None:
        return None
    known = client.search_model_versions(f"name = '{registered}'")
    numbers = [
        v.version for v in known
        if v.tags.get("lake_version") == str(version) and _registered_digest(client, v) == digest
    ]  # fmt: skip
    return str(min(numbers, key=int)) if numbers else None


def add_version(client: Any, lake: Lake, name: str, version: int, run_id: str) -> str:
    """Register a version whose files are the artifact `modelpack` of a run; MLflow's number.

    MLflow numbers versions itself; the lake's number is the tag `lake_version`. Doing it again
    changes nothing.

    Raises:
        LookupError: The lake has no such version.
    """
    found = find_version(client, lake, name, version)
    if found is not None:
        return found
    digest = _pack_digest(lake, name, version)
    if digest is None:
        raise LookupError(f"the lake has no version {version} of {name}")
    made = client.create_model_version(
        _registered_name(client, lake, name, create=True),
        source=f"{client.get_run(run_id).info.artifact_uri}/modelpack", run_id=run_id,
        tags={"lake_version": str(version), "lake": lake.uri, "pack_sha256": digest},
    )  # fmt: skip
    return str(made.version)


def point_alias(client: Any, lake: Lake, name: str, alias: str, version: int) -> None:
    """Let MLflow's alias name the registered version of this number.

    Raises:
        LookupError: That version is not registered.
    """
    number = find_version(client, lake, name, version)
    if number is None:
        raise LookupError(f"{name} version {version} is not registered")
    registered = _registered_name(client, lake, name, create=False)
    client.set_registered_model_alias(registered, alias, number)


def alias_version(client: Any, lake: Lake, name: str, alias: str) -> int | None:
    """The lake's number of the version behind an alias in MLflow; None when there is none.

    An alias that leads to other files than those of the lake's version counts as none.
    """
    registered = _registered_name(client, lake, name, create=False)
    if registered is None:
        return None
    # Listing the aliases instead of asking for one: an alias that is not there is no error.
    number = dict(client.get_registered_model(registered).aliases).get(alias)
    if number is None:
        return None
    found = client.get_model_version(registered, str(number))
    text = str(found.tags.get("lake_version", ""))
    if not text.isdecimal():
        return None
    digest = _pack_digest(lake, name, int(text))
    return int(text) if digest and digest == _registered_digest(client, found) else None


def _pack_digest(lake: Lake, name: str, version: int) -> str | None:
    """SHA-256 of the `pack.json` of the lake's version; None when it is not there."""
    where = join(lake.model(name, version), "pack.json")
    try:
        return sha256_hex(Store().read_bytes(where, max_bytes=10_000_000))
    except InputError:
        return None


def _registered_digest(client: Any, version: Any) -> str | None:
    """SHA-256 of the `pack.json` behind a version in MLflow; None when it cannot be told.

    Earlier releases set no tag: then of the artifact itself.
    """
    tag = version.tags.get("pack_sha256")
    if tag is not None:
        return str(tag)
    try:
        with tempfile.TemporaryDirectory(prefix="sgcd-") as scratch:
            file = client.download_artifacts(version.run_id, "modelpack/pack.json", scratch)
            return sha256_hex(Path(file).read_bytes())
    except Exception:  # the run or its files are gone; the version is registered anew
        log.debug("registered version %s has no files", version.version, exc_info=True)
        return None


def _mlflow_name(name: str) -> str:
    """Name of a model as MLflow takes it; one with `/`, `:` or `'` gets a digest in their place."""
    plain = re.sub(r"[/:']", "_", name)[:_LONGEST_NAME]
    if plain == name:
        return name
    return f"{plain[: _LONGEST_NAME - 9]}-{sha256_hex(name.encode())[:8]}"


def _registered_name(client: Any, lake: Lake, name: str, *, create: bool) -> str | None:
    """Name in the registry: the lake's own, or with a digest where another lake has taken it."""
    plain, digest = _mlflow_name(name), sha256_hex(lake.uri.encode())[:8]
    for candidate in (plain, f"{plain}.{digest}"):
        owner = _owner(client, candidate)
        if owner is None and not create:
            continue
        if owner is None:
            from mlflow.exceptions import MlflowException

            try:
                client.create_registered_model(candidate, tags={"lake": lake.uri})
            except MlflowException as error:  # another run was first
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            owner = _owner(client, candidate)
        # Models that an earlier version registered have no tag.
        if owner in (lake.uri, ""):
            return candidate
    if create:
        raise LookupError(f"{name} cannot be registered: both its names belong to other lakes")
    return None


def _owner(client: Any, registered: str) -> str | None:
    """Tag `lake` of a registered model, empty without one; None when there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_registered_model(registered).tags.get("lake", ""))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
