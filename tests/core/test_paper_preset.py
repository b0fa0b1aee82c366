"""Preset `paper`: every number of the authors, and the literal reading runs from end to end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sgcd_core.batch import make_batch, sample_seed
from sgcd_core.config import load_config, parse_config
from sgcd_core.diffusion.ddim import timestep_grid
from sgcd_core.diffusion.network import build_network
from sgcd_core.diffusion.sampler import reverse_grid
from sgcd_core.diffusion.schedule import Schedule
from sgcd_core.global_stage import GlobalStage, draw, planned_steps
from sgcd_core.harmonizer import Harmonizer
from sgcd_core.style.encoder import load_encoder
from sgcd_core.style.look import LOOK_SIZE
from sgcd_core.style.outlier import OutlierModel, style_features
from sgcd_core.target_stage import TargetStage
from sgcd_core.volume.condition import Goals

PAPER = load_config("paper")
SIDE = 8
#: The preset on a grid and with a width that a test can afford; BiomedCLIP's weights are no part
#: of the package.
SMALL = load_config(
    "paper",
    settings=[
        f"prepare.shape=[{SIDE}, {SIDE}, {SIDE}]", "prepare.mm=8",
        "network.channels=[8, 8, 8, 8]", "network.head_channels=8", "network.norm_groups=4",
        "global_sampler.steps=2",
        "target_stage.encoder=statistics",
    ],
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_authors_numbers() -> None:
    schedule, record = PAPER.schedule, PAPER.record
    assert schedule.timesteps == 1000 and schedule.kind == "linear"
    assert (schedule.beta_start, schedule.beta_end) == (0.0015, 0.0195)
    assert PAPER.network.channels == (32, 64, 256, 256) and PAPER.network.res_blocks == 2
    # four self-attention blocks on the way down: two residual blocks at each of two levels
    assert PAPER.network.res_blocks * sum(PAPER.network.attention_levels) == 4
    assert PAPER.network.prediction == "epsilon"
    assert (record.bins, record.decay, record.order) == (100, 0.2, "update_then_compare")
    one, two = PAPER.global_stage, PAPER.target_stage
    assert (one.learning_rate, one.epochs) == (1e-4, 300)
    assert (two.learning_rate, two.epochs) == (1e-6, 30)
    assert (one.schedule, one.warmup_steps, one.loss) == ("constant", 0, "l2")
    # L_1 = L_N + L_G + L_E and L_2 = L_S + L_R, nothing else
    assert (one.weight_noise, one.weight_gradient, one.weight_record) == (1, 1, 1)
    assert (two.weight_style, two.weight_reconstruction) == (1, 1)
    assert (two.weight_anatomy, two.target_denoising, two.style_every) == (0, 0, 1)
    assert two.encoder == "biomedclip" and two.backprop == "chain"
    assert (one.x0_weight, one.t_power, one.site_balance) == ("flat", 1, False)


def test_the_condition_is_the_gradient_map_and_the_sequence_alone() -> None:
    condition = PAPER.condition
    assert condition.gradient_channel and not condition.content_channel
    assert condition.match == "none" and not condition.contrast_augmentation
    assert not condition.look_label


def test_steps_are_the_paper_s_timesteps() -> None:
    """T_f = 35 and T_r = 25 of timesteps 1 to 1000; here they are numbered from 0."""
    sampler = PAPER.target_sampler
    assert (sampler.invert_steps, sampler.steps) == (35, 25)
    assert timestep_grid(sampler.t_start, sampler.invert_steps) == [*range(34, -1, -1), -1]
    assert reverse_grid(sampler) == [*range(24, -1, -1), -1]
    assert (sampler.start, sampler.kind) == ("inversion", "anchored")
    first = PAPER.global_sampler
    assert (first.t_start, first.steps, first.start) == (999, 25, "noise")


def test_the_schedule_is_equation_1_s() -> None:
    bars = Schedule.from_config(PAPER.schedule).alpha_bars
    beta = np.linspace(0.0015, 0.0195, 1000)
    assert bars.numel() == 1001 and bars[0] == 1
    assert float(bars[1]) == pytest.approx(1 - 0.0015, rel=1e-6)
    assert float(bars[-1]) == pytest.approx(float(np.prod(1 - beta)), rel=1e-4)


def test_the_network_has_the_authors_width() -> None:
    with torch.device("meta"):
        network = build_network(PAPER)
    weights = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert sum(math.prod(shape) for shape in weights.values()) == pytest.approx(62.2e6, rel=0.01)
    first = next(shape for name, shape in weights.items() if name.endswith("conv_in.conv.weight"))
    assert first == (32, 2, 3, 3, 3)  # noisy image and gradient map


def test_epochs_pass_over_every_scan() -> None:
    one, two = PAPER.global_stage, PAPER.target_stage
    assert planned_steps(one.steps, one.epochs, 66, one.batch_size) == 300 * 66
    assert planned_steps(two.steps, two.epochs, 66, two.batch_size) == 30 * 66


def test_timesteps_are_drawn_evenly() -> None:
    made = batch(*[1.0] * 64)
    t = draw(made, 1000, PAPER.global_stage.t_power).t.double()
    assert 400 < float(t.mean()) < 600 and float(t.min()) < 100 and float(t.max()) > 900


def scan(seed: int, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 3, indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes)) + 0.05 * rng.standard_normal((SIDE,) * 3)
    mask = radius < 0.9
    tissue = np.select([radius < 0.3, radius < 0.6], [0.1, 0.9], 0.5) ** gamma
    return (tissue * mask).astype(np.float32), mask


def batch(*gammas: float, look: float = 0.0, first: int = 0) -> Any:
    pairs = [scan(first + i, gamma) for i, gamma in enumerate(gammas)]
    looks = [np.full(LOOK_SIZE, look, np.float32)] * len(pairs)
    return make_batch(
        [p[0] for p in pairs], [p[1] for p in pairs], ["T1w"] * len(pairs),
        [sample_seed(0, first, i) for i in range(len(pairs))], PAPER.sequences, looks, looks,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stage_one() -> tuple[GlobalStage, dict[str, float]]:
    stage = GlobalStage(SMALL, 2)
    stage.step(batch(0.6))
    return stage, stage.step(batch(1.7, first=1))


def test_one_step_of_stage_1(stage_one: tuple[GlobalStage, dict[str, float]]) -> None:
    stage, losses = stage_one
    assert losses["learning_rate"] == 1e-4
    parts = losses["noise"] + losses["gradient"] + losses["record"]
    assert losses["loss"] == pytest.approx(parts, rel=1e-5)
    assert losses["noise"] == pytest.approx(1.0, abs=0.2)  # of noise, by a network fresh to it
    group = stage.optimizer.param_groups[0]
    assert isinstance(stage.optimizer, torch.optim.Adam)
    assert group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0


def test_no_look_reaches_the_network() -> None:
    """A label that told the site would make the class condition more than the sequence."""

    def loss(look: float, label: bool) -> float:
        values = SMALL.model_dump()
        values["condition"]["look_label"] = label
        stage = GlobalStage(parse_config(values), 2)
        perturb(stage)
        return stage.step(batch(0.6, look=look))["loss"]

    assert loss(0.0, False) == loss(0.8, False)
    assert loss(0.0, True) != loss(0.8, True)


def perturb(stage: GlobalStage) -> None:
    """A fresh U-Net ends in zeros, through which nothing passes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in stage.network.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)


def test_one_step_of_stage_2_and_harmonizing_with_both(
    stage_one: tuple[GlobalStage, dict[str, float]],
) -> None:
    stage, _ = stage_one
    perturb(stage)
    image, mask = scan(3, 1.7)
    outliers = OutlierModel.fit([style_features(*scan(i, 0.6)) for i in range(3)], [0] * 3)
    pack = stage.pack(outliers, Goals(torch.zeros(2, LOOK_SIZE)), {"name": "global"})
    before = pack.weights_digest()
    goals = Goals(torch.zeros(2, LOOK_SIZE))
    tuned = TargetStage(pack, SMALL, "A", load_encoder("statistics"), goals)
    tuned.measure_target([batch(0.6, first=5)])
    losses = tuned.step(batch(1.7, first=6), batch(0.6, first=7))
    assert set(losses) == {"loss", "style", "reconstruction"}
    assert all(math.isfinite(value) for value in losses.values())
    assert tuned.optimizer.param_groups[0]["lr"] == 1e-6
    result = tuned.pack({"name": "target-A"})
    assert result.weights_digest() != before == pack.weights_digest()
    aligned = Harmonizer(pack).harmonize(image, mask, "T1w", "s")
    moved = Harmonizer(result).harmonize(image, mask, "T1w", "s")
    for found in (aligned.image, moved.image):
        assert np.isfinite(found).all() and not found[~mask].any()
        assert found.min() >= 0 and found.max() <= 1
    # Eq. 11 as printed: the output lies close to I' whatever the tuned network does
    assert 0 < np.abs(moved.image - aligned.image)[mask].mean() < 0.05
