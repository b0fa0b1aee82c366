"""From `--preset`, `--config` and `--set` to settings, alone or over those of a trained model."""

from __future__ import annotations

import json
from typing import Any

from pipelines.lake import Lake
from sgcd_core.config import (
    PRESETS,
    SgcdConfig,
    load_config,
    merge,
    parse_config,
    parse_pairs,
    read_settings,
)
from sgcd_core.errors import ConfigError, InputError
from sgcd_core.io.store import Store

#: What decides how scans are prepared; `sgcd prepare` leaves it in the lake.
REMEMBERED = ("preset", "sequences", "prepare")


def from_args(args: Any, lake: Lake) -> SgcdConfig:
    """The user's settings over those the lake's scans were prepared with.

    Whoever prepared with other settings than the defaults need not repeat them for every command.
    """
    return load_config(args.preset, args.config, args.settings, base=remembered(lake))


def remembered(lake: Lake) -> dict[str, Any]:
    """The settings the lake's scans were last prepared with; empty when none were.

    Raises:
        ConfigError: The file in the lake is damaged.
    """
    where = lake.prepared_with
    try:
        found = json.loads(Store().read_bytes(where, max_bytes=1_000_000))
        return {name: found[name] for name in REMEMBERED}
    except InputError:  # there is none
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "this file is damaged.", code="CONFIG-FILE", where=where,
            hint="Delete it, and run `sgcd prepare` again with your settings.",
        ) from error  # fmt: skip


def remember(lake: Lake, config: SgcdConfig) -> None:
    """Leave in the lake what its scans are prepared with."""
    values = config.model_dump(mode="json", include=set(REMEMBERED))
    body = (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()
    where, store = lake.prepared_with, Store()
    if not store.exists(where) or store.read_bytes(where) != body:
        store.write_bytes(where, body)


def settings_words(args: Any) -> list[str]:
    """The user's own settings again, as words of a further command."""
    words = ["--preset", args.preset] if args.preset else []
    words += ["--config", args.config] if args.config else []
    return words + [word for item in args.settings for word in ("--set", item)]


def preparation_line(config: SgcdConfig) -> list[str]:
    """One line that names what differs from the preset's preparation; none when nothing does."""
    usual, now = load_config(config.preset), config.model_dump(mode="json")
    plain = usual.model_dump(mode="json")
    words = [
        f"prepare.{name}={value}"
        for name, value in now["prepare"].items()
        if value != plain["prepare"][name]
    ]
    if now["sequences"] != plain["sequences"]:
        words.append(f"sequences={now['sequences']}")
    if config.preset != "tiny":
        words.insert(0, f"preset {config.preset}")
    return [f"settings kept in the lake: {', '.join(words)}"] if words else []


def over_model(args: Any, base: SgcdConfig) -> SgcdConfig:
    """A model's own settings with the user's laid over them.

    A preset or file names everything anew for the later stages, but the parts a model was built
    with (grid, network, condition, schedule, record, sequences) cannot be changed afterwards.

    Raises:
        ConfigError: A setting does not exist, has a wrong value, or is built into the model.
    """
    load_config(args.preset, args.config, args.settings)  # errors of the user's own words first
    user: dict[str, Any] = {}
    if args.preset:
        user = dict(PRESETS[args.preset])
    if args.config:
        user = merge(user, read_settings(args.config))
    user = merge(user, parse_pairs(args.settings))
    user.pop("preset", None)
    config = parse_config(merge(base.model_dump(), user))
    for part in ("prepare", "network", "condition", "schedule", "record", "sequences"):
        if getattr(config, part) != getattr(base, part):
            raise ConfigError(
                "this is built into the model and cannot be changed afterwards.",
                where=part, hint="Train another model with it, or leave the setting out.",
            )  # fmt: skip
    return config
