"""Matching a scan to a look without mixing tissues: histogram matching that knows the brain.

`CompositionModel` looks at two profiles, of the look a scan has and of the one wanted, and predicts
the rank in the second that each rank in the first stands for. Profiles are ranks only, so it knows
no scanner. It is fitted to digital brains (`pipelines/box`): some scans against the look of others
of the same site. Only where their distribution already agrees with the predicted one is that
believed. The map is one curve for all scans of a site: what tells its subjects apart stays.

A profile is not quite blind to scanners, and on heads unlike those it was fitted to one fit can be
far off. `Composition` is several fits to different sites, believed as far as they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sgcd_core.style.look import (
    LEVELS,
    PROFILE_SIZE,
    Look,
    rising,
    through,
)
from sgcd_core.style.shading import SHADING_SIZE, contrast_of, shading_field

Array = NDArray[Any]

#: What the sets of weights are for, in their order, whatever the settings of a training say.
SEQUENCES = ("T1w", "T2w")
#: Ranks at which the shift is predicted; 0 and 1 stay where they are.
KNOTS = np.linspace(0.0, 1.0, 33)
#: No rank moves further than this, whatever the profiles.
MAX_SHIFT = 0.25
#: Part of the predicted shift that is made. Fits have seen scans of one scanner restyled, never of
#: two, so they take some of what scanners do to a profile for anatomy.
BELIEF = 0.9
#: Part of what the profile tells about a shading that is taken for anatomy; the rest may be what
#: scanners do to a profile.
ANATOMY_PART = 0.75


class CompositionModel(nn.Module):
    """Rank shifts from two profiles and two distributions; one set of weights a sequence.

    The profiles predict the shift, by a linear part, which few examples fit, and a small
    perceptron beside it. The shift that would change no intensity is known exactly; where the
    two agree the scan comes from a scanner like the look's, and that one is trusted more.

    Args:
        sequences: How many.
        hidden: Width of the perceptrons.
    """

    def __init__(self, sequences: int, hidden: int = 64) -> None:
        super().__init__()
        features, out = 3 * PROFILE_SIZE, len(KNOTS) - 2
        self.linear = nn.Parameter(torch.zeros(sequences, 2 * PROFILE_SIZE, out))
        self.enter = nn.Parameter(torch.randn(sequences, features, hidden) * features**-0.5)
        self.bias = nn.Parameter(torch.zeros(sequences, hidden))
        self.leave = nn.Parameter(torch.zeros(sequences, hidden, out))
        self.trust_enter = nn.Parameter(torch.randn(sequences, 2 * out, hidden) * out**-0.5)
        self.trust_bias = nn.Parameter(torch.zeros(sequences, hidden))
        self.trust_leave = nn.Parameter(torch.zeros(sequences, hidden, out))
        self.trust = nn.Parameter(torch.full((sequences, out), -1.0))

    def forward(self, scan: Tensor, look: Tensor, identity: Tensor, sequence: Tensor) -> Tensor:
        """Shifts (B, K) at the inner `KNOTS`.

        Args:
            scan: (B, PROFILE_SIZE), the scans' profiles.
            look: (B, PROFILE_SIZE), the looks'.
            identity: (B, K), `true_shift` of the scans' own quantiles: it leaves them as they are.
            sequence: (B,) int64.
        """
        change = torch.cat([scan - look, 10 * (scan.square() - look.square())], 1)
        features = torch.cat([4 * change, 4 * look], 1)
        out = torch.zeros_like(identity)
        for index in range(len(self.linear)):
            mine = (sequence == index).nonzero()[:, 0]
            inner = nn.functional.silu(features[mine] @ self.enter[index] + self.bias[index])
            shift = change[mine] @ self.linear[index] + inner @ self.leave[index]
            gap = identity[mine] - shift
            about = torch.cat([20 * gap, 20 * gap.abs()], 1)
            inner = nn.functional.silu(about @ self.trust_enter[index] + self.trust_bias[index])
            trust = torch.sigmoid(inner @ self.trust_leave[index] + self.trust[index])
            out = out.index_put((mine,), shift + trust * gap)
        return MAX_SHIFT * torch.tanh(out / MAX_SHIFT)


class Composition(nn.Module):
    """Several `CompositionModel`s, fitted from different starts to different sites.

    The mean of their shifts counts, times the part of its square that is not their disagreement,
    times `BELIEF`. It also knows what anatomy adds to a fitted shading: large ventricles are dark
    in T1w and lie in the middle, which looks like a coil that is weak there.

    Args:
        members: At least one, of equal size.
        profiles: (sequences, PROFILE_SIZE), mean profiles; zeros by default.
        anatomy: (sequences, PROFILE_SIZE, SHADING_SIZE), what a profile adds to the shading for
            being unlike the mean; zeros by default.
    """

    def __init__(
        self, members: Sequence[CompositionModel], profiles: Tensor | None = None,
        anatomy: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.members = nn.ModuleList(members)
        sequences = len(members[0].linear)
        self.profiles: Tensor
        self.anatomy: Tensor
        none = torch.zeros(sequences, PROFILE_SIZE)
        self.register_buffer("profiles", none if profiles is None else profiles)
        none = torch.zeros(sequences, PROFILE_SIZE, SHADING_SIZE)
        self.register_buffer("anatomy", none if anatomy is None else anatomy)

    def index_of(self, sequence: str) -> int | None:
        """Which set of weights is for a BIDS suffix; None: it was fitted to none of that."""
        known = SEQUENCES[: len(self.profiles)]
        return known.index(sequence) if sequence in known else None

    def shading(self, look: Look, sequence: int) -> NDArray[np.float32]:
        """The shading of a look without what its subjects' anatomy adds, (SHADING_SIZE,)."""
        mean, added = self.profiles[sequence].numpy(), self.anatomy[sequence].numpy()
        part = ANATOMY_PART * ((look.profile - mean) @ added)
        return np.asarray(look.shading - part, np.float32)

    @torch.no_grad()
    def shift(
        self, scan: Array, look: Array, identity: Array, sequence: int
    ) -> NDArray[np.float32]:
        """The shift that is believed, (K,). Arguments as of a member, of one scan."""
        rows = [torch.from_numpy(np.asarray(x, np.float32))[None] for x in (scan, look, identity)]
        index = torch.tensor([sequence])
        found = np.stack([member(*rows, index)[0].numpy() for member in self.members])
        mean = found.mean(0)
        if len(found) < 2:
            return np.asarray(BELIEF * mean, np.float32)
        power, spread = float((mean**2).mean()), float(found.var(0, ddof=1).mean())
        part = max(0.0, power - spread / len(found)) / max(power + spread, 1e-12)
        return np.asarray(BELIEF * part * mean, np.float32)

    def ranks(
        self, scan: Array, look: Array, identity: Array, sequence: int
    ) -> NDArray[np.float32]:
        """Rank in the look for each of `LEVELS` in the scan, rising from 0 to 1, (257,)."""
        shift = self.shift(scan, look, identity, sequence)
        moved = np.clip(KNOTS + np.concatenate([[0.0], shift, [0.0]]), 0, 1)
        return np.interp(LEVELS, KNOTS, np.maximum.accumulate(moved)).astype(np.float32)


def joined(first: Composition, second: Composition) -> Composition:
    """The members of both, which know different sites; the anatomy of the second."""
    members: list[Any] = [*first.members, *second.members]
    return Composition(members, second.profiles, second.anatomy).requires_grad_(False)


def match(
    image: Array, mask: Array, mm: float, look: Look, source: Look, sequence: str,
    model: Composition | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """`image` with the intensities and the shading of `look`.

    Args:
        image: (X, Y, Z) float32, [0, 1] as a prepared scan.
        mask: (X, Y, Z) bool.
        mm: Voxel side.
        look: What to match.
        source: The look the scan has: its site's, or its own where no site is known.
        sequence: BIDS suffix.
        model: Corrects ranks and shadings for composition; None, or one that was not fitted to the
            sequence: plain histogram matching of the mean quantile functions.

    Returns:
        (X, Y, Z) float32 in [0, 1], 0 outside the mask.
    """
    out = np.zeros(image.shape, np.float32)
    if not mask.any():
        return out
    own, goal = rising(source.quantiles), rising(look.quantiles)
    shown = contrast_of(sequence, LEVELS)
    there = shown = own if shown is None else shown
    shadings = source.shading, look.shading
    index = None if model is None else model.index_of(sequence)
    if model is not None and index is not None:
        shadings = model.shading(source, index), model.shading(look, index)
        identity = true_shift(source.quantiles, look.quantiles)
        ranks = model.ranks(source.profile, look.profile, identity, index)
        there = np.interp(ranks, LEVELS, shown)
    # own contrast → average contrast, where shadings act → ranks of the look → its contrast
    values = through(image[mask], source.quantiles, shown)
    values = values / shading_field(shadings[0], image.shape, mm)[mask]
    values = np.interp(values, shown, there)
    values = values * shading_field(shadings[1], image.shape, mm)[mask]
    out[mask] = np.clip(np.interp(values, shown, goal), 0, 1)
    return out


def true_shift(own: Array, look: Array) -> NDArray[np.float32]:
    """What the model is to predict, (K,): for each inner knot the look's rank of that quantile.

    Args:
        own: (257,) quantile function of a scan at the look's own site.
        look: (257,) quantile function of the look.
    """
    rank = np.interp(np.asarray(own, np.float64), rising(look), LEVELS)
    inner = KNOTS[1:-1]
    return np.asarray(np.interp(inner, LEVELS, rank) - inner, np.float32)


def composition_state(model: Composition | None) -> dict[str, Tensor]:
    """Weights for a modelpack's state; nothing for None."""
    if model is None:
        return {}
    return {f"composition.{name}": value for name, value in model.state_dict().items()}


def composition_from_state(state: Mapping[str, Tensor]) -> Composition | None:
    """The model that `composition_state` put there, or None."""
    found = {k.removeprefix("composition."): v.float() for k, v in state.items()
             if k.startswith("composition.")}  # fmt: skip
    if not found:
        return None
    count = len({name.split(".")[1] for name in found if name.startswith("members.")})
    sequences, _, hidden = found["members.0.enter"].shape
    model = Composition([CompositionModel(sequences, hidden) for _ in range(count)])
    model.load_state_dict(model.state_dict() | found)  # models from before know no anatomy
    return model.requires_grad_(False)
