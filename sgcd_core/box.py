"""The model in the box: weights that come with the package, one file a preset.

`pipelines/box` made them (`make box`), from digital scans alone. Each file holds the network
(`network.*`), the composition model (`composition.*`) and, as metadata, what it was made with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from torch import Tensor

from sgcd_core.config import SgcdConfig
from sgcd_core.errors import ModelError
from sgcd_core.style.composition import CompositionModel, composition_from_state, composition_state

#: Settings a network must share with the box to start from it.
SHAPING = ("network", "schedule", "sequences")


@dataclass(frozen=True)
class Box:
    """Weights to start from.

    Attributes:
        network: State of `build_network`, float32.
        composition: Corrects the matching of scans to looks.
        meta: How it was made: `config` (the settings of `SHAPING` and the condition), `steps`,
            `volumes`, `seed` …
    """

    network: dict[str, Tensor]
    composition: CompositionModel | None
    meta: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As a safetensors file; the network in half precision, which its training uses too."""
        from safetensors.torch import save

        tensors = {f"network.{k}": v.detach().half() for k, v in self.network.items()}
        tensors |= {k: v.detach().half() for k, v in composition_state(self.composition).items()}
        ordered = {name: tensors[name].cpu().contiguous() for name in sorted(tensors)}
        return save(ordered, metadata={"box": json.dumps(self.meta, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Box:
        """Inverse of `to_bytes`."""
        from safetensors.torch import load

        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        tensors = load(data)
        network = {
            name.removeprefix("network."): value.float()
            for name, value in tensors.items()
            if name.startswith("network.")
        }
        meta = json.loads(header.get("__metadata__", {}).get("box", "{}"))
        return cls(network, composition_from_state(tensors), meta)


def shape_of(config: SgcdConfig) -> dict[str, Any]:
    """The settings that decide whether weights fit."""
    values = config.model_dump(mode="json")
    return {name: values[name] for name in SHAPING}


def find_box(config: SgcdConfig) -> Box | None:
    """The box whose weights fit the settings, or None."""
    folder = files("sgcd_core") / "weights"
    path = folder / f"{config.preset}.safetensors"
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
