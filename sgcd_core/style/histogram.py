"""The differentiable soft histogram of Eqs. 5-6, masked, in bounded memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: Voxels whose kernel weights are held at once: 65,536 × 13 bins of float32 are 3.4 MB.
CHUNK = 65_536
#: Bins further away than this many bandwidths get no weight; exp(-18) is below float32's noise.
REACH = 6.0


class _KernelSums(torch.autograd.Function):
    """Sum over voxels of the Gaussian kernel at each bin centre; weights are never held whole.

    Only the bins within reach of a value are visited.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, centers: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(values, centers)
        ctx.bandwidth = bandwidth
        sums = torch.zeros_like(centers)
        for part in torch.split(values, CHUNK):
            bins, z, inside = _near(part, centers, bandwidth)
            weight = torch.exp(-0.5 * z * z) * inside
            sums.index_add_(0, bins.flatten(), weight.flatten())
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        values, centers = ctx.saved_tensors
        (grad,) = grads
        parts = []
        for part in torch.split(values, CHUNK):
            bins, z, inside = _near(part, centers, ctx.bandwidth)
            slope = torch.exp(-0.5 * z * z) * inside * (-z / ctx.bandwidth)
            parts.append((slope * grad[bins]).sum(1))
        return torch.cat(parts) if parts else torch.zeros_like(values), None, None


def _near(values: Tensor, centers: Tensor, bandwidth: float) -> tuple[Tensor, Tensor, Tensor]:
    """Bins within reach of each value (F, R): their indices, (value - centre) / σ, and validity."""
    last = centers.numel() - 1
    reach = min(last, math.ceil(REACH * bandwidth * last) + 1)
    offsets = torch.arange(-reach, reach + 1, device=values.device)
    # far outside [0, 1] every bin is out of reach, whatever index stands for it
    nearest = (values * last).round().clamp(-2 * last - 2, 3 * last + 2).long()
    wanted = nearest[:, None] + offsets
    bins = wanted.clamp(0, last)
    z = (values[:, None] - centers[bins]) / bandwidth
    return bins, z, (wanted == bins).to(values.dtype)


def soft_histogram(values: Tensor, bins: int = 100, bandwidth: float = 0.01) -> Tensor:
    """H(x) of Eqs. 5-6 over [0, 1], differentiable.

    Args:
        values: (F,) intensities inside the mask, float32.
        bins: K; centres c_k = (k - 1) / (K - 1).
        bandwidth: σ of the Gaussian kernel, in units of intensity.

    Returns:
        (K,) float32, sums to 1 (to 0 if no value lies near [0, 1]).
    """
    centers = torch.linspace(0, 1, bins, device=values.device, dtype=values.dtype)
    sums: Tensor = _KernelSums.apply(values, centers, bandwidth)
    return sums / (sums.sum() + 1e-8)


def wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """WD of Eq. 8: mean absolute difference of the cumulative sums of histograms (..., K)."""
    return (a.cumsum(-1) - b.cumsum(-1)).abs().mean(-1)


def redistributed(image: Tensor, like: Tensor, mask: Tensor, levels: int = 257) -> Tensor:
    """Each image of a batch, its intensities in the mask mapped onto the distribution of another.

    The map rises with intensity, piecewise linear between quantiles, so what is brighter stays so.
    Equal quantiles (many voxels of one value) map to the middle of what they span.

    Args:
        image: (B, 1, X, Y, Z).
        like: Same shape; whose distribution is wanted.
        mask: Same shape, bool; outside it `image` stays.
        levels: Quantiles on either side.
    """
    out = image.clone()
    for drawn, wanted, inside in zip(out, like, mask, strict=True):
        if not bool(inside.any()):
            continue
        values = drawn[inside]
        own, shown = _quantiles(values, levels), _quantiles(wanted[inside], levels)
        own, times = torch.unique_consecutive(own, return_counts=True)
        last = times.cumsum(0) - 1
        shown = (shown[last - times + 1] + shown[last]) / 2
        if len(own) < 2:
            drawn[inside] = shown
            continue
        above = torch.searchsorted(own, values, right=True).clamp(1, len(own) - 1)
        width = (own[above] - own[above - 1]).clamp(min=torch.finfo(own.dtype).tiny)
        part = ((values - own[above - 1]) / width).clamp(0, 1)
        drawn[inside] = shown[above - 1] + part * (shown[above] - shown[above - 1])
    return out


def _quantiles(values: Tensor, levels: int) -> Tensor:
    """Quantile function at `levels` even levels from the smallest value to the largest."""
    ordered = values.sort().values
    place = torch.linspace(0, ordered.numel() - 1, levels, dtype=torch.float64)
    below = place.floor().long().clamp(max=max(0, ordered.numel() - 2)).to(values.device)
    above = (below + 1).clamp(max=ordered.numel() - 1)
    part = (place.to(values.device) - below).to(values.dtype)
    return ordered[below] + part * (ordered[above] - ordered[below])
