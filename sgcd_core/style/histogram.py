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
