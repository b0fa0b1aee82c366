"""The models of a lake: which versions there are, and what `NAME[@VERSION]` means."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from pipelines.aliases import NEWEST, aliases, current
from pipelines.lake import Lake
from sgcd_core.errors import InputError, ModelError
from sgcd_core.io.store import Store, join, sha256_hex

log = logging.getLogger(__name__)

#: Written last, so its presence says that a model is complete.
PACK = "pack.json"
#: What makes two trainings the same.
SAME = (
    "init", "start_digest", "kind", "target", "config_digest", "data_digest", "parent_weights",
)  # fmt: skip


def models(lake: Lake) -> dict[str, list[int]]:
    """Complete versions, rising, of every model of the lake."""
    root = lake.model("")
    found: dict[str, list[int]] = {}
    for item in Store().list(root + "/"):
        parts = item.uri[len(root) :].strip("/").split("/")
        if len(parts) == 3 and parts[2] == PACK and parts[1].isdigit():
            found.setdefault(parts[0], []).append(int(parts[1]))
    return {name: sorted(versions) for name, versions in found.items()}


def target_model(site: str) -> str:
    """Name of the model that is tuned to a site: `target-SITE`.

    Where a name of a model cannot hold what is in the site's, a like one with a digest.
    """
    word = site
    if re.search(r"[/@\x00-\x1f\x7f]", site):  # folders, versions, what no store takes
        digest = sha256_hex(site.encode())[:8]
        word = "-".join([*re.findall(r"[\w.]+", site), digest])
    return f"target-{word}"


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

    An alias is looked up in the lake. One that only MLflow knows is taken from there with a
    warning; MLflow is asked for nothing else, and may be absent or out of reach.

    Raises:
        ModelError: MODEL-MISSING, listing the models there are; MODEL-ALIAS, the files behind an
            alias are not those that were promoted.
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
    if wish in ("", *NEWEST):
        return name, versions[-1]
    alias = alias_of(reference)
    if alias is None:
        version: int | None = int(wish.removeprefix("v"))
    else:
        version = _promoted(lake, name, alias) or _in_mlflow(lake, name, alias)
    if version not in versions:
        named = ", ".join(f"{word} ({v})" for word, v in aliases(lake, name).items())
        promote = f"`sgcd promote {name}@{versions[-1]} --alias {alias}` sets it."
        raise ModelError(
            f"model {name!r} has no version or alias {wish!r}; it has "
            f"{', '.join(map(str, versions))}{f'; aliases: {named}' if named else ''}.",
            where=lake.uri,
            hint=promote if alias else None,
        )  # fmt: skip
    return name, version


def alias_of(reference: str) -> str | None:
    """The alias in `NAME@ALIAS`; None where a version is named, or the newest is meant."""
    wish = reference.partition("@")[2]
    number = wish.removeprefix("v").isdecimal()
    return None if number or wish in ("", *NEWEST) else wish


def pinned(reference: str, name: str, version: int) -> str:
    """What the next command is to name: the version in place of an alias, which may move."""
    return f"{name}@{version}" if "@" in reference else name


def pack_digest(lake: Lake, name: str, version: int) -> str:
    """SHA-256 of a version's `pack.json`.

    Raises:
        ModelError: MODEL-MISSING.
    """
    where = lake.model(name, version)
    try:
        return sha256_hex(Store().read_bytes(join(where, PACK), max_bytes=10_000_000))
    except InputError as error:
        raise ModelError("there is no model here.", where=where) from error


def _promoted(lake: Lake, name: str, alias: str) -> int | None:
    """Version behind an alias of the lake, its files being those that were promoted."""
    found = current(lake, name, alias)
    if found is None:
        return None
    if pack_digest(lake, name, found.version) != found.pack_sha256:
        raise ModelError(
            f"version {found.version} of {name} was changed after it was promoted to {alias}.",
            code="MODEL-ALIAS", where=lake.model(name, found.version),
            hint="Restore the model's files, or look at it and promote it again.",
        )  # fmt: skip
    return found.version


def _in_mlflow(lake: Lake, name: str, alias: str) -> int | None:
    """Version behind an alias that only MLflow knows; None when it has none or is out of reach."""
    from pipelines import registry
    from pipelines.tracking import database_file, tracking_uri

    found: list[int | None] = []
    uri = tracking_uri(lake)
    file = database_file(uri)
    if file is not None and not file.exists():
        return None
    registry.guarded(
        "alias",
        lambda: found.append(registry.alias_version(registry.connect(uri), lake, name, alias)),
    )
    version = next(iter(found), None)
    if version is not None:
        log.warning(
            "alias=%s model=%s version=%d: only MLflow knows this alias. Keep it in the lake with "
            "`sgcd promote`.", alias, name, version,
        )  # fmt: skip
    return version
