"""The noise schedule: exact relations between image, noise and what a network predicts."""

import numpy as np
import pytest
import torch

from sgcd_core.config import ScheduleConfig
from sgcd_core.diffusion.schedule import CLEAN, Schedule

SCHEDULE = Schedule.from_config(ScheduleConfig())


def volumes(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 1, 4, 5, 6, generator=generator) for _ in range(count)]


def test_alpha_bar_is_the_cumulative_product_of_the_paper_s_betas():
    betas = np.linspace(0.0015, 0.0195, 1000)
    expected = np.cumprod(1 - betas)
    got = SCHEDULE.alpha_bar(torch.tensor([0, 500, 999])).flatten().numpy()
    np.testing.assert_allclose(got, expected[[0, 500, 999]], rtol=1e-5)
    assert SCHEDULE.alpha_bar(torch.tensor([CLEAN])).item() == 1.0


def test_scaled_linear_has_the_same_ends_but_another_middle():
    scaled = Schedule.from_config(ScheduleConfig(kind="scaled_linear"))
    assert scaled.alpha_bar(torch.tensor([0])).item() == pytest.approx(1 - 0.0015)
    assert (
        scaled.alpha_bar(torch.tensor([500])).item()
        > 1.1 * SCHEDULE.alpha_bar(torch.tensor([500])).item()
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "residual"])
@pytest.mark.parametrize("t", [0, 100, 500, 999])
def test_a_perfect_network_returns_the_clean_image_and_the_noise(prediction, t):
    x0, noise = volumes()
    content = torch.zeros_like(x0) + 0.3
    steps = torch.full((2,), t)
    x_t = SCHEDULE.add_noise(x0.double(), noise.double(), steps)
    target = SCHEDULE.training_target(prediction, x0.double(), noise.double(), steps, content)
    got_x0, got_noise = SCHEDULE.clean_and_noise(prediction, target, x_t, steps, content)
    torch.testing.assert_close(got_x0, x0.double(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got_noise, noise.double(), atol=1e-2, rtol=1e-2)


def test_eq_4_as_printed_would_return_a_fifth_of_the_intensity():
    x0, noise = volumes()
    steps = torch.full((2,), 500)
    x_t = SCHEDULE.add_noise(x0, noise, steps)
    bar = SCHEDULE.alpha_bar(steps)
    alpha = bar / SCHEDULE.alpha_bar(steps - 1)
    printed = (x_t - (1 - bar).sqrt() * noise) / alpha.sqrt()
    ratio = float((printed / x0).median())
    assert ratio == pytest.approx(0.22, abs=0.01)


def test_trust_in_the_clean_estimate_is_the_signal_to_noise_ratio_for_noise_prediction():
    t = torch.tensor([0, 100, 500, 999])
    bar = SCHEDULE.alpha_bar(t).flatten()
    expected = torch.minimum(torch.ones(4), bar / (1 - bar))
    torch.testing.assert_close(SCHEDULE.clean_weight("epsilon", t), expected)
    assert SCHEDULE.clean_weight("residual", t).tolist() == [1.0] * 4
