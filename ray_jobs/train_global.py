"""`sgcd train`: Stage 1 on Ray Train. Any number of workers, the same scans at the same step."""

from __future__ import annotations

import logging
import time
from typing import Any

from pipelines.lake import Lake
from pipelines.lease import Hold, lease
from ray_jobs.checkpoint import Checkpoints
from ray_jobs.context import code_version, open_lake, quoted, track_training, tracked
from ray_jobs.loop import check_shares, fit, schedule_steps
from ray_jobs.models import find_trained, next_version
from ray_jobs.outcome import Outcome
from ray_jobs.preflight import need_of
from ray_jobs.session import session
from ray_jobs.settings import from_args
from ray_jobs.volume_stream import survey
from ray_jobs.watch import data_wait, in_words, last_means
from sgcd_core.config import SgcdConfig
from sgcd_core.words import counted

log = logging.getLogger(__name__)

NAME = "global"
#: Settings Stage 1 does not read; changing them does not make another model.
LATER = {"target_stage", "global_sampler", "target_sampler", "transport", "guard", "preset"}


def run(args: Any) -> Outcome:
    """Train, or say that this very model exists already."""
    lake = open_lake(args.lake)
    if args.dry_run:
        return _train(args, lake, None)
    with lease(lake, f"model-{NAME}", wait=60 * args.wait) as held:  # two would write one version
        return _train(args, lake, held.hold)


def _train(args: Any, lake: Lake, hold: Hold | None) -> Outcome:
    from pipelines.catalog import Catalog
    from pipelines.training_data import data_digest, described, training_rows
    from sgcd_core.box import start_digest
    from sgcd_core.global_stage import planned_steps

    config = from_args(args, lake)
    rows = training_rows(
        Catalog(lake), config.prepare.digest(), sequences=config.sequences,
        sites=args.sites, exclude_sites=args.exclude_sites or (),
    )  # fmt: skip
    sites = sorted({row["site"] for row in rows})
    meta: dict[str, Any] = {
        "name": NAME, "kind": "global", "target": None, "training_sites": sites,
        "sequences": sorted({row["sequence"] for row in rows}), "scans": len(rows),
        "data_digest": data_digest(rows), "config_digest": stage_digest(config),
        "code_version": code_version(), **described(rows),
    }  # fmt: skip
    init = starting_point(args.init, config)
    meta |= {"init": init, "box": box_origin(config) if init == "box" else None}
    meta["start_digest"] = start_digest(config, init)
    stage = config.global_stage
    steps = planned_steps(stage.steps, stage.epochs, len(rows), stage.batch_size)
    meta["steps"] = steps
    follow = f"sgcd suggest-target --lake {quoted(args.lake)}"
    found = None if args.force else find_trained(lake, NAME, meta)
    plan = f"{steps} steps of {stage.batch_size} volumes on {len(rows)} scans of "
    plan += f"{counted(len(sites), 'site')} ({', '.join(sites)}) from "
    plan += "the model in the box" if init == "box" else "fresh weights"
    data = {"model": NAME, "version": found, **meta}
    key = f"train-{init}-{meta['start_digest']}-{meta['config_digest']}-{meta['data_digest']}"
    checkpoints = Checkpoints(lake.scratch(f"again-{key}" if args.force else key))
    if found is not None:
        if hold is not None:  # of a job that ended between its model and its last step
            checkpoints.clear()
        text = (
            f"{NAME} version {found} was trained with these settings on these scans; nothing to do "
            "(--force: again)"
        )
        return Outcome(text, next=follow, data=data)
    workers = args.workers or 1
    check_shares(stage.batch_size, workers)  # said before anything is read
    version = next_version(lake, NAME)
    if hold is None:
        return Outcome(f"would train {NAME} version {version}: {plan}", data=data)
    started = time.monotonic()
    schedule = schedule_steps(
        {"scan": rows}, config, steps, stage.batch_size, site_balance=stage.site_balance,
    )  # fmt: skip
    with (
        tracked(lake, "train", config, model=NAME, data_digest=meta["data_digest"]) as run_,
        session(args.ray_address, need_of("train", config, workers, args.gpus), lake) as ray,
    ):
        measured = survey(ray, rows, lake.uri, config)
        history = fit(
            ray, train_worker, schedule, lake, config, checkpoints, looks=measured.looks,
            label="train", total=steps, workers=workers, gpus=args.gpus,
            hold=hold,
            extra={
                "meta": meta | {"version": version}, "init": init,
                "features": (measured.features, measured.sequences),
                "looks": measured.looks,
            },
        )  # fmt: skip
        last, waited = last_means(history), data_wait(history)
        summary, tracker = run_
        track_training(tracker, lake, NAME, version, history)
        summary.update(model=NAME, version=version, steps=steps, data_wait=waited, **last)
    checkpoints.clear()
    seconds = time.monotonic() - started
    text = f"trained {NAME} version {version}: {plan}, {seconds:.0f} s {in_words(last, waited)}"
    data |= {"version": version, "losses": last, "data_wait": waited}
    return Outcome(text, next=follow, data=data)


def starting_point(asked: str | None, config: SgcdConfig) -> str:
    """`box` or `scratch`: as asked, else the box where its weights fit the settings.

    Raises:
        ModelError: MODEL-MISSING, the box was asked for and does not fit.
    """
    from sgcd_core.box import find_box, load_box

    if asked == "box":
        load_box(config)
    if asked is not None:
        return asked
    return "scratch" if find_box(config) is None else "box"


def box_origin(config: SgcdConfig) -> dict[str, Any]:
    """How the network in the box was made, without what it shares with the settings."""
    from sgcd_core.box import load_box

    kept = ("steps", "volumes", "filter_volumes", "seed")
    return {key: value for key, value in load_box(config).meta.items() if key in kept}


def stage_digest(config: SgcdConfig, later: set[str] = LATER) -> str:
    """Digest of the settings a stage reads, and of how models are kept now."""
    import hashlib
    import json

    from sgcd_core.modelpack import FORMAT

    values = config.model_dump(mode="json", exclude=later)
    values["format"] = FORMAT
    # How often to save and how much to hold at once are no part of what is learned.
    values["global_stage"].pop("checkpoint_every", None)
    for stage in ("global_stage", "target_stage"):
        values.get(stage, {}).pop("accumulate", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def train_worker(setup: dict[str, Any]) -> None:
    """The loop of one Ray Train worker, from the newest checkpoint to the last step."""
    from ray_jobs.volume_stream import common_goals, to_batch
    from ray_jobs.worker import Worker
    from sgcd_core.box import load_box
    from sgcd_core.global_stage import GlobalStage
    from sgcd_core.modelpack import ModelPack
    from sgcd_core.style.outlier import OutlierModel

    worker = Worker(setup)
    # Build on the device, go on from the checkpoint, let Ray Train average the gradients.
    box = load_box(worker.config) if setup["init"] == "box" else None
    stage = GlobalStage(worker.config, worker.total, worker.device, box)
    start = worker.resume(stage.load_state_dict)
    stage.wrap(worker.prepare_network)
    # One optimizer step per step of the schedule.
    every = worker.config.global_stage.checkpoint_every
    for step, columns in worker.steps(start):
        losses = stage.step(to_batch(columns, "scan"))
        worker.after_step(step, losses, stage.state_dict, every)

    def pack(meta: dict[str, Any]) -> ModelPack:
        # What the training scans look like goes into the model, to know a stranger by.
        outliers = OutlierModel.fit(*setup["features"])
        common = common_goals(setup["looks"], len(worker.config.sequences))
        return stage.pack(outliers, common, meta)

    worker.finish(pack)
