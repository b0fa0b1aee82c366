"""The conditional denoiser Φ: MONAI's 3D diffusion U-Net with the condition concatenated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sgcd_core.config import SgcdConfig
from sgcd_core.diffusion.schedule import Schedule


def condition_channels(config: SgcdConfig) -> int:
    """How many channels the condition has."""
    return int(config.condition.gradient_channel) + int(config.condition.content_channel)


def build_network(config: SgcdConfig) -> nn.Module:
    """The U-Net of the settings, with fresh weights, channels-last.

    Input (B, 1 + C, X, Y, Z): noisy image, then the C condition channels; output (B, 1, X, Y, Z).
    The sequence label enters as a class embedding.
    """
    from monai.networks.nets import DiffusionModelUNet

    net = config.network
    network = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=1 + condition_channels(config),
        out_channels=1,
        num_res_blocks=net.res_blocks,
        channels=net.channels,
        attention_levels=net.attention_levels,
        num_head_channels=net.head_channels,
        norm_num_groups=net.norm_groups,
        num_class_embeds=len(config.sequences),
        use_flash_attention=True,
    )
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[no-any-return]


@contextlib.contextmanager
def precision(name: str, device: torch.device | str) -> Iterator[None]:
    """Run the network in bfloat16 (`bf16`) or float32 (`fp32`)."""
    kind = torch.device(device).type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=name == "bf16"):
        yield


class ConditionalDenoiser:
    """A network, its schedule and one condition: a function `(x_t, t) -> (x̂0, ε̂)`.

    Args:
        network: The U-Net (or a DDP wrapper).
        schedule: Noise schedule.
        config: Settings; the prediction kind is read from them.
        condition: (B, C, X, Y, Z) float32 in [-1, 1].
        content: (B, 1, X, Y, Z) in [-1, 1], the base of prediction `residual`, or None.
        sequence: (B,) int64, index into `config.sequences`.
        precision_name: `bf16` or `fp32`.
        clip: Clip x̂0 to [-1, 1] and recompute ε̂ from it; for sampling, not for training losses.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        config: SgcdConfig,
        condition: Tensor,
        content: Tensor | None,
        sequence: Tensor,
        precision_name: str = "fp32",
        clip: bool = False,
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.prediction = config.network.prediction
        self.condition = condition
        self.content = content
        self.sequence = sequence
        self.precision_name = precision_name
        self.clip = clip

    def output(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Raw network output (B, 1, X, Y, Z) float32."""
        x = torch.cat([x_t, self.condition], dim=1)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        with precision(self.precision_name, x.device):
            out = self.network(x, t, class_labels=self.sequence)
        return out.float()  # type: ignore[no-any-return]

    def __call__(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates (x̂0, ε̂) at `t`."""
        return self.split(self.output(x_t, t), x_t, t)

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂0, ε̂) that `output` stands for."""
        x0, eps = self.schedule.clean_and_noise(self.prediction, output, x_t, t, self.content)
        if self.clip:
            x0 = x0.clamp(-1, 1)
            bar = self.schedule.alpha_bar(t)
            eps = (x_t - bar.sqrt() * x0) / (1 - bar).sqrt()
        return x0, eps
