"""From `--preset`, `--config` and `--set` to settings, alone or over those of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sgcd_core.config import PRESETS, SgcdConfig, load_config, merge, parse_config, parse_pairs
from sgcd_core.errors import ConfigError


def from_args(args: Any) -> SgcdConfig:
    """The settings of a command that starts from nothing."""
    return load_config(args.preset, args.config, args.settings)


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
        user = merge(user, yaml.safe_load(Path(args.config).read_text(encoding="utf-8")) or {})
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
