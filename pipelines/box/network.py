"""Training the network of the box from the pool, by the same steps as `sgcd train`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.box.scans import Pool
from sgcd_core.batch import Batch, make_batch, sample_seed
from sgcd_core.box import Box, shape_of
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import SgcdError
from sgcd_core.global_stage import GlobalStage, unwrapped
from sgcd_core.style.composition import CompositionModel
from sgcd_core.style.look import Look, blend, mean_look, measure_look
from sgcd_core.style.shading import mirrored


def batches(pool: Pool, config: SgcdConfig, seed: int, start: int) -> Iterator[Batch]:
    """Batches from the pool: random sites, mirrored at random, each with the look of others there.

    A brain's mirror image is a brain, and no label depends on the side.
    """
    size, mm = config.global_stage.batch_size, config.prepare.mm
    measured: dict[Path, list[Look]] = {}
    step = start
    while True:
        rng = np.random.default_rng([seed, step])
        images: list[Any] = []
        masks: list[Any] = []
        names: list[str] = []
        looks: list[Any] = []
        sources: list[Any] = []
        seeds: list[int] = []
        while len(images) < size:
            files = pool.files()
            path = files[int(rng.integers(len(files)))]
            try:
                name, volumes, inside = Pool.read(path, config.preset)
            except FileNotFoundError:  # a producer took the file away
                continue
            if path not in measured:
                pairs = zip(volumes, inside, strict=True)
                measured[path] = [measure_look(image, mask, mm, name) for image, mask in pairs]
            looks_here = measured[path]
            if rng.uniform() < 0.5:
                volumes, inside = volumes[:, ::-1].copy(), inside[:, ::-1].copy()
                looks_here = [replace(x, shading=mirrored(x.shading)) for x in looks_here]
            order = rng.permutation(len(volumes))
            others = order[1 : 1 + int(rng.integers(2, len(order)))]
            looks.append(mean_look([looks_here[j] for j in others]).vector())
            site, own = mean_look(looks_here).vector(), looks_here[order[0]].vector()
            sources.append(blend(site, own, rng.uniform()))
            images.append(volumes[order[0]])
            masks.append(inside[order[0]])
            names.append(name)
            seeds.append(sample_seed(seed, step, len(images)))
        yield make_batch(images, masks, names, seeds, config.sequences, looks, sources)
        step += 1


def train_network(
    pool: Pool,
    config: SgcdConfig,
    composition: CompositionModel,
    folder: Path,
    *,
    minutes: float,
    total_steps: int,
    every: int = 100,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Path:
    """Train for a while, from the newest checkpoint in `folder`; returns the box file.

    Args:
        pool: Where scans are drawn from; producers may go on filling it.
        config: Settings of the preset.
        composition: The fitted composition model.
        folder: Checkpoint, losses and the box file.
        minutes: How long at most.
        total_steps: Length of the learning-rate schedule; more steps are not done.
        every: Steps between checkpoints.
        report: Called with the mean losses of each such stretch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, weights = folder / "checkpoint.pt", folder / f"{config.preset}.safetensors"
    stage = GlobalStage(config, total_steps, composition=composition)
    if checkpoint.exists():
        stage.load_state_dict(torch.load(checkpoint, weights_only=True))
    end = time.monotonic() + 60 * minutes
    rows: list[dict[str, float]] = []

    def save() -> None:
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(stage.state_dict(), temporary)
        temporary.replace(checkpoint)
        meta = {
            "shape": shape_of(config), "steps": stage.done, "seed": config.seed,
            "volumes": stage.done * config.global_stage.batch_size,
            "condition": config.condition.model_dump(mode="json"),
        }  # fmt: skip
        box = Box(unwrapped(stage.network).state_dict(), meta)
        weights.write_bytes(box.to_bytes())
        if rows:
            mean = {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}
            line = {"step": stage.done, **{k: round(v, 5) for k, v in mean.items()}}
            with (folder / "losses.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            report(line)
        rows.clear()

    source = batches(pool, config, config.seed, stage.done)
    while stage.done < total_steps and time.monotonic() < end:
        batch = next(source)
        try:
            rows.append(stage.step(batch))
        except SgcdError:
            save()
            raise
        if stage.done % every == 0:
            save()
    save()
    return weights
