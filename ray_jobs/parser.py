"""The command line of `sgcd`: few options, an example for each command.

Everything else is a setting: `--config FILE` and `--set key=value`.
"""

from __future__ import annotations

import argparse
from typing import Any

#: Which function runs a command; imported only when it is called.
COMMANDS = {
    "check": "ray_jobs.commands:check",
    "demo": "ray_jobs.demo:run",
    "cohort": "ray_jobs.commands:cohort",
    "index": "ray_jobs.commands:index",
    "prepare": "ray_jobs.prepare:run",
    "train": "ray_jobs.train_global:run",
    "suggest-target": "ray_jobs.commands:suggest",
    "tune": "ray_jobs.tune_target:run",
    "promote": "ray_jobs.promote:run",
    "harmonize": "ray_jobs.harmonize:run",
    "evaluate": "ray_jobs.evaluate:run",
    "report": "ray_jobs.commands:report",
    "serve": "ray_jobs.commands:serve",
    "cite": "ray_jobs.commands:cite",
    "query": "ray_jobs.tables:query",
    "optimize": "ray_jobs.tables:optimize",
    "export": "ray_jobs.tables:export",
    "new-site": "ray_jobs.new_site:run",
    "submit": "ray_jobs.submit:run",
    "status": "ray_jobs.status:run",
    "doctor": "ray_jobs.doctor:run",
}

_EPILOG = """\
the way through:
  sgcd cohort COHORT                        # or your own BIDS data
  sgcd index COHORT --lake LAKE
  sgcd prepare --lake LAKE
  sgcd train --lake LAKE
  sgcd suggest-target --lake LAKE
  sgcd tune --lake LAKE --target SITE
  sgcd harmonize --lake LAKE --model target-SITE
  sgcd evaluate --lake LAKE --model target-SITE
  sgcd report --lake LAKE --model target-SITE

as a BIDS App, for users of fMRIPrep and MRIQC (sgcd . . participant --help):
  sgcd BIDS_DIR OUT_DIR participant --lake LAKE --model NAME@champion --participant-label 01 02

Running any command twice is safe, and is also how to resume.
exit codes: 0 done, 1 finished with failed scans, 2 usage, 65 bad data, 69 storage or cluster
out of reach, 70 internal, 75 stopped (run again to resume), 78 bad configuration
"""


def program_version() -> str:
    """Version of the installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sgcd-lake")
    except PackageNotFoundError:
        return "unknown"


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(f"sgcd {program_version()}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of `sgcd` with all its commands."""
    parser = argparse.ArgumentParser(
        prog="sgcd",
        description="Harmonize multi-site 3D brain MRI: scans of many scanners, one look.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND")
    _check(sub)
    _demo(sub)
    _cohort(sub)
    _index(sub)
    _prepare(sub)
    _train(sub)
    _suggest(sub)
    _tune(sub)
    _promote(sub)
    _harmonize(sub)
    _evaluate(sub)
    _report(sub)
    _serve(sub)
    _cite(sub)
    _new_site(sub)
    _submit(sub)
    _query(sub)
    _optimize(sub)
    _export(sub)
    _status(sub)
    _doctor(sub)
    return parser


def _command(
    sub: Any, name: str, help_: str, example: str, *, lake: bool = True, settings: bool = False,
    ray: bool = False,
) -> argparse.ArgumentParser:  # fmt: skip
    parser: argparse.ArgumentParser = sub.add_parser(
        name, help=help_, description=help_, epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    if lake:
        parser.add_argument(
            "--lake", required=True, metavar="LAKE", help="a folder or an s3:// prefix"
        )
    if settings:
        _settings(parser)
        _dry_run(parser)
    if ray:
        parser.add_argument(
            "--workers", type=_positive, metavar="N", help="worker processes (default: by machine)"
        )
        parser.add_argument(
            "--ray-address", metavar="ADDRESS", help="a Ray cluster (default: RAY_ADDRESS, or here)"
        )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--debug", action="store_true", help="logs and tracebacks")
    return parser


def _dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, change nothing"
    )


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="settings in YAML")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
        help="one setting, may be repeated",
    )  # fmt: skip
    parser.add_argument("--preset", choices=("tiny", "small", "paper"), help="default: tiny")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _days(text: str) -> float:
    value = float(text)
    if not abs(value) < 1e6:
        raise argparse.ArgumentTypeError("must be a number of days such as 30")
    return value


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError("must be a number of minutes such as 30, or 0")
    return value


def _timeout(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1_000_000:
        raise argparse.ArgumentTypeError("must be 1 to 1000000")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError("must be 0 to 65535")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be a part such as 0.25, or 1")
    return value


def _tasks(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip() in ("1", "2", "3") for part in parts):
        raise argparse.ArgumentTypeError("must name tasks as in 1,2,3")
    return tuple(sorted({int(part) for part in parts}))


def _methods(text: str) -> tuple[str, ...]:
    from pipelines.baselines import BASELINES

    names = [part.strip() for part in text.split(",")]
    known = (*BASELINES, "combat")
    if names == ["all"]:
        return known
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"no method {name!r}; there are {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def _check(sub: Any) -> None:
    p = _command(
        sub, "check", "Say of each scan whether it can be used, and if not why.",
        "sgcd check sub-01/anat/sub-01_T1w.nii.gz", lake=False,
    )  # fmt: skip
    p.add_argument("scans", nargs="+", metavar="SCAN", help="files or URIs")
    _settings(p)


def _demo(sub: Any) -> None:
    p = _command(
        sub, "demo", "The whole path on a small digital cohort that it makes, on this machine.",
        "sgcd demo --out work/demo", lake=False, settings=True,
    )  # fmt: skip
    p.add_argument("--out", default="sgcd-demo", metavar="DIR", help="default: %(default)s")
    p.add_argument("--subjects", type=_positive, default=12, help="default: %(default)s")
    p.add_argument("--sites", type=_positive, default=3, help="default: %(default)s")
    p.add_argument("--traveling", type=_positive, default=2, help="default: %(default)s")
    p.add_argument("--mm", type=float, default=2.0, help="voxel side, default: %(default)s")
    p.add_argument("--train-steps", type=_positive, help="default: 40, or the settings'")
    p.add_argument("--tune-steps", type=_positive, help="default: 16, or the settings'")
    p.add_argument("--encoder", help="style encoder, default: mri-dino, or the settings'")
    p.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def _cohort(sub: Any) -> None:
    p = _command(
        sub, "cohort", "Make digital traveling subjects as BIDS, the truth beside.",
        "sgcd cohort work/cohort --subjects 12 --sites 4 --traveling 2", lake=False,
    )  # fmt: skip
    _dry_run(p)
    p.add_argument("out", metavar="OUT", help="a new folder, or one that an earlier run made")
    p.add_argument("--subjects", type=_positive, default=20, help="to train on (20)")
    p.add_argument("--sites", type=_positive, default=4, help="that these visit, in turn (4)")
    p.add_argument("--traveling", type=int, default=2, help="to test on, seen at every site (2)")
    p.add_argument("--unseen-sites", type=int, default=1, help="that only these visit (1)")
    p.add_argument(
        "--anatomy", metavar="DIR",
        help="label maps with FreeSurfer's numbers; default: nilearn's template",
    )  # fmt: skip
    p.add_argument("--mm", type=float, default=2.0, help="voxel side (2)")
    p.add_argument("--head", action="store_true", help="keep skull and skin (label maps only)")
    p.add_argument("--seed", type=int, default=0, help="draws people and scanners (0)")
    p.add_argument("--workers", type=_positive, metavar="N", help="processes (default: all CPUs)")


def _index(sub: Any) -> None:
    p = _command(
        sub, "index", "List the scans of BIDS trees, prefixes or CSV manifests in the lake.",
        "sgcd index s3://bucket/bids --lake s3://bucket/lake --site-from participants",
        settings=True,
    )  # fmt: skip
    p.add_argument("sources", nargs="+", metavar="SOURCE")
    p.add_argument(
        "--site-from", default="auto", metavar="HOW",
        help="auto, participants, session, sidecar, column, or name:SITE where all are from one "
        "(default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--sequences", nargs="+", default=["T1w", "T2w"], metavar="T1w", help="default: T1w T2w"
    )


def _prepare(sub: Any) -> None:
    p = _command(
        sub, "prepare", "Bring every scan onto the model grid; exactly invertible.",
        "sgcd prepare --lake LAKE --preset tiny", settings=True, ray=True,
    )  # fmt: skip
    p.add_argument("--sites", nargs="+", metavar="SITE", help="only these")
    p.add_argument(
        "--model", metavar="NAME[@VERSION]",
        help="with the settings of this model, and only what it has still to harmonize",
    )  # fmt: skip
    p.add_argument(
        "--force", action="store_true", help="also what is already prepared or was set aside"
    )
    _scan_deadline(p)


def _scan_deadline(p: Any) -> None:
    p.add_argument(
        "--scan-deadline", type=_seconds, default=3600.0, metavar="SECONDS",
        help="a scan that takes longer is failed (default: 3600)",
    )  # fmt: skip


def _wait(p: Any, whose: str) -> None:
    p.add_argument(
        "--wait", type=_minutes, default=360.0, metavar="MINUTES",
        help=f"for {whose}; 0: only to see that it lives (default: %(default)g)",
    )  # fmt: skip


def _train(sub: Any) -> None:
    p = _command(
        sub, "train", "Stage 1: learn the anatomy of all sites; makes the model `global`.",
        "sgcd train --lake LAKE --set global_stage.steps=500", settings=True, ray=True,
    )  # fmt: skip
    p.add_argument("--gpus", action="store_true", help="one GPU for each worker")
    p.add_argument(
        "--init", choices=("box", "scratch"),
        help="start from the weights that come with the package, or from fresh ones; "
        "default: the box where its weights fit the settings",
    )  # fmt: skip
    p.add_argument("--sites", nargs="+", metavar="SITE", help="train on these only")
    p.add_argument("--exclude-sites", nargs="+", metavar="SITE", help="never train on these")
    _again(p)


def _suggest(sub: Any) -> None:
    _command(
        sub, "suggest-target", "Rank the sites by how alike their scans look, best target first.",
        "sgcd suggest-target --lake LAKE", settings=True,
    )  # fmt: skip


def _tune(sub: Any) -> None:
    p = _command(
        sub, "tune", "Stage 2: tune to one site's look; makes the model `target-SITE`.",
        "sgcd tune --lake LAKE --target SITE --set target_stage.steps=200",
        settings=True, ray=True,
    )  # fmt: skip
    p.add_argument(
        "--target", required=True, metavar="SITE",
        help="its model has another name, which is said at the end, where SITE holds a / or @",
    )  # fmt: skip
    p.add_argument(
        "--model", default="global", metavar="NAME[@VERSION]", help="start from (default: global)"
    )
    p.add_argument(
        "--sequences", nargs="+", metavar="T1w", help="only these, for a target that lacks others"
    )
    p.add_argument("--gpus", action="store_true", help="use a GPU")
    _again(p)


def _again(p: Any) -> None:
    p.add_argument(
        "--force",
        action="store_true",
        help="a further version, though the same settings on the same scans made one",
    )
    _wait(p, "another training of this model")


def _promote(sub: Any) -> None:
    p = _command(
        sub, "promote", "Move an alias of a model, such as champion, to a version; or back.",
        "sgcd promote --lake LAKE target-SITE@2 --alias champion",
    )  # fmt: skip
    p.add_argument("reference", metavar="NAME@VERSION", help="the version to promote")
    p.add_argument("--alias", default="champion", help="default: %(default)s")
    p.add_argument("--dry-run", action="store_true", help="say what would change, change nothing")


def _harmonize(sub: Any) -> None:
    p = _command(
        sub, "harmonize", "Bring every planned scan to the model's look, in its own grid.",
        "sgcd harmonize --lake LAKE --model target-SITE --sites A B", settings=True, ray=True,
    )  # fmt: skip
    _model(p)
    p.add_argument("--sites", nargs="+", metavar="SITE", help="only these")
    p.add_argument("--sequences", nargs="+", metavar="T1w", help="only these")
    p.add_argument("--only-new", action="store_true", help="only scans never tried")
    p.add_argument(
        "--retry-failed", action="store_true", help="also scans that failed, whatever the reason"
    )
    p.add_argument("--force", action="store_true", help="also what is done or set aside")
    p.add_argument("--samples", type=_positive, default=1, help="seeds, for an uncertainty map")
    p.add_argument(
        "--lesions", metavar="PATTERN",
        help="lesion masks, relative to each data set's root or absolute, such as "
        "derivatives/lesions/{subject}/anat/{stem}_label-lesion_mask.nii.gz; with {subject}, "
        "{session}, {sequence}, {entities} and {stem}; masks named *_label-lesion_mask or _roi "
        "beside a scan are found without; none: use no mask",
    )  # fmt: skip
    _scan_deadline(p)
    p.add_argument("--gpus", action="store_true", help="a GPU for each worker")
    p.add_argument(
        "--gpu-fraction", type=_share, default=1.0, metavar="PART",
        help="with --gpus: part of a GPU for each worker, such as 0.25 where a model leaves most "
        "of a GPU idle (default: 1)",
    )  # fmt: skip


def _evaluate(sub: Any) -> None:
    p = _command(
        sub, "evaluate", "Measure raw, peer and harmonized scans against the truth and the sites.",
        "sgcd evaluate --lake LAKE --model target-SITE --tasks 1,2,3", settings=True,
    )  # fmt: skip
    _model(p)
    p.add_argument(
        "--tasks", type=_tasks, default=(1,), metavar="1,2,3",
        help="1 voxels, 2 tissues, 3 sites and ages (default: 1)",
    )  # fmt: skip
    p.add_argument(
        "--methods", type=_methods, default=("raw", "nyul"), metavar="A,B,…",
        help="to compare with: raw, nyul, minmax, zscore, whitestripe, histogram, of task 3 also "
        "combat; or all (default: raw,nyul)",
    )  # fmt: skip
    p.add_argument(
        "--segmenter",
        metavar="NAME",
        help='of task 2: gmm, kmeans or a command as "mytool {input} {output} {mask}" (gmm)',
    )
    p.add_argument(
        "--features",
        metavar="NAME",
        help="of task 3: resnet18:FILE_OR_URI, mri-dino, statistics, … (default: mri-dino where "
        "its weights are at hand, else statistics)",
    )


def _report(sub: Any) -> None:
    p = _command(
        sub, "report", "Self-contained HTML: a page about the cohort and a page per scan.",
        "sgcd report --lake LAKE --model target-SITE",
    )  # fmt: skip
    _model(p, required=False)
    p.add_argument("--out", metavar="FOLDER", help="default: LAKE/reports/MODEL-vVERSION")
    p.add_argument(
        "--pages", choices=("all", "flagged", "none"), default="all",
        help="scans that get a page of their own (all); what has not changed is kept",
    )  # fmt: skip
    p.add_argument("--workers", type=_positive, metavar="N", help="scans at once (default: CPUs)")


def _serve(sub: Any) -> None:
    p = _command(
        sub, "serve", "Show the reports of a lake, and its scans in 3D, in a browser.",
        "sgcd serve --lake LAKE --port 8765",
    )  # fmt: skip
    p.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: %(default)s")
    p.add_argument("--port", type=_port, default=8765, help="0: any that is free (%(default)s)")


def _cite(sub: Any) -> None:
    p = _command(
        sub, "cite", "A methods paragraph and its references, from what was done.",
        "sgcd cite --lake LAKE --model target-SITE > methods.md",
    )  # fmt: skip
    _model(p)


def _new_site(sub: Any) -> None:
    p = _command(
        sub, "new-site", "The scheduled job: index, harmonize, evaluate and report what is new.",
        "sgcd new-site s3://bucket/incoming/siteX --lake s3://bucket/lake", settings=True, ray=True,
    )  # fmt: skip
    p.add_argument("sources", nargs="+", metavar="SOURCE")
    p.add_argument("--site-from", default="auto", metavar="HOW", help="as for index")
    p.add_argument(
        "--model", metavar="NAME[@VERSION]",
        help="harmonize with this; default: the only target model there is",
    )  # fmt: skip
    p.add_argument(
        "--target", metavar="SITE",
        help="learn this site's look first (stage 2), then bring every scan to it",
    )  # fmt: skip
    p.add_argument("--sequences", nargs="+", metavar="T1w", help="only these")
    p.add_argument(
        "--min-scans", type=_positive, default=4, metavar="N",
        help="training scans of each sequence that a target needs (default: %(default)s)",
    )  # fmt: skip
    _wait(p, "another such job on this lake and model")
    p.add_argument("--gpus", action="store_true", help="one GPU for each worker")


def _submit(sub: Any) -> None:
    p = _command(
        sub, "submit", "Run a command as a job on a Ray cluster, follow it, end as it ends.",
        "sgcd submit --address http://head:8265 harmonize --lake s3://bucket/lake --model target-A",
        lake=False,
    )  # fmt: skip
    p.add_argument(
        "--address", metavar="URL",
        help="of the dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or a Ray found here",
    )  # fmt: skip
    p.add_argument("--no-wait", action="store_true", help="submit and leave")
    p.add_argument(
        "--id", metavar="NAME",
        help="of the job, such as nightly; while it runs it is joined, not started again",
    )  # fmt: skip
    p.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]",
        help="a variable for the job, may be repeated; nothing secret",
    )  # fmt: skip
    p.add_argument(
        "--working-dir", metavar="DIR",
        help="run the code of this checkout; default: what is installed on the cluster",
    )  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="say what would be submitted")
    p.add_argument("job", metavar="COMMAND", help="any command of this program")
    p.add_argument("words", nargs=argparse.REMAINDER, metavar="…", help="and its arguments")


def _query(sub: Any) -> None:
    p = _command(
        sub, "query", "Ask the tables of a lake in SQL; reads only.",
        'sgcd query "SELECT site, count(*) FROM scans GROUP BY site" --lake LAKE',
    )  # fmt: skip
    p.add_argument("sql", nargs="?", metavar="SQL", help="one SELECT; - reads it from stdin")
    p.add_argument("--tables", action="store_true", help="list the tables instead")
    p.add_argument(
        "--schema", nargs="?", const="", metavar="TABLE", help="list the columns of a table, or all"
    )
    p.add_argument(
        "--format", choices=("table", "csv", "parquet", "json"),
        help="default: by the ending of --out, else table",
    )  # fmt: skip
    p.add_argument("--out", metavar="FILE", help="a file or s3:// address (default: stdout)")
    p.add_argument("--as-of", metavar="WHEN", help="a date, a version, or results=7,scans=3")
    p.add_argument("--timeout", type=_timeout, metavar="SECONDS", help="longest run (60)")


def _optimize(sub: Any) -> None:
    p = _command(
        sub, "optimize", "Put small files of the tables together; remove old replaced ones.",
        "sgcd optimize --lake LAKE --dry-run",
    )  # fmt: skip
    p.add_argument(
        "--keep-days", type=_days, default=30.0, metavar="DAYS",
        help="keep replaced files for running readers and old versions (%(default)g)",
    )  # fmt: skip
    p.add_argument("--tables", nargs="+", default=[], metavar="TABLE", help="only these")
    p.add_argument("--dry-run", action="store_true", help="count, change nothing")


def _export(sub: Any) -> None:
    p = _command(
        sub, "export", "Write the tables as plain Parquet files that explain themselves.",
        "sgcd export --lake LAKE --out tables",
    )  # fmt: skip
    p.add_argument("--out", required=True, metavar="DIR", help="a folder or an s3:// prefix")
    p.add_argument("--history", action="store_true", help="also every row that was ever appended")
    p.add_argument("--as-of", metavar="WHEN", help="the tables as they were at this date")


def _status(sub: Any) -> None:
    _command(
        sub, "status", "What is done, failed and set aside, and how to go on.",
        "sgcd status --lake LAKE",
    )  # fmt: skip


def _doctor(sub: Any) -> None:
    p = _command(
        sub, "doctor", "Is this machine, and a lake's store, fit for the work?",
        "sgcd doctor --lake s3://bucket/lake", lake=False,
    )  # fmt: skip
    p.add_argument("--lake", metavar="LAKE", help="also test this lake's store")
    p.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="also test the nodes of this cluster (or RAY_ADDRESS)",
    )


def _model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    text = None if required else "default: that of the newest result"
    parser.add_argument("--model", required=required, metavar="NAME[@VERSION|@ALIAS]", help=text)
