"""Deterministic DDIM in both directions on explicit timestep grids (Song et al. 2020; Eqs. 9-11).

A denoiser is any function `(x_t, t) -> (x̂0, ε̂)`. MONAI's scheduler steps are not used: their
stride need not agree with the grid, and `reversed_step` fails at the top (MONAI 1.6.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sgcd_core.diffusion.schedule import CLEAN, Schedule

Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def timestep_grid(t_start: int, steps: int) -> list[int]:
    """Falling timesteps from `t_start` to the clean image: `steps` + 1 entries, the last is -1.

    The grid for inversion with another number of steps spans the same range.
    """
    if not 1 <= steps <= t_start + 1:
        raise ValueError(f"steps must be within 1 to t_start + 1 = {t_start + 1}, got {steps}")
    grid = torch.linspace(t_start, CLEAN, steps + 1, dtype=torch.float64).round().long()
    return [int(t) for t in grid]


def ddim_step(schedule: Schedule, x0: Tensor, eps: Tensor, t_next: int) -> Tensor:
    """The image at `t_next` that lies on the line of (x̂0, ε̂); t_next = -1 gives x̂0 itself.

    Serves generation (t_next below the present timestep) and inversion (above) alike.
    """
    t = torch.full((x0.shape[0],), t_next, dtype=torch.long, device=x0.device)
    return schedule.add_noise(x0, eps, t)


def generate(
    schedule: Schedule, denoiser: Denoiser, x: Tensor, grid: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk down `grid`; after every network evaluation yield (x̂0, x at the next timestep).

    x̂0 is computed afresh at every step. The last x equals the last x̂0.
    """
    for t, t_next in pairwise(grid):
        x0, eps = denoiser(x, _batch_of(t, x))
        x = ddim_step(schedule, x0, eps, t_next)
        yield x0, x


def invert(schedule: Schedule, denoiser: Denoiser, x: Tensor, grid: list[int]) -> Tensor:
    """Walk a clean image up to the top of `grid` (a falling grid, ending in -1).

    The noise of an interval (t, t_next) is estimated at its lower end, on the image there: the
    usual DDIM inversion. That of the first one is, at its upper end: the network knows no t = -1.
    """
    rising = grid[::-1]
    for t, t_next in pairwise(rising):
        if t == CLEAN:
            x0_known = x
            _, eps = denoiser(x, _batch_of(t_next, x))
            x = ddim_step(schedule, x0_known, eps, t_next)
        else:
            x0, eps = denoiser(x, _batch_of(t, x))
            x = ddim_step(schedule, x0, eps, t_next)
    return x


def generate_anchored(
    schedule: Schedule, denoiser: Denoiser, x: Tensor, anchor: Tensor, grid: list[int]
) -> Tensor:
    """Eq. 11 as printed: the anchor I' stands where x̂0 belongs. Kept for the preset `paper`.

    At the clean end the result is the anchor, whatever the network does; so the walk stops at the
    last noisy timestep, t = 0.
    """
    for t, t_next in pairwise(grid):
        _, eps = denoiser(x, _batch_of(t, x))
        x = ddim_step(schedule, anchor, eps, max(t_next, 0))
    return x


def invert_anchored(
    schedule: Schedule, denoiser: Denoiser, anchor: Tensor, grid: list[int]
) -> Tensor:
    """Eq. 10 as printed: noise of the network is added to the anchor I' at every step."""
    x = anchor
    for t_next in grid[::-1][1:]:
        _, eps = denoiser(x, _batch_of(t_next, x))
        x = ddim_step(schedule, anchor, eps, t_next)
    return x


def _batch_of(t: int, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, dtype=torch.long, device=x.device)
