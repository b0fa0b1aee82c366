"""Scan in, scan out: a modelpack bound to a device, for any number of prepared scans."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sgcd_core.batch import Batch, make_batch, to_device
from sgcd_core.config import SamplerConfig, SgcdConfig
from sgcd_core.diffusion.network import ConditionalDenoiser, LookEmbedding, build_network
from sgcd_core.diffusion.sampler import noise_for, starting_image, walk_down
from sgcd_core.diffusion.schedule import Schedule
from sgcd_core.errors import InputError, ModelError
from sgcd_core.modelpack import ModelPack
from sgcd_core.style.composition import composition_from_state
from sgcd_core.style.histogram import redistributed
from sgcd_core.style.look import LOOK_SIZE, OWN_PART, blend, measure_look
from sgcd_core.style.outlier import OutlierModel, style_features
from sgcd_core.volume.condition import (
    Goals,
    LookMatcher,
    build_condition,
    from_network,
    to_network,
)


@dataclass(frozen=True)
class Harmonized:
    """A harmonized volume on the model grid.

    Attributes:
        image: (X, Y, Z) float32 in [0, 1], RAS+, 0 outside the mask.
        uncertainty: Voxelwise standard deviation over the samples, or None for one sample.
        seconds: Wall time of the network.
    """

    image: NDArray[np.float32]
    uncertainty: NDArray[np.float32] | None
    seconds: float


class Harmonizer:
    """A trained model, ready to run.

    Args:
        pack: Global model (the common domain comes out) or target model (the target's look does).
        device: Where the networks run.
    """

    def __init__(self, pack: ModelPack, device: torch.device | str = "cpu") -> None:
        self.config = pack.config
        self.device = torch.device(device)
        self.schedule = Schedule(pack.state["alpha_bars"])
        self.is_target = pack.global_network is not None
        self.outliers = OutlierModel.from_state(pack.state)
        self.matcher = LookMatcher(
            self.config.condition.match, self.config.prepare.mm, self.config.sequences,
            composition_from_state(pack.state),
        )  # fmt: skip
        self.common = Goals.from_state(pack.state, "common")
        wanted = "target" if "looks.target" in pack.state else "common"
        self.goals = Goals.from_state(pack.state, wanted)
        self.network = _frozen(self.config, pack.network, self.device)
        first = pack.global_network if pack.global_network is not None else pack.network
        self.global_network = _frozen(self.config, first, self.device)

    @torch.inference_mode()
    def harmonize(
        self,
        image: NDArray[np.float32],
        mask: NDArray[np.bool_],
        sequence: str,
        scan_id: str,
        *,
        site_look: NDArray[np.float32] | None = None,
        site_subjects: int | None = None,
        voxel_mm: float = 0.0,
        seed: int = 0,
        samples: int = 1,
    ) -> Harmonized:
        """Harmonize one prepared scan. The same arguments give the same voxels.

        With another number of threads or another processor they agree to 5e-4 (bfloat16) or 6e-7.

        Args:
            image: (X, Y, Z) float32 in [0, 1], model grid, RAS+, 0 outside the mask.
            mask: (X, Y, Z) bool.
            sequence: One of the model's sequences.
            scan_id: Seeds the noise, with `seed`.
            site_look: (LOOK_SIZE,), the mean look of the scans of its site and sequence; with
                None the scan stands for its site.
            site_subjects: How many people those scans are of; None: not known, `site_look` is
                believed in full.
            voxel_mm: The longest side of the stored scan's voxels; 0: not known.
            seed: The run's seed.
            samples: Outputs drawn; more than one also gives their mean and deviation.

        Raises:
            InputError: SCAN-SEQUENCE, SCAN-EMPTY.
            ModelError: MODEL-GRID.
        """
        started = time.perf_counter()
        batch = self._batch(image, mask, sequence, site_look, site_subjects, voxel_mm)
        sampler = self.config.target_sampler if self.is_target else self.config.global_sampler
        draws = max(samples, sampler.seeds)
        shape = tuple(batch["image"].shape)
        denoisers = self._denoisers(batch)
        outputs = torch.stack([
            self._draw(batch, denoisers, noise_for(scan_id, seed, i, shape))[0, 0]
            for i in range(draws)
        ])  # fmt: skip
        spread = outputs.std(dim=0, unbiased=False) if samples > 1 else None
        return Harmonized(
            image=outputs.mean(0).cpu().numpy().astype(np.float32),
            uncertainty=None if spread is None else spread.cpu().numpy().astype(np.float32),
            seconds=time.perf_counter() - started,
        )

    def outlier_score(
        self, image: NDArray[np.float32], mask: NDArray[np.bool_], sequence: str
    ) -> float:
        """How unlike the training scans this prepared scan is; 1 is usual (`OutlierModel`)."""
        index = list[str](self.config.sequences).index(sequence)
        return self.outliers.score(style_features(image, mask), index)

    def _denoisers(self, batch: Batch) -> Denoisers:
        """Conditions are taken once for all draws."""

        def one(network: nn.Module, goals: Goals) -> ConditionalDenoiser:
            return sampling_denoiser(
                network, self.schedule, self.config, self.matcher, batch, goals
            )

        target = one(self.network, self.goals)
        if not self.is_target or not start_matters(self.schedule, self.config.target_sampler):
            return Denoisers(target, target)
        return Denoisers(one(self.global_network, self.common), target)

    def _batch(
        self, image: NDArray[np.float32], mask: NDArray[np.bool_], sequence: str,
        site_look: NDArray[np.float32] | None, site_subjects: int | None = None,
        voxel_mm: float = 0.0,
    ) -> Batch:  # fmt: skip
        config = self.config
        if sequence not in config.sequences:
            raise InputError(
                f"the model knows {', '.join(config.sequences)}, not {sequence!r}.",
                code="SCAN-SEQUENCE",
            )
        if image.shape != config.prepare.shape or mask.shape != image.shape:
            raise ModelError(
                f"the model works on {config.prepare.shape}, the scan was prepared on "
                f"{image.shape}.",
                code="MODEL-GRID",
                hint="Run `sgcd prepare` with the model's settings.",
            )
        if not mask.any():
            raise InputError("the brain mask is empty.", code="SCAN-EMPTY")
        look = np.zeros(LOOK_SIZE, np.float32)
        if config.condition.match != "none":
            look = measure_look(
                image, mask, config.prepare.mm, sequence, voxel_mm=voxel_mm
            ).vector()
            look = look if site_look is None else blend(site_look, look, OWN_PART)
        subjects = 1 if site_look is None else site_subjects or math.inf
        batch = make_batch(
            [image], [mask], [sequence], [0], config.sequences, [look], [look], [subjects]
        )
        return to_device(batch, self.device)

    def _draw(self, batch: Batch, denoisers: Denoisers, noise: Tensor) -> Tensor:
        """One output (1, 1, X, Y, Z) in [0, 1]."""
        schedule, config = self.schedule, self.config
        noise = noise.to(self.device)
        if not self.is_target:
            return global_image(schedule, config, denoisers.common, batch, noise)
        aligned = batch["image"]
        if start_matters(schedule, config.target_sampler):
            aligned = global_image(schedule, config, denoisers.common, batch, noise)
        return target_image(schedule, config, denoisers, batch, aligned, noise)


@dataclass(frozen=True)
class Denoisers:
    """The networks of both stages under the condition of one batch.

    Attributes:
        common: Stage 1, in the common look.
        target: Stage 2, in the target's; the same as `common` for a global model.
    """

    common: ConditionalDenoiser
    target: ConditionalDenoiser


def start_matters(schedule: Schedule, sampler: SamplerConfig) -> bool:
    """Whether what generation starts from is seen in its noise at all.

    At t_start = 999 the image has 0.5 % of the noise's amplitude: Stage 1 need not be run for it.
    """
    if sampler.start == "inversion" or sampler.kind == "anchored":
        return True
    return float(schedule.alpha_bar(torch.tensor([sampler.t_start]))) > 1e-3


def global_image(
    schedule: Schedule, config: SgcdConfig, denoiser: ConditionalDenoiser, batch: Batch,
    noise: Tensor,
) -> Tensor:  # fmt: skip
    """I' of Stage 1: noise the scans to t_start, then DDIM down to 0 (Eq. 9).

    The result is (B, 1, X, Y, Z) in [0, 1], 0 outside the mask. `denoiser` holds the scans' own
    condition in the common look.
    """
    sampler = config.global_sampler
    image, mask = batch["image"], batch["mask"]
    return _sample(schedule, sampler, config, denoiser, denoiser, image, mask, noise)


def target_image(
    schedule: Schedule, config: SgcdConfig, denoisers: Denoisers, batch: Batch, aligned: Tensor,
    noise: Tensor,
) -> Tensor:  # fmt: skip
    """I_{X→T} of Stage 2: the globally aligned image goes up, then down with the tuned network.

    Args:
        schedule: Noise schedule.
        config: All settings.
        denoisers: The way up, where it is an inversion, and the way down.
        batch: The scans I_X.
        aligned: I'_X of Stage 1.
        noise: Used where the sampler starts from noise.
    """
    return _sample(
        schedule, config.target_sampler, config, denoisers.common, denoisers.target, aligned,
        batch["mask"], noise,
    )  # fmt: skip


def sampling_denoiser(
    network: nn.Module, schedule: Schedule, config: SgcdConfig, matcher: LookMatcher,
    batch: Batch, goals: Goals,
) -> ConditionalDenoiser:  # fmt: skip
    """Denoiser with the scans' own condition in the wanted look, x̂0 clipped."""
    sequence = batch["sequence"]
    index = sequence.cpu()
    look = goals.looks[index]
    subjects = None if goals.subjects is None else goals.subjects[index]
    condition = build_condition(batch, config.condition, matcher, look, subjects=subjects)
    return ConditionalDenoiser(
        network, schedule, config, condition.channels, condition.content,
        LookEmbedding.labels_of(sequence, look, condition.source, condition.strength),
        config.target_stage.precision, clip=True,
    )  # fmt: skip


def _sample(
    schedule: Schedule, sampler: SamplerConfig, config: SgcdConfig, up: ConditionalDenoiser,
    down: ConditionalDenoiser, clean: Tensor, mask: Tensor, noise: Tensor,
) -> Tensor:  # fmt: skip
    anchor = to_network(clean)
    x = starting_image(schedule, sampler, up, anchor, noise)
    x = walk_down(schedule, sampler, down, x, anchor)
    if sampler.distribution == "look" and config.condition.matched_content:
        assert down.content is not None
        x = redistributed(x, down.content, mask)
    return from_network(x).clamp(0, 1) * mask


def _frozen(config: SgcdConfig, weights: dict[str, Tensor], device: torch.device) -> nn.Module:
    network = build_network(config)
    network.load_state_dict(weights)
    return network.to(device).eval().requires_grad_(False)
