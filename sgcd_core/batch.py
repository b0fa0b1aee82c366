"""A batch of prepared scans, as the two training stages take it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgcd_core.errors import InputError


class Batch(TypedDict):
    """Prepared scans of one step.

    Keys:
        image: (B, 1, X, Y, Z) float32 in [0, 1], 0 outside the mask.
        mask: (B, 1, X, Y, Z) bool.
        sequence: (B,) int64, index into `config.sequences`.
        seed: (B,) int64; all randomness of a sample comes from its seed, so a global batch gives
            the same losses however it is split over workers.
        look: (B, LOOK_SIZE) float32, the look of the site each scan is from, measured on other
            scans; where it is not known, the scan's own.
        source: (B, LOOK_SIZE) float32, the look each scan is taken to have: its site's and some
            of its own.
        subjects: (B,) float32, how many people the site's look was measured on; inf: not known.
        voxel: (B,) float32, the longest side of the stored scans' voxels, mm; 0: not known.
    """

    image: Tensor
    mask: Tensor
    sequence: Tensor
    seed: Tensor
    look: Tensor
    source: Tensor
    subjects: Tensor
    voxel: Tensor


def make_batch(
    images: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.bool_]],
    sequences: Sequence[str],
    seeds: Sequence[int],
    known: Sequence[str],
    looks: Sequence[NDArray[np.float32]],
    sources: Sequence[NDArray[np.float32]],
    subjects: Sequence[float] | None = None,
    voxel: Sequence[float] | None = None,
) -> Batch:
    """Stack (X, Y, Z) volumes into a batch; `known` is `config.sequences`, looks are vectors.

    Without `subjects` and `voxel` neither is known.

    Raises:
        InputError: SCAN-SEQUENCE, a sequence the model does not know.
    """
    for name in sequences:
        if name not in known:
            raise InputError(
                f"sequence {name!r} is not one of {', '.join(known)}.", code="SCAN-SEQUENCE"
            )
    return Batch(
        image=torch.from_numpy(np.stack(images).astype(np.float32))[:, None],
        mask=torch.from_numpy(np.stack(masks).astype(bool))[:, None],
        sequence=torch.tensor([list(known).index(name) for name in sequences]),
        seed=torch.tensor(list(seeds), dtype=torch.int64),
        look=torch.from_numpy(np.stack(looks).astype(np.float32)),
        source=torch.from_numpy(np.stack(sources).astype(np.float32)),
        subjects=torch.tensor(subjects or [math.inf] * len(images), dtype=torch.float32),
        voxel=torch.tensor(voxel or [0.0] * len(images), dtype=torch.float32),
    )


def sample_seed(run_seed: int, *labels: str | int) -> int:
    """A 62-bit seed from the run's seed and what the sample is (step, scan …)."""
    text = "/".join(str(part) for part in (run_seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on `device`; seeds and looks stay on the CPU."""
    return Batch(
        image=batch["image"].to(device),
        mask=batch["mask"].to(device),
        sequence=batch["sequence"].to(device),
        seed=batch["seed"],
        look=batch["look"],
        source=batch["source"],
        subjects=batch["subjects"],
        voxel=batch["voxel"],
    )


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """The batch in up to `parts` parts, in its order, as alike in size as can be."""
    count = min(parts, len(batch["seed"]))
    bounds = [len(batch["seed"]) * i // count for i in range(count + 1)]
    return [
        Batch(
            image=batch["image"][start:end],
            mask=batch["mask"][start:end],
            sequence=batch["sequence"][start:end],
            seed=batch["seed"][start:end],
            look=batch["look"][start:end],
            source=batch["source"][start:end],
            subjects=batch["subjects"][start:end],
            voxel=batch["voxel"][start:end],
        )
        for start, end in pairwise(bounds)
    ]
