"""Which part of a training step waits for data: `sgcd train`, beside a plain loop that reads first.

Ours: the command itself, on a small digital cohort that is prepared in a temporary lake; Ray Data
reads ahead while the network computes. The peer: the same scans in the same order, read and then
trained on in this process, as a loop without a loader would. Both in one run, each step timed
but the first. Nothing is asserted about time.

    python benchmarks/bench_data_wait.py [--preset tiny] [--steps 24] [--workers 1]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.training_data import training_rows
from ray_jobs.cli import execute
from ray_jobs.loop import schedule_steps
from ray_jobs.session import session
from ray_jobs.volume_stream import load_packed, packed, survey, to_batch
from ray_jobs.watch import SECONDS, WAIT, Losses, data_wait
from sgcd_core.box import find_box, load_box
from sgcd_core.config import SgcdConfig, load_config
from sgcd_core.global_stage import GlobalStage


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny", choices=("tiny", "small"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    words = ["--preset", args.preset, "--set", f"global_stage.steps={args.steps}"]
    with tempfile.TemporaryDirectory(prefix="sgcd-bench-") as folder, session() as ray:
        cohort, place = str(Path(folder) / "cohort"), ["--lake", str(Path(folder) / "lake")]
        execute(["cohort", cohort, "--subjects", "4", "--sites", "2", "--traveling", "1"])
        execute(["index", cohort, *place])
        execute(["prepare", *words, *place])
        _, outcome = execute(["train", *words, *place, "--workers", str(args.workers)])
        config = load_config(args.preset, settings=words[3:])
        peer = plain_loop(ray, Lake(place[1]), config, args.steps)
    batch = config.global_stage.batch_size
    print(
        f"preset {args.preset}, {args.steps} steps of {batch} volumes "
        f"of {'×'.join(map(str, config.prepare.shape))}"
    )
    ours, theirs = outcome.data["data_wait"], data_wait(peer)
    print(f"  sgcd train, {args.workers} workers   {ours:6.1%} of a step waits for data")
    print(f"  plain loop, 1 process       {theirs:6.1%}")
    if ours and theirs:
        print(f"  ratio {ours / theirs:.2f}")


def plain_loop(ray: object, lake: Lake, config: SgcdConfig, steps: int) -> list[Losses]:
    """Seconds of each step, and of reading its volumes, one after the other."""
    stage_config = config.global_stage
    rows = training_rows(Catalog(lake), config.prepare.digest(), sequences=config.sequences)
    looks = survey(ray, rows, lake.uri, config).looks
    size = stage_config.batch_size
    schedule = schedule_steps({"scan": rows}, config, steps, size)
    box = None if find_box(config) is None else load_box(config)
    stage, history = GlobalStage(config, steps, box=box), []
    for step in range(steps):
        started = time.perf_counter()
        found = [
            load_packed(packed(row), lake.uri, config.prepare, looks, config.sequences)
            for row in schedule[step * size : (step + 1) * size]
        ]
        read = time.perf_counter()
        stage.step(to_batch({key: [item[key] for item in found] for key in found[0]}, "scan"))
        if step:
            took = time.perf_counter() - started
            history.append({"step": step, SECONDS: took, WAIT: read - started})
    return history


if __name__ == "__main__":
    main()
