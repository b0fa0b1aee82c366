"""`sgcd tune`: Stage 2 on Ray Train; makes `target-SITE` from a global model."""

from __future__ import annotations

import time
from typing import Any

from pipelines.lake import Lake
from pipelines.lease import Hold, lease
from ray_jobs.checkpoint import Checkpoints
from ray_jobs.context import code_version, open_lake, quoted, track_training, tracked
from ray_jobs.loop import check_shares, fit, schedule_steps
from ray_jobs.models import find_trained, next_version, resolve, target_model
from ray_jobs.outcome import Outcome
from ray_jobs.preflight import need_of
from ray_jobs.session import session
from ray_jobs.settings import over_model
from ray_jobs.site_looks import few_notes
from ray_jobs.train_global import stage_digest
from ray_jobs.volume_stream import survey
from ray_jobs.watch import data_wait, in_words, last_means
from sgcd_core.words import counted

#: Settings Stage 2 does not read. It does read the samplers: it back-propagates through them.
LATER = {"transport", "guard", "preset"}
#: What a target model's card says of the model it was tuned from.
FROM_STAGE1 = ("init", "box", "steps", "scans", "data_digest", "losses", "code_version")


def run(args: Any) -> Outcome:
    """Tune, or say that this very model exists already."""
    lake = open_lake(args.lake)
    if args.dry_run:
        return _tune(args, lake, None)
    name = f"model-{target_model(args.target)}"
    with lease(lake, name, wait=60 * args.wait) as held:  # two would write one version
        return _tune(args, lake, held.hold)


def _tune(args: Any, lake: Lake, hold: Hold | None) -> Outcome:
    from pipelines.catalog import Catalog
    from pipelines.training_data import (
        check_sequences,
        check_sites,
        check_target,
        data_digest,
        described,
        training_rows,
    )
    from sgcd_core.errors import ModelError
    from sgcd_core.global_stage import planned_steps
    from sgcd_core.io.store import Store, join
    from sgcd_core.modelpack import load_modelpack
    from sgcd_core.style.encoder import check_encoder

    catalog = Catalog(lake)
    check_sites([args.target], catalog.rows("scans").to_pylist(), lake.uri)
    parent, parent_version = resolve(lake, args.model)
    pack = load_modelpack(lake.model(parent, parent_version), Store())
    if pack.meta.get("kind") != "global":
        raise ModelError(
            f"{parent} is a target model already.", code="MODEL-FORMAT", where=args.model,
            hint="Tune from a global model: --model global.",
        )  # fmt: skip
    config = over_model(args, pack.config)
    sequences = check_sequences(args.sequences or config.sequences, config.sequences)
    rows = training_rows(catalog, config.prepare.digest(), sequences=sequences)
    check_target(args.target, rows, sequences, lake.uri)
    # A site that Stage 1 never saw is to stay unseen, unless it is the target itself.
    seen = set(pack.meta.get("training_sites", [])) | {args.target}
    rows = [row for row in rows if row["site"] in seen]
    own = [row for row in rows if row["site"] == args.target]
    known = {row["sequence"] for row in own}
    others = [row for row in rows if row["site"] != args.target]
    check_encoder(config.target_stage.encoder)  # missing weights are said before, not after
    name, stage = target_model(args.target), config.target_stage
    meta: dict[str, Any] = {
        "name": name, "kind": "target", "target": args.target,
        "parent": f"{parent}@{parent_version}",
        "parent_weights": pack.weights_digest(), "sequences": sorted(known),
        "target_scans": len(own),
        "data_digest": data_digest(rows), "config_digest": stage_digest(config, LATER),
        "code_version": code_version(), **described(rows),
        "stage1": {key: pack.meta[key] for key in FROM_STAGE1 if key in pack.meta},
    }  # fmt: skip
    steps = planned_steps(stage.steps, stage.epochs, len(rows), stage.batch_size)
    meta["steps"] = steps
    follow = f"sgcd harmonize --lake {quoted(args.lake)} --model {quoted(name)}"
    found = None if args.force else find_trained(lake, name, meta)
    data = {**meta, "model": name, "version": found}
    start = f"{meta['parent_weights'][:16]}-{meta['config_digest']}"
    key = f"tune-{start}-{meta['data_digest']}-{name.removeprefix('target-')}"
    checkpoints = Checkpoints(lake.scratch(f"again-{key}" if args.force else key))
    if found is not None:
        if hold is not None:  # of a job that ended between its model and its last step
            checkpoints.clear()
        text = (
            f"{name} version {found} was tuned with these settings on these scans; nothing to do "
            "(--force: again)"
        )
        return Outcome(text, next=follow, data=data)
    workers = args.workers or 1
    check_shares(stage.batch_size, workers)  # said before anything is read
    version = next_version(lake, name)
    plan = (
        f"{steps} steps from {parent}@{parent_version}, {counted(len(own), 'scan')} of "
        f"{args.target}, {len(others)} of other sites"
    )
    if hold is None:
        return Outcome(f"would tune {name} version {version}: {plan}", data=data)
    started = time.monotonic()
    schedule = schedule_steps(
        {"source": others or own, "target": own}, config, steps, stage.batch_size,
        site_balance=config.global_stage.site_balance,
    )  # fmt: skip
    index = {name: i for i, name in enumerate(config.sequences)}
    extra = {
        "meta": meta | {"version": version}, "target": args.target,
        "parent": lake.model(parent, parent_version),
        # what the frozen network makes of a scan: gone with the checkpoints when all is done
        "inversions": join(checkpoints.folder, "inversions"),
        "target_scans": [(row["scan_id"], index[row["sequence"]]) for row in own],
    }  # fmt: skip
    with (
        tracked(lake, "tune", config, model=name, data_digest=meta["data_digest"]) as run_,
        session(args.ray_address, need_of("tune", config, workers, args.gpus), lake) as ray,
    ):
        looks = survey(ray, rows, lake.uri, config).looks
        history = fit(
            ray, tune_worker, schedule, lake, config, checkpoints, looks=looks, label="tune",
            total=steps, workers=workers, gpus=args.gpus, hold=hold,
            extra=extra | {"looks": looks},
        )  # fmt: skip
        last, waited = last_means(history), data_wait(history)
        summary, tracker = run_
        track_training(tracker, lake, name, version, history)
        summary.update(model=name, version=version, steps=steps, data_wait=waited, **last)
    checkpoints.clear()
    seconds = time.monotonic() - started
    text = f"tuned {name} version {version}: {plan}, {seconds:.0f} s {in_words(last, waited)}"
    data |= {"version": version, "losses": last, "data_wait": waited}
    wanted = {
        (args.target, sequence): looks[args.target, index[sequence]] for sequence in sorted(known)
    }
    return Outcome(text, next=follow, lines=few_notes(wanted), data=data)


def tune_worker(setup: dict[str, Any]) -> None:
    """The loop of one Ray Train worker, from the newest checkpoint to the last step."""
    from ray_jobs.volume_stream import load_packed, packed, site_goals, to_batch
    from ray_jobs.worker import Worker
    from sgcd_core.inversions import Inversions
    from sgcd_core.io.store import Store
    from sgcd_core.modelpack import load_modelpack
    from sgcd_core.style.encoder import load_encoder
    from sgcd_core.target_stage import TargetStage
    from sgcd_core.volume.condition import Goals

    worker = Worker(setup)
    config = worker.config
    encoder = load_encoder(
        config.target_stage.encoder, precision_name=config.target_stage.precision
    )
    pack = load_modelpack(setup["parent"], Store())
    common = Goals.from_state(pack.state, "common")
    goals = site_goals(setup["looks"], setup["target"], common)
    stage = TargetStage(
        pack, config, setup["target"], encoder, goals, worker.device,
        Inversions(setup["inversions"]),
    )  # fmt: skip
    start = worker.resume(stage.load_state_dict)
    if not stage.directions:
        # The target's mean style direction, once, one scan at a time.
        def scans() -> Any:
            for n, (scan_id, sequence) in enumerate(setup["target_scans"]):
                entry = (scan_id, sequence, n, setup["target"])
                item = packed({"step": 0, "scans": {"scan": entry}})
                columns = load_packed(
                    item, worker.lake.uri, config.prepare, setup["looks"], config.sequences
                )
                yield to_batch({k: [v] for k, v in columns.items()}, "scan")

        stage.measure_target(scans())
    stage.wrap(worker.prepare_network)
    # One step on scans of other sites and scans of the target.
    every = config.global_stage.checkpoint_every
    for step, columns in worker.steps(start):
        losses = stage.step(to_batch(columns, "source"), to_batch(columns, "target"))
        worker.after_step(step, losses, stage.state_dict, every)
    worker.finish(stage.pack)
