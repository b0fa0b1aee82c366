"""The model in the box: weights that come with the package. `pipelines/box` made them.

`composition.safetensors` corrects the matching of scans to looks, whatever the preset;
`PRESET.safetensors` is a network to start Stage 1 from. All of it learned from digital scans alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from torch import Tensor

from sgcd_core.config import SgcdConfig
from sgcd_core.errors import ModelError
from sgcd_core.style.composition import Composition, composition_from_state, composition_state

#: Settings a network must share with the box to start from it.
SHAPING = ("network", "schedule", "sequences")
#: And of the condition, those that decide what goes in.
INPUTS = ("gradient_channel", "content_channel", "look_label")
#: What the code around the U-Net makes of its weights; raised when that changes.
LAYOUT = 3


@dataclass(frozen=True)
class Box:
    """A network to start from.

    Attributes:
        network: State of `build_network`, float32.
        meta: How it was made: `shape` (the settings of `SHAPING`), `steps`, `volumes`,
            `filter_volumes` (scans the look filter was fitted to), `seed` …
    """

    network: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As a safetensors file, in half precision."""
        return _save(self.network, self.meta)

    @classmethod
    def from_bytes(cls, data: bytes) -> Box:
        """Inverse of `to_bytes`."""
        return cls(*_load(data))


def _save(tensors: dict[str, Tensor], meta: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    half = {name: tensors[name].detach().half().cpu().contiguous() for name in sorted(tensors)}
    return save(half, metadata={"box": json.dumps(meta, sort_keys=True)})


def _load(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors.torch import load

    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensors = {name: value.float() for name, value in load(data).items()}
    return tensors, json.loads(header.get("__metadata__", {}).get("box", "{}"))


def composition_bytes(model: Composition, meta: dict[str, Any]) -> bytes:
    """The composition model as a safetensors file, in half precision."""
    return _save(composition_state(model), meta)


@cache
def load_composition() -> Composition | None:
    """The composition model of the package; None if it was built without."""
    path = files("sgcd_core") / "weights" / "composition.safetensors"
    return composition_from_state(_load(path.read_bytes())[0]) if path.is_file() else None


def start_digest(config: SgcdConfig, init: str) -> str | None:
    """First 16 hex digits of the SHA-256 of what comes with the package and enters a training.

    The composition model where scans are matched by it, and the network where `init` is `box`.
    """
    names = ["composition"] if config.condition.match == "composition" else []
    names += [config.preset] if init == "box" else []
    paths = [files("sgcd_core") / "weights" / f"{name}.safetensors" for name in names]
    found = [path.read_bytes() for path in paths if path.is_file()]
    return hashlib.sha256(b"".join(found)).hexdigest()[:16] if found else None


def shape_of(config: SgcdConfig) -> dict[str, Any]:
    """The settings that decide whether weights fit."""
    values = config.model_dump(mode="json")
    inputs = {name: values["condition"][name] for name in INPUTS}
    return {name: values[name] for name in SHAPING} | {"inputs": inputs, "layout": LAYOUT}


def find_box(config: SgcdConfig) -> Box | None:
    """The box whose weights fit the settings, or None."""
    path = files("sgcd_core") / "weights" / f"{config.preset}.safetensors"
    if not path.is_file():
        return None
    box = Box.from_bytes(path.read_bytes())
    return box if box.meta.get("shape") == shape_of(config) else None


def load_box(config: SgcdConfig) -> Box:
    """The box whose weights fit the settings.

    Raises:
        ModelError: MODEL-MISSING.
    """
    box = find_box(config)
    if box is None:
        raise ModelError(
            f"no weights in the box fit preset {config.preset} with these settings.",
            code="MODEL-MISSING", where="--init box",
            hint="Keep the preset's network and schedule, or train with --init scratch.",
        )  # fmt: skip
    return box
