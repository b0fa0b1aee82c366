"""`sgcd promote`: the one way an alias moves. The lake first, then MLflow as a mirror."""

from __future__ import annotations

from typing import Any

from pipelines.aliases import Move, aliases, check_alias, current, move
from pipelines.lake import Lake
from ray_jobs.context import code_version, open_lake, quoted, recorded, track_files
from ray_jobs.models import meta_of, models, resolve
from ray_jobs.outcome import Outcome, table
from sgcd_core.errors import UsageError
from sgcd_core.io.store import Store, sha256_hex

#: What is compared of the version an alias leaves and the one it goes to.
COMPARED = (
    "target", "init", "parent", "training_sites", "sequences", "scans", "steps", "losses",
    "config_digest", "data_digest", "code_version",
)  # fmt: skip


def run(args: Any) -> Outcome:
    """Check the version, show what changes, move the alias, mirror it."""
    from sgcd_core.modelpack import checked_files

    lake, alias = open_lake(args.lake), check_alias(args.alias)
    if "@" not in args.reference:
        raise UsageError(_which(lake, args.reference))
    name, version = resolve(lake, args.reference)
    files = checked_files(lake.model(name, version), Store())
    digest = sha256_hex(files["pack.json"])
    del files
    before = current(lake, name, alias)
    lines = _changes(lake, name, before, version)
    what = f"{alias} of {name}"
    data = {
        "model": name, "alias": alias, "version": version,
        "previous": before.version if before else None, "pack_sha256": digest,
    }  # fmt: skip
    same = before is not None and (before.version, before.pack_sha256) == (version, digest)
    if args.dry_run:
        text = f"{what} is version {version} already" if same else (
            f"would move {what} {_from(before)}to version {version}"
        )  # fmt: skip
        return Outcome(text, lines=lines, data=data)
    done = None
    if not same:
        with recorded(lake, "promote") as summary:
            done = move(lake, name, alias, version, digest)
            summary.update(model=name, version=version, alias=alias)
            # Another promotion may have come between: what was really left is in the record.
            summary["previous"] = data["previous"] = done.previous if done else version
    mirrored = mirror(lake, name, alias)
    text = (
        f"{what} is version {version} already" if done is None
        else f"moved {what} {_from_version(done.previous)}to version {version}"
    )  # fmt: skip
    text += "" if mirrored else "; MLflow does not show it yet: run this again when it answers"
    follow = f"sgcd harmonize --lake {quoted(args.lake)} --model {quoted(f'{name}@{alias}')}"
    return Outcome(text, next=follow, lines=lines, data=data | {"mirrored": mirrored})


def mirror(lake: Lake, name: str, alias: str) -> bool:
    """Let MLflow's alias follow the lake's; False, with a warning, when MLflow does not answer.

    After each move in MLflow the lake is read again: of two promotions at once, whichever comes
    last in MLflow leaves there what the lake says.
    """
    from pipelines import registry
    from pipelines.tracking import Tracker, tracking_uri

    def follow() -> None:
        client = registry.connect(tracking_uri(lake))
        while (goal := current(lake, name, alias)) is not None:
            if registry.find_version(client, lake, name, goal.version) is None:
                # It was trained where MLflow did not answer, or in another lake.
                tags = {"code_version": code_version(), "model": name}
                with Tracker.start(lake, "promote", tags=tags) as tracker:
                    track_files(tracker, lake, name, goal.version)
            if registry.alias_version(client, lake, name, alias) != goal.version:
                registry.point_alias(client, lake, name, alias, goal.version)
            if current(lake, name, alias) == goal:
                return

    return registry.guarded("promote", follow)


def _which(lake: Lake, name: str) -> str:
    """What may be promoted of a model, when no version was named."""
    have = models(lake).get(name)
    if have is None:
        known = ", ".join(sorted(models(lake))) or "none"
        return f"there is no model {name!r}; the lake has {known}. Name one as NAME@VERSION."
    words: dict[int, list[str]] = {}
    for alias, version in aliases(lake, name).items():
        words.setdefault(version, []).append(alias)
    shown = [f"{v} ({', '.join(words[v])})" if v in words else str(v) for v in have]
    return f"say which version: {name}@VERSION; it has {', '.join(shown)}."


def _from(before: Move | None) -> str:
    return _from_version(before.version if before else None)


def _from_version(version: int | None) -> str:
    return "" if version is None else f"from version {version} "


def _changes(lake: Lake, name: str, before: Move | None, version: int) -> list[str]:
    """What sets the two versions apart, and what was measured of each."""
    new = meta_of(lake, name, version)
    old: dict[str, Any] = {}
    if before is not None and before.version in models(lake).get(name, []):
        old = meta_of(lake, name, before.version)
    left = "-" if before is None else f"version {before.version}"
    rows = [
        [key, _text(old.get(key)), _text(new.get(key))]
        for key in COMPARED
        if new.get(key) is not None and (not old or old.get(key) != new.get(key))
    ]
    versions = [version] if before is None else [before.version, version]
    found = _measured(lake, name, versions)
    rows += [
        [what, *("-" if before is None else _text(by.get(before.version)),), _text(by.get(version))]
        for what, by in sorted(found.items())
    ]  # fmt: skip
    lines = table(["", left, f"version {version}"], rows) if rows else []
    if not any(version in by for by in found.values()):
        lines.append(f"note: version {version} was not evaluated; `sgcd evaluate` measures it.")
    return [*lines, ""] if lines else []


def _measured(lake: Lake, name: str, versions: list[int]) -> dict[str, dict[int, float]]:
    """Mean over the sites of what `sgcd evaluate` measured of the model's own outputs."""
    from pipelines.catalog import Catalog

    sums: dict[str, dict[int, list[float]]] = {}
    for row in Catalog(lake).rows("site_metrics", where={"model": name}).to_pylist():
        if row["method"] != "sgcd" or row["site"] is None or row["after"] is None:
            continue
        if row["model_version"] in versions:
            key = f"{row['metric']}, {row['sequence']}"
            sums.setdefault(key, {}).setdefault(row["model_version"], []).append(row["after"])
    return {
        key: {v: sum(values) / len(values) for v, values in by.items()} for key, by in sums.items()
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return str(value)
