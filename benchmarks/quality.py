"""How close harmonized scans come to the truth, beside the classical methods; anyone can rerun it.

Digital traveling subjects: training subjects are scanned at one site each, test subjects (of
anatomies no training saw) at every site, one site never in training. Each step is a command a user
would type, so an interrupted run goes on where it stopped.

    python benchmarks/quality.py WORK --anatomy FOLDER_OF_LABEL_MAPS [--preset small]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.baselines import BASELINES, make_baseline
from pipelines.catalog import Catalog
from pipelines.cohort.scanner import site_name
from pipelines.evaluate import find_truth, load_output, usable_results
from pipelines.lake import Lake
from pipelines.pair import load_pair
from pipelines.prepare import load_prepared
from pipelines.truth import load_truth, load_truth_on_scan
from pipelines.verdict import METHOD_TITLES, Line, estimate, number, summarize
from ray_jobs.steps import step
from sgcd_core.config import SgcdConfig, load_config
from sgcd_core.io.store import Store
from sgcd_core.metrics import MEASURES, measure_all
from sgcd_core.modelpack import load_modelpack

Row = dict[str, Any]
TITLES = METHOD_TITLES | {
    "look": "the site's look alone", "filter": "the look and its filter, no U-Net",
    "stage1": "SGCD, Stage 1 alone", "paper": "SGCD `paper`, cut down",
    "sgcd": "**SGCD**", "rescan": "*a second scan at the target*",
    "raw_native": "raw, on the scan's own voxels", "sgcd_native": "SGCD, on the scan's own voxels",
}  # fmt: skip
#: After the classical methods: parts of the method, the whole, and what it is held to.
OURS = ("look", "filter", "stage1", "paper", "sgcd", "rescan", "raw_native", "sgcd_native")
#: Subjects at each training site.
EACH = 6
#: Preset `paper` cut down to what two cores can do: a smaller network on the benchmark's grid,
#: fewer evaluations over the same timesteps. Its losses, prediction and samplers stay.
PAPER_CUT = (
    "network.channels=[32, 64, 128]", "network.res_blocks=1",
    "network.attention_levels=[false, false, true]",
    "network.patch=2", "global_sampler.steps=4", "target_sampler.steps=4",
    "target_sampler.invert_steps=6", "target_stage.encoder=mri-dino",
    "target_stage.slices_per_plane=1",
)  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder for cohort and lake; kept")
    parser.add_argument("--anatomy", help="folder of label maps; without it the template")
    parser.add_argument("--preset", default="small", choices=("tiny", "small"))
    parser.add_argument("--sites", type=int, default=5, help="in training; one more is not")
    parser.add_argument("--traveling", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", default="siteA")
    parser.add_argument("--steps", type=int, default=60, help="of Stage 1")
    parser.add_argument("--tune-steps", type=int, default=24, help="of Stage 2")
    parser.add_argument(
        "--no-paper",
        dest="paper",
        action="store_false",
        help="leave out preset `paper` (cut down, one seen and the unseen site)",
    )
    parser.add_argument("--gpus", action="store_true", help="train, tune and harmonize on GPUs")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="K=V")
    args = parser.parse_args(words)
    started = time.monotonic()
    lake, versions = build(args)
    found = rows(lake, args.target, versions)
    print(table(summarize(found, seed=args.seed).groups))
    print(against_best(found, args.seed))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


def build(args: argparse.Namespace) -> tuple[Lake, dict[str, tuple[str, int]]]:
    """Cohort, models and harmonized scans; each step does only what is left to do.

    Returns:
        The lake, and by method the name and version of its model.
    """
    cohort, lake = args.work / "cohort", args.work / "lake"
    place = ["--anatomy", args.anatomy] if args.anatomy else []
    sets = [word for item in args.settings for word in ("--set", item)]
    sets += ["--set", f"global_stage.steps={args.steps}"]
    run("cohort", cohort, *place, "--sites", args.sites, "--subjects", EACH * args.sites,
        "--traveling", args.traveling, "--mm", 2, "--seed", args.seed, "--workers", 2)  # fmt: skip
    run("index", cohort, "--lake", lake)
    run("prepare", "--lake", lake, "--preset", args.preset, *sets)
    first = run(
        "train", "--lake", lake, "--preset", args.preset, "--init", "box", *sets, *on_gpus(args)
    )
    tuned = tune(args, lake, first)
    versions = {"stage1": ("global", first), "sgcd": (f"target-{args.target}", tuned)}
    for name, version in versions.values():
        run("harmonize", "--lake", lake, "--model", f"{name}@{version}", *on_gpus(args))
    if args.paper:
        versions["paper"] = (f"target-{args.target}", build_paper(args, lake))
    return Lake.open(str(lake)), versions


def tune(args: argparse.Namespace, lake: Path, parent: int) -> int:
    """Stage 2 from a version of the global model; the version it made."""
    return run("tune", "--lake", lake, "--target", args.target, "--model", f"global@{parent}",
               "--set", f"target_stage.steps={args.tune_steps}", *on_gpus(args))  # fmt: skip


def build_paper(args: argparse.Namespace, lake: Path) -> int:
    """Preset `paper`, cut down; scans of one seen and the unseen site. The version of its model.

    Adam's rates of the authors are meant for 300 epochs and change nothing in so few steps; they
    are raised to those of the other rows.
    """
    grid = load_config(args.preset, settings=args.settings)
    sides = list(grid.prepare.shape)
    sets = [
        *PAPER_CUT, f"prepare.shape={sides}", f"prepare.mm={grid.prepare.mm}",
        "global_stage.epochs=null", f"global_stage.steps={args.steps}",
        f"global_stage.learning_rate={grid.global_stage.learning_rate}",
        "target_stage.epochs=null", f"target_stage.steps={args.tune_steps}",
        f"target_stage.learning_rate={grid.target_stage.learning_rate}",
    ]  # fmt: skip
    words = [word for item in sets for word in ("--set", item)]
    sites = [site_name(number) for number in range(args.sites + 1)]
    seen = next(site for site in sites if site != args.target)
    made = tune(
        args, lake, run("train", "--lake", lake, "--preset", "paper", *words, *on_gpus(args))
    )
    run("harmonize", "--lake", lake, "--model", f"target-{args.target}@{made}",
        "--sites", seen, sites[-1], *on_gpus(args))  # fmt: skip
    return made


def on_gpus(args: argparse.Namespace) -> list[str]:
    """What a command that runs a network is told."""
    return ["--gpus"] if args.gpus else []


def run(*words: object) -> int:
    """One command; the version of the model it made or found, 0 for other commands.

    A scan that fails is a row of its own and does not end the benchmark; errors do.
    """
    return int(step(False, *(str(word) for word in words)).data.get("version") or 0)


def rows(lake: Lake, target: str, versions: Mapping[str, tuple[str, int]]) -> list[Row]:
    """Measures of every test scan by every method, against the subject's scan at the target.

    Also of what a user gets, the output on the scan's own voxels, and of the scan as it is there.
    """
    catalog = Catalog(lake)
    scans = catalog.rows("scans").to_pylist()
    by_id = {scan["scan_id"]: scan for scan in scans}
    pack = load_modelpack(lake.model(*versions["sgcd"]), Store())
    recipe, seen = pack.config.prepare.digest(), pack.meta["training_sites"]
    fitted = _fitted(lake, scans, target, pack.config)
    out: list[Row] = []
    others = {
        method: {r["scan_id"]: r for r in usable_results(catalog, model, version)}
        for method, (model, version) in versions.items() if method != "sgcd"
    }  # fmt: skip
    for result in usable_results(catalog, *versions["sgcd"]):
        scan = by_id[result["scan_id"]]
        truth = find_truth(scan, scans, target)
        if truth is None:
            continue
        own = load_prepared(lake, recipe, scan["scan_id"])
        goal, inside = load_truth(lake, pack.config.prepare, truth, own)
        images = {m: fitted[m, scan["sequence"]].apply(own.image, own.mask) for m in BASELINES}
        images["sgcd"] = load_output(result, own.image.shape)
        for method, found in others.items():
            if scan["scan_id"] in found:
                images[method] = load_output(found[scan["scan_id"]], own.image.shape)
        scored = {m: measure_all(image, goal, own.mask & inside) for m, image in images.items()}
        pair = load_pair(lake, pack.config.prepare, scan, result)
        goal, inside = load_truth_on_scan(lake, pack.config.prepare, truth, own)
        for method, native in (("raw_native", pair.before), ("sgcd_native", pair.after)):
            scored[method] = measure_all(np.clip(native, 0, 1), goal, pair.mask & inside)
        for method, measures in scored.items():
            for metric, value in measures.items():
                out.append({"subject": scan["subject"], "site": scan["site"], "value": value,
                            "sequence": scan["sequence"], "seen": scan["site"] in seen,
                            "method": method, "metric": metric})  # fmt: skip
    return out


def _fitted(lake: Lake, scans: list[Row], target: str, config: SgcdConfig) -> dict[Any, Any]:
    """Every classical method, fit to the target's training scans of every sequence."""
    out = {}
    for sequence in config.sequences:
        mine = [s for s in scans if s["site"] == target and s["split"] != "test"
                and s["sequence"] == sequence and s["status"] == "ok"]  # fmt: skip
        files = [load_prepared(lake, config.prepare.digest(), s["scan_id"]) for s in mine]
        for name in BASELINES:
            out[name, sequence] = make_baseline(name, sequence).fit(
                [(f.image, f.mask) for f in files]
            )
    return out


def table(lines: list[Line], titles: Mapping[str, str] = TITLES) -> str:
    """Markdown: a row a method and group, mean and 95 % interval over subjects.

    Args:
        lines: Groups of a `Summary`.
        titles: Of the methods.
    """
    head = [m for m in MEASURES if any(line.metric == m for line in lines)]
    text = [f"| scans | method | {' | '.join(MEASURES[m].title for m in head)} |"]
    text.append("|---|---|" + "---|" * len(head))
    for sequence, seen in dict.fromkeys((line.sequence, line.seen) for line in lines):
        group = {x.metric: x for x in lines if (x.sequence, x.seen) == (sequence, seen)}
        for method in _order(group):
            cells = []
            for metric in head:
                found = group[metric].by_method[method]
                cell = number(metric, found.mean)
                low, high = number(metric, found.low), number(metric, found.high)
                cells.append(f"{cell} ({low} to {high})")
            name = f"{sequence}, {'seen' if seen else 'unseen'}"
            text.append(f"| {name} | {titles[method]} | {' | '.join(cells)} |")
    return "\n".join(text)


def _order(group: dict[str, Line]) -> Iterator[str]:
    """Classical methods, then ours, the whole of it last."""
    have = next(iter(group.values())).by_method
    yield from (m for m in (*BASELINES, *OURS) if m in have)


def against_best(rows: Sequence[Row], seed: int = 0) -> str:
    """Markdown: by group and measure, how much better SGCD is than the best classical method.

    Differences are taken within a subject, so what makes one head harder than another does not
    widen the interval.
    """
    groups = dict.fromkeys((r["sequence"], r["seen"]) for r in rows)
    head = [m for m in MEASURES if any(r["metric"] == m for r in rows)]
    text = [f"| SGCD better by | {' | '.join(MEASURES[m].title for m in head)} |"]
    text.append("|---|" + "---|" * len(head))
    for sequence, seen in sorted(groups, key=lambda g: (g[0], not g[1])):
        cells = []
        for metric in head:
            sign = 1 if MEASURES[metric].higher_is_better else -1
            mine = {
                (r["method"], r["subject"], r["site"]): sign * r["value"] for r in rows
                if (r["sequence"], r["seen"], r["metric"]) == (sequence, seen, metric)
            }  # fmt: skip
            rivals = {m: [v for k, v in mine.items() if k[0] == m] for m in BASELINES}
            best = max((m for m in BASELINES if rivals[m]), key=lambda m: float(np.mean(rivals[m])))
            pairs = [
                {"subject": subject, "value": value - mine[best, subject, site]}
                for (method, subject, site), value in mine.items() if method == "sgcd"
            ]  # fmt: skip
            found = estimate(pairs, seed)
            mean, low, high = (number(metric, v) for v in (found.mean, found.low, found.high))
            cells.append(f"{mean} ({low} to {high}), {METHOD_TITLES[best]}")
        text.append(f"| {sequence}, {'seen' if seen else 'unseen'} | {' | '.join(cells)} |")
    return "\n".join(text)


if __name__ == "__main__":
    main()
