"""One vector for each volume from an image network: what a downstream classifier would see.

The paper takes ResNet18 without its last layer. Its weights are not in this package; without them
the style encoder at hand serves, and its name stands beside every figure.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import PurePosixPath
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sgcd_core.errors import ConfigError, ModelError
from sgcd_core.io.store import Store
from sgcd_core.style.encoder import (
    ENCODERS,
    MAX_WEIGHTS,
    StyleEncoder,
    load_encoder,
    parse_weights,
)
from sgcd_core.style.slices import SlicePlan, cut_slices, plan_slices

log = logging.getLogger(__name__)

#: Slices in each of three planes; their features are averaged.
SLICES = 4
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


class Features(Protocol):
    """A frozen network that describes a volume."""

    name: str

    def embed(self, volume: Tensor, plan: SlicePlan) -> Tensor:
        """Mean over the planned slices' features, (E,), of (X, Y, Z) float32 in [0, 1], RAS+."""
        ...


class ResNet18(nn.Module):
    """torchvision's ResNet18 without its last layer, 512 features of each slice.

    Source: He et al. 2016, CVPR. Grey is repeated to three channels, ImageNet's mean and deviation.
    """

    name = "resnet18"
    size = 224
    mean: Tensor
    std: Tensor

    def __init__(self, state: dict[str, Tensor], where: str) -> None:
        super().__init__()
        from torchvision.models import resnet18

        network = resnet18(weights=None)
        network.fc = nn.Identity()
        wanted = network.state_dict()
        state = {key.removeprefix("module."): value for key, value in state.items()}
        # Old files lack the counters of batch normalization, which nothing here reads.
        misfits = [
            key for key, value in wanted.items()
            if not key.endswith("num_batches_tracked")
            and (key not in state or state[key].shape != value.shape)
        ]  # fmt: skip
        if misfits:
            raise ModelError(
                f"does not fit torchvision's resnet18 ({len(misfits)} of {len(wanted)} weights "
                "are missing or of another shape).",
                code="ENCODER-WEIGHTS", where=where,
            )  # fmt: skip
        network.load_state_dict({key: state.get(key, value) for key, value in wanted.items()})
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))

    def embed(self, volume: Tensor, plan: SlicePlan) -> Tensor:
        """See `Features.embed`."""
        slices = cut_slices(volume, plan, self.size).expand(-1, 3, -1, -1)
        out: Tensor = self.network((slices - self.mean) / self.std)
        return out.mean(0)


def load_features(spec: str, store: Store | None = None) -> Features:
    """The network that a word stands for, frozen.

    The name of one whose weights the word gives ends in a digest of them: figures of two are two
    series.

    Args:
        spec: `resnet18:FILE_OR_URI`, or just the file or address (.pth, .pt, .bin, .safetensors);
            a style encoder as in `target_stage.encoder`; `auto`: `mri-dino` where its weights
            are at hand, else `statistics`.
        store: Where addresses are read.

    Raises:
        ConfigError: There is no network of this name.
        ModelError: ENCODER-WEIGHTS, the weights are not at hand or do not fit.
        StorageError: The store is out of reach.
    """
    store = store or Store()
    if spec == "auto":
        try:
            return load_encoder("mri-dino", store)
        except ModelError:
            log.info("features=statistics reason=no weights of mri-dino")
            return load_encoder("statistics", store)
    name, _, address = spec.partition(":")
    if name in ENCODERS:
        encoder = load_encoder(spec, store)
        return _named_by_weights(encoder) if address and encoder.state_dict() else encoder
    if name != ResNet18.name:
        if PurePosixPath(spec).suffix not in _SUFFIXES:
            raise ConfigError(
                f"there is no image network {spec!r}.", where="--features",
                hint=f"Give resnet18:FILE_OR_URI or one of auto, {', '.join(ENCODERS)}.",
            )  # fmt: skip
        address = spec
    if not address or not store.exists(address):
        raise ModelError(
            "there is no file of weights for resnet18 here.", code="ENCODER-WEIGHTS",
            where=address or "--features",
            hint="Give torchvision's state dict as --features resnet18:FILE_OR_URI.",
        )  # fmt: skip
    data = store.read_bytes(address, max_bytes=MAX_WEIGHTS)
    return _named_by_weights(ResNet18(parse_weights(data, address), address))


_Network = TypeVar("_Network", ResNet18, StyleEncoder)


def _named_by_weights(network: _Network) -> _Network:
    """The same, its name with a digest of all its weights."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode() + value.cpu().numpy().tobytes())
    network.name = f"{network.name}-{digest.hexdigest()[:8]}"
    return network


def features_of(
    network: Features, image: NDArray[Any], mask: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The features of one brain, float64 (E,).

    Args:
        network: From `load_features`.
        image: (X, Y, Z) float32 in [0, 1], RAS+.
        mask: (X, Y, Z) bool, not empty; outside it the image counts as 0.
    """
    plan = plan_slices(torch.from_numpy(np.ascontiguousarray(mask)), SLICES)
    volume = torch.from_numpy(np.where(mask, image, 0).astype(np.float32))
    with torch.no_grad():
        out: NDArray[np.float64] = network.embed(volume, plan).double().numpy()
    return out
