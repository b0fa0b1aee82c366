"""The running record of each sequence's intensity statistics (Eqs. 7-8)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sgcd_core.config import RecordConfig
from sgcd_core.style.histogram import soft_histogram, wasserstein


def statistics_of(image: Tensor, mask: Tensor, config: RecordConfig) -> Tensor:
    """Histogram, mean and standard deviation of each sample inside its mask, differentiable.

    Args:
        image: (B, 1, X, Y, Z) float32 in [0, 1].
        mask: (B, 1, X, Y, Z) bool.
        config: Bins and bandwidth.

    Returns:
        (B, K + 2): K histogram bins, mean, standard deviation.
    """
    rows = []
    for sample, inside in zip(image, mask, strict=True):
        values = sample[inside]
        histogram = soft_histogram(values, config.bins, config.bandwidth)
        moments = torch.stack([values.mean(), values.std(unbiased=False)])
        rows.append(torch.cat([histogram, moments]))
    return torch.stack(rows)


class Record:
    """Per-sequence exponential moving average of `statistics_of`; part of the model's state.

    With several workers each update is summed over them, weighted by count, so that n workers
    hold the record one process with the same global batch would hold.
    """

    def __init__(self, sequences: int, config: RecordConfig) -> None:
        self.config = config
        self.values = torch.zeros(sequences, config.bins + 2)
        self.updates = torch.zeros(sequences, dtype=torch.long)

    def loss(self, statistics: Tensor, sequence: Tensor, weight: Tensor) -> Tensor:
        """L_E of Eq. 8 against the record as it stands.

        Args:
            statistics: (B, K + 2) of the estimates x̂0, differentiable.
            sequence: (B,) int64.
            weight: (B,) trust in each estimate.

        Returns:
            Scalar; a sequence without a record yet contributes 0.
        """
        record = self.values.to(statistics.device)[sequence]
        bins = self.config.bins
        known = (self.updates.to(sequence.device)[sequence] > 0).float()
        distance = wasserstein(record[:, :bins], statistics[:, :bins])
        moments = (record[:, bins:] - statistics[:, bins:]).square().sum(-1)
        return (known * weight * (distance + moments)).mean()

    @torch.no_grad()
    def update(self, statistics: Tensor, sequence: Tensor, weight: Tensor) -> None:
        """Eq. 7 with detached statistics, one update a sequence and step.

        The new value is the weighted mean over all workers' samples of the sequence; its rate is
        (1 - decay) times their mean weight. The first value is taken whole.
        """
        count = self.values.shape[0]
        sums = torch.zeros(count, self.values.shape[1] + 2, dtype=torch.float64)
        rows = statistics.detach().double().cpu()
        weights = weight.detach().double().cpu()
        packed = torch.cat([rows * weights[:, None], weights[:, None], torch.ones(len(rows), 1)], 1)
        sums.index_add_(0, sequence.cpu(), packed.double())
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # nccl moves tensors on the GPU only
            device = statistics.device if dist.get_backend() == "nccl" else torch.device("cpu")
            moved = sums.to(device)
            dist.all_reduce(moved)
            sums = moved.cpu()
        for index in range(count):
            total, seen = float(sums[index, -2]), float(sums[index, -1])
            if total <= 0:
                continue
            new = (sums[index, :-2] / total).float()
            keep = 1 - (1 - self.config.decay) * total / seen if self.updates[index] else 0.0
            self.values[index] = keep * self.values[index] + (1 - keep) * new
            self.updates[index] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that restore this record."""
        return {"values": self.values.clone(), "updates": self.updates.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore from `state_dict`."""
        self.values = state["values"].clone().float()
        self.updates = state["updates"].clone().long()
