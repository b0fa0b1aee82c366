"""DDIM in both directions: with an oracle for the noise, up and down is the identity."""

from itertools import pairwise

import pytest
import torch

from sgcd_core.config import SamplerConfig, ScheduleConfig
from sgcd_core.diffusion.ddim import (
    generate,
    generate_anchored,
    invert,
    timestep_grid,
)
from sgcd_core.diffusion.sampler import noise_for, starting_image, walk_down
from sgcd_core.diffusion.schedule import Schedule

SCHEDULE = Schedule.from_config(ScheduleConfig())


def oracle(noise):
    def denoise(x, t):
        bar = SCHEDULE.alpha_bar(t)
        return (x - (1 - bar).sqrt() * noise) / bar.sqrt(), noise

    return denoise


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(3)
    x0 = torch.rand(1, 1, 6, 7, 8, generator=generator) * 2 - 1
    return x0, torch.randn(x0.shape, generator=generator)


def last(steps):
    for _, x in steps:
        final = x
    return final


@pytest.mark.parametrize(("t_start", "up", "down"), [(180, 35, 25), (100, 5, 9), (400, 1, 1)])
def test_up_and_down_returns_the_input(pair, t_start, up, down):
    x0, noise = pair
    top = invert(SCHEDULE, oracle(noise), x0, timestep_grid(t_start, up))
    back = last(generate(SCHEDULE, oracle(noise), top, timestep_grid(t_start, down)))
    assert float((back - x0).abs().max()) < 1e-5


def test_inversion_reaches_the_noisy_image_of_eq_1(pair):
    x0, noise = pair
    top = invert(SCHEDULE, oracle(noise), x0, timestep_grid(180, 7))
    expected = SCHEDULE.add_noise(x0, noise, torch.tensor([180]))
    torch.testing.assert_close(top, expected, atol=1e-5, rtol=1e-5)


def test_the_estimate_is_computed_afresh_at_every_step(pair):
    x0, noise = pair
    calls = []

    def denoise(x, t):
        calls.append(int(t[0]))
        return oracle(noise)(x, t)

    start = SCHEDULE.add_noise(x0, noise, torch.tensor([180]))
    last(generate(SCHEDULE, denoise, start, timestep_grid(180, 4)))
    assert calls == timestep_grid(180, 4)[:-1]


def test_grids_span_the_same_range_whatever_the_number_of_steps():
    for steps in (1, 2, 25, 35, 181):
        grid = timestep_grid(180, steps)
        assert (grid[0], grid[-1], len(grid)) == (180, -1, steps + 1)
        assert all(a > b for a, b in pairwise(grid))
    with pytest.raises(ValueError, match="steps must be within"):
        timestep_grid(10, 12)


def test_the_printed_update_ignores_the_network_at_the_clean_end(pair):
    """Why Eqs. 10-11 as printed are not the default: two networks, one output."""
    x0, noise = pair
    grid = timestep_grid(25, 25)
    start = SCHEDULE.add_noise(x0, noise, torch.tensor([25]))
    one = generate_anchored(SCHEDULE, oracle(noise), start, x0, grid)
    other = generate_anchored(SCHEDULE, oracle(-noise), start, x0, grid)
    bar = SCHEDULE.alpha_bar(torch.tensor([0]))
    assert (
        float((one - other).abs().max()) <= float(2 * (1 - bar).sqrt() * noise.abs().max()) + 1e-6
    )
    assert float((one - x0).abs().mean()) < 0.05


def test_noise_depends_on_scan_seed_and_sample_alone():
    shape = (1, 1, 4, 4, 4)
    assert torch.equal(noise_for("a", 1, 0, shape), noise_for("a", 1, 0, shape))
    others = [noise_for("b", 1, 0, shape), noise_for("a", 2, 0, shape), noise_for("a", 1, 1, shape)]
    assert all(not torch.equal(noise_for("a", 1, 0, shape), other) for other in others)


@pytest.mark.parametrize("start", ["noise", "inversion"])
def test_sampling_with_an_oracle_returns_the_input(pair, start):
    x0, noise = pair
    config = SamplerConfig(t_start=180, steps=6, invert_steps=9, start=start)
    x = starting_image(SCHEDULE, config, oracle(noise), x0, noise)
    back = walk_down(SCHEDULE, config, oracle(noise), x, x0)
    assert float((back - x0).abs().max()) < 1e-5
