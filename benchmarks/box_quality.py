"""How close the model in the box comes to the truth as it is, with no training on the cohort.

Digital traveling subjects of held-out anatomies, each scan set beside the subject's own scan at the
target: raw, every classical method, the look of the site alone, the network of the box on top, and
a second scan at the target, which is as close as two scans of one head come.
In one process, without Ray and without a lake; what is rendered is kept, so a run goes on where it
stopped. `quality.py` does the same through the commands, both stages included.

    python benchmarks/box_quality.py WORK --anatomy FOLDER_OF_LABEL_MAPS [--preset small]

With `--evaluations PNG` instead: PSNR by noise level and number of network evaluations, on one seen
and the unseen site, and its plot.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from ablation_cohort import Cohort, Plan, Scan, make_member
from ablation_list import EVALUATIONS
from ablation_runs import WITHOUT_NETWORK, by_matching, from_the_box, scored
from ablation_tables import Results, evaluations_chart, evaluations_table
from numpy.typing import NDArray
from quality import TITLES, Row, against_best, table

from pipelines.baselines import BASELINES, make_baseline
from pipelines.spawned import begin_worker
from pipelines.verdict import summarize
from sgcd_core.config import SgcdConfig, load_config
from sgcd_core.metrics import measure_all

Method = Callable[[Scan], NDArray[np.float32]]
TITLES = TITLES | {"sgcd": "**SGCD, from the box**"}


def main(words: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder for the cohort; kept")
    parser.add_argument("--anatomy", help="folder of label maps; without it the template")
    parser.add_argument("--preset", default="small", choices=("tiny", "small"))
    parser.add_argument("--sites", type=int, default=5, help="in the look; one more is not")
    parser.add_argument("--each", type=int, default=6, help="subjects at each of them")
    parser.add_argument("--traveling", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", default="siteA")
    parser.add_argument("--mm", type=float, default=2.0, help="nominal voxels of the scanners")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--unshaded", action="store_true",
                        help="coils without a bias field and no correction of one: what a perfect "
                        "correction would leave every method")  # fmt: skip
    parser.add_argument("--evaluations", type=Path, metavar="PNG",
                        help="what more evaluations are worth, by noise, and a plot")  # fmt: skip
    args = parser.parse_args(words)
    started = time.monotonic()
    unshaded = ("prepare.bias_correction=none",) if args.unshaded else ()
    config = load_config(args.preset, settings=unshaded)
    plan = Plan.of(
        args.anatomy, config.prepare, sites=args.sites, each=args.each,
        traveling=args.traveling, seed=args.seed, mm=args.mm, rescanned=args.target,
        shaded=not args.unshaded,
    )  # fmt: skip
    folder = args.work / f"{args.preset}-{plan.digest()}"
    render(folder, plan, args.workers)
    cohort = Cohort(folder, plan, args.target)
    if args.evaluations is not None:
        results = by_evaluations(cohort, args.preset, unshaded)
        args.evaluations.write_bytes(evaluations_chart(results))
        print(evaluations_table(results))
        return 0
    found = rows(cohort, config)
    print(table(summarize(found, seed=args.seed).groups, TITLES))
    print(against_best(found, args.seed))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def render(folder: Path, plan: Plan, workers: int) -> None:
    """Scans of all subjects, prepared; those that are there stay."""
    make = partial(make_member, folder, plan)
    if workers <= 1:
        for member in plan.members:
            make(member)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=begin_worker) as pool:
        for path in pool.map(make, plan.members):
            print(f"cohort {path.stem}", flush=True)


def by_evaluations(cohort: Cohort, preset: str, settings: Sequence[str] = ()) -> Results:
    """Results of the grid of evaluations as the ablations keep them, but of the box as it is."""
    out = {}
    for ablation in EVALUATIONS:
        sampling = [s.replace("target_sampler", "global_sampler") for s in ablation.sampling]
        config = load_config(preset, settings=(*settings, *sampling))
        method = from_the_box(config, cohort)
        out[ablation.name] = {"rows": scored(ablation.name, cohort, cohort.few, method)}
        print(ablation.title, flush=True)
    config = load_config(preset, settings=tuple(settings))
    for name in ("raw", "matched"):
        method = WITHOUT_NETWORK[name](config, cohort)
        out[name] = {"rows": scored(name, cohort, cohort.few, method)}
    return out


def rows(cohort: Cohort, config: SgcdConfig) -> list[Row]:
    """Measures of every test scan by every method, against the subject's scan at the target."""
    methods = {
        "look": by_matching(config, cohort),
        "filter": from_the_box(config, cohort, unet=False),
        "sgcd": from_the_box(config, cohort),
    }
    fitted = {
        (name, sequence): make_baseline(name, sequence).fit(
            [(s.image, s.mask) for s in cohort.training
             if s.site == cohort.target and s.sequence == sequence]
        )
        for name in BASELINES
        for sequence in cohort.sequences
    }  # fmt: skip
    out: list[Row] = []
    for scan in cohort.test:
        truth = cohort.truth(scan)
        images = {n: fitted[n, scan.sequence].apply(scan.image, scan.mask) for n in BASELINES}
        images |= {name: method(scan) for name, method in methods.items()}
        again, inside = cohort.rescans[scan.subject, scan.sequence]
        pairs = {name: (image, scan.mask) for name, image in images.items()}
        for method, (image, mask) in (pairs | {"rescan": (again, inside)}).items():
            for metric, value in measure_all(image, truth.image, mask & truth.mask).items():
                out.append({"subject": scan.subject, "site": scan.site, "value": value,
                            "sequence": scan.sequence, "method": method, "metric": metric,
                            "seen": scan.site in cohort.training_sites})  # fmt: skip
    return out


if __name__ == "__main__":
    raise SystemExit(main())
