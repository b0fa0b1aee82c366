"""Fitting the look filter of a box: its coefficients are linear, so each sample is a small matrix.

A sample is a scan as the trainer sees it, whole: recoloured, at another resolution and with noise,
then brought to the wanted look. What the best filter of a sample is follows from K² numbers, so a
thousand samples fit in memory and the perceptron is fitted to them in a minute, while steps of the
network would take hours to come to the same.

What is made small is not the squared error but what is lost in structural similarity, to second
order: an error counts by how much there is to see around it. Squared, four tenths of the error lie
in the two outermost layers of voxels, which differ most between heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.box.made import Made, require_same
from sgcd_core.batch import Batch
from sgcd_core.diffusion.look_filter import LookFilter
from sgcd_core.diffusion.network import LookEmbedding
from sgcd_core.volume.condition import Condition, from_network, to_network

#: Side of the windows in which similarity is taken, about as large as the Gaussian ones of
#: `sgcd_core.metrics.ssim`, and from one to the next; voxels.
WINDOW, STRIDE = 5, 3
#: Constants of structural similarity for images in [0, 1].
C1, C2 = 0.01**2, 0.03**2


class Quadratic(NamedTuple):
    """A loss of N samples that is quadratic in K coefficients w: wᵀAw - 2bᵀw + c.

    Attributes:
        products: A, (N, K, K).
        targets: b, (N, K).
        squares: c, (N,), the loss without a filter.
    """

    products: Tensor
    targets: Tensor
    squares: Tensor

    def of(self, found: Tensor) -> Tensor:
        """The loss of each sample (N,) with its coefficients (N, K)."""
        quadratic = torch.einsum("ni,nij,nj->n", found, self.products, found)
        return quadratic - 2 * (found * self.targets).sum(1) + self.squares

    def best(self) -> Tensor:
        """Coefficients (N, K) that leave the least loss of each sample."""
        ridge = 1e-6 * torch.eye(self.products.shape[1])
        found: Tensor = torch.linalg.solve(self.products + ridge, self.targets)
        return found

    def take(self, index: Tensor) -> Quadratic:
        """Some of the samples."""
        return Quadratic(*(part[index] for part in self))


@dataclass(frozen=True)
class Normals:
    """What N samples say about the filter.

    Attributes:
        labels: (N, L), of `LookEmbedding.labels_of`.
        error: Mean squared error in the brain; network scale, squared.
        unlike: What is lost in structural similarity, to second order: means over windows in the
            brain of (Δμ)² / (μ₁² + μ₂² + C₁) and var(Δ) / (σ₁² + σ₂² + C₂), Δ the error, with the
            sums below the line those of the content and the wanted image.
    """

    labels: Tensor
    error: Quadratic
    unlike: Quadratic

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def joined(cls, parts: Sequence[Normals]) -> Normals:
        """All samples of all parts."""
        return cls._of([torch.cat(rows) for rows in zip(*(p._rows() for p in parts), strict=True)])

    def save(self, path: Path, made: Made) -> None:
        """Complete or not at all, with what they were made with."""
        temporary = path.with_suffix(".tmp")
        torch.save({"made": dict(made), "rows": self._rows()}, temporary)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, made: Made) -> Normals:
        """What `save` wrote; UsageError where that was made with something else."""
        found = torch.load(path, weights_only=True)
        says = isinstance(found, dict)
        require_same(path, found["made"] if says else None, made)
        return cls._of(found["rows"])

    def _rows(self) -> list[Tensor]:
        return [self.labels, *self.error, *self.unlike]

    @classmethod
    def _of(cls, rows: Sequence[Tensor]) -> Normals:
        return cls(rows[0], Quadratic(*rows[1:4]), Quadratic(*rows[4:]))


def normals_of(look_filter: LookFilter, batch: Batch, condition: Condition) -> Normals:
    """What a batch of whole scans, with their condition, says about the filter."""
    assert condition.content is not None
    rows = []
    for image, mask, content in zip(batch["image"], batch["mask"], condition.content, strict=True):
        basis = look_filter.basis(content) * mask
        wanted = (to_network(image) - content) * mask
        inside = mask[0]
        flat, difference = basis[:, inside], wanted[0, inside]
        plain = _products(flat, difference, torch.ones_like(difference) / len(difference))
        local, whole, weights = _similarity(from_network(content) * mask, image * mask, mask)
        means, mean = _windowed(basis)[:, local], _windowed(wanted)[0, local]
        spread = _products(flat, difference, weights[inside])
        offset = _products(means, mean, whole)
        rows.append((*plain, *(a + b for a, b in zip(spread, offset, strict=True))))
    stacked = [torch.stack(part) for part in zip(*rows, strict=True)]
    labels = LookEmbedding.labels_of(batch["sequence"], batch["look"], condition.source)
    return Normals(labels, Quadratic(*stacked[:3]), Quadratic(*stacked[3:]))


def _products(basis: Tensor, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted A, b and c of a basis (K, V), what is wanted of it (V,) and weights (V,)."""
    weighted = basis * weights
    return weighted @ basis.T, weighted @ wanted, (weights * wanted) @ wanted


def _similarity(one: Tensor, other: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of squared errors in network scale, of two images (1, X, Y, Z) in [0, 1], 0 outside.

    Returns:
        Which windows have their middle in the brain; for those the weight of the squared mean of
        the error (N,), which may be negative; and (X, Y, Z) that of each voxel's squared error.
        The variance of the error is the mean of its squares less the square of its mean.
    """
    parts = _windowed(torch.cat([one, other, one**2, other**2]))
    brightness = parts[0] ** 2 + parts[1] ** 2 + C1
    contrast = (parts[2] - parts[0] ** 2).clamp(min=0) + (parts[3] - parts[1] ** 2).clamp(min=0)
    inside = mask[0, ::STRIDE, ::STRIDE, ::STRIDE]
    scale = 4 * inside.sum()  # 4: errors in network scale are twice as large
    variance = inside / (contrast + C2) / scale
    mean = inside / brightness / scale - variance
    voxels = F.conv_transpose3d(
        variance[None, None], torch.full((1, 1, *[WINDOW] * 3), 1 / WINDOW**3), stride=STRIDE,
        padding=WINDOW // 2, output_padding=[(side - 1) % STRIDE for side in mask.shape[1:]],
    )  # fmt: skip
    return inside, mean[inside], voxels[0, 0]


def _windowed(volumes: Tensor) -> Tensor:
    """Means over windows, (C, X, Y, Z) → (C, ⌈X/3⌉, ⌈Y/3⌉, ⌈Z/3⌉); outside the grid is 0."""
    return F.avg_pool3d(volumes[None], WINDOW, STRIDE, padding=WINDOW // 2)[0]


def fit_look_filter(
    look_filter: LookFilter, embedding: LookEmbedding, normals: Normals, *, steps: int = 3000,
    batch: int = 64, seed: int = 0,
) -> None:  # fmt: skip
    """Fit the perceptron, by what is lost in similarity as a part of what it is without a filter.

    Args:
        look_filter: Changed in place.
        embedding: Of the network; reads the labels.
        normals: Of the samples to learn from.
        steps: Optimizer steps.
        batch: Samples a step.
        seed: Of their order.
    """
    look_filter.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(look_filter.parameters(), lr=2e-3, weight_decay=0.5)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-5)
    with torch.no_grad():
        features = embedding.features(normals.labels)
    for _ in range(steps):
        pick = torch.randint(len(features), (batch,), generator=generator)
        some = normals.unlike.take(pick)
        loss = (some.of(look_filter.coefficients(features[pick])) / some.squares).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    set_limits(look_filter, features)


@torch.no_grad()
def set_limits(look_filter: LookFilter, features: Tensor) -> None:
    """Keep each coefficient within what is found for these features (N, F)."""
    found = look_filter.perceptron(features)
    look_filter.lowest.copy_(found.min(0).values)
    look_filter.highest.copy_(found.max(0).values)


@torch.no_grad()
def score_look_filter(
    look_filter: LookFilter, embedding: LookEmbedding, normals: Normals
) -> dict[str, dict[str, list[float]]]:
    """By sequence index, of no filter, this one and the best of each sample: `psnr`, dB of the mean
    over samples, and `unlike`, the mean of what is lost in structural similarity.
    """
    found = look_filter.coefficients(embedding.features(normals.labels))
    ways = (torch.zeros_like(found), found, normals.unlike.best())
    errors, lost = ([loss.of(way) for way in ways] for loss in (normals.error, normals.unlike))
    index = normals.labels[:, 0].long()
    out = {}
    for sequence in sorted(set(index.tolist())):
        mine = index == sequence
        out[str(sequence)] = {
            "psnr": [
                round(float((-10 * torch.log10(e[mine].clamp(min=1e-9) / 4)).mean()), 3)
                for e in errors
            ],
            "unlike": [round(float(x[mine].mean()), 5) for x in lost],
        }
    return out
