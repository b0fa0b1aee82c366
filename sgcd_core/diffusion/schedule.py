"""The noise schedule and the exact relations between its quantities (Eqs. 1 and 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sgcd_core.config import Prediction, ScheduleConfig

#: Timestep of the clean image: `alpha_bar(CLEAN) == 1`.
CLEAN = -1


@dataclass(frozen=True)
class Schedule:
    """Cumulative products of a variance schedule, with the clean image as timestep -1.

    Attributes:
        alpha_bars: (T + 1,) float32; entry 0 is the clean image (1.0), entry t + 1 is timestep t.
    """

    alpha_bars: Tensor

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> Schedule:
        """Build from settings; computed in float64, stored in float32."""
        start, end, steps = config.beta_start, config.beta_end, config.timesteps
        if config.kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        else:
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        bars = torch.cumprod(1.0 - betas, dim=0)
        return cls(torch.cat([torch.ones(1, dtype=torch.float64), bars]).float())

    @property
    def timesteps(self) -> int:
        """T, the number of noisy timesteps."""
        return int(self.alpha_bars.numel()) - 1

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ at timesteps `t` (B,) int64 in [-1, T), shaped (B, 1, 1, 1, 1) to meet a volume."""
        return self.alpha_bars.to(t.device)[t + 1].view(-1, 1, 1, 1, 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of Eq. 1. `x0` and `noise` (B, 1, X, Y, Z), `x0` in [-1, 1], `t` (B,)."""
        bar = self.alpha_bar(t)
        return bar.sqrt() * x0 + (1 - bar).sqrt() * noise

    def training_target(
        self, prediction: Prediction, x0: Tensor, noise: Tensor, t: Tensor, content: Tensor | None
    ) -> Tensor:
        """What the network should output for `x0`, given what its output means."""
        if prediction == "epsilon":
            return noise
        if prediction == "v":
            bar = self.alpha_bar(t)
            return bar.sqrt() * noise - (1 - bar).sqrt() * x0
        return x0 - _base(prediction, content)

    def clean_and_noise(
        self, prediction: Prediction, output: Tensor, x_t: Tensor, t: Tensor, content: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Estimates (x̂0, ε̂) that a network output stands for; they always satisfy Eq. 1.

        Eq. 4 as printed divides by √α_t. With √ᾱ_t a perfect network returns x0 exactly.

        Args:
            prediction: What the output means.
            output: Network output (B, 1, X, Y, Z).
            x_t: Noisy image (B, 1, X, Y, Z).
            t: Timesteps (B,), all >= 0.
            content: Content channel (B, 1, X, Y, Z) in [-1, 1], for prediction `residual`.
        """
        bar = self.alpha_bar(t)
        signal, sigma = bar.sqrt(), (1 - bar).sqrt()
        if prediction == "epsilon":
            return (x_t - sigma * output) / signal, output
        if prediction == "v":
            return signal * x_t - sigma * output, sigma * x_t + signal * output
        x0 = output + _base(prediction, content)
        return x0, (x_t - signal * x0) / sigma

    def clean_weight(self, prediction: Prediction, t: Tensor) -> Tensor:
        """Trust in x̂0 at `t`: min(1, 1 / (error amplification)²), shape (B,).

        x̂0 from ε multiplies the network's error by √(1-ᾱ)/√ᾱ, which gives the signal-to-noise
        weight min(1, ᾱ / (1-ᾱ)). The other predictions amplify by at most 1.
        """
        if prediction != "epsilon":
            return torch.ones(t.shape, device=t.device)
        bar = self.alpha_bar(t).flatten()
        return (bar / (1 - bar)).clamp(max=1.0)


def _base(prediction: Prediction, content: Tensor | None) -> Tensor | float:
    if prediction != "residual":
        return 0.0
    if content is None:
        raise ValueError("prediction 'residual' needs the content channel")
    return content
