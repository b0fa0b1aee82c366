"""What each part of the method is worth: the same cohort, one part changed at a time.

Digital traveling subjects at the grid of preset `tiny`, every row trained for the same number of
steps, scored against the subject's own scan at the target. What is done is kept, so an interrupted
run goes on where it stopped, and rows that differ only in what comes later share their models.

    python benchmarks/ablations.py WORK --anatomy FOLDER_OF_LABEL_MAPS [--only NAME] [--out docs]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ablation_cohort import Plan, make_member
from ablation_list import ABLATIONS
from ablation_runs import PHASES, Work, attempt, write_failure
from ablation_tables import chart, evaluations_chart, evaluations_table, inversion_table
from ablation_tables import runs_table as runs
from ablation_tables import scores_table as scores

from pipelines.cohort.plan import Member
from pipelines.spawned import begin_worker
from sgcd_core.config import load_config

REGION = ("<!-- ablations: written by `make bench-ablations` -->", "<!-- end of ablations -->")


def main(words: Sequence[str] | None = None) -> int:
    """See the module."""
    args = _parser().parse_args(words)
    if args.list:
        for ablation in ABLATIONS.values():
            print(f"{ablation.name:28} {' '.join((*ablation.settings, *ablation.sampling))}")
        return 0
    started = time.monotonic()
    work = work_of(args)
    run(work, args.only or list(ABLATIONS), args.workers)
    results = {name: work.result(ablation) for name, ablation in ABLATIONS.items()}
    left = [name for name, result in results.items() if result is None]
    text = page(work, results)
    print(text)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    if left:
        print(f"{len(left)} of {len(results)} rows are still to be run: {', '.join(left)}")
    elif args.out is not None:
        write(args.out, text, results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder for cohort, models and results; kept")
    parser.add_argument("--anatomy", help="folder of label maps; without it the template")
    parser.add_argument("--only", action="append", choices=ABLATIONS, metavar="NAME",
                        help="just this row, with what it needs; may be repeated")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="names and settings of all rows")
    parser.add_argument("--out", type=Path, help="docs folder the page and the plots go to")
    parser.add_argument("--steps", type=int, default=60, help="of Stage 1")
    parser.add_argument("--tune-steps", type=int, default=24, help="of Stage 2")
    parser.add_argument("--sites", type=int, default=5, help="in training; one more is not")
    parser.add_argument("--each", type=int, default=4, help="training subjects at each site")
    parser.add_argument("--traveling", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", default="siteA")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--preset", default="tiny", choices=("tiny", "small"))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="K=V")
    return parser


def work_of(args: argparse.Namespace) -> Work:
    """The run that the arguments describe."""
    base = (
        f"global_stage.steps={args.steps}", f"target_stage.steps={args.tune_steps}",
        f"seed={args.seed}", *args.settings,
    )  # fmt: skip
    prepare = load_config(args.preset, settings=base).prepare
    plan = Plan.of(
        args.anatomy, prepare, sites=args.sites, each=args.each, traveling=args.traveling,
        seed=args.seed,
    )  # fmt: skip
    return Work(args.work, plan, args.preset, base, args.target)


def run(work: Work, names: Iterable[str], workers: int = 1) -> list[str]:
    """Do what is left to do for the rows; the names of those it was done for."""
    todo = [ABLATIONS[name] for name in names if work.result(ABLATIONS[name]) is None]
    with _mapper(workers) as run_all:
        if todo:
            members = [m for m in work.plan.members
                       if not (work.cohort_folder / f"{m.label}.npz").exists()]  # fmt: skip
            for name, seconds in run_all(_make, [(work, member) for member in members]):
                _say("cohort", name, seconds)
        stopped: dict[str, str] = {}
        for phase, (_, key) in PHASES.items():
            # One row of those that share a model makes it.
            first = {key(work, a): a for a in reversed(todo) if a.network or phase == "score"}
            jobs = [
                (work, phase, a.name)
                for a in reversed(first.values())
                if not {work.stage1_key(a), work.stage2_key(a)} & stopped.keys()
            ]
            for name, seconds, code in run_all(_attempt, jobs):
                _say(phase, name, seconds, code)
                if code:
                    stopped[key(work, ABLATIONS[name])] = code
    for ablation in todo:
        for key in (work.stage1_key(ablation), work.stage2_key(ablation), ablation.name):
            if key in stopped and work.result(ablation) is None:
                write_failure(work, ablation, stopped[key])
    return [ablation.name for ablation in todo]


def _make(job: tuple[Work, Member]) -> tuple[str, float]:
    work, member = job
    started = time.perf_counter()
    make_member(work.cohort_folder, work.plan, member)
    return member.label, time.perf_counter() - started


def _attempt(job: tuple[Work, str, str]) -> tuple[str, float, str]:
    return attempt(*job)


def _say(phase: str, name: str, seconds: float, code: str = "") -> None:
    if seconds >= 0.1 or code:  # else it was there
        print(f"{phase:7} {name:28} {seconds:6.1f} s {code}", file=sys.stderr, flush=True)


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A map over processes of one thread each, or in this process; results as they come."""
    if workers <= 1:
        yield map
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=begin_worker) as pool:

        def over_processes(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
            for done in as_completed([pool.submit(function, job) for job in jobs]):
                yield done.result()

        yield over_processes


def page(work: Work, results: dict[str, dict[str, Any] | None]) -> str:
    """The generated part of the page."""
    request, config = work.plan.request, load_config(work.preset, settings=work.base)
    about = (
        f"Preset `{work.preset}` ({config.prepare.mm:g} mm), {request.subjects} training subjects "
        f"at {request.sites} sites, one site each; {request.traveling} traveling subjects, "
        f"also at a site no training saw; target {work.target}, seed {request.seed}. Stage 1 "
        f"{config.global_stage.steps} steps of {config.global_stage.batch_size} volumes, Stage 2 "
        f"{config.target_stage.steps} steps of {config.target_stage.batch_size}."
    )
    return "\n\n".join([
        about, runs(results), scores(results), "### Quality against evaluations",
        evaluations_table(results), "### DDIM inversion: T_f up, T_r down",
        inversion_table(results),
    ])  # fmt: skip


def write(out: Path, text: str, results: dict[str, dict[str, Any] | None]) -> None:
    """The page's marked region and the plots, under a folder of documents."""
    images, file = out / "images", out / "ablations.md"
    images.mkdir(parents=True, exist_ok=True)
    (images / "ablations-psnr.png").write_bytes(chart(results))
    (images / "ablations-evaluations.png").write_bytes(evaluations_chart(results))
    old = file.read_text(encoding="utf-8") if file.exists() else f"# Ablations\n\n{REGION[0]}\n"
    before, mark, rest = old.partition(REGION[0])
    after = rest.partition(REGION[1])[2]
    plots = "\n\n".join(
        f"![{title}](images/ablations-{name}.png)"
        for name, title in (("psnr", "PSNR by row"), ("evaluations", "PSNR by evaluations"))
    )
    body = f"{before}{mark or REGION[0]}\n{text}\n\n{plots}\n{REGION[1]}{after}"
    file.write_text(body.rstrip() + "\n", encoding="utf-8")
    print(f"wrote {file} and two plots")


if __name__ == "__main__":
    raise SystemExit(main())
