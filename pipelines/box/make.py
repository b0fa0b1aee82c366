"""`python -m pipelines.box WORK --anatomy FOLDER`: make, or go on making, the weights of the box.

Producers render random sites as they are wanted: each scan serves once, for the look filter or the
network of one preset. With `--refit` the composition model is fitted once enough of them are
measured; the network is then trained for `--minutes`. Run the same again to go on; other settings,
another composition model and other anatomies want another folder.
Anatomies beyond the first `--anatomies` show the error on heads and sites never trained on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from pipelines.box.composition import (
    fit_composition,
    measure_site,
    read_sites,
    score_composition,
)
from pipelines.box.curve import learning_curve
from pipelines.box.made import heads_of
from pipelines.box.network import train_network
from pipelines.box.scans import (
    ANATOMIES_AT_ONCE,
    SEQUENCES,
    SUBJECTS,
    Pool,
    SiteScans,
    produce,
    wait_for,
)
from pipelines.cohort import list_anatomies
from pipelines.spawned import begin_worker
from sgcd_core.box import Box, composition_bytes, load_composition
from sgcd_core.config import load_config
from sgcd_core.io.store import is_s3
from sgcd_core.style.composition import Composition, composition_from_state, joined

SEED = 2026
#: One site in so many is kept for scoring the composition model.
HELD_OUT = 7
#: Random sites of anatomies that nothing here is fitted to, for the held-out error.
HELD_SITES = 6
#: Files of the pool before training begins; without a look filter to fit, the usual details of
#: looks are taken from those that are there.
FIRST = 20
#: The composition model that `--refit` made.
REFITTED = "composition.safetensors"
#: What is different from training on scans: these scans have no noise, so voxels can be compared,
#: and they can be sharpened; a window's histogram is no brain's, so there is no record.
SETTINGS = (
    "condition.sharpen_mm=0.9",
    "global_stage.loss_mm=0",
    "global_stage.weight_record=0",
    "global_stage.warmup_steps=50",
)

#: And of presets whose voxels are about as long as those of scanners, which are averaged otherwise.
SETTINGS_OF = {"small": ("condition.other_voxels=0.75",)}


def main(words: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.box", description=__doc__)
    parser.add_argument("work", type=Path, help="folder for pool, checkpoints and weights")
    parser.add_argument("--anatomy", required=True, help="folder of FreeSurfer label maps")
    parser.add_argument(
        "--anatomies", type=int, default=10, help="use the first so many, and the template"
    )
    parser.add_argument("--preset", default="tiny", choices=("tiny", "small"))
    parser.add_argument("--minutes", type=float, default=120.0, help="for the network")
    parser.add_argument("--steps", type=int, default=20_000, help="of the learning-rate schedule")
    parser.add_argument("--start", type=Path, help="weights to start from, of another preset too")
    parser.add_argument("--sites", type=int, default=250, help="measured before fitting")
    parser.add_argument("--producers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of the trainer")
    parser.add_argument(
        "--filter-samples", type=int, default=1500, help="whole scans the look filter is fitted to"
    )
    parser.add_argument("--refit", action="store_true", help="fit the composition model again")
    parser.add_argument(
        "--keep-fits", action="store_true",
        help="with --refit: beside the fits of the package, which then must be of other sites",
    )  # fmt: skip
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="K=V")
    parser.add_argument("--install", action="store_true", help="copy the weights into the package")
    args = parser.parse_args(words)
    if args.sites < 2 * HELD_OUT:
        parser.error(f"--sites must be at least {2 * HELD_OUT}: one in {HELD_OUT} is held out")
    if args.start is not None and not args.start.is_file():
        parser.error(f"--start: there is no file {args.start}")
    if not args.anatomy:
        parser.error("--anatomy names no folder")
    settings = [*SETTINGS, *SETTINGS_OF.get(args.preset, ()), *args.settings]
    config = load_config(args.preset, settings=settings)
    torch.set_num_threads(args.threads)
    # by full addresses: a pool says which maps it is made of
    found = [uri if is_s3(uri) else os.path.abspath(uri) for uri in list_anatomies(args.anatomy)]
    anatomies = [*found[: args.anatomies], *list_anatomies(None)]
    pool = Pool(args.work / "pool")
    pool.claim(anatomies)
    pool.ended.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    producers = [
        context.Process(
            target=_produce,
            daemon=True,
            args=(args.work, anatomies, n, args.producers, args.sites if args.refit else 0),
        )
        for n in range(args.producers)
    ]
    for n, producer in enumerate(producers):
        producer.start()
        threading.Thread(target=_watch, args=(pool, n, producer), daemon=True).start()
    try:
        composition = _composition(args.work, pool, args.sites, args.refit, args.keep_fits)
        wait_for(
            lambda: len(pool.files()) >= FIRST, f"{FIRST} files", ended=pool.ended,
            count=lambda: len(pool.files()), tell=lambda n: _say({"files": n, "first": FIRST}),
        )  # fmt: skip
        held = _held_out(args.work, found[args.anatomies :])
        weights = train_network(
            pool, config, composition, args.work / args.preset, minutes=args.minutes,
            total_steps=args.steps, start_from=args.start, held=held,
            filter_samples=args.filter_samples,
            report=_say,
        )  # fmt: skip
    finally:
        for producer in producers:
            producer.terminate()
    losses = args.work / args.preset / "losses.jsonl"
    if losses.exists():
        picture = args.work / args.preset / "curve.png"
        title = f"the box of preset {args.preset}"
        picture.write_bytes(learning_curve(losses, title, *_described(held)))
    if args.install:
        goal = Path(__file__).parents[2] / "sgcd_core" / "weights"
        goal.mkdir(exist_ok=True)
        shutil.copy(weights, goal / weights.name)
        if args.refit:
            shutil.copy(args.work / REFITTED, goal / REFITTED)
    print(f"weights: {weights} ({weights.stat().st_size / 2**20:.1f} MiB)")


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def _produce(work: Path, anatomies: list[str], worker: int, workers: int, at_least: int) -> None:
    """One producer, at low priority, until it is ended or who started it is gone."""
    begin_worker()
    os.nice(10)
    threadpool_limits(1)  # threads of two producers wait for each other, five times longer
    condition = load_config().condition
    folder = work / "profiles"
    folder.mkdir(exist_ok=True)

    def measured(number: int, site: Sequence[SiteScans]) -> None:
        seeds = (SEED + 1000 * (len(site) * number + k) for k in range(len(site)))
        rows = [measure_site(x, condition, s) for x, s in zip(site, seeds, strict=True)]
        temporary = folder / f"{number:07d}.{os.getpid()}"
        temporary.write_bytes(b"".join(row.tobytes() for row in rows))
        temporary.replace(folder / f"{number:07d}.f32")

    produce(
        Pool(work / "pool"), anatomies, SEED, worker, workers, at_least=at_least, measured=measured
    )


def _watch(pool: Pool, number: int, producer: BaseProcess) -> None:
    """Wait for a producer's end and say it in the pool, unless it was told to by SIGTERM."""
    producer.join()
    if producer.exitcode not in (None, -signal.SIGTERM):
        pool.say_ended(f"producer {number} ended with exit code {producer.exitcode}")


def _described(held: Pool | None) -> list[str]:
    """What a pool of `_held_out` holds, in words; of so few sites all are of the same heads."""
    if held is None:
        return []
    heads = min(len(held.anatomies()), ANATOMIES_AT_ONCE + 1)
    return [f"{len(held.files()) // len(SEQUENCES)} sites of {heads} other heads"]


def _held_out(work: Path, anatomies: list[str]) -> Pool | None:
    """Sites of other anatomies than those trained on; None where no anatomy is left for them.

    Raises:
        UsageError: There are such sites of other anatomies than these: some may be trained on now.
    """
    pool = Pool(work / "held-out")
    pool.claim(anatomies)
    if anatomies:
        produce(pool, anatomies, SEED + 1, sites=HELD_SITES)
    return pool if pool.files() else None


def _profiles(work: Path) -> list[Path]:
    """What the producers measured, a file a site."""
    return sorted((work / "profiles").glob("*.f32"))


def _composition(
    work: Path, pool: Pool, sites: int, refit: bool, keep: bool = False
) -> Composition:
    """The package's model, or one fitted now; with `keep`, the fits of both.

    One that was fitted for the same command is taken again, so that what it serves goes on.
    """
    packaged = load_composition()
    if packaged is not None and not refit:
        return packaged
    asked = {"sites": sites, "keep": keep, "anatomies": heads_of(pool)}
    path = work / REFITTED
    kept = _kept(path, asked)
    if kept is not None:
        return kept
    wait_for(
        lambda: len(pool.files()) >= 2 * sites, f"{sites} sites", seconds=24 * 3600,
        ended=pool.ended,
    )  # fmt: skip
    rows = read_sites(_profiles(work), SUBJECTS)
    # a site's two sequences follow each other and stay on one side
    held = (torch.arange(len(rows)) // 2 % HELD_OUT == 0).numpy()
    model = fit_composition(rows[~held])
    scores = score_composition(model, rows[held])
    print(json.dumps({"composition": scores, "sites": len(rows) // 2}), flush=True)
    model = fit_composition(rows)
    if keep and packaged is not None:
        model = joined(packaged, model)
    meta = {"sites": len(rows) // 2, "seed": SEED, "fits": len(model.members), "asked": asked}
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(composition_bytes(model, meta))
    temporary.replace(path)
    return _kept(path, asked) or model  # as it is kept, in half precision


def _kept(path: Path, asked: dict[str, Any]) -> Composition | None:
    """The composition model that was fitted before, if the same was asked for."""
    box = Box.from_bytes(path.read_bytes()) if path.exists() else Box({})
    return composition_from_state(box.network) if box.meta.get("asked") == asked else None
