"""The BIDS App form, `sgcd BIDS_DIR OUT_DIR {participant,group}`; flags as fMRIPrep has them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ray_jobs.parser import COMMANDS, _positive

LEVELS = ("participant", "group")
_EPILOG = """\
examples:
  sgcd /data/bids /data/out participant --lake /data/lake --model target-SITE \\
      --participant-label 01 02 -w /scratch/work
  sgcd /data/bids /data/out group --model target-SITE -w /scratch/work

participant lists all scans of BIDS_DIR in a lake in the work folder and writes those that are
asked for, harmonized, to OUT_DIR, a BIDS derivative data set. group measures what is there and
writes a report beside it. Jobs for single participants may share the work folder or not: the look
of a site is measured on all its scans in BIDS_DIR either way.
exit codes: as of every command, see sgcd --help
"""


def is_bids_app(words: Sequence[str]) -> bool:
    """Whether the command line is the BIDS App form and no command of `sgcd`."""
    return bool(words) and words[0] not in COMMANDS and any(word in LEVELS for word in words)


def build_bids_parser() -> argparse.ArgumentParser:
    """The parser of the BIDS App form."""
    p = argparse.ArgumentParser(
        prog="sgcd", usage="sgcd BIDS_DIR OUT_DIR {participant,group} --model MODEL [options]",
        description="Harmonize the T1w and T2w scans of a BIDS data set with a trained model.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.set_defaults(command="bids-app", run="ray_jobs.bids_app:run", preset=None, config=None)
    p.add_argument("bids_dir", metavar="BIDS_DIR", help="a BIDS data set: a folder or s3://")
    p.add_argument(
        "out_dir", metavar="OUT_DIR",
        help="the derivative data set to write, outside BIDS_DIR or in its derivatives/",
    )  # fmt: skip
    p.add_argument("level", choices=LEVELS, metavar="{participant,group}")

    model = p.add_argument_group("model")
    model.add_argument(
        "--model", required=True, metavar="MODEL",
        help="NAME[@VERSION|@ALIAS] in --lake, or the folder of a modelpack",
    )  # fmt: skip
    model.add_argument(
        "--lake", metavar="LAKE", help="the lake that has the model: a folder or s3://"
    )

    which = p.add_argument_group("which scans")
    which.add_argument(
        "--participant-label", "--participant_label", nargs="+", metavar="01",
        dest="participants", help="only these, with or without sub- (default: all)",
    )  # fmt: skip
    which.add_argument(
        "--session-id", "--session_id", "--session-label", "--session_label", nargs="+",
        metavar="01", dest="sessions", help="only these, with or without ses- (default: all)",
    )  # fmt: skip
    which.add_argument(
        "--bids-filter-file", "--bids_filter_file", metavar="FILE", dest="filter_file",
        help='JSON such as {"t1w": {"acquisition": "mprage", "run": null}}',
    )  # fmt: skip
    which.add_argument(
        "--site-from", default="auto", metavar="HOW",
        help="auto, participants, session, sidecar, or name:SITE where all are from one "
        "(default: %(default)s)",
    )  # fmt: skip
    which.add_argument(
        "--skip-bids-validation", "--skip_bids_validation", action="store_true",
        help="do not run the BIDS validator on BIDS_DIR first",
    )  # fmt: skip

    how = p.add_argument_group("how")
    how.add_argument(
        "-w", "--work-dir", "--work_dir", default="work", metavar="DIR",
        help="where intermediate results are kept between runs (default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--nprocs", "--nthreads", "--n_cpus", "--n-cpus", "--n_procs", "--n-procs",
        type=_positive, metavar="N", help="worker processes at once (default: by machine)",
    )  # fmt: skip
    how.add_argument(
        "--mem", "--mem-mb", "--mem_mb", "--mem-gb", "--mem_gb", type=gigabytes, metavar="SIZE",
        help="memory for all workers, as 16G or 16000M; fewer are started where it is short. "
        "Without a unit: MB from 256 on, GB below",
    )  # fmt: skip
    how.add_argument("--random-seed", type=int, metavar="N", help="seeds all noise")
    how.add_argument("--samples", type=_positive, default=1, help="seeds, for an uncertainty map")
    how.add_argument("--lesions", metavar="PATTERN", help="as of `sgcd harmonize`")
    how.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
        help="one setting, may be repeated",
    )  # fmt: skip
    how.add_argument("--gpus", action="store_true", help="one GPU for each worker")
    how.add_argument("--ray-address", metavar="ADDRESS", help="a Ray cluster")
    how.add_argument(
        "--dry-run", action="store_true",
        help="say what would be done; the list of scans and the model are written to the work "
        "folder, nothing else anywhere",
    )  # fmt: skip

    p.add_argument("--json", action="store_true", help="one JSON document on stdout")
    p.add_argument("-v", "--verbose", action="count", default=0, help="-vv: logs")
    p.add_argument("--debug", action="store_true", help="logs and tracebacks")
    return p


def gigabytes(text: str) -> float:
    """GB of "16G", "16GB", "16000M", "16000" or "16"."""
    digits = text.strip().rstrip("BbIiGgMmTt")
    unit = text.strip()[len(digits) :][:1].upper()
    try:
        value = float(digits)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 16G or 16000M")
    return value * {"T": 1e3, "G": 1.0, "M": 1e-3, "": 1e-3 if value >= 256 else 1.0}.get(unit, 1.0)
