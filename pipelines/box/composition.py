"""Fitting the composition model of the box: which rank of a look a rank of a scan stands for.

One example is one to three scans of a site in a random style against the look of other subjects of
that site; the answer is known because the scans' own intensities are the site's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.box.scans import GRIDS, SEQUENCES, SiteScans
from sgcd_core.config import ConditionConfig
from sgcd_core.style.composition import Composition, CompositionModel, true_shift
from sgcd_core.style.look import LEVELS, LOOK_SIZE, PROFILE_SIZE, measure_look, rising
from sgcd_core.style.shading import SHADING_SIZE, SIDES
from sgcd_core.volume.condition import augment_contrast

Array = NDArray[Any]

#: Restyled profiles kept of each scan beside its own.
STYLES = 3
#: Part of the sites that a member is fitted to.
PART = 0.75
_ROW = 1 + LOOK_SIZE + STYLES * PROFILE_SIZE
_PROFILE = 1 + len(LEVELS)
_SHADING = _PROFILE + PROFILE_SIZE
#: Weight that keeps the regression of shadings on profiles small; profiles are of length 1.
RIDGE = 0.1


def measure_site(scans: SiteScans, config: ConditionConfig, seed: int) -> NDArray[np.float32]:
    """What fitting needs of a site, (N, 1 + LOOK_SIZE + 3·PROFILE_SIZE): kilobytes, not volumes.

    Sequence, own look, and profiles in other styles of each scan.
    """
    mm = GRIDS["tiny"][0]
    rows = []
    for number, (image, mask) in enumerate(
        zip(scans.images["tiny"], scans.masks["tiny"], strict=True)
    ):
        parts = [
            np.array([SEQUENCES.index(scans.sequence)]),
            measure_look(image, mask, mm, scans.sequence).vector(),
        ]
        for style in range(STYLES):
            generator = torch.Generator().manual_seed(seed + STYLES * number + style)
            volume, inside = torch.from_numpy(image)[None, None], torch.from_numpy(mask)[None, None]
            styled = augment_contrast(volume, inside, config, [generator], mm)[0, 0].numpy()
            parts.append(measure_look(styled, mask, mm, scans.sequence).profile)
        rows.append(np.concatenate(parts))
    return np.asarray(rows, np.float32)


def read_sites(paths: list[Path], subjects: int) -> NDArray[np.float32]:
    """Rows that `measure_site` made, appended to files: (sites, subjects, row)."""
    found = []
    for path in sorted(paths):
        raw = path.read_bytes()
        values = np.frombuffer(raw[: len(raw) // 4 * 4], np.float32)
        whole = len(values) // (2 * _ROW * subjects) * 2 * _ROW * subjects  # both sequences
        found.append(values[:whole].reshape(-1, subjects, _ROW))
    return np.concatenate(found)


def fit_composition(
    sites: Array, *, members: int = 6, steps: int = 1500, hidden: int = 64, seed: int = 0
) -> Composition:
    """Fit each member to its own choice of the sites; the same arguments give the same model.

    Args:
        sites: From `read_sites`; the two sequences of a site follow each other.
        members: How many.
        steps: Optimizer steps of each.
        hidden: Width of the perceptrons.
        seed: Of everything.
    """
    count = len(sites) // len(SEQUENCES)
    fits = []
    for member in range(members):
        rng = np.random.default_rng([seed, member])
        mine = np.sort(rng.permutation(count)[: max(1, round(PART * count))])
        rows = np.concatenate([len(SEQUENCES) * mine + k for k in range(len(SEQUENCES))])
        fits.append(_fit(sites[rows], steps=steps, hidden=hidden, seed=seed + member))
    return Composition(fits, *fit_anatomy(sites)).requires_grad_(False)


def fit_anatomy(sites: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """What anatomy adds to a fitted shading, from what differs between the scans of one site.

    A site's scans share a coil, so what their profiles tell about their shadings is anatomy. A
    profile knows no left and right; neither does what it tells.

    Args:
        sites: From `read_sites`.

    Returns:
        Mean profiles (sequences, PROFILE_SIZE) and slopes (sequences, PROFILE_SIZE, SHADING_SIZE).
    """
    means, slopes = [], []
    for index in range(len(SEQUENCES)):
        mine = sites[sites[:, 0, 0] == index].astype(np.float64)
        inner = mine - mine.mean(1, keepdims=True)
        profiles = inner[..., _PROFILE:_SHADING].reshape(-1, PROFILE_SIZE)
        shadings = inner[..., _SHADING : _SHADING + SHADING_SIZE].reshape(-1, SHADING_SIZE)
        left = profiles.T @ profiles + RIDGE * np.eye(PROFILE_SIZE)
        slopes.append(np.linalg.solve(left, profiles.T @ shadings) * (SIDES > 0))
        means.append(mine[..., _PROFILE:_SHADING].mean((0, 1)))
    mean, slope = (torch.from_numpy(np.stack(x).astype(np.float32)) for x in (means, slopes))
    return mean, slope


def _fit(sites: Array, *, steps: int, hidden: int, seed: int, batch: int = 128) -> CompositionModel:
    """One member, by Adam on the mean absolute error of ranks.

    Args:
        sites: From `read_sites`.
        steps: Optimizer steps.
        batch: Examples a step.
        seed: Of everything.
        hidden: Width of the perceptron.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = CompositionModel(len(SEQUENCES), hidden)
    rest = [weight for name, weight in model.named_parameters() if name != "linear"]
    optimizer = torch.optim.AdamW(
        [{"params": [model.linear], "weight_decay": 1e-4}, {"params": rest, "weight_decay": 1e-2}],
        lr=1e-3,
    )
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-5)
    for _ in range(steps):
        *given, shift = _examples(sites, rng.integers(0, len(sites), batch), rng)
        loss = (model(*given) - shift).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    return model


def score_composition(model: Composition, sites: Array, seed: int = 1) -> dict[str, float]:
    """By sequence, the mean absolute error of ranks as a part of what it is without the model."""
    rng = np.random.default_rng(seed)
    out = {}
    for index, name in enumerate(SEQUENCES):
        mine = np.flatnonzero(sites[:, 0, 0] == index)
        *given, _, truth = (x.numpy() for x in _examples(sites, np.repeat(mine, 5), rng))
        found = np.stack([model.shift(a, b, c, index) for a, b, c in zip(*given, strict=True)])
        out[name] = float(np.abs(found - truth).mean() / np.abs(truth).mean())
    return out


def _examples(sites: Array, picks: Array, rng: np.random.Generator) -> list[torch.Tensor]:
    """Some scans of each picked site, as another scanner shows them, against two or more others.

    The other scanner's contrast is a map between the looks of two sites drawn at random, from twice
    of it down to none; its noise, bias and resolution are those of the restyled profiles.

    Returns:
        The model's arguments, then the shift it is to predict.
    """
    count, first = sites.shape[1], _PROFILE
    styles = [first, *(1 + LOOK_SIZE + k * PROFILE_SIZE for k in range(STYLES))]
    groups = [np.flatnonzero(sites[:, 0, 0] == index) for index in range(len(SEQUENCES))]
    rows: list[list[Array]] = [[], [], [], []]
    for pick in picks:
        site, order = sites[pick], rng.permutation(count)
        size = int(rng.integers(1, count - 1))
        some, others = order[:size], order[size : size + int(rng.integers(2, count - size + 1))]
        own, look = site[some, 1:first].mean(0), site[others, 1:first].mean(0)
        at = styles[int(rng.integers(len(styles)))]
        group = groups[int(site[0, 0])]
        other = sites[group[int(rng.integers(len(group)))], :, 1:first].mean(0)
        here = rising(site[:, 1:first].mean(0))
        part = max(0.0, float(rng.uniform(-0.1, 2.0)))
        shown = np.clip((1 - part) * own + part * np.interp(own, here, other), 0, 1)
        rows[0].append(site[some, at : at + PROFILE_SIZE].mean(0))
        rows[1].append(site[others, first : first + PROFILE_SIZE].mean(0))
        rows[2].append(true_shift(shown, look))
        rows[3].append(true_shift(own, look))
    scan, profile, identity, shift = (
        torch.from_numpy(np.stack(r).astype(np.float32)) for r in rows
    )
    sequence = torch.from_numpy(sites[picks, 0, 0].astype(np.int64))
    return [scan, profile, identity, sequence, shift]
