"""Fitting the look filter of a box: its coefficients are linear, so each sample is a small matrix.

A sample is a scan as the trainer sees it, whole: recoloured, at another resolution and with noise,
then brought to the wanted look. What the best filter of a sample is follows from K² numbers, so a
thousand samples fit in memory and the perceptron is fitted to them in a minute, while steps of the
network would take hours to come to the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sgcd_core.batch import Batch
from sgcd_core.diffusion.look_filter import LookFilter
from sgcd_core.diffusion.network import LookEmbedding
from sgcd_core.volume.condition import Condition, to_network


@dataclass(frozen=True)
class Normals:
    """Mean squares and products of N samples with K coefficients: the error of coefficients w is
    wᵀAw - 2bᵀw + c.

    Attributes:
        labels: (N, L), of `LookEmbedding.labels_of`.
        products: A, (N, K, K).
        targets: b, (N, K).
        squares: c, (N,), the error without a filter; network scale, squared.
    """

    labels: Tensor
    products: Tensor
    targets: Tensor
    squares: Tensor

    def error(self, found: Tensor) -> Tensor:
        """Mean squared error of each sample (N,) with its coefficients (N, K)."""
        quadratic = torch.einsum("ni,nij,nj->n", found, self.products, found)
        return quadratic - 2 * (found * self.targets).sum(1) + self.squares

    def best(self) -> Tensor:
        """The error that each sample's own best coefficients leave (N,)."""
        ridge = 1e-6 * torch.eye(self.products.shape[1])
        return self.error(torch.linalg.solve(self.products + ridge, self.targets))

    def take(self, index: Tensor) -> Normals:
        """Some of the samples."""
        return Normals(*(part[index] for part in self._parts()))

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def joined(cls, parts: Sequence[Normals]) -> Normals:
        """All samples of all parts."""
        columns = zip(*(part._parts() for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def save(self, path: Path) -> None:
        """Complete or not at all."""
        temporary = path.with_suffix(".tmp")
        torch.save(self._parts(), temporary)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Normals:
        """What `save` wrote."""
        return cls(*torch.load(path, weights_only=True))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.labels, self.products, self.targets, self.squares


def normals_of(look_filter: LookFilter, batch: Batch, condition: Condition) -> Normals:
    """What a batch of whole scans, with their condition, says about the filter."""
    assert condition.content is not None
    labels = LookEmbedding.labels_of(batch["sequence"], batch["look"], condition.source)
    rows = []
    for image, mask, content in zip(batch["image"], batch["mask"], condition.content, strict=True):
        inside = mask[0]
        basis = look_filter.basis(content)[:, inside]
        wanted = (to_network(image) - content)[0, inside]
        count = len(wanted)
        rows.append((basis @ basis.T / count, basis @ wanted / count, wanted @ wanted / count))
    products, targets, squares = (torch.stack(part) for part in zip(*rows, strict=True))
    return Normals(labels, products, targets, squares)


def fit_look_filter(
    look_filter: LookFilter, embedding: LookEmbedding, normals: Normals, *, steps: int = 3000,
    batch: int = 64, seed: int = 0,
) -> None:  # fmt: skip
    """Fit the perceptron, by the error as a part of what it is without a filter.

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
        some = normals.take(pick)
        loss = (some.error(look_filter.coefficients(features[pick])) / some.squares).mean()
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
) -> dict[str, list[float]]:
    """By sequence index, dB of the mean over samples: no filter, this one, the best of each."""
    found = normals.error(look_filter.coefficients(embedding.features(normals.labels)))
    best = normals.best()
    index = normals.labels[:, 0].long()
    out = {}
    for sequence in sorted(set(index.tolist())):
        mine = index == sequence
        errors = (normals.squares[mine], found[mine], best[mine])
        out[str(sequence)] = [
            round(float((-10 * torch.log10(e.clamp(min=1e-9) / 4)).mean()), 3) for e in errors
        ]
    return out
