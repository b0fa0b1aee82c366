"""Typed settings: frozen, unknown keys refused, checked when built.

One model per part, beside each other here so that a user can read every setting in one sitting.
`load_config` merges, in this order: defaults, preset, YAML file, `key=value` pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sgcd_core.errors import ConfigError, InputError

Prediction = Literal["epsilon", "v", "x0", "residual"]
Precision = Literal["auto", "bf16", "fp32"]


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the resolved settings."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class PrepareConfig(Settings):
    """How a scan is brought onto the model grid."""

    version: int = Field(2, description="raised when the same settings come to give other volumes")
    shape: tuple[int, int, int] = Field((48, 56, 48), description="model grid, voxels, RAS+")
    mm: float = Field(4.0, gt=0.2, le=8, description="model grid voxel side, mm")
    brain_extraction: Literal["auto", "deepbet", "none"] = Field(
        "auto", description="auto: keep an already extracted brain, else deepbet"
    )
    bias_correction: Literal["n4", "none"] = Field(
        "n4", description="N4 bias field correction, inside the brain"
    )
    registration: Literal["rigid", "none"] = Field(
        "rigid", description="rigid to the ICBM152 template; none: centre of mass only"
    )
    percentiles: tuple[float, float] = Field((0.5, 99.5), description="masked, map to 0 and 1")
    max_voxel_mm: float = Field(4.0, description="a longer voxel side is refused (SCAN-COARSE)")
    min_extent_mm: float = Field(100.0, description="a smaller field of view is refused")
    max_inflated_bytes: int = Field(2_000_000_000, description="bound on a decompressed scan")

    @model_validator(mode="after")
    def _check(self) -> Self:
        lo, hi = self.percentiles
        if not 0 <= lo < hi <= 100:
            raise ValueError(f"percentiles must rise within 0 to 100, got {lo}, {hi}")
        return self


class ConditionConfig(Settings):
    """What the network is told about the anatomy (Eq. 2), and how style is kept out of it."""

    gradient_channel: bool = Field(True, description="the paper's gradient map G")
    content_channel: bool = Field(True, description="the contrast-augmented scan itself")
    match: Literal["composition", "histogram", "none"] = Field(
        "composition",
        description="the condition is first matched to the wanted look: rank for rank "
        "(histogram), corrected for how much of each tissue there is (composition), or not",
    )
    look_label: bool = Field(
        True,
        description="the class embedding reads the looks beside the sequence; false: the sequence "
        "alone, as in the paper",
    )
    contrast_augmentation: bool = Field(
        True, description="random monotone remap, bias, noise and blur before G is taken (training)"
    )
    remap_knots: int = Field(6, ge=2, description="knots of the random monotone intensity map")
    remap_strength: float = Field(0.7, ge=0, le=1, description="0 identity, 1 fully random map")
    bias_strength: float = Field(0.1, ge=0, description="log-amplitude of the random bias field")
    noise_std: float = Field(0.03, ge=0, description="largest standard deviation of added noise")
    blur_mm: float = Field(
        1.3, ge=0, description="most that resolution is lowered, an axis: sigma of a Gaussian, mm"
    )
    sharpen_mm: float = Field(
        0.0, ge=0, description="most that it is raised; for scans without noise (the box)"
    )
    other_voxels: float = Field(
        0.0, ge=0, le=1,
        description="share of scans brought onto another scanner's voxels and back (the box)",
    )  # fmt: skip
    fine_voxel_mm: float = Field(
        0.0, ge=0,
        description="between scanners whose longest voxel sides are both at most this a part of "
        "the look filter is applied, where one is longer by 0.15 of it all; 0: always all",
    )  # fmt: skip
    fine_voxel_filter: float = Field(0.5, ge=0, le=1, description="that part")

    @property
    def matched_content(self) -> bool:
        """Whether the network is given the scan itself, brought to the wanted look."""
        return self.content_channel and self.match != "none"


class ScheduleConfig(Settings):
    """Noise schedule of the diffusion (Eq. 1)."""

    timesteps: int = Field(1000, ge=2, description="T")
    beta_start: float = Field(0.0015, gt=0, lt=1, description="variance added by the first step")
    beta_end: float = Field(0.0195, gt=0, lt=1, description="variance added by the last step")
    kind: Literal["linear", "scaled_linear"] = Field(
        "linear", description="linear in the variance, or in its square root (scaled_linear)"
    )


class NetworkConfig(Settings):
    """The 3D U-Net (MONAI DiffusionModelUNet)."""

    channels: tuple[int, ...] = Field((32, 64, 128), description="features of each level")
    res_blocks: int = Field(1, ge=1, description="residual blocks of each level")
    attention_levels: tuple[bool, ...] = Field(
        (False, False, True), description="levels with self-attention, one entry for each"
    )
    patch: int = Field(
        2, ge=1, description="voxels along each side that one cell of the U-Net's grid holds"
    )
    curve_knots: int = Field(
        9, ge=0, description="knots of the intensity curve predicted for each cell; 0: none"
    )
    filter_radius: int = Field(
        1, ge=0, description="half-width in voxels of the filter predicted for each cell; 0: none"
    )
    look_filter_radius: int = Field(
        2, ge=0, description="half-width in voxels of the filter that the looks tell, before the "
        "U-Net; 0: none; only with prediction=residual",
    )  # fmt: skip
    head_channels: int = Field(16, ge=1, description="features of one attention head")
    norm_groups: int = Field(8, ge=1, description="groups of the group normalization")
    prediction: Prediction = Field("residual", description="what the network's output means")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.channels) != len(self.attention_levels):
            raise ValueError("attention_levels needs one entry for each of channels")
        if any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels must be multiples of norm_groups={self.norm_groups}")
        return self


class RecordConfig(Settings):
    """The running record of each sequence's histogram, mean and deviation (Eqs. 5-8)."""

    bins: int = Field(100, ge=2, description="bins of the soft histogram")
    bandwidth: float = Field(0.01, gt=0, description="Gaussian kernel, in units of [0, 1]")
    decay: float = Field(0.95, ge=0, lt=1, description="weight of the old record")
    order: Literal["compare_then_update", "update_then_compare"] = Field(
        "compare_then_update", description="the latter is Algorithm 1 as printed"
    )


class SamplerConfig(Settings):
    """How an image is drawn from the model."""

    t_start: int = Field(999, ge=1, description="timestep noise is added to; t_0 of the method")
    t_reverse: int | None = Field(
        None, ge=1, description="timestep generation starts at, if not t_start (paper as printed)"
    )
    steps: int = Field(1, ge=1, description="network evaluations down to 0 (T_r)")
    invert_steps: int = Field(4, ge=1, description="network evaluations of DDIM inversion (T_f)")
    start: Literal["noise", "inversion"] = Field(
        "noise", description="noise: seeded forward process; inversion: DDIM upwards"
    )
    kind: Literal["ddim", "anchored"] = Field("ddim", description="anchored: Eqs. 10-11 as printed")
    seeds: int = Field(1, ge=1, description="outputs averaged")
    distribution: Literal["look", "network"] = Field(
        "look",
        description="intensities of the output: look: the network's image mapped, voxel by voxel "
        "and rising, onto the distribution of the scan brought to the wanted look; network: as "
        "drawn, and always so where condition.match or condition.content_channel is off",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        top = self.t_reverse or self.t_start
        if self.steps > top + 1 or self.invert_steps > self.t_start + 1:
            raise ValueError("steps and invert_steps cannot exceed the timesteps they span")
        return self


class GlobalConfig(Settings):
    """Stage 1: global harmonization."""

    steps: int = Field(300, ge=1, description="optimizer steps, unless epochs is given")
    epochs: int | None = Field(None, ge=1, description="overrides steps")
    batch_size: int = Field(2, ge=1, description="volumes per step, over all workers")
    accumulate: int = Field(
        1, ge=1,
        description="parts in which a worker takes its share of a step, gradients added up: "
        "less memory, the same result",
    )  # fmt: skip
    learning_rate: float = Field(1e-3, gt=0, description="of Adam, from fresh weights")
    box_rate: float = Field(
        0.02, gt=0, le=1, description="part of learning_rate when starting from the box"
    )
    warmup_steps: int = Field(20, ge=0, description="in which the learning rate rises from 0")
    schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="of the learning rate after the warm-up"
    )
    loss: Literal["l1", "l2"] = Field("l1", description="of the network's prediction (L_N)")
    loss_mm: float = Field(
        8.0,
        ge=0,
        description="L_N and L_G compare images smoothed to this width (FWHM, mm): a "
        "scan's noise is nothing to learn; 0: voxel by voxel",
    )
    weight_noise: float = Field(1.0, ge=0, description="weight of L_N")
    weight_gradient: float = Field(0.1, ge=0, description="weight of L_G")
    weight_record: float = Field(0.1, ge=0, description="weight of L_E")
    x0_weight: Literal["snr", "flat"] = Field(
        "snr", description="weight over t of losses taken on the estimate of the clean image"
    )
    t_power: float = Field(
        0.2, gt=0, description="t is drawn as T·u^p: below 1 favours the noisy end"
    )
    crop: tuple[int, int, int] | None = Field(
        None,
        description="denoising is trained on random windows of so many voxels; conditions "
        "are taken from whole scans all the same; none: whole scans",
    )
    site_balance: bool = Field(
        True, description="every site and sequence equally often; false: every scan"
    )
    precision: Precision = Field("auto", description="auto: bf16 where the device is made for it")
    checkpoint_every: int = Field(
        100, ge=1, description="steps between two checkpoints, of both stages"
    )
    clip_norm: float = Field(1.0, gt=0, description="longest gradient; a longer one is shortened")


class TargetConfig(Settings):
    """Stage 2: fine-tuning to one site's look."""

    steps: int = Field(120, ge=1, description="optimizer steps, unless epochs is given")
    epochs: int | None = Field(None, ge=1, description="overrides steps")
    batch_size: int = Field(1, ge=1, description="volumes of each role per step, over all workers")
    accumulate: int = Field(
        1, ge=1,
        description="parts in which a worker takes its share of a step, gradients added up: "
        "less memory, the same result",
    )  # fmt: skip
    learning_rate: float = Field(
        1e-6, gt=0, description="as the paper's; more undoes what the box has learned of noise"
    )
    encoder: str = Field(
        "mri-dino",
        description="statistics | mri-dino | biomedclip | clip, optionally NAME:weights-uri",
    )
    slices_per_plane: int = Field(1, ge=1, description="slices the encoder sees of each plane")
    style_every: int = Field(4, ge=1, description="steps between two evaluations of L_S and L_R")
    weight_style: float = Field(0.1, ge=0, description="L_S, Eq. 12")
    weight_reconstruction: float = Field(0.1, ge=0, description="L_R, Eq. 13")
    weight_anatomy: float = Field(0.1, ge=0, description="gradient term; 0 in preset paper")
    target_denoising: float = Field(
        1.0, ge=0, description="weight of plain denoising of the target's own scans"
    )
    backprop: Literal["stepwise", "chain"] = Field(
        "stepwise", description="through each generative step by itself, or through all (chain)"
    )
    last_k: int = Field(1, ge=1, description="generative steps that are trained (stepwise)")
    precision: Precision = Field("auto", description="auto: bf16 where the device is made for it")
    clip_norm: float = Field(1.0, gt=0, description="longest gradient; a longer one is shortened")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.accumulate > 1 and self.backprop == "stepwise" and self.last_k > 1:
            raise ValueError("accumulate above 1 needs last_k=1 or backprop=chain")
        return self


class TransportConfig(Settings):
    """How the correction is carried to the native grid."""

    radius: int = Field(1, ge=1, description="window half-width of the local linear maps, voxels")
    epsilon: float = Field(1e-4, gt=0, description="ridge of the local regression")
    remainder: float = Field(
        0.05,
        ge=0,
        le=1,
        description="the most that what the maps leave over may change a voxel, of intensities in "
        "[0, 1]; 0: the maps alone",
    )


class GuardConfig(Settings):
    """When a written result is marked `flagged`."""

    min_gradient_correlation: float = Field(
        0.75, ge=-1, le=1, description="of edges before and after; below: FLAG-ANATOMY"
    )
    min_local_correlation: float = Field(
        0.5, ge=-1, le=1,
        description="of gradients in any cube of 24 mm with edges; below: FLAG-ANATOMY",
    )  # fmt: skip
    max_volume_drift: float = Field(0.15, ge=0, description="relative, largest of the tissues")
    max_outlier_score: float = Field(
        4.0, gt=0, description="distance to training scans, in typical distances"
    )


class SgcdConfig(Settings):
    """All settings of a run."""

    preset: Literal["tiny", "small", "paper"] = Field(
        "tiny", description="settings to start from; paper: the literal reading of the paper"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of all noise and of the order of scans")
    sequences: tuple[Literal["T1w", "T2w"], ...] = Field(
        ("T1w", "T2w"), min_length=1, description="BIDS suffixes to work on, one or both"
    )
    prepare: PrepareConfig = PrepareConfig()
    condition: ConditionConfig = ConditionConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    network: NetworkConfig = NetworkConfig()
    record: RecordConfig = RecordConfig()
    global_sampler: SamplerConfig = SamplerConfig()
    target_sampler: SamplerConfig = SamplerConfig()
    global_stage: GlobalConfig = GlobalConfig()
    target_stage: TargetConfig = TargetConfig()
    transport: TransportConfig = TransportConfig()
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("global_sampler", "target_sampler"):
            top = getattr(self, name).t_start
            if top >= self.schedule.timesteps:
                raise ValueError(
                    f"{name}.t_start={top} must be below "
                    f"schedule.timesteps={self.schedule.timesteps}"
                )
        if self.network.prediction == "residual" and not self.condition.content_channel:
            raise ValueError("network.prediction=residual needs condition.content_channel=true")
        if self.network.curve_knots == 1:
            raise ValueError("network.curve_knots must be 0 or at least 2")
        for name in ("curve_knots", "filter_radius"):
            if getattr(self.network, name) and not self.condition.content_channel:
                raise ValueError(f"network.{name} needs condition.content_channel=true")
        factor = self.network.patch * 2 ** (len(self.network.channels) - 1)
        if any(side % factor for side in self.prepare.shape):
            raise ValueError(f"prepare.shape={self.prepare.shape} must be multiples of {factor}")
        crop = self.global_stage.crop
        if crop is not None and any(
            side % factor or not 0 < side <= whole
            for side, whole in zip(crop, self.prepare.shape, strict=True)
        ):
            raise ValueError(
                f"global_stage.crop={crop} must be multiples of {factor} within prepare.shape"
            )
        return self


#: What each preset changes. `paper` is the paper's literal reading with the authors' numbers.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "prepare": {"shape": (96, 112, 96), "mm": 2.0},
        "condition": {"noise_std": 0.08, "fine_voxel_mm": 1.3},
        "global_stage": {"steps": 4000, "crop": (48, 48, 48)},
        "target_stage": {"steps": 400},
    },
    "paper": {
        "prepare": {"shape": (160, 192, 160), "mm": 1.0},
        "condition": {
            "content_channel": False, "contrast_augmentation": False, "match": "none",
            "look_label": False,
        },
        "network": {
            "channels": (32, 64, 256, 256),
            "res_blocks": 2,
            "attention_levels": (False, False, True, True),
            "head_channels": 32,
            "norm_groups": 32,
            "patch": 1,
            "curve_knots": 0,
            "filter_radius": 0,
            "look_filter_radius": 0,
            "prediction": "epsilon",
        },
        "record": {"decay": 0.2, "order": "update_then_compare"},
        "global_sampler": {"t_start": 999, "steps": 25, "distribution": "network"},
        # The paper counts timesteps from 1, with 0 the clean image; here 0 is its first noisy one.
        # So T_f = 35 and T_r = 25 steps of one timestep each begin at 34 and 24.
        "target_sampler": {
            "t_start": 34, "t_reverse": 24, "steps": 25, "invert_steps": 35,
            "start": "inversion", "kind": "anchored", "distribution": "network",
        },
        "global_stage": {
            "site_balance": False, "clip_norm": 1e9,  # every scan once an epoch; plain Adam
            "epochs": 300, "learning_rate": 1e-4, "warmup_steps": 0, "schedule": "constant",
            "loss": "l2", "loss_mm": 0.0, "weight_gradient": 1.0, "weight_record": 1.0,
            "x0_weight": "flat", "t_power": 1.0, "batch_size": 1, "precision": "fp32",
        },
        "target_stage": {
            "epochs": 30, "learning_rate": 1e-6, "encoder": "biomedclip", "weight_style": 1.0,
            "weight_reconstruction": 1.0, "weight_anatomy": 0.0, "target_denoising": 0.0,
            "slices_per_plane": 3, "style_every": 1, "clip_norm": 1e9,
            "backprop": "chain", "precision": "fp32",
        },
    },
}  # fmt: skip


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it, nested mappings merged."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            out[key] = merge(old, value)
        else:
            out[key] = value
    return out


#: What PyYAML raises; thousands of brackets are too deep for it.
_NO_YAML = (ValueError, yaml.YAMLError, RecursionError)


def parse_pairs(settings: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1"]` → `{"a": {"b": 1}}`; values are read as YAML.

    Raises:
        ConfigError: CONFIG-KEY, it is no pair; CONFIG-VALUE, the value is not YAML.
    """
    out: dict[str, Any] = {}
    for item in settings:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise ConfigError(
                f"--set takes key=value, got {item!r}.", code="CONFIG-KEY",
                hint="Example: --set global_stage.steps=500",
            )  # fmt: skip
        try:
            node: Any = yaml.safe_load(text)
        except _NO_YAML as error:
            raise ConfigError(
                f"--set cannot read {text[:60]!r}: a value is written as in YAML.",
                where=key.strip(), hint="Example: --set 'prepare.shape=[48, 56, 48]'",
            ) from error  # fmt: skip
        for part in reversed(key.strip().split(".")):
            node = {part: node}
        out = merge(out, node)
    return out


def load_config(
    preset: str | None = None,
    file: str | Path | None = None,
    settings: Sequence[str] = (),
    *,
    base: Mapping[str, Any] | None = None,
) -> SgcdConfig:
    """Resolve settings: defaults, then preset, then YAML file, then `key=value` pairs.

    Args:
        preset: Name of a preset; wins over one that the file names.
        file: YAML file, or its s3:// address.
        settings: `key=value` pairs.
        base: Settings to start from, their preset among them. They lie between preset and file,
            and count for nothing when the user names another preset.

    Raises:
        ConfigError: A key does not exist, a value is not allowed or the file cannot be read.
        StorageError: The store does not answer.
    """
    user = merge({} if file is None else read_settings(file), parse_pairs(settings))
    base = base or {}
    name = preset or user.get("preset") or base.get("preset") or "tiny"
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"preset {name!r} does not exist; choose from {', '.join(PRESETS)}.")
    start = merge(PRESETS[name], base if name == base.get("preset") else {})
    return parse_config(merge(merge(start, user), {"preset": name}))


def read_settings(file: str | Path) -> dict[str, Any]:
    """What a YAML file, here or at an s3:// address, says.

    Raises:
        ConfigError: CONFIG-FILE, it cannot be read.
        StorageError: The store does not answer.
    """
    from sgcd_core.io.store import Store, is_s3

    where = str(file)
    try:
        if is_s3(where):
            text = Store().read_bytes(where, max_bytes=1_000_000).decode()
        else:
            text = Path(file).read_text(encoding="utf-8")
        found = yaml.safe_load(text) or {}
    except (OSError, InputError, *_NO_YAML) as error:
        raise ConfigError(
            f"cannot be read as YAML ({getattr(error, 'code', type(error).__name__)}).",
            code="CONFIG-FILE", where=where,
        ) from error  # fmt: skip
    if not isinstance(found, dict):
        raise ConfigError("must hold key: value lines.", code="CONFIG-FILE", where=where)
    return found


def parse_config(values: Mapping[str, Any]) -> SgcdConfig:
    """Settings from nested values; the errors name the setting to change."""
    try:
        return SgcdConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "settings"
        unknown = first["type"] == "extra_forbidden"
        raise ConfigError(
            "this setting does not exist." if unknown else f"{first['msg']}.",
            code="CONFIG-KEY" if unknown else "CONFIG-VALUE",
            where=key,
            hint="See `sgcd train --help` or docs/reference.md for the settings.",
        ) from error
