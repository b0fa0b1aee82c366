"""Drawing an image from the model: where to start, which way to walk, with which noise."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from sgcd_core.config import SamplerConfig
from sgcd_core.diffusion.ddim import (
    Denoiser,
    generate,
    generate_anchored,
    invert,
    invert_anchored,
    timestep_grid,
)
from sgcd_core.diffusion.schedule import Schedule


def noise_for(scan_id: str, seed: int, sample: int, shape: tuple[int, ...]) -> Tensor:
    """Gaussian noise that depends on the scan, the run's seed and the sample alone.

    Drawn on the CPU, so that worker, batch, order and device make no difference.
    """
    digest = hashlib.sha256(f"{scan_id}/{seed}/{sample}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator)


def noised(schedule: Schedule, config: SamplerConfig, clean: Tensor, noise: Tensor) -> Tensor:
    """`clean` (B, 1, X, Y, Z) in [-1, 1] at the timestep `t_start` (Eq. 1)."""
    t = torch.full((clean.shape[0],), config.t_start, dtype=torch.long, device=clean.device)
    return schedule.add_noise(clean, noise, t)


def starting_image(
    schedule: Schedule, config: SamplerConfig, denoiser: Denoiser, clean: Tensor, noise: Tensor
) -> Tensor:
    """The noisy image generation starts from.

    Args:
        schedule: Noise schedule.
        config: `start` noise (Eq. 1) or inversion (DDIM upwards, T_f evaluations; Eq. 10 where
            `kind` is anchored).
        denoiser: Used by inversion only.
        clean: (B, 1, X, Y, Z) in [-1, 1].
        noise: Same shape, used by `noise` only.
    """
    if config.start == "noise":
        return noised(schedule, config, clean, noise)
    grid = timestep_grid(config.t_start, config.invert_steps)
    if config.kind == "anchored":
        return invert_anchored(schedule, denoiser, clean, grid)
    return invert(schedule, denoiser, clean, grid)


def reverse_grid(config: SamplerConfig) -> list[int]:
    """Timesteps of generation, falling, ending in -1."""
    return timestep_grid(config.t_reverse or config.t_start, config.steps)


def walk_down(
    schedule: Schedule, config: SamplerConfig, denoiser: Denoiser, x: Tensor, anchor: Tensor
) -> Tensor:
    """The image (B, 1, X, Y, Z) in [-1, 1] that generation from `x` ends in.

    `anchor` stands for I' of Eq. 11 and is used by kind `anchored` only.
    """
    grid = reverse_grid(config)
    if config.kind == "anchored":
        return generate_anchored(schedule, denoiser, x, anchor, grid)
    for _, x_next in generate(schedule, denoiser, x, grid):
        x = x_next
    return x
