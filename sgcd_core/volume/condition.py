"""What the network is told about the anatomy: gradient map (Eq. 2) and content, style kept out.

The signed mean of forward differences can be inverted exactly, so a gradient map of the scan
itself carries the full tissue contrast. `augment_contrast` breaks that tie during training: the
condition is taken from a randomly recoloured scan, while the denoising target stays the original.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sgcd_core.batch import Batch
from sgcd_core.config import ConditionConfig
from sgcd_core.style.composition import Composition, match
from sgcd_core.style.look import Look, restyled, voxels, with_rim

#: Most that another scanner's voxels are longer or shorter than those of the model grid, a factor.
LONGEST = 1.35
#: Variance that interpolating linearly adds, in voxels²: the mean over where a voxel may lie.
INTERPOLATED = 1 / 6
#: How much longer than `fine_voxel_mm`, as a part of it, voxels are that need all of the filter.
FINE_TO_COARSE = 0.15
#: Root mean square, over a brain in [0, 1], of what is unusual about one subject and passes for its
#: scanner's where no other was seen.
ONE_SUBJECT = 0.02


def to_network(image: Tensor) -> Tensor:
    """[0, 1] → [-1, 1]. The one place where this map lives, with its inverse below."""
    return 2.0 * image - 1.0


def from_network(x: Tensor) -> Tensor:
    """[-1, 1] → [0, 1], the inverse of `to_network`; not clipped."""
    return (x + 1.0) / 2.0


class Goals(NamedTuple):
    """The look that is wanted of each sequence, and how much is behind it.

    Attributes:
        looks: (S, LOOK_SIZE) float32.
        subjects: (S,) float32, how many people each was measured on; None: not known.
    """

    looks: Tensor
    subjects: Tensor | None = None

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], name: str) -> Goals:
        """What `state` put there under `name`; earlier models do not know the numbers."""
        return cls(state[f"looks.{name}"], state.get(f"subjects.{name}"))

    def state(self, name: str) -> dict[str, Tensor]:
        """Tensors for a modelpack's state."""
        found = {f"looks.{name}": self.looks}
        return found if self.subjects is None else found | {f"subjects.{name}": self.subjects}


@dataclass(frozen=True)
class Condition:
    """Condition of one batch.

    Attributes:
        channels: (B, C, X, Y, Z) float32 in [-1, 1], concatenated with the noisy image.
        content: (B, 1, X, Y, Z) float32 in [-1, 1], or None where the option is off.
        source: (B, LOOK_SIZE), the looks the scans had before they were matched, with the rims
            they have now.
        strength: (B,), how much of the look filter is wanted.
    """

    channels: Tensor
    content: Tensor | None
    source: Tensor
    strength: Tensor


class LookMatcher:
    """Brings scans to a wanted look before the condition is taken, so that no other look is left.

    Args:
        kind: `composition`, `histogram` or `none`.
        mm: Voxel side of the model grid.
        sequences: Names, in the order of their indices.
        composition: For kind `composition`; without it that kind is `histogram`.
    """

    def __init__(
        self, kind: str, mm: float, sequences: Sequence[str],
        composition: Composition | None = None,
    ) -> None:  # fmt: skip
        self.kind, self.mm, self.sequences = kind, mm, tuple(sequences)
        self.composition = composition if kind == "composition" else None

    def __call__(
        self, image: Tensor, mask: Tensor, look: Tensor, source: Tensor, sequence: Tensor
    ) -> Tensor:
        """Images (B, 1, X, Y, Z) from the look `source` to `look`, both (B, LOOK_SIZE)."""
        if self.kind == "none":
            return image
        rows = [
            match(
                sample[0].cpu().numpy(), inside[0].cpu().numpy(), self.mm,
                Look.from_vector(wanted.cpu().numpy()), Look.from_vector(has.cpu().numpy()),
                self.sequences[int(index)], self.composition,
            )
            for sample, inside, wanted, has, index in zip(
                image, mask, look, source, sequence, strict=True
            )
        ]  # fmt: skip
        return torch.from_numpy(np.stack(rows))[:, None].to(image.device)


def build_condition(
    batch: Batch,
    config: ConditionConfig,
    matcher: LookMatcher,
    look: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    subjects: Tensor | None = None,
) -> Condition:
    """Condition of a batch of prepared scans.

    Args:
        batch: Scans, masks, sequences, and the looks they have (`source`).
        config: Which channels, and how strong the augmentation.
        matcher: Takes the scan's own look away.
        look: (B, LOOK_SIZE), the look that is wanted.
        generators: With them and `contrast_augmentation`, each sample's style is randomized
            first (training). None takes the scans as they are (inference).
        subjects: (B,), how many people the wanted looks were measured on; with them a matching
            that is hardly more than a look of so few may be wrong by is made in part.
    """
    image, mask, source = batch["image"], batch["mask"], batch["source"]
    if generators is not None and config.contrast_augmentation:
        styled = augment_contrast(image, mask, config, generators, matcher.mm)
        rows = [
            restyled(
                look_.cpu().numpy(),
                old[0].cpu().numpy(),
                new[0].cpu().numpy(),
                inside[0].cpu().numpy(),
                matcher.sequences[int(index)],
            )
            for look_, old, new, inside, index in zip(
                source, image, styled, mask, batch["sequence"], strict=True
            )
        ]
        image, source = styled, torch.from_numpy(np.stack(rows))
    matched = matcher(image, mask, look, source, batch["sequence"])
    if subjects is not None:
        part = believed(image, matched, mask, batch["subjects"], subjects)
        matched = torch.lerp(image, matched, part.to(image.device).view(-1, 1, 1, 1, 1))
    image = matched
    rims = [
        with_rim(*(x.cpu().numpy() for x in (one, volume[0], inside[0])))
        for one, volume, inside in zip(source, image, mask, strict=True)
    ]
    source = torch.from_numpy(np.stack(rims))
    parts = []
    content = to_network(image) if config.content_channel else None
    if config.gradient_channel:
        parts.append(gradient_map(image, mask))
    if content is not None:
        parts.append(content)
    channels = torch.cat(parts, dim=1) if parts else image[:, :0]
    return Condition(channels, content, source, filter_strength(look, source, config))


def believed(before: Tensor, after: Tensor, mask: Tensor, source: Tensor, wanted: Tensor) -> Tensor:
    """Part of a matching that is a difference of scanners, not of the few who were seen, (B,).

    A matching moves a scan by the difference of two looks, and each is off by what is unusual about
    the people it was measured on. Where it moves a scan no further than that, it is not made.

    Args:
        before: (B, 1, X, Y, Z), the scans.
        after: (B, 1, X, Y, Z), the scans matched.
        mask: (B, 1, X, Y, Z) bool.
        source: (B,), how many people the looks of the scans' sites were measured on.
        wanted: (B,), how many the wanted looks.
    """
    inside = mask.sum((1, 2, 3, 4)).clamp(min=1)
    moved = ((after - before).square() * mask).sum((1, 2, 3, 4)) / inside
    error = ONE_SUBJECT**2 * (source**-2 + wanted**-2).to(moved.device)
    return (1 - error / (2 * moved).clamp(min=1e-12)).clamp(0, 1)


def filter_strength(look: Tensor, source: Tensor, config: ConditionConfig) -> Tensor:
    """How much of the look filter leads from look to look, (B,) of two (B, LOOK_SIZE).

    On a grid far coarser than the voxels of both, two scanners are nearly equally sharp.
    """
    both = torch.stack([voxels(look), voxels(source)])
    part = torch.ones_like(both[0])
    if config.fine_voxel_mm > 0:
        rise = (both.amax(0) / config.fine_voxel_mm - 1) / FINE_TO_COARSE
        part = torch.where(both.amin(0) > 0, rise.clamp(0, 1), part)
    return config.fine_voxel_filter + (1 - config.fine_voxel_filter) * part


def forward_gradient(image: Tensor) -> Tensor:
    """Pad((∇x + ∇y + ∇z) / 3) of Eq. 2: forward differences, zero-padded. (B, 1, X, Y, Z)."""
    dx = F.pad(image[:, :, 1:] - image[:, :, :-1], (0, 0, 0, 0, 0, 1))
    dy = F.pad(image[:, :, :, 1:] - image[:, :, :, :-1], (0, 0, 0, 1))
    dz = F.pad(image[..., 1:] - image[..., :-1], (0, 1))
    return (dx + dy + dz) / 3.0


def gradient_map(image: Tensor, mask: Tensor) -> Tensor:
    """G of Eq. 2 in [-1, 1]: scaled by the 99th percentile of |∇| inside the mask, then clipped.

    The scale is a constant for differentiation. One outlier voxel must not set it, so it is a
    percentile, not the maximum.
    """
    gradient = forward_gradient(image)
    scale = masked_quantiles(gradient.detach().abs(), mask, (0.99,))[:, 0]
    return (gradient / scale.clamp(min=1e-6).view(-1, 1, 1, 1, 1)).clamp(-1, 1)


def masked_quantiles(image: Tensor, mask: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Quantiles of each sample's masked voxels, linear between order statistics. (B, levels)."""
    rows = []
    for sample, inside in zip(image, mask, strict=True):
        values, _ = sample[inside].float().sort()
        if values.numel() == 0:
            rows.append(torch.zeros(len(levels), device=image.device))
            continue
        at = torch.tensor(levels, dtype=torch.float32, device=image.device)
        position = at * (values.numel() - 1)
        low = position.floor().long()
        high = (low + 1).clamp(max=values.numel() - 1)
        rows.append(torch.lerp(values[low], values[high], position - low))
    return torch.stack(rows)


def augment_contrast(
    image: Tensor, mask: Tensor, config: ConditionConfig, generators: Sequence[torch.Generator],
    mm: float,
) -> Tensor:  # fmt: skip
    """The same anatomy in a random style: monotone remap, smooth bias, resolution, noise.

    Afterwards rescaled to the robust range [0, 1] of a prepared scan, so that an augmented scan
    and a new one look alike to the network. Random numbers are drawn on the CPU.

    Args:
        image: (B, 1, X, Y, Z) float32 in [0, 1].
        mask: (B, 1, X, Y, Z) bool.
        config: Strengths.
        generators: A CPU generator a sample; the same state gives the same style, whatever the
            batch.
        mm: Voxel side.

    Returns:
        (B, 1, X, Y, Z) float32 in [0, 1], 0 outside the mask.
    """
    each = zip(image, mask, generators, strict=True)
    out = torch.stack([_one_style(one, brain, config, draw, mm) for one, brain, draw in each])
    limits = masked_quantiles(out, mask, (0.005, 0.995))
    low, high = limits[:, 0].view(-1, 1, 1, 1, 1), limits[:, 1].view(-1, 1, 1, 1, 1)
    out = ((out - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return out * mask


def _one_style(
    image: Tensor, mask: Tensor, config: ConditionConfig, generator: torch.Generator, mm: float
) -> Tensor:
    device = image.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def smooth() -> Tensor:
        """A random field of about unit deviation, from a coarse grid."""
        coarse = torch.randn((1, 1, 4, 4, 4), generator=generator).to(device)
        return F.interpolate(coarse, image.shape[1:], mode="trilinear", align_corners=True)[0]

    # Monotone remap through random knots, blended with the identity.
    increments = -torch.log(uniform(config.remap_knots).clamp(min=1e-6))
    random_map = torch.cat([torch.zeros(1), increments.cumsum(0) / increments.sum()])
    blend = config.remap_strength * uniform()
    knots = torch.lerp(torch.linspace(0, 1, config.remap_knots + 1), random_map, blend).to(device)
    position = image.clamp(0, 1) * config.remap_knots
    index = position.floor().long().clamp(max=config.remap_knots - 1)
    out = torch.lerp(knots[index], knots[index + 1], position - index)
    # Smooth multiplicative field from a coarse random grid.
    out = out * torch.exp(config.bias_strength * float(uniform()) * smooth())
    # Resolution, then noise: in this order, because noise is added by the receiver.
    along = torch.lerp(uniform(1), uniform(3), uniform())
    variance = along * (config.blur_mm**2 + config.sharpen_mm**2) - config.sharpen_mm**2
    variance = variance / mm**2
    if config.other_voxels > 0 and float(uniform()) < config.other_voxels:
        out = blurred(out, (variance - INTERPOLATED).tolist())
        ratios = torch.exp(math.log(LONGEST) * (2 * uniform(3) - 1))
        pairs = [
            through_voxels(side, *at)
            for side, *at in zip(image.shape[1:], ratios.tolist(), uniform(3).tolist(), strict=True)
        ]
        there, back = ([pair[k].to(device) for pair in pairs] for k in (0, 1))
        both = [b @ t for t, b in zip(there, back, strict=True)]
        share = along_axes(mask.to(out.dtype), both)
        out = along_axes(out * mask, both) / share.clamp(min=0.25)
        noise = torch.randn((1, *(len(m) for m in there)), generator=generator).to(device)
        noise = along_axes(noise, back)
    else:
        out = blurred(out, variance.tolist())
        # A scan's noise is no longer white after resampling, nor even after bias correction.
        noise = torch.randn(image.shape, generator=generator).to(device)
        noise = blurred(noise, (0.3 * uniform() * uniform(3)).tolist())
    noise = noise / noise.std().clamp(min=1e-6) * torch.exp(0.15 * smooth())
    return out + config.noise_std * float(uniform()) * noise


def through_voxels(side: int, ratio: float, offset: float) -> tuple[Tensor, Tensor]:
    """Matrices that bring one axis onto the voxels of another scanner, and back.

    There by a Lanczos window, which loses little; back linearly, as scans come onto the model grid,
    so what is lost depends on where a voxel lies between two of the other's. Finer voxels are
    averaged.

    Args:
        side: Voxels along the axis.
        ratio: Side of the other's voxels, in those of the axis.
        offset: How far its first voxel lies before the first of the axis, in its own, [0, 1].

    Returns:
        (other side, side) and (side, other side), float32; rows sum to 1.
    """
    at = ratio * (torch.arange(math.ceil(side / ratio) + 2) - offset)
    here, width = torch.arange(side, dtype=torch.float32), max(ratio, 1.0)
    near = (at.clamp(0, side - 1)[:, None] - here) / width
    there = torch.sinc(near) * torch.sinc(near / 3) * (near.abs() < 3)
    back = (1 - (here[:, None] - at).abs() / width).clamp(min=0)
    return there / there.sum(1, keepdim=True), back / back.sum(1, keepdim=True)


def along_axes(volume: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """(1, X, Y, Z) with a matrix (X', X) … applied along each axis: (1, X', Y', Z')."""
    for axis, matrix in enumerate(matrices, start=1):
        volume = (volume.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return volume


def blurred(volume: Tensor, variance: Sequence[float]) -> Tensor:
    """(…, X, Y, Z) blurred by a Gaussian of `variance` voxels² along each axis, periodic.

    Below 0 it is sharpened, by the inverse of that Gaussian.
    """
    sides = volume.shape[-3:]
    spectrum = torch.fft.rfftn(volume, dim=(-3, -2, -1))
    for axis, (side, amount) in enumerate(zip(sides, variance, strict=True)):
        frequency = (torch.fft.rfftfreq if axis == 2 else torch.fft.fftfreq)(side)
        window = torch.exp(-2 * (math.pi * frequency) ** 2 * amount).to(volume.device)
        shape = [-1 if a == axis else 1 for a in range(3)]
        spectrum = spectrum * window.view(shape)
    out: Tensor = torch.fft.irfftn(spectrum, s=sides, dim=(-3, -2, -1))
    return out
