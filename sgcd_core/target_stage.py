"""Stage 2: the denoiser learns one site's look from its own scans and a style encoder.

Algorithm 2 of the paper, with the corrections that docs/method.md lists. Besides the style losses
L_S and L_R there are two options: plain denoising of the target's own scans under the style-free
condition (`target_denoising`), and an anatomy term. The Stage 1 network stays frozen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sgcd_core.batch import Batch, split_batch, to_device
from sgcd_core.config import SgcdConfig
from sgcd_core.diffusion.ddim import ddim_step
from sgcd_core.diffusion.network import ConditionalDenoiser, build_network
from sgcd_core.diffusion.sampler import noise_for, noised, reverse_grid, starting_image
from sgcd_core.diffusion.schedule import Schedule
from sgcd_core.errors import InputError, ModelError
from sgcd_core.global_stage import (
    average_gradients,
    averaging,
    conditioned,
    draw,
    loss_region,
    loss_sigma,
    predict,
    unwrapped,
)
from sgcd_core.harmonizer import global_image, sampling_denoiser
from sgcd_core.inversions import Inversions, content_key
from sgcd_core.losses import (
    gradient_loss,
    prediction_loss,
    style_direction_loss,
    style_reconstruction_loss,
)
from sgcd_core.modelpack import ModelPack
from sgcd_core.style.composition import composition_from_state
from sgcd_core.style.encoder import StyleEncoder, embed_batch
from sgcd_core.style.look import OWN_PART, blend, measure_look
from sgcd_core.style.slices import SlicePlan, plan_slices
from sgcd_core.volume.condition import Goals, LookMatcher, from_network, to_network


class TargetStage:
    """State of Stage 2: frozen and tuned network, optimizer, style directions, step count.

    Args:
        pack: A global model. Its weights are never changed.
        config: All settings; network, schedule and grid must be the pack's.
        target: Name of the target site.
        encoder: Frozen style encoder Ψ.
        goals: The target's look of each sequence; rows of a sequence it lacks are not read.
        device: Where the networks live.
        inversions: Keeps what the frozen network makes of a scan, I' and its inverted latent.
    """

    def __init__(
        self, pack: ModelPack, config: SgcdConfig, target: str, encoder: StyleEncoder,
        goals: Goals, device: torch.device | str = "cpu", inversions: Inversions | None = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(config.seed)
        self.inversions = inversions or Inversions()
        self.config, self.target, self.parent = config, target, pack
        self.device = torch.device(device)
        self.schedule = Schedule(pack.state["alpha_bars"])
        self.common, self.goals = Goals.from_state(pack.state, "common"), goals
        self.matcher = LookMatcher(
            config.condition.match, config.prepare.mm, config.sequences,
            composition_from_state(pack.state),
        )  # fmt: skip
        self.frozen = build_network(config)
        self.frozen.load_state_dict(pack.network)
        self.frozen.to(self.device).eval().requires_grad_(False)
        network = copy.deepcopy(self.frozen).requires_grad_(True)
        if network.look_filter is not None and network.look_filter.at_rest:
            network.look_filter.requires_grad_(False)  # as in Stage 1
        self.network: nn.Module = network
        self.encoder = encoder.to(self.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.target_stage.learning_rate
        )
        self.directions: dict[int, Tensor] = {}
        self.done = 0
        self._share = 1.0  # of a step's batch that the part at hand is

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        """Replace the tuned network by `wrapper(network)`, for example DDP."""
        self.network = wrapper(self.network)

    @torch.no_grad()
    def measure_target(self, batches: Iterable[Batch]) -> None:
        """Mean style direction S_T of each sequence over the target's scans (Eq. 12).

        Fewer and steadier than one embedding a step. Must run before `step`.
        """
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        for raw in batches:
            batch = to_device(raw, self.device)
            aligned, _ = self._inverted(batch)
            directions = self._direction(batch["image"], aligned, _plans(self, batch))
            for index, row in zip(batch["sequence"].tolist(), directions, strict=True):
                sums[index] = sums.get(index, torch.zeros_like(row)) + row
                counts[index] = counts.get(index, 0) + 1
        self.directions = {k: sums[k] / counts[k] for k in sums}

    def step(self, source: Batch, target: Batch) -> dict[str, float]:
        """One optimizer step (one for each of the last k generative steps, stepwise).

        Args:
            source: Scans of any site.
            target: Scans of the target site.

        Returns:
            `loss` and its parts: `denoising`, and on the steps where style is evaluated `style`
            (L_S), `reconstruction` (L_R) and `anatomy`.

        Raises:
            InputError: TARGET-SEQUENCE, the target has no scan of a source's sequence.
            ModelError: TRAIN-DIVERGED.
        """
        stage = self.config.target_stage
        source, target = to_device(source, self.device), to_device(target, self.device)
        for index in source["sequence"].tolist():
            if index not in self.directions:
                raise InputError(
                    f"site {self.target!r} has no {self.config.sequences[index]} scan.",
                    code="TARGET-SEQUENCE",
                )
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, float] = {}
        pairs = zip(
            split_batch(source, stage.accumulate), split_batch(target, stage.accumulate),
            strict=True,
        )  # fmt: skip
        # Several backward passes make one step, and some of them compute parts of the network
        # again: DDP's own averaging, one for each pass, does not know of that.
        with averaging(self.network, False):
            for one, own in pairs:
                share = len(one["seed"]) / len(source["seed"])
                for name, value in self._part(one, own, share).items():
                    values[name] = values.get(name, 0.0) + share * value
        self._optimize()
        self.done += 1
        return {"loss": sum(values.values()), **values}

    def _part(self, source: Batch, target: Batch, share: float) -> dict[str, float]:
        """Losses of a part of a step, their gradients times `share` added to the network's."""
        stage, self._share = self.config.target_stage, share
        losses: dict[str, float] = {}
        if stage.target_denoising > 0:
            loss = self._denoising(target)
            losses["denoising"] = float(loss.detach())
            self._backward(stage.target_denoising * loss)
        if self.done % stage.style_every == 0 and (
            stage.weight_style > 0 or stage.weight_reconstruction > 0 or stage.weight_anatomy > 0
        ):
            if stage.weight_style > 0 or stage.weight_anatomy > 0:
                wanted = torch.stack([self.directions[i] for i in source["sequence"].tolist()])
                losses |= self._styled(source, wanted, "style", stage.weight_style)
            if stage.weight_reconstruction > 0:
                weight = stage.weight_reconstruction
                losses |= self._styled(target, None, "reconstruction", weight)
        return losses

    def _denoising(self, batch: Batch) -> Tensor:
        """Plain denoising of target scans under the style-free condition."""
        config = self.config
        drawn = draw(batch, self.schedule.timesteps, config.global_stage.t_power)
        batch, condition, drawn = conditioned(
            batch, config, self.matcher, drawn, config.global_stage.crop
        )
        denoiser, _, output = predict(
            self.network, self.schedule, config, batch, drawn, condition,
            config.target_stage.precision,
        )  # fmt: skip
        wanted = self.schedule.training_target(
            config.network.prediction, to_network(batch["image"]), drawn.noise, drawn.t,
            denoiser.content,
        )  # fmt: skip
        inside = loss_region(config, batch["mask"])
        return prediction_loss(
            output, wanted, inside, config.global_stage.loss, loss_sigma(config)
        ).mean()

    def _styled(
        self, batch: Batch, wanted: Tensor | None, name: str, weight: float
    ) -> dict[str, float]:
        """Translate `batch`, compare its style direction and back-propagate.

        `wanted` is the direction it is to have, (B, E); None: that of the scans themselves.
        """
        stage, plans = self.config.target_stage, _plans(self, batch)
        aligned, latent = self._inverted(batch)
        with torch.no_grad():
            base = embed_batch(self.encoder, aligned, plans)
            if wanted is None:
                wanted = embed_batch(self.encoder, batch["image"], plans) - base
        denoiser = sampling_denoiser(
            self.network, self.schedule, self.config, self.matcher, batch, self.goals
        )
        found: dict[str, float] = {}

        def backward(x0: Tensor) -> None:
            image = from_network(x0).clamp(0, 1) * batch["mask"]
            moved = embed_batch(self.encoder, image, plans) - base
            compare = style_direction_loss if name == "style" else style_reconstruction_loss
            loss = compare(moved, wanted).mean()
            found[name] = float(loss.detach())
            total = weight * loss
            if name == "style" and stage.weight_anatomy > 0:
                anatomy = gradient_loss(
                    image, batch["image"], batch["mask"], loss_sigma(self.config)
                ).mean()
                found["anatomy"] = float(anatomy.detach())
                total = total + stage.weight_anatomy * anatomy
            self._backward(total)

        if latent is None:
            latent = noised(
                self.schedule, self.config.target_sampler, to_network(aligned), _noise(batch)
            )
        if stage.backprop == "chain":
            backward(self._whole_chain(denoiser, latent, to_network(aligned)))
        else:
            self._stepwise(denoiser, latent, to_network(aligned), backward)
        return found

    def _stepwise(
        self, denoiser: ConditionalDenoiser, x: Tensor, anchor: Tensor,
        backward: Callable[[Tensor], None],
    ) -> None:  # fmt: skip
        """Loss on x̂0 at each of the last k steps, then step and detach: one graph in memory."""
        grid = reverse_grid(self.config.target_sampler)
        first_trained = len(grid) - 1 - self.config.target_stage.last_k
        for position, (t, t_next) in enumerate(pairwise(grid)):
            steps = torch.full((x.shape[0],), t, dtype=torch.long, device=x.device)
            with torch.set_grad_enabled(position >= first_trained):
                x0, eps = denoiser(x, steps)
                if position >= first_trained:
                    backward(x0)
                    if t_next >= 0:
                        self._optimize()
            x = self._next(x0.detach(), eps.detach(), anchor, t_next)

    def _whole_chain(self, denoiser: ConditionalDenoiser, x: Tensor, anchor: Tensor) -> Tensor:
        """The generated image with the graph of all steps, activations recomputed."""
        for t, t_next in pairwise(reverse_grid(self.config.target_sampler)):
            steps = torch.full((x.shape[0],), t, dtype=torch.long, device=x.device)
            x0, eps = checkpoint(denoiser, x, steps, use_reentrant=False)
            x = self._next(x0, eps, anchor, t_next)
        return x

    def _next(self, x0: Tensor, eps: Tensor, anchor: Tensor, t_next: int) -> Tensor:
        """The image at `t_next`; with kind `anchored` as in `generate_anchored`.

        There a last step would return the anchor whatever the network does (Eq. 11 at t = 0), so
        the walk ends at the last noisy image.
        """
        if self.config.target_sampler.kind == "anchored":
            return ddim_step(self.schedule, anchor, eps, max(t_next, 0))
        return ddim_step(self.schedule, x0, eps, t_next)

    @torch.no_grad()
    def _inverted(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """I' of Stage 1 and, where generation starts from an inversion, the latent it leads to.

        Both (B, 1, X, Y, Z), I' in [0, 1], the latent on the network's scale. They depend on the
        scan and on the look of its site's other scans alone; `Harmonizer`, given that look, makes
        the same of it.
        """
        found = []
        for one in split_batch(batch, len(batch["seed"])):
            key = content_key(one["image"], one["mask"], one["sequence"], one["look"])
            found.append(self.inversions.get(key, partial(self._invert, one, key)))
        aligned = torch.cat([item["aligned"] for item in found]).to(self.device)
        if self.config.target_sampler.start == "noise":
            return aligned, None
        return aligned, torch.cat([item["latent"] for item in found]).to(self.device)

    def _invert(self, scan: Batch, key: str) -> dict[str, Tensor]:
        """`aligned`, and `latent` where it is needed, of a batch of one."""
        config, sequence = self.config, int(scan["sequence"])
        source = scan["source"]
        if config.condition.match != "none":
            image, mask = scan["image"][0, 0].cpu().numpy(), scan["mask"][0, 0].cpu().numpy()
            own = measure_look(
                image, mask, config.prepare.mm, config.sequences[sequence],
                voxel_mm=float(scan["voxel"]),
            ).vector()  # fmt: skip
            source = torch.from_numpy(blend(scan["look"][0].numpy(), own, OWN_PART))[None]
        scan = Batch(**{**scan, "source": source})  # type: ignore[typeddict-item]
        denoiser = sampling_denoiser(
            self.frozen, self.schedule, config, self.matcher, scan, self.common
        )
        noise = noise_for(key, config.seed, 0, tuple(scan["image"].shape)).to(self.device)
        aligned = global_image(self.schedule, config, denoiser, scan, noise)
        if config.target_sampler.start == "noise":
            return {"aligned": aligned}
        latent = starting_image(
            self.schedule, config.target_sampler, denoiser, to_network(aligned), noise
        )
        return {"aligned": aligned, "latent": latent}

    @torch.no_grad()
    def _direction(self, image: Tensor, aligned: Tensor, plans: list[SlicePlan]) -> Tensor:
        """S = Ψ(I) - Ψ(I') of Eq. 12, (B, E)."""
        return embed_batch(self.encoder, image, plans) - embed_batch(self.encoder, aligned, plans)

    def _backward(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise ModelError(
                f"the loss is {float(loss.detach())} at step {self.done}.",
                code="TRAIN-DIVERGED",
                hint="Lower target_stage.learning_rate, or set target_stage.precision=fp32.",
            )
        (self._share * loss).backward()  # type: ignore[no-untyped-call]

    def _optimize(self) -> None:
        average_gradients(self.network)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.target_stage.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; tensors and plain values only."""
        return {
            "network": unwrapped(self.network).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "directions": dict(self.directions),
            "done": self.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        unwrapped(self.network).load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.directions = {int(k): v.to(self.device) for k, v in state["directions"].items()}
        self.done = int(state["done"])

    def pack(self, meta: dict[str, Any]) -> ModelPack:
        """The target model: tuned weights beside the untouched Stage 1 weights and state."""
        inherited = ("training_sites", "scans", "data_digest", "sequences")
        from_parent = {k: self.parent.meta[k] for k in inherited if k in self.parent.meta}
        return ModelPack(
            config=self.config,
            network=unwrapped(self.network).state_dict(),
            state={**self.parent.state, **self.goals.state("target")},
            global_network=dict(self.parent.network),
            meta={
                **from_parent,
                "kind": "target",
                "target": self.target,
                "encoder": self.encoder.name,
                "parent_weights": self.parent.weights_digest(),
                **meta,
            },
        )


def _plans(stage: TargetStage, batch: Batch) -> list[SlicePlan]:
    count = stage.config.target_stage.slices_per_plane
    return [plan_slices(mask[0].cpu(), count) for mask in batch["mask"]]


def _noise(batch: Batch) -> Tensor:
    """Noise of the sampler, from the samples' seeds."""
    shape = batch["image"].shape[1:]
    rows = [
        torch.randn(shape, generator=torch.Generator().manual_seed(int(s) ^ 0x5A5A))
        for s in batch["seed"]
    ]
    return torch.stack(rows).to(batch["image"].device)
