"""The BIDS App form of the program: the commands users of fMRIPrep and MRIQC know.

participant = index, prepare and harmonize; group = evaluate and report. The lake lies in the work
folder, the harmonized scans in OUT_DIR.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pipelines.lake import Lake
from ray_jobs.context import absolute, open_lake, quoted
from ray_jobs.models import models, resolve
from ray_jobs.outcome import WITH_FAILURES, Outcome
from ray_jobs.settings import settings_words
from sgcd_core.errors import REPLACED, InputError, ModelError, UsageError
from sgcd_core.io.bids import is_skipped
from sgcd_core.io.store import Store, is_below, is_s3, join, sha256_hex

#: Memory a worker may take with the model and one scan of 1 mm, GB.
WORKER_GB = 3.0
_VALIDATION_SECONDS = 3600


def run(args: Any) -> Outcome:
    """One level of the app."""
    bids, out = absolute(args.bids_dir), absolute(args.out_dir)
    refuse_inside(bids, out, "OUT_DIR", "such as BIDS_DIR/derivatives/sgcd")
    refuse_inside(bids, absolute(args.work_dir), "the work folder", "with -w")
    # One lake for each pair: results of another OUT_DIR are not there.
    digest = sha256_hex("\n".join((bids, out)).encode())[:12]
    lake = Lake(join(absolute(args.work_dir), f"sgcd-{digest}"))
    return (_participant if args.level == "participant" else _group)(args, bids, out, lake)


def refuse_inside(bids: str, folder: str, what: str, instead: str) -> None:
    """Refuse a folder to write to in which BIDS_DIR's scans are looked for.

    Raises:
        UsageError: It is BIDS_DIR or lies in it, and in no folder that is passed over.
    """
    for inner, outer in ((folder, bids), (_real(folder), _real(bids))):
        path, root = join(inner), join(outer)
        if is_below(path, root) and not is_skipped(join(path[len(root) :], "file")):
            raise UsageError(
                f"{what} lies in BIDS_DIR, so its files would be taken for the data set's.",
                where=folder, hint=f"Name another one, {instead}.",
            )  # fmt: skip


def _real(folder: str) -> str:
    return folder if is_s3(folder) else os.path.realpath(folder)


def _participant(args: Any, bids: str, out: str, lake: Lake) -> Outcome:
    from pipelines.bids_filter import read_filters
    from pipelines.catalog import Catalog
    from ray_jobs import commands, harmonize

    filters = read_filters(args.filter_file) if args.filter_file else {}
    _find_model(args, lake)  # a wrong name is said before anything is read
    lines = [] if args.skip_bids_validation else validate(bids)
    indexed = commands.index(
        _parse(
            "index", bids, "--lake", lake.uri, "--site-from", args.site_from, *settings_words(args)
        )
    )
    lines += [line for line in indexed.lines if line.startswith("note:")]
    name, version = bring_model(args, lake)
    catalog = Catalog(lake)
    only = chosen(args, catalog.rows("scans").to_pylist(), bids, filters)
    words = _parse("harmonize", *_settings(args), "--model", f"{name}@{version}", lake=lake.uri)
    words.samples, words.lesions, words.gpus = args.samples, args.lesions, args.gpus
    words.outputs, words.workers, words.only = out, workers(args), only
    words.ray_address = args.ray_address
    gone = set() if args.dry_run else _gone(catalog, name, version, only)
    if gone:  # somebody took them away: the tables say done, the folder does not
        harmonize.run(argparse.Namespace(**vars(words) | {"force": True, "only": gone}))
    done = harmonize.run(words)
    where = {"model": name, "model_version": version}
    rows = [row for row in catalog.rows("results", where=where).to_pylist()
            if row["scan_id"] in only]  # fmt: skip
    count = Counter(row["status"] for row in rows)
    text = f"participant level: {done.summary}"
    if not args.dry_run:
        counted = ", ".join(f"{n} {status}" for status, n in count.most_common()) or "none"
        text = f"participant level: {counted} of {len(only)} scans, in {args.out_dir}"
    follow = (
        f"sgcd {quoted(args.bids_dir)} {quoted(args.out_dir)} group --model {name}@{version} "
        f"-w {quoted(args.work_dir)}"
    )
    bad = count["failed"] + count["quarantined"]
    data = {**done.data, "counts": dict(count), "scans": len(only), "out": out, "lake": lake.uri}
    return Outcome(
        text, next=follow, exit_code=WITH_FAILURES if bad else done.exit_code,
        lines=[*lines, *done.lines], data=data,
    )  # fmt: skip


def _group(args: Any, bids: str, out: str, lake: Lake) -> Outcome:
    from pipelines.catalog import Catalog
    from pipelines.dataset_files import write_changed
    from ray_jobs import commands, evaluate, harmonize

    if not Store().exists(lake.marker):
        raise UsageError(
            f"no participant was done with this BIDS_DIR, OUT_DIR and work folder {args.work_dir}.",
            hint="Run the level participant first, with the same -w.",
        )
    lake = open_lake(lake.uri)
    name, version = bring_model(args, lake)
    reference = ("--model", f"{name}@{version}")
    measured = evaluate.run(_parse("evaluate", *_settings(args), *reference, lake=lake.uri))
    if args.dry_run:
        return Outcome(f"group level: {measured.summary}", data=measured.data)
    # Participants that were done at the same time may each have written the tables of one moment.
    harmonize.describe(dataclasses.replace(lake, outputs=out), name, version)
    page = join(out, "report")
    commands.report(_parse("report", *reference, "--out", page, lake=lake.uri))
    rows = Catalog(lake).rows("results", where={"model": name, "model_version": version})
    tables = []
    for sequence in sorted({row["sequence"] for row in rows.to_pylist() if row["sequence"]}):
        tables.append(join(out, f"group_{sequence}.tsv"))
        mine = [row for row in rows.to_pylist() if row["sequence"] == sequence]
        write_changed(Store(), tables[-1], group_table(mine))
    return Outcome(
        f"group level: {measured.summary}; report: {page}", exit_code=measured.exit_code,
        lines=measured.lines, data={**measured.data, "report": page, "tables": tables},
    )  # fmt: skip


def bring_model(args: Any, lake: Lake) -> tuple[str, int]:
    """Copy the model into the work folder's lake, its digests checked; its name and version.

    Raises:
        UsageError: It is no modelpack and no lake is named.
        ModelError: It is missing, damaged, or another one of its name lies there.
    """
    from sgcd_core.modelpack import checked_files

    folder = _find_model(args, lake)
    files = checked_files(folder, Store())
    meta = json.loads(files["pack.json"])["meta"]
    name, version = meta.get("name"), meta.get("version")
    if not isinstance(name, str) or not isinstance(version, int):
        raise ModelError(
            "pack.json does not say name and version.", code="MODEL-FORMAT", where=folder
        )
    target, store = lake.model(name, version), Store()
    if target == folder:
        return name, version
    if not store.exists(join(target, "pack.json")):
        for file, data in files.items():  # pack.json comes last
            store.write_bytes(join(target, file), data)
    elif store.read_bytes(join(target, "pack.json")) != files["pack.json"]:
        raise ModelError(
            f"another model {name}@{version} was used with this work folder.", code="MODEL-DIGEST",
            where=target, hint="Name another work folder with -w.",
        )  # fmt: skip
    return name, version


def _find_model(args: Any, lake: Lake) -> str:
    """Address of the modelpack that `--model` and `--lake` mean."""
    reference = args.model
    if "/" in reference or Path(reference, "pack.json").is_file():
        return absolute(reference)
    if args.lake is not None:
        lake = open_lake(args.lake)
    elif reference.partition("@")[0] not in models(lake):
        raise UsageError(
            "say where the model lies: --lake LAKE, or --model with the folder of a modelpack.",
            where="--model",
        )
    return lake.model(*resolve(lake, reference))


def chosen(args: Any, scans: list[dict[str, Any]], bids: str, filters: Any) -> set[str]:
    """scan_id of the scans that are asked for.

    Raises:
        InputError: LAKE-EMPTY, a participant or session is not there, or nothing is left.
    """
    from pipelines.bids_filter import passes

    mine = [scan for scan in scans if scan["uri"].startswith(bids.rstrip("/") + "/")]
    # Files that went away or were replaced are no part of the data set any more.
    mine = [scan for scan in mine if scan["code"] not in ("SCAN-MISSING", REPLACED)]
    for key, prefix, labels in (
        ("subject", "sub-", args.participants), ("session", "ses-", args.sessions),
    ):  # fmt: skip
        if labels is None:
            continue
        wanted = {label.removeprefix(prefix) for label in labels}
        missing = wanted - {scan[key] for scan in mine}
        if missing:
            names = ", ".join(prefix + label for label in sorted(missing))
            raise InputError(
                f"there is no T1w or T2w scan of {names}.", code="LAKE-EMPTY", where=bids,
                hint="Check the labels.",
            )  # fmt: skip
        mine = [scan for scan in mine if scan[key] in wanted]
    mine = [scan for scan in mine if passes(scan["uri"], filters)]
    if not mine:
        raise InputError(
            "no scan is left by labels and filter.", code="LAKE-EMPTY", where=bids,
            hint="Check --session-id and --bids-filter-file.",
        )  # fmt: skip
    return {scan["scan_id"] for scan in mine}


def validate(bids: str) -> list[str]:
    """Run the official validator on a local data set; notes for the user.

    Raises:
        InputError: BIDS-INVALID, it found errors.
    """
    beside = Path(sys.executable).with_name("bids-validator-deno")
    program = str(beside) if beside.exists() else (
        shutil.which("bids-validator-deno") or shutil.which("bids-validator")
    )  # fmt: skip
    if program is None or is_s3(bids):
        why = "lies in a bucket" if is_s3(bids) else "the BIDS validator is not installed"
        return [f"note: {bids} was not validated: {why}"]
    command = [program, bids, "--format", "json", "--ignoreWarnings", "--ignoreNiftiHeaders"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_VALIDATION_SECONDS, check=False
        )
        found = json.loads(done.stdout)["issues"]["issues"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        return [f"note: {bids} was not validated: the validator ended with {type(error).__name__}"]
    codes = Counter(issue["code"] for issue in found if issue["severity"] == "error")
    if codes:
        raise InputError(
            f"the BIDS validator finds {_listed(codes)}.", code="BIDS-INVALID", where=bids,
            hint="Repair the data set, or go on with --skip-bids-validation.",
        )  # fmt: skip
    return []


def workers(args: Any) -> int | None:
    """Worker processes: as asked, fewer where memory is short; None leaves it to the machine."""
    from ray_jobs.cpus import cpu_count

    if args.mem is None:
        count: int | None = args.nprocs
        return count
    return max(1, min(args.nprocs or cpu_count(), int(args.mem // WORKER_GB)))


def group_table(rows: list[dict[str, Any]]) -> bytes:
    """Results as TSV, one scan a row, as MRIQC's group tables."""
    names = ("status", "code", "site", "gradient_correlation", "local_correlation",
             "volume_drift", "outlier_score", "lesion_ml", "uncertainty_mean")  # fmt: skip
    lines = ["\t".join(("bids_name", *names))]
    for row in sorted(rows, key=lambda r: (r["output_uri"] or "", r["scan_id"])):
        stem = str(row["output_uri"] or row["scan_id"]).rpartition("/")[2].removesuffix(".nii.gz")
        lines.append("\t".join((stem, *("n/a" if row[n] is None else str(row[n]) for n in names))))
    return ("\n".join(lines) + "\n").encode()


def _gone(catalog: Any, name: str, version: int, only: set[str]) -> set[str]:
    """Scans whose row says done and whose output is not there any more."""
    store, where = Store(), {"model": name, "model_version": version}
    return {
        row["scan_id"] for row in catalog.rows("results", where=where).to_pylist()
        if row["scan_id"] in only and row["output_uri"] and not store.exists(row["output_uri"])
    }  # fmt: skip


def _settings(args: Any) -> list[str]:
    words = settings_words(args)
    if args.random_seed is not None:
        words += ["--set", f"seed={args.random_seed}"]
    return words + (["--dry-run"] if args.dry_run else [])


def _parse(command: str, *words: str, lake: str | None = None) -> Any:
    """Arguments of one of the commands, as if they had been typed."""
    from ray_jobs.parser import build_parser

    where = ["--lake", lake] if lake is not None else []
    return build_parser().parse_args([command, *words, *where])


def _listed(codes: Counter[str]) -> str:
    return ", ".join(f"{n} × {code}" for code, n in codes.most_common(5))
