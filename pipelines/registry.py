"""The lake's models in MLflow's registry: versions and aliases as a mirror for people to look at.

Nothing here decides which model is used: `pipelines.aliases` does. A server may serve many lakes,
so a registered model belongs to the lake that its tag `lake` names.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from pipelines.lake import Lake

log = logging.getLogger(__name__)

#: How long a server may take to take a connection.
CONNECT_SECONDS = 3.0
_PORTS = {"http": 80, "https": 443}


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
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    # MLflow's own name for what the store reads from the usual variables.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        os.environ.setdefault("MLFLOW_S3_ENDPOINT_URL", endpoint)
    _knock(uri)
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
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
    """Do `action`; whatever goes wrong in MLflow becomes one warning and False.

    MLflow hands on what its server, its database, its artifact store and their drivers raise, so
    every exception is caught; Ctrl-C is none.
    """
    started = time.monotonic()
    try:
        action()
        return True
    except Exception as error:
        log.warning(
            "tracking=off what=%s error=%s seconds=%.1f: MLflow does not answer as expected; "
            "the work goes on without it",
            what, type(error).__name__, time.monotonic() - started,
        )  # fmt: skip
        log.debug("tracking=off what=%s", what, exc_info=True)
        return False


def find_version(client: Any, lake: Lake, name: str, version: int) -> str | None:
    """MLflow's number of a version of the lake's model; None when it is not registered."""
    registered = _registered_name(client, lake, name, create=False)
    if registered is None:
        return None
    known = client.search_model_versions(f"name = '{registered}'")
    numbers = [v.version for v in known if v.tags.get("lake_version") == str(version)]
    return str(min(numbers, key=int)) if numbers else None


def add_version(client: Any, lake: Lake, name: str, version: int, run_id: str) -> str:
    """Register a version whose files are the artifact `modelpack` of a run; MLflow's number.

    MLflow numbers versions itself; the lake's number is the tag `lake_version`. Doing it again
    changes nothing.
    """
    found = find_version(client, lake, name, version)
    if found is not None:
        return found
    made = client.create_model_version(
        _registered_name(client, lake, name, create=True),
        source=f"{client.get_run(run_id).info.artifact_uri}/modelpack",
        run_id=run_id, tags={"lake_version": str(version), "lake": lake.uri},
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
    """The lake's number of the version behind an alias in MLflow; None when there is none."""
    registered = _registered_name(client, lake, name, create=False)
    if registered is None:
        return None
    # Listing the aliases instead of asking for one: an alias that is not there is no error.
    number = dict(client.get_registered_model(registered).aliases).get(alias)
    if number is None:
        return None
    tags = client.get_model_version(registered, str(number)).tags
    text = str(tags.get("lake_version", ""))
    return int(text) if text.isdigit() else None


def _registered_name(client: Any, lake: Lake, name: str, *, create: bool) -> str | None:
    """Name in the registry: the lake's own, or with a digest where another lake has taken it."""
    digest = hashlib.sha256(lake.uri.encode()).hexdigest()[:8]
    for candidate in (name, f"{name}.{digest}"):
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
