"""Stage 1: one denoiser for all sites and sequences, pulled to a common look by the record.

Shapes: B batch, X Y Z voxels of the model grid. Algorithm 1 of the paper, with the corrections
that docs/method.md lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sgcd_core.batch import Batch, split_batch, to_device
from sgcd_core.box import Box, load_composition
from sgcd_core.config import GlobalConfig, SgcdConfig
from sgcd_core.diffusion.network import ConditionalDenoiser, LookEmbedding, build_network
from sgcd_core.diffusion.schedule import Schedule
from sgcd_core.errors import ModelError
from sgcd_core.losses import gradient_loss, prediction_loss
from sgcd_core.modelpack import ModelPack
from sgcd_core.style.composition import Composition, composition_state
from sgcd_core.style.outlier import OutlierModel
from sgcd_core.style.record import Record, statistics_of
from sgcd_core.volume.condition import (
    Condition,
    Goals,
    LookMatcher,
    build_condition,
    from_network,
    to_network,
)
from sgcd_core.volume.resample import FWHM


def planned_steps(steps: int, epochs: int | None, scans: int, batch_size: int) -> int:
    """Optimizer steps of a run: `steps`, or as many as `epochs` passes over `scans` take."""
    return steps if epochs is None else epochs * math.ceil(scans / batch_size)


def learning_rate(config: GlobalConfig, step: int, total: int) -> float:
    """Linear warm-up, then constant or a cosine to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class GlobalStage:
    """State of Stage 1: network, optimizer, record, step count.

    Args:
        config: All settings; `config.seed` fixes the initial weights.
        total_steps: Length of the run, for the learning-rate schedule.
        device: Where the network lives.
        box: Weights to start from, with a learning rate that is `box_rate` of the usual one;
            None starts from fresh ones.
        composition: Corrects the matching of scans to looks; part of the model, not trained here.
            None: the one that comes with the package.
    """

    def __init__(
        self,
        config: SgcdConfig,
        total_steps: int,
        device: torch.device | str = "cpu",
        box: Box | None = None,
        composition: Composition | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.total_steps = total_steps
        self.device = torch.device(device)
        self.schedule = Schedule.from_config(config.schedule)
        network = build_network(config).to(self.device)
        self.network: nn.Module = network
        if composition is None and config.condition.match == "composition":
            composition = load_composition()
        self.composition = composition
        self.matcher = LookMatcher(
            config.condition.match, config.prepare.mm, config.sequences, self.composition
        )
        self.rate = 1.0
        if box is not None:
            self.network.load_state_dict(box.network)
            self.rate = config.global_stage.box_rate
        elif network.look_filter is not None:
            # Its 87 coefficients are fitted in closed form (`make box`): steps of Adam from fresh
            # weights throw the whole image about. It lets the content through as it is.
            network.look_filter.requires_grad_(False)
        self.record = Record(len(config.sequences), config.record)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.global_stage.learning_rate
        )
        self.done = 0

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        """Replace the network by `wrapper(network)`, for example DDP, keeping its parameters."""
        self.network = wrapper(self.network)

    def step(self, batch: Batch, condition: Condition | None = None) -> dict[str, float]:
        """One optimizer step on `batch`, whose condition is taken here unless given.

        The batch is taken in `accumulate` parts; with a condition given, at once.

        Returns:
            `loss` and its parts `noise` (L_N), `gradient` (L_G), `record` (L_E), and
            `learning_rate`, all of this worker's share of the batch.

        Raises:
            ModelError: TRAIN-DIVERGED, the loss is not finite.
        """
        stage = self.config.global_stage
        rate = self.rate * learning_rate(stage, self.done, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = to_device(batch, self.device)
        parts = split_batch(batch, 1 if condition is not None else stage.accumulate)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        update_first = self.config.record.order == "update_then_compare"
        if update_first and len(parts) > 1:
            # The record needs all of the batch before the first part is compared with it.
            with torch.no_grad():
                self._update_record([self._losses(part)[1:] for part in parts], batch)
        found: list[tuple[Tensor, Tensor]] = []
        values = dict.fromkeys(("loss", "noise", "gradient", "record"), 0.0)
        for number, part in enumerate(parts):
            share = len(part["seed"]) / len(batch["seed"])
            with averaging(self.network, number == len(parts) - 1):
                losses, statistics, weight = self._losses(part, condition)
                found.append((statistics, weight))
                if len(parts) == 1 and update_first:
                    self._update_record(found, batch)
                losses["record"] = self.record.loss(statistics, part["sequence"], weight)
                losses["loss"] = (
                    stage.weight_noise * losses["noise"]
                    + stage.weight_gradient * losses["gradient"]
                    + stage.weight_record * losses["record"]
                )
                if not torch.isfinite(losses["loss"]):
                    raise ModelError(
                        f"the loss is {float(losses['loss'].detach())} at step {self.done}.",
                        code="TRAIN-DIVERGED",
                        hint="Lower global_stage.learning_rate, or set "
                        "global_stage.precision=fp32.",
                    )
                (share * losses["loss"]).backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                values[name] += share * float(value.detach())
        if not update_first:
            self._update_record(found, batch)
        nn.utils.clip_grad_norm_(self.network.parameters(), stage.clip_norm)
        self.optimizer.step()
        self.done += 1
        return {**values, "learning_rate": rate}

    def _update_record(self, parts: list[tuple[Tensor, Tensor]], batch: Batch) -> None:
        """Eq. 7 with (statistics, weight) of all parts of a batch."""
        statistics, weights = zip(*parts, strict=True)
        self.record.update(torch.cat(statistics), batch["sequence"], torch.cat(weights))

    @torch.no_grad()
    def error(self, batch: Batch, condition: Condition | None = None) -> float:
        """L_N of `batch` as it would be in a step; nothing is learned."""
        self.network.eval()
        losses, *_ = self._losses(to_device(batch, self.device), condition)
        return float(losses["noise"])

    def _losses(
        self, batch: Batch, condition: Condition | None = None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """L_N and L_G, and the statistics of x̂0 with their weights, for L_E."""
        config, stage = self.config, self.config.global_stage
        drawn = draw(batch, self.schedule.timesteps, stage.t_power)
        if condition is None:
            batch, condition, drawn = conditioned(batch, config, self.matcher, drawn, stage.crop)
        image, mask = batch["image"], batch["mask"]
        denoiser, x_t, output = predict(
            self.network, self.schedule, config, batch, drawn, condition, stage.precision
        )
        target = self.schedule.training_target(
            config.network.prediction, to_network(image), drawn.noise, drawn.t, denoiser.content
        )
        estimate, _ = denoiser.split(output, x_t, drawn.t)
        estimate = from_network(estimate).clamp(0, 1) * mask
        weight = torch.ones_like(drawn.t, dtype=torch.float32)
        if stage.x0_weight == "snr":
            weight = self.schedule.clean_weight(config.network.prediction, drawn.t)
        inside, sigma = loss_region(config, mask), loss_sigma(config)
        losses = {
            "noise": prediction_loss(output, target, inside, stage.loss, sigma).mean(),
            "gradient": (weight * gradient_loss(estimate, image, mask, sigma)).mean(),
        }
        return losses, statistics_of(estimate, mask, config.record), weight

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; tensors and plain values only."""
        return {
            "network": unwrapped(self.network).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "record": self.record.state_dict(),
            "done": self.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        unwrapped(self.network).load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.record.load_state_dict(state["record"])
        self.done = int(state["done"])

    def pack(self, outliers: OutlierModel, common: Goals, meta: dict[str, Any]) -> ModelPack:
        """The trained model; `meta` is completed with kind and sequences.

        Args:
            outliers: Fitted on the training scans.
            common: The common look of each sequence: the mean over sites.
            meta: See `ModelPack`.
        """
        state = {f"record.{k}": v for k, v in self.record.state_dict().items()}
        state |= {**common.state("common"), **composition_state(self.composition)}
        state |= {"alpha_bars": self.schedule.alpha_bars, **outliers.state_dict()}
        return ModelPack(
            config=self.config,
            network=unwrapped(self.network).state_dict(),
            state=state,
            meta={"kind": "global", "sequences": list(self.config.sequences), **meta},
        )


class Draw:
    """Timesteps, noise and generators of one batch, each sample from its own seed."""

    def __init__(self, t: Tensor, noise: Tensor, generators: list[torch.Generator]) -> None:
        self.t, self.noise, self.generators = t, noise, generators


def draw(batch: Batch, timesteps: int, t_power: float) -> Draw:
    """t = ⌊T·u^p⌋ and Gaussian noise for each sample; generators go on to the augmentation."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
    device = batch["image"].device
    u = torch.stack([torch.rand((), generator=g) for g in generators])
    t = (timesteps * u**t_power).long().clamp(max=timesteps - 1).to(device)
    shape = batch["image"].shape[1:]
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    return Draw(t, noise, generators)


def conditioned(
    batch: Batch, config: SgcdConfig, matcher: LookMatcher, drawn: Draw,
    crop: tuple[int, int, int] | None,
) -> tuple[Batch, Condition, Draw]:  # fmt: skip
    """The style-free condition of a training batch, and of everything the same random windows.

    Args:
        batch: Whole scans.
        config: All settings.
        matcher: Takes the scans' own looks away.
        drawn: Of this batch; its generators place the windows after the augmentation.
        crop: Sides of the windows, voxels; None keeps whole scans.
    """
    condition = build_condition(batch, config.condition, matcher, batch["look"], drawn.generators)
    return windowed(batch, condition, drawn, crop)


def windowed(
    batch: Batch, condition: Condition, drawn: Draw, crop: tuple[int, int, int] | None
) -> tuple[Batch, Condition, Draw]:
    """The same random window of each scan's image, condition and noise; `crop` as above.

    Every window holds a voxel of the brain.
    """
    if crop is None:
        return batch, condition, drawn
    windows = [
        _window(mask[0], crop, generator)
        for mask, generator in zip(batch["mask"], drawn.generators, strict=True)
    ]

    def cut(volumes: Tensor) -> Tensor:
        pairs = zip(volumes, windows, strict=True)
        return torch.stack([volume[(slice(None), *window)] for volume, window in pairs])

    content = None if condition.content is None else cut(condition.content)
    part: Batch = {**batch, "image": cut(batch["image"]), "mask": cut(batch["mask"])}
    return (
        part,
        Condition(cut(condition.channels), content, condition.source, condition.strength),
        Draw(drawn.t, cut(drawn.noise), drawn.generators),
    )


def _window(
    mask: Tensor, crop: tuple[int, int, int], generator: torch.Generator
) -> tuple[slice, ...]:
    """A random window of the sides `crop`; where it misses the brain, one around a voxel of it."""

    def below(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    sides = list(zip(crop, mask.shape, strict=True))
    starts = [below(whole - side + 1) for side, whole in sides]
    window = tuple(slice(start, start + side) for start, side in zip(starts, crop, strict=True))
    if bool(mask[window].any()):
        return window
    brain = mask.nonzero()
    voxel = brain[below(len(brain))].tolist()
    starts = [
        min(max(at - below(side), 0), whole - side)
        for at, (side, whole) in zip(voxel, sides, strict=True)
    ]
    return tuple(slice(start, start + side) for start, side in zip(starts, crop, strict=True))


def predict(
    network: nn.Module, schedule: Schedule, config: SgcdConfig, batch: Batch, drawn: Draw,
    condition: Condition, precision_name: str,
) -> tuple[ConditionalDenoiser, Tensor, Tensor]:  # fmt: skip
    """Noise a batch and ask the network under its condition: (denoiser, x_t, output)."""
    x_t = schedule.add_noise(to_network(batch["image"]), drawn.noise, drawn.t)
    denoiser = ConditionalDenoiser(
        network,
        schedule,
        config,
        condition.channels,
        condition.content,
        LookEmbedding.labels_of(
            batch["sequence"], batch["look"], condition.source, condition.strength
        ),
        precision_name,
    )
    return denoiser, x_t, denoiser.output(x_t, drawn.t)


def loss_region(config: SgcdConfig, mask: Tensor) -> Tensor | None:
    """Where L_N counts: the brain for predictions of the image, everywhere for noise."""
    return mask if config.network.prediction in ("x0", "residual") else None


def loss_sigma(config: SgcdConfig) -> float:
    """Sigma in voxels of the smoothing that `global_stage.loss_mm` asks for.

    Predictions of noise are compared voxel by voxel whatever it says: noise is what they are.
    """
    if config.network.prediction in ("epsilon", "v"):
        return 0.0
    return config.global_stage.loss_mm / FWHM / config.prepare.mm


@contextmanager
def averaging(network: nn.Module, on: bool) -> Iterator[None]:
    """Whether DDP averages gradients over the workers in the backward passes of this block."""
    if on or not isinstance(network, DistributedDataParallel):
        yield
    else:
        with network.no_sync():
            yield


@torch.no_grad()
def average_gradients(network: nn.Module) -> None:
    """Mean over the workers of the gradients as they stand; a network without DDP keeps them."""
    if not isinstance(network, DistributedDataParallel):
        return
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    parts = torch.split(flat / dist.get_world_size(), sizes)
    for gradient, mean in zip(gradients, parts, strict=True):
        gradient.copy_(mean.view_as(gradient))


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside a DDP wrapper, or the network itself."""
    inner = getattr(network, "module", network)
    return inner if isinstance(inner, nn.Module) else network
