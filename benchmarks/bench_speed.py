"""Seconds of one harmonized scan on this processor, beside MONAI's U-Net and DDIM as they come.

Ours: the network of the preset, DDIM on explicit grids, precision `auto`, channels last. MONAI's:
DiffusionModelUNet and DDIMScheduler, float32, contiguous, every voxel a cell, the same channels and
blocks, the two condition channels concatenated, the same grid and number of evaluations. Both are
measured in turn in this process; the medians are compared. Nothing is asserted about time.

    python benchmarks/bench_speed.py [--preset small] [--evaluations 2] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch
from ablation_cohort import prepared
from ablation_list import ABLATIONS, evaluations
from torch import Tensor, nn

from pipelines.cohort import load_anatomy, random_sites, random_subject
from sgcd_core.config import SgcdConfig, load_config
from sgcd_core.diffusion.network import ConditionalDenoiser, LookEmbedding, fast_bfloat16
from sgcd_core.diffusion.network import build_network as build_ours
from sgcd_core.diffusion.sampler import starting_image, walk_down
from sgcd_core.diffusion.schedule import Schedule
from sgcd_core.global_stage import GlobalStage
from sgcd_core.harmonizer import Harmonizer
from sgcd_core.style.look import LOOK_SIZE, measure_look
from sgcd_core.style.outlier import OutlierModel, style_features
from sgcd_core.volume.condition import Goals

Run = Callable[[], Any]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="small", choices=("tiny", "small"))
    parser.add_argument("--evaluations", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0,
                        help="seconds an evaluation of the paper's network may take; above them "
                             "it is measured on a smaller grid")  # fmt: skip
    args = parser.parse_args()
    config = load_config(args.preset)
    where = f"{torch.get_num_threads()} threads, bfloat16 {'on' if fast_bfloat16('cpu') else 'off'}"
    print(
        f"preset {args.preset}, {args.evaluations} evaluations, {where}, torch {torch.__version__}"
    )
    with torch.inference_mode():
        compare(
            "channels and blocks of the preset", config, config, config.prepare.shape,
            args.evaluations, args.repeats,
        )  # fmt: skip
        paper = load_config("paper")
        shape = affordable(paper, config.prepare.shape, args.limit)
        compare(
            "the preset, beside MONAI with the paper's channels (32, 64, 256, 256)", config, paper,
            shape, args.evaluations, args.repeats,
        )  # fmt: skip
    whole_scan(config, args.repeats)


def compare(
    title: str, config: SgcdConfig, theirs: SgcdConfig, shape: tuple[int, ...], evaluations: int,
    repeats: int,
) -> None:  # fmt: skip
    """Print medians of our loop and of MONAI's, whose channels are those of `theirs`."""
    network, needs = monai_network(theirs, shape)
    ours, peer = (
        our_loop(config, shape, evaluations),
        monai_loop(network, config, shape, evaluations),
    )
    first, second = alternate([ours, peer], repeats)
    print(f"\n{title}, {'×'.join(map(str, shape))} voxels, {needs}")
    print(f"  SGCD Lake {first:8.2f} s    MONAI {second:8.2f} s    ratio {second / first:.1f}")


def alternate(runs: list[Run], repeats: int) -> list[float]:
    """Median seconds of each, measured in turn, so that what else the machine does hits all."""
    for run in runs:
        run()  # warm-up: memory formats are converted and kernels chosen once
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, found in zip(runs, seconds, strict=True):
            started = time.perf_counter()
            run()
            found.append(time.perf_counter() - started)
    return [statistics.median(found) for found in seconds]


def our_loop(config: SgcdConfig, shape: tuple[int, ...], evaluations: int) -> Run:
    """Noise to t_0, then DDIM down, as `Harmonizer` does it."""
    network = build_ours(config).eval()
    schedule = Schedule.from_config(config.schedule)
    sampler = config.target_sampler.model_copy(update={"steps": evaluations})
    clean, noise, condition = _volumes(shape)
    looks = torch.zeros(1, LOOK_SIZE)
    denoiser = ConditionalDenoiser(
        network, schedule, config, condition, condition[:, 1:],
        LookEmbedding.labels_of(torch.zeros(1, dtype=torch.long), looks, looks), "auto", clip=True,
    )  # fmt: skip

    def run() -> Tensor:
        x = starting_image(schedule, sampler, denoiser, clean, noise)
        return walk_down(schedule, sampler, denoiser, x, clean)

    return run


def monai_network(config: SgcdConfig, shape: tuple[int, ...]) -> tuple[nn.Module, str]:
    """MONAI's U-Net with the channels of `config`, float32 and contiguous, and a word on it.

    As it comes, its attention holds the matrix of all pairs of voxels; where that does not fit
    into half of the free memory, its own `use_flash_attention` is turned on, in its favour.
    """
    from monai.networks.nets import DiffusionModelUNet

    net = config.network
    heads, largest = 0, 0.0
    for level, (channels, attends) in enumerate(
        zip(net.channels, net.attention_levels, strict=True)
    ):
        if attends:
            heads = channels // net.head_channels
            tokens = np.prod([side / 2**level for side in shape])
            largest = max(largest, 4.0 * heads * tokens**2)
    flash = 2 * largest > psutil.virtual_memory().available / 2  # scores and their softmax
    network = DiffusionModelUNet(
        spatial_dims=3, in_channels=3, out_channels=1, num_res_blocks=net.res_blocks,
        channels=net.channels, attention_levels=net.attention_levels,
        num_head_channels=net.head_channels, norm_num_groups=net.norm_groups,
        num_class_embeds=len(config.sequences), use_flash_attention=flash,
    ).eval()  # fmt: skip
    count = sum(p.numel() for p in network.parameters()) / 1e6
    kind = "its flash attention" if flash else "its default attention"
    return network, f"MONAI with {count:.1f} million parameters, {kind}"


def monai_loop(
    network: nn.Module, config: SgcdConfig, shape: tuple[int, ...], evaluations: int
) -> Run:
    """Noise to the first timestep, then DDIMScheduler's loop."""
    from monai.networks.schedulers import DDIMScheduler

    schedule = config.schedule
    scheduler = DDIMScheduler(
        num_train_timesteps=schedule.timesteps, schedule="linear_beta",
        beta_start=schedule.beta_start, beta_end=schedule.beta_end,
    )  # fmt: skip
    scheduler.set_timesteps(evaluations)
    clean, noise, condition = _volumes(shape)
    label = torch.zeros(1, dtype=torch.long)

    def run() -> Tensor:
        x = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
        for t in scheduler.timesteps:
            out = network(torch.cat([x, condition], 1), t[None], class_labels=label)
            x, _ = scheduler.step(out, int(t), x)
        return x

    return run


def _volumes(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Image, noise and two condition channels; what is in them does not change the time."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand((1, 1, *shape), generator=generator) * 2 - 1
    noise = torch.randn((1, 1, *shape), generator=generator)
    return clean, noise, torch.rand((1, 2, *shape), generator=generator) * 2 - 1


def affordable(config: SgcdConfig, shape: tuple[int, ...], limit: float) -> tuple[int, ...]:
    """`shape`, or half of it along each side where an evaluation would take longer than `limit`.

    Estimated from a quarter of each side, in proportion to the voxels.
    """
    unit = 2 ** (len(config.network.channels) - 1)
    quarter = tuple(max(unit, side // 4 // unit * unit) for side in shape)
    network, _ = monai_network(config, quarter)
    (seconds,) = alternate([monai_loop(network, config, quarter, 1)], 1)
    estimate = seconds * float(np.prod(shape) / np.prod(quarter))
    if estimate <= limit:
        return shape
    half = tuple(max(unit, side // 2 // unit * unit) for side in shape)
    print(f"\nthe paper's network would take about {estimate:.0f} s an evaluation on the whole "
          f"grid, more than {limit:.0f} s: half of each side is measured")  # fmt: skip
    return half


def whole_scan(config: SgcdConfig, repeats: int) -> None:
    """Print the seconds of `Harmonizer.harmonize` on a prepared scan, conditions included."""
    subject = random_subject(load_anatomy(mm=2.0), np.random.default_rng(0))
    scanner = random_sites(0, 1, 0)[0]
    scan = prepared(subject, scanner, "T1w", 2.0, np.random.default_rng(1), config.prepare)
    look = measure_look(scan.image, scan.mask, config.prepare.mm, "T1w").vector()
    looks = torch.from_numpy(look).expand(len(config.sequences), -1).clone()
    outliers = OutlierModel.fit([style_features(scan.image, scan.mask)], [0])
    pack = GlobalStage(config, 1).pack(outliers, Goals(looks), {})
    pack = replace(pack, global_network=pack.network)  # as a tuned model has it
    harmonizer = Harmonizer(pack)
    (seconds,) = alternate(
        [lambda: harmonizer.harmonize(scan.image, scan.mask, "T1w", "scan", site_look=look)],
        repeats,
    )
    count = evaluations(ABLATIONS["full"], config)
    print(f"\nthe whole of Harmonizer.harmonize of a tuned model, condition and {count} "
          f"evaluation(s) of the preset\n  SGCD Lake {seconds:8.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
