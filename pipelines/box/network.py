"""Training the network of the box from the pool, by the same steps as `sgcd train`.

The look filter in front of the U-Net is fitted first, in closed form, and stays as it is then.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from pipelines.box.filters import Normals, fit_look_filter, normals_of, score_look_filter
from pipelines.box.made import made_of, require_same
from pipelines.box.scans import SUBJECTS, Pool, wait_for
from sgcd_core.batch import Batch, make_batch, sample_seed
from sgcd_core.box import Box, shape_of
from sgcd_core.config import SgcdConfig
from sgcd_core.diffusion.network import CellNetwork, LookEmbedding, build_network
from sgcd_core.errors import SgcdError
from sgcd_core.global_stage import GlobalStage, conditioned, draw, unwrapped, windowed
from sgcd_core.style.composition import Composition
from sgcd_core.style.look import blend, details, mirrored_look
from sgcd_core.volume.condition import Condition, LookMatcher

#: Samples of sites that are not trained on, and the seed that fixes them.
HELD_SAMPLES, HELD_SEED = 48, 7
#: Windows cut from a scan once its condition is taken, which costs as much as training on one, and
#: scans whose windows take turns.
WINDOWS, TURNS = 4, 16
#: The seed of the samples that the look filter is fitted to, and how many are kept at a time.
FILTER_SEED, FILTER_PART = 77, 100


class Samples(IterableDataset[dict[str, Any]]):
    """Endless samples from the pool: random sites, mirrored at random, each with the look of
    others there. A brain's mirror image is a brain, and no label depends on the side.

    Each scan of a user's serves once, in as many windows as are cut from it.

    Args:
        pool: Producers may go on filling it.
        config: Settings of the preset.
        composition: The fitted composition model.
        seed: Of everything.
        user: Whose scans: nobody else is given them. None: any of those that are there.
        start: Samples that were taken before; the rest are the same ones.
        windows: Samples of each scan, where windows are trained on.
    """

    def __init__(
        self, pool: Pool, config: SgcdConfig, composition: Composition, seed: int,
        user: str | None = None, start: int = 0, windows: int = 1,
    ) -> None:  # fmt: skip
        self.pool, self.config, self.seed, self.user = pool, config, seed, user
        self.start, self.windows = start, windows
        self.matcher = LookMatcher(
            config.condition.match, config.prepare.mm, config.sequences, composition
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The samples from the one at `start`, without end."""
        torch.set_num_threads(1)
        before, skip = divmod(self.start, TURNS * self.windows)
        for turn in itertools.count(before):
            yield from self._turn(TURNS * turn, skip)
            skip = 0

    def _turn(self, number: int, skip: int) -> Iterator[dict[str, Any]]:
        """A window of each of so many scans, then another of each: a batch holds several scans."""
        found: dict[int, list[dict[str, Any]]] = {}
        for at in range(skip, TURNS * self.windows):
            window, place = divmod(at, TURNS)
            if place not in found:
                found[place] = self.numbered(number + place)
            yield found[place][window]

    def numbered(self, number: int) -> list[dict[str, Any]]:
        """Samples of the scan that is this user's `number`-th; waits until it is there."""
        rng = np.random.default_rng([self.seed, number])
        if self.user is None:
            files = self.pool.files()
            path, index = files[int(rng.integers(len(files)))], int(rng.integers(SUBJECTS))
        else:
            path, index = self.pool.scan(self.pool.take(self.user, number + 1)[number])
            wait_for(path.exists, path.name, ended=self.pool.ended)
        return self.sample(path, index, number, rng)

    def sample(
        self, path: Path, index: int, number: int, rng: np.random.Generator
    ) -> list[dict[str, Any]]:
        """One scan of a file: as many batches of one as it gives windows, and their conditions."""
        config, name = self.config, path.name.split("-")[0]
        image, mask, looks = self.pool.read(path, config.preset, index)
        others = rng.permutation(np.delete(np.arange(len(looks)), index))
        look = looks[others[: int(rng.integers(2, len(looks)))]].mean(0)
        source = blend(looks.mean(0), looks[index], rng.uniform())
        if rng.uniform() < 0.5:
            image, mask = image[::-1].copy(), mask[::-1].copy()
            look, source = mirrored_look(look), mirrored_look(source)
        seed = sample_seed(self.seed, number)
        batch = make_batch([image], [mask], [name], [seed], config.sequences, [look], [source])
        # the same generator draws noise and timestep first, as in a step of `sgcd train`
        drawn = draw(batch, config.schedule.timesteps, config.global_stage.t_power)
        batch, condition, _ = conditioned(batch, config, self.matcher, drawn, None)
        found = []
        for window in range(self.windows):
            cut, part, _ = windowed(batch, condition, drawn, config.global_stage.crop)
            cut["seed"] = batch["seed"] + window  # each has its own timestep and noise
            parts = part.channels, part.content, part.source, part.strength
            found.append({**cut, "condition": parts})
        return found


def collate(samples: list[dict[str, Any]]) -> tuple[Batch, Condition]:
    """A batch and its condition from samples."""
    names = [k for k in samples[0] if k != "condition"]
    batch: Any = {k: torch.cat([s[k] for s in samples]) for k in names}
    parts = [
        None if rows[0] is None else torch.cat(rows)
        for rows in zip(*(s["condition"] for s in samples), strict=True)
    ]
    return batch, Condition(*parts)  # type: ignore[arg-type]


def set_details(network: torch.nn.Module, paths: Iterable[Path], config: SgcdConfig) -> None:
    """Write what the details of the looks of these files are like into the label embedding."""
    found = [np.load(path)[f"{config.preset}_looks"] for path in paths]
    values = torch.from_numpy(details(np.concatenate(found)))
    for module in network.modules():
        if isinstance(module, LookEmbedding):
            module.detail_mean.copy_(values.mean(0))
            module.detail_std.copy_(values.std(0).clamp(min=0.02))


def start_weights(network: CellNetwork, box: Box) -> None:
    """Start from a box; one without a look filter starts with a fresh output layer.

    What such a network's own output did the filter does now.
    """
    found = network.load_state_dict(box.network, strict=False)
    missing = [name for name in found.missing_keys if not name.startswith("look_filter.")]
    if missing or found.unexpected_keys:
        raise ValueError(f"weights of another network: {[*missing, *found.unexpected_keys]}")
    if found.missing_keys:
        network.silence()


def fixed_samples(
    pool: Pool, config: SgcdConfig, composition: Composition, count: int
) -> list[tuple[Batch, Condition]]:
    """The same `count` samples at every call, in turn over the files of a pool that stays.

    Windows are cut and styles drawn as in training; which are told by the number of the sample.
    """
    samples, files = Samples(pool, config, composition, HELD_SEED), pool.files()
    found = []
    for number in range(count if files else 0):
        rng = np.random.default_rng([HELD_SEED, number])
        index = int(rng.integers(SUBJECTS))
        found.append(collate(samples.sample(files[number % len(files)], index, number, rng)))
    return found


def filter_normals(
    pool: Pool, config: SgcdConfig, composition: Composition, path: Path, count: int,
    user: str | None = None,
) -> Normals:  # fmt: skip
    """What `count` whole samples say about the look filter; `path` keeps those that are there.

    Raises:
        UsageError: Those there were made with other settings, composition model or anatomies.
    """
    whole = config.model_copy(
        update={"global_stage": config.global_stage.model_copy(update={"crop": None})}
    )
    samples = Samples(pool, whole, composition, FILTER_SEED, user)
    look_filter = build_network(config).look_filter
    assert look_filter is not None
    made = made_of(config, composition, pool)
    found = Normals.load(path, made) if path.exists() else None
    while found is None or len(found) < count:
        start = 0 if found is None else len(found)
        rows = [
            normals_of(look_filter, *collate(samples.numbered(number)))
            for number in range(start, min(count, start + FILTER_PART))
        ]
        found = Normals.joined([*([] if found is None else [found]), *rows])
        found.save(path, made)
    return found


def train_network(
    pool: Pool,
    config: SgcdConfig,
    composition: Composition,
    folder: Path,
    *,
    minutes: float,
    total_steps: int,
    every: int = 100,
    beside: bool = True,
    start_from: Path | None = None,
    held: Pool | None = None,
    filter_samples: int = 1500,
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
        beside: Whether a process beside this one takes the conditions.
        start_from: Box file to start from where there is no checkpoint yet.
        held: Sites that are not trained on: their mean L_N, always of the same samples, is
            reported as `held_out`.
        filter_samples: Whole scans that the look filter is fitted to; 0 keeps it as it starts.
        report: Called with the mean losses of each such stretch.

    Raises:
        UsageError: What lies in `folder` was made with other settings, composition model or
            anatomies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, weights = folder / "checkpoint.pt", folder / f"{config.preset}.safetensors"
    stage = GlobalStage(config, total_steps, composition=composition)
    network = cast(CellNetwork, unwrapped(stage.network))
    look_filter = network.look_filter
    assert look_filter is not None
    made, fitted_to = made_of(config, composition, pool), 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        require_same(checkpoint, state.get("made"), made)
        stage.load_state_dict(state)
        fitted_to = Box.from_bytes(weights.read_bytes()).meta.get("filter_volumes", 0)
    else:
        if start_from is not None:
            given = Box.from_bytes(start_from.read_bytes())
            start_weights(network, given)
            fitted_to = given.meta.get("filter_volumes", 0)
        if not filter_samples:
            set_details(network, pool.files(), config)
        else:
            user, sums = f"{config.preset}-filter", folder / "filter.pt"
            normals = filter_normals(pool, config, composition, sums, filter_samples, user)
            fitted_to = len(normals)
            # of the scans it is fitted to, not of those that happen to be there already
            taken = {pool.scan(n)[0] for n in pool.take(user, fitted_to)}
            set_details(network, sorted(taken), config)
            fit_look_filter(look_filter, network.embedding, normals)
            report({"filter": score_look_filter(look_filter, network.embedding, normals)})
            if held is not None:
                normals = filter_normals(
                    held, config, composition, folder / "filter-held.pt", FILTER_PART
                )
                report({"filter-held": score_look_filter(look_filter, network.embedding, normals)})
    look_filter.requires_grad_(False)
    fixed = [] if held is None else fixed_samples(held, config, composition, HELD_SAMPLES)
    size = config.global_stage.batch_size
    windows = WINDOWS if config.global_stage.crop else 1
    end = time.monotonic() + 60 * minutes
    rows: list[dict[str, float]] = []

    def save() -> None:
        turns, rest = divmod(stage.done * size, TURNS * windows)
        meta = {
            "shape": shape_of(config), "steps": stage.done, "seed": config.seed,
            "volumes": TURNS * turns + min(rest, TURNS), "filter_volumes": fitted_to,
            "condition": config.condition.model_dump(mode="json"),
        }  # fmt: skip
        box = Box(unwrapped(stage.network).state_dict(), meta)
        # the box first: where there is a checkpoint there is a box that says what is in it
        temporary = folder / "saving"
        temporary.write_bytes(box.to_bytes())
        temporary.replace(weights)
        torch.save({**stage.state_dict(), "made": made}, temporary)
        temporary.replace(checkpoint)
        if rows:
            mean = {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}
            if fixed:
                mean["held_out"] = float(np.mean([stage.error(*sample) for sample in fixed]))
            line = {"step": stage.done, **{k: round(v, 5) for k, v in mean.items()}}
            with (folder / "losses.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            report(line)
        rows.clear()

    samples = Samples(
        pool, config, composition, config.seed, config.preset, size * stage.done, windows
    )
    source = iter(DataLoader(
        samples, batch_size=size, num_workers=int(beside), collate_fn=collate,
        prefetch_factor=4 if beside else None,
        multiprocessing_context="spawn" if beside else None,
    ))  # fmt: skip
    while stage.done < total_steps and time.monotonic() < end:
        try:
            batch, condition = next(source)
            rows.append(stage.step(batch, condition))
        except SgcdError:
            save()
            raise
        if stage.done % every == 0:
            save()
    save()
    return weights
