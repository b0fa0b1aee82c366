"""From the resolution of one look to that of another: a filter that the two looks tell.

Two scanners that agree on every tissue's intensity still differ in resolution, and so in how sharp
edges are and how much of what lies outside the brain is mixed into its rim. What undoes the
difference is nearly the same for every scan of a site: a small filter, what the rim gains or
loses, and a curve over intensity, all linear in coefficients that a perceptron reads from the
looks. Held against the best such coefficients of each scan it needs few numbers and so few scans
to learn; the U-Net is left with what differs from place to place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Knots of the curve over intensity.
KNOTS = 9
#: Content inside the brain is kept above this: -1 means outside.
LOWEST = -1 + 1e-6


def offset_groups(radius: int) -> list[tuple[int, int, int]]:
    """Distances (|i|, |j|, |k|) of the neighbours in a cube, the middle left out, x slowest.

    Neighbours at the same distances share a weight, so no side is preferred.
    """
    span = range(radius + 1)
    return list(itertools.product(span, span, span))[1:]


def group_cube(radius: int) -> tuple[Tensor, Tensor]:
    """For each voxel of the cube its group, from 1, and its share of the group's weight.

    int64 and float32, (2·radius + 1)³; both 0 in the middle.
    """
    far = torch.arange(-radius, radius + 1).abs()
    distances = torch.stack(torch.meshgrid(far, far, far, indexing="ij"))
    side = radius + 1
    group = (distances * torch.tensor([side * side, side, 1]).reshape(3, 1, 1, 1)).sum(0)
    return group, torch.where(group > 0, 0.5 ** (distances > 0).sum(0), 0.0)


class LookFilter(nn.Module):
    """Content of one look's resolution → the resolution of another.

    With c the content of a voxel, c_k and m_k the content and presence (brain 1, outside 0) of the
    neighbours at distance k, averaged over all neighbours so far away, the content becomes
    c + Σ w_k m_k (c_k - c) + Σ (1 - m_k) (u_k + v_k c) + curve(c).

    Args:
        inputs: Features of the two looks.
        radius: Half-width of the cube, voxels.
        hidden: Width of the perceptron.
    """

    def __init__(self, inputs: int, radius: int, hidden: int = 128) -> None:
        super().__init__()
        self.radius = radius
        self.count = len(offset_groups(radius))
        last = nn.Linear(hidden, 3 * self.count + KNOTS)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.perceptron = nn.Sequential(
            nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last
        )
        # what was found for the looks it was fitted to: looks unlike those must not run away
        self.lowest: Tensor
        self.highest: Tensor
        self.register_buffer("lowest", torch.full((3 * self.count + KNOTS,), -torch.inf))
        self.register_buffer("highest", torch.full((3 * self.count + KNOTS,), torch.inf))
        group, share = group_cube(radius)
        self.group: Tensor
        self.share: Tensor
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("share", share, persistent=False)

    @property
    def at_rest(self) -> bool:
        """Whether it was never fitted and lets every content through as it is."""
        return not any(bool(one.any()) for one in self.perceptron[-1].parameters())

    def coefficients(self, features: Tensor) -> Tensor:
        """(B, 3·groups + KNOTS) of features of two looks (B, inputs), within the limits."""
        found: Tensor = self.perceptron(features)
        return torch.minimum(torch.maximum(found, self.lowest), self.highest)

    def forward(self, content: Tensor, features: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) in [-1, 1] of such content, -1 outside, and features (B, inputs)."""
        with torch.autocast(content.device.type, enabled=False):
            content = content.float()
            found = self.coefficients(features.float())
            inside = content > -1
            out = torch.stack([
                self._changed(one, mask, row) for one, mask, row
                in zip(content, inside.to(content.dtype), found, strict=True)
            ])  # fmt: skip
            return torch.where(inside, out.clamp(min=LOWEST), -1.0)

    def _changed(self, content: Tensor, inside: Tensor, found: Tensor) -> Tensor:
        """Of one scan (1, X, Y, Z), by three small convolutions."""
        parts = torch.split(found[: 3 * self.count], self.count)
        weights, level, slope = (self._kernel(part) for part in parts)
        pad = [self.radius] * 6
        here, there = (F.pad(x, pad, mode="replicate") for x in (content * inside, inside))
        moved = F.conv3d(here[None], weights[None, None])[0]
        kernels = torch.stack([weights, level, slope])[:, None]
        masses, levels, slopes = torch.split(F.conv3d(there[None], kernels)[0], 1)
        moved = moved - masses * content
        moved = moved + (level.sum() - levels) + (slope.sum() - slopes) * content
        for hat, height in zip(hats(content), found[3 * self.count :], strict=True):
            moved = torch.addcmul(moved, hat, height)
        return content + moved

    def _kernel(self, weights: Tensor) -> Tensor:
        """A cube of weights, each group's shared by its neighbours; 0 in the middle."""
        return F.pad(weights, [1, 0])[self.group] * self.share

    def basis(self, content: Tensor) -> Tensor:
        """What each coefficient is multiplied by, (3·groups + KNOTS, X, Y, Z), of (1, X, Y, Z)."""
        inside = (content > -1).to(content.dtype)
        here, there = self._means(content * inside), self._means(inside)
        moved = [(a - b * content)[0] for a, b in zip(here, there, strict=True)]
        level = [(1 - b)[0] for b in there]
        slope = [x * content[0] for x in level]
        return torch.stack([*moved, *level, *slope, *(hat[0] for hat in hats(content))])

    def _means(self, volume: Tensor) -> list[Tensor]:
        """Means over the neighbours of each group, by sums along one axis after the other."""
        rows: dict[tuple[int, ...], Tensor] = {
            (): F.pad(volume, [self.radius] * 6, mode="replicate")
        }
        for axis in (1, 2, 3):
            size = volume.shape[axis]
            rows = {
                (*key, far): (
                    x.narrow(axis, self.radius + far, size)
                    + x.narrow(axis, self.radius - far, size)
                )
                / 2
                for key, x in rows.items()
                for far in range(self.radius + 1)
            }
        return [rows[group] for group in offset_groups(self.radius)]


def hats(content: Tensor) -> Iterator[Tensor]:
    """How near each voxel's content is to each of the KNOTS in [-1, 1]: 1 at it, 0 at the next."""
    at = (content + 1) / 2 * (KNOTS - 1)
    for knot in range(KNOTS):
        yield (1 - (at - knot).abs()).clamp(min=0)
