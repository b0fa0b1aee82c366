"""Matching a scan to a look without mixing tissues: histogram matching that knows the brain.

`CompositionModel` looks at two profiles, a scan's and a look's, and predicts the rank in the look
that each rank of the scan stands for. It sees ranks only, so it knows no scanner, and was fitted to
digital brains (`pipelines/box`): a scan against the look of other subjects of the same site.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sgcd_core.style.look import (
    LEVELS,
    PROFILE_SIZE,
    Look,
    composition_profile,
    quantiles,
)

Array = NDArray[Any]

#: Ranks at which the shift is predicted; 0 and 1 stay where they are.
KNOTS = np.linspace(0.0, 1.0, 33)
#: No rank moves further than this, whatever the profiles.
MAX_SHIFT = 0.25


class CompositionModel(nn.Module):
    """Rank shifts from two profiles; one set of weights a sequence.

    A linear part, which few examples fit, and a small perceptron beside it that starts at zero.

    Args:
        sequences: How many.
        hidden: Width of the perceptron.
    """

    def __init__(self, sequences: int, hidden: int = 64) -> None:
        super().__init__()
        features, out = 3 * PROFILE_SIZE, len(KNOTS) - 2
        self.linear = nn.Parameter(torch.zeros(sequences, 2 * PROFILE_SIZE, out))
        self.enter = nn.Parameter(torch.randn(sequences, features, hidden) * features**-0.5)
        self.bias = nn.Parameter(torch.zeros(sequences, hidden))
        self.leave = nn.Parameter(torch.zeros(sequences, hidden, out))

    def forward(self, scan: Tensor, look: Tensor, sequence: Tensor) -> Tensor:
        """Shifts (B, K) at the inner `KNOTS` of profiles (B, P), for sequences (B,)."""
        change = torch.cat([scan - look, 10 * (scan.square() - look.square())], 1)
        out = torch.einsum("bi,bio->bo", change, self.linear[sequence])
        features = torch.cat([4 * change, 4 * look], 1)
        inner = torch.einsum("bi,bih->bh", features, self.enter[sequence]) + self.bias[sequence]
        out = out + torch.einsum("bh,bho->bo", torch.nn.functional.silu(inner),
                                 self.leave[sequence])  # fmt: skip
        return MAX_SHIFT * torch.tanh(out / MAX_SHIFT)

    @torch.no_grad()
    def ranks(self, scan: Array, look: Array, sequence: int) -> NDArray[np.float32]:
        """Rank in the look for each of `LEVELS` in the scan, rising from 0 to 1, (257,)."""
        shift = self(
            torch.from_numpy(np.asarray(scan, np.float32))[None],
            torch.from_numpy(np.asarray(look, np.float32))[None],
            torch.tensor([sequence]),
        )[0].numpy()
        moved = np.clip(KNOTS + np.concatenate([[0.0], shift, [0.0]]), 0, 1)
        return np.interp(LEVELS, KNOTS, np.maximum.accumulate(moved)).astype(np.float32)


def match(
    image: Array, mask: Array, mm: float, look: Look, sequence: int,
    model: CompositionModel | None,
) -> NDArray[np.float32]:  # fmt: skip
    """`image` with the intensities of `look`, rank for rank.

    Args:
        image: (X, Y, Z) float32, any monotone scale.
        mask: (X, Y, Z) bool.
        mm: Voxel side.
        look: What to match.
        sequence: Index of the sequence.
        model: Corrects the ranks for composition; None is plain histogram matching to the mean
            quantile function.

    Returns:
        (X, Y, Z) float32, 0 outside the mask.
    """
    out = np.zeros(image.shape, np.float32)
    if not mask.any():
        return out
    goal: Array = look.quantiles
    if model is not None:
        profile = composition_profile(image, mask, mm)
        goal = np.interp(model.ranks(profile, look.profile, sequence), LEVELS, goal)
    own = quantiles(image, mask)
    # equal quantiles (many voxels of one value) map to the middle of what they span
    unique, first, counts = np.unique(own, return_index=True, return_counts=True)
    middle = 0.5 * (goal[first] + goal[first + counts - 1])
    out[mask] = np.interp(image[mask], unique, middle)
    return out


def true_shift(own: Array, look: Array) -> NDArray[np.float32]:
    """What the model is to predict, (K,): for each inner knot the look's rank of that quantile.

    Args:
        own: (257,) quantile function of a scan at the look's own site.
        look: (257,) quantile function of the look.
    """
    rising = np.asarray(look, np.float64) + 1e-7 * np.arange(len(LEVELS))
    rank = np.interp(np.asarray(own, np.float64), rising, LEVELS)
    inner = KNOTS[1:-1]
    return np.asarray(np.interp(inner, LEVELS, rank) - inner, np.float32)


def composition_state(model: CompositionModel | None) -> dict[str, Tensor]:
    """Weights for a modelpack's state; nothing for None."""
    if model is None:
        return {}
    return {f"composition.{name}": value for name, value in model.state_dict().items()}


def composition_from_state(state: Mapping[str, Tensor]) -> CompositionModel | None:
    """The model that `composition_state` put there, or None."""
    found = {k.removeprefix("composition."): v for k, v in state.items()
             if k.startswith("composition.")}  # fmt: skip
    if not found:
        return None
    sequences, _, hidden = found["enter"].shape
    model = CompositionModel(sequences, hidden)
    model.load_state_dict({name: value.float() for name, value in found.items()})
    return model.requires_grad_(False)
