"""The differentiable soft histogram of Eqs. 5-6, masked, in bounded memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Voxels whose kernel weights are held at once: 65,536 × 100 bins of float32 are 26 MB.
CHUNK = 65_536


class _KernelSums(torch.autograd.Function):
    """Sum over voxels of the Gaussian kernel at each bin centre; weights are never held whole."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, centers: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(values, centers)
        ctx.bandwidth = bandwidth
        sums = torch.zeros_like(centers)
        for part in torch.split(values, CHUNK):
            sums += torch.exp(-0.5 * ((part[:, None] - centers) / bandwidth) ** 2).sum(0)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        values, centers = ctx.saved_tensors
        (grad,) = grads
        out = torch.empty_like(values)
        start = 0
        for part in torch.split(values, CHUNK):
            z = (part[:, None] - centers) / ctx.bandwidth
            weight = torch.exp(-0.5 * z**2) * (-z / ctx.bandwidth)
            out[start : start + part.numel()] = weight @ grad
            start += part.numel()
        return out, None, None


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
