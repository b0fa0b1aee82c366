"""The models of a lake: which versions there are, and what `NAME[@VERSION]` means."""

from __future__ import annotations

import json
from typing import Any

from pipelines.lake import Lake
from sgcd_core.errors import InputError, ModelError
from sgcd_core.io.store import Store, join

#: Written last, so its presence says that a model is complete.
PACK = "pack.json"
#: What makes two trainings the same.
SAME = ("init", "kind", "target", "config_digest", "data_digest", "parent_weights")


def models(lake: Lake) -> dict[str, list[int]]:
    """Complete versions, rising, of every model of the lake."""
    root = lake.model("")
    found: dict[str, list[int]] = {}
    for item in Store().list(root + "/"):
        parts = item.uri[len(root) :].strip("/").split("/")
        if len(parts) == 3 and parts[2] == PACK and parts[1].isdigit():
            found.setdefault(parts[0], []).append(int(parts[1]))
    return {name: sorted(versions) for name, versions in found.items()}


def next_version(lake: Lake, name: str) -> int:
    """Number of the version to make."""
    return max(models(lake).get(name, [0])) + 1


def meta_of(lake: Lake, name: str, version: int) -> dict[str, Any]:
    """Metadata of one version, without reading its weights.

    Raises:
        ModelError: MODEL-MISSING or MODEL-FORMAT.
    """
    where = lake.model(name, version)
    try:
        body = json.loads(Store().read_bytes(join(where, PACK), max_bytes=10_000_000))
        meta: dict[str, Any] = body["meta"]
    except InputError as error:
        raise ModelError("there is no model here.", where=where) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{PACK} is damaged.", code="MODEL-FORMAT", where=where) from error
    return meta


def find_trained(lake: Lake, name: str, meta: dict[str, Any]) -> int | None:
    """Version of `name` that the same settings made from the same scans, if there is one."""
    for version in reversed(models(lake).get(name, [])):
        have = meta_of(lake, name, version)
        if all(have.get(key) == meta.get(key) for key in SAME):
            return version
    return None


def resolve(lake: Lake, reference: str) -> tuple[str, int]:
    """Name and version of `NAME`, `NAME@VERSION`, `NAME@latest` or `NAME@ALIAS`.

    Raises:
        ModelError: MODEL-MISSING, listing the models there are.
    """
    name, _, wish = reference.partition("@")
    have = models(lake)
    if name not in have:
        known = ", ".join(sorted(have)) or "none"
        raise ModelError(
            f"there is no model {name!r}; it has {known}.", where=lake.uri,
            hint="Make one with `sgcd train` and `sgcd tune`.",
        )  # fmt: skip
    versions = have[name]
    if wish in ("", "latest"):
        return name, versions[-1]
    version = int(wish.removeprefix("v")) if wish.removeprefix("v").isdigit() else None
    if version is None:
        version = _alias(lake, name, wish)
    if version not in versions:
        raise ModelError(
            f"model {name!r} has no version or alias {wish!r}; it has "
            f"{', '.join(map(str, versions))}.", where=lake.uri,
        )  # fmt: skip
    return name, version


def _alias(lake: Lake, name: str, alias: str) -> int | None:
    """Version of the lake behind an alias of the MLflow registry; None when it has none."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    from pipelines.tracking import tracking_uri

    try:
        client = MlflowClient(tracking_uri=tracking_uri(lake))
        number = client.get_model_version_by_alias(name, alias).tags.get("lake_version", "")
    except (MlflowException, SQLAlchemyError, OSError):
        return None
    return int(number) if number.isdigit() else None
