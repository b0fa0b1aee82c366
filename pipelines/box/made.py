"""What files of a box were made with, so that none is gone on with by other means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipelines.box.scans import Pool
from sgcd_core.box import composition_bytes
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import UsageError
from sgcd_core.io.store import sha256_hex
from sgcd_core.style.composition import Composition

Made = Mapping[str, str]


def heads_of(pool: Pool) -> str:
    """Digest of the list of anatomies that a pool is made of."""
    return sha256_hex(json.dumps(pool.anatomies()).encode())[:16]


def made_of(config: SgcdConfig, composition: Composition, pool: Pool) -> dict[str, str]:
    """Digests of what samples, and weights trained on them, follow from."""
    return {
        "settings": config.digest(),
        "composition model": sha256_hex(composition_bytes(composition, {}))[:16],
        "anatomies": heads_of(pool),
    }


def require_same(path: Path, found: Made | None, made: Made) -> None:
    """Refuse to go on with a file that was made with something else.

    Args:
        path: The file.
        found: What it says; None where it says nothing.
        made: What it would be made with now.

    Raises:
        UsageError: They differ.
    """
    differs = [name for name, value in made.items() if (found or {}).get(name) != value]
    if differs:
        raise UsageError(
            f"{path.name} was not made with the same {' and '.join(differs)}.",
            where=str(path.parent), hint="Take another folder, or take the files there away.",
        )  # fmt: skip
