"""`sgcd cohort`: a BIDS tree of digital traveling subjects. Running it again changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np

from pipelines.cohort.anatomy import TEMPLATE, check_anatomy, load_anatomy
from pipelines.cohort.plan import (
    CohortRequest,
    Member,
    check_sequences,
    choose_anatomies,
    plan_members,
)
from pipelines.cohort.render import render_scan, render_truth
from pipelines.cohort.scanner import Scanner
from pipelines.cohort.subject import Subject, random_subject
from pipelines.cohort.write import (
    claim,
    json_bytes,
    scan_uri,
    sidecar,
    sidecar_uri,
    truth_uri,
    write_scan,
    write_tables,
)
from pipelines.spawned import begin_worker
from sgcd_core.errors import ConfigError
from sgcd_core.io.nifti import encode_nifti
from sgcd_core.io.store import Store

#: Called after each subject with scans done, scans in all, and the subject's label.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CohortSummary:
    """What a run made.

    Attributes:
        out: Folder or prefix of the BIDS tree.
        subjects: Training subjects.
        traveling: Traveling subjects.
        sites: Sites that training visits.
        unseen_sites: Sites only traveling subjects visit.
        scans: Scans in the tree.
        written: Scans this run made; the others were there.
    """

    out: str
    subjects: int
    traveling: int
    sites: tuple[str, ...]
    unseen_sites: tuple[str, ...]
    scans: int
    written: int

    def row(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def make_cohort(
    out: str,
    *,
    subjects: int = 20,
    sites: int = 5,
    traveling: int = 2,
    unseen_sites: int = 1,
    anatomy: str | None = None,
    train_anatomies: Sequence[str] | None = None,
    test_anatomies: Sequence[str] | None = None,
    mm: float = 2.0,
    seed: int = 0,
    sequences: Sequence[str] = ("T1w", "T2w"),
    head: bool = False,
    shift: float = 0.0,
    progress: Progress | None = None,
    workers: int = 1,
    dry_run: bool = False,
) -> CohortSummary:
    """Make a BIDS tree of training subjects at one site each and test subjects at all.

    Deterministic in its arguments, whatever `workers`. Complete scans are kept as they are.

    Args:
        out: Folder or s3:// prefix.
        subjects: Training subjects (split `train`), in turn at `sites` sites.
        sites: Sites that training visits.
        traveling: Subjects (split `test`) scanned at every site.
        unseen_sites: Further sites that only these visit.
        anatomy: Folder of FreeSurfer label maps, or one map; None for nilearn's template.
        train_anatomies: File stems (paths below the folder, where stems are equal) for training
            subjects; default see `choose_anatomies`.
        test_anatomies: The same for traveling subjects.
        mm: Nominal voxel side.
        seed: Draws people and scanners.
        sequences: BIDS suffixes.
        head: Keep skull and skin (label maps only).
        shift: Standard deviation of repositioning between scans, mm and degrees.
        progress: Called after each subject.
        workers: Processes.
        dry_run: Check and count only; `written` is how many scans would be.

    Raises:
        ConfigError: A value that is not allowed, or another cohort lies in `out`.
        InputError: The anatomy folder holds no label map, or one that cannot be used; nothing
            is written then.
    """
    found, train, test = choose_anatomies(anatomy, train_anatomies, test_anatomies, out)
    values = {
        "subjects": subjects, "sites": sites, "traveling": traveling,
        "unseen_sites": unseen_sites, "anatomies": tuple(sorted(found)),
        "train_anatomies": train, "test_anatomies": test, "mm": mm, "seed": seed,
        "sequences": check_sequences(sequences), "head": head, "shift": shift,
    }  # fmt: skip
    request = _request(values)
    members, scanners = plan_members(request)
    store = Store()
    used = {m.anatomy: found[m.anatomy] for m in members}
    claim(out, request, store, lambda: _check_maps(used, head, store), dry_run=dry_run)
    total = sum(len(m.sites) for m in members) * len(request.sequences)
    names = tuple(s.site for s in scanners)
    made = CohortSummary(out, subjects, traveling, names[:sites], names[sites:], total, 0)
    if dry_run:
        missing = sum(len(missing_scans(out, request, m, scanners, store)) for m in members)
        return replace(made, written=missing)
    write_tables(out, members, scanners, store)
    done = written = 0
    for member, count in _run(out, request, members, scanners, found, workers):
        done += len(member.sites) * len(request.sequences)
        written += count
        if progress is not None:
            progress(done, total, f"sub-{member.label}")
    return replace(made, written=written)


def _check_maps(found: dict[str, str], head: bool, store: Store) -> dict[str, str]:
    """SHA-256 of the label maps by name, all known to be good; see `check_anatomy`."""
    for uri in found.values():  # whether all are there costs little, so it is asked first
        if uri != TEMPLATE:
            store.info(uri)
    digests = {name: check_anatomy(uri, head) for name, uri in sorted(found.items())}
    return {name: digest for name, digest in digests.items() if digest}


def _request(values: dict[str, Any]) -> CohortRequest:
    from pydantic import ValidationError

    try:
        return CohortRequest(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['msg']}.", where=str(first["loc"][0])) from error


def _run(
    out: str,
    request: CohortRequest,
    members: list[Member],
    scanners: list[Scanner],
    found: dict[str, str],
    workers: int,
) -> Iterator[tuple[Member, int]]:
    """Make the members, here or in processes; yields each with the number of scans written."""
    # one anatomy after the other: loading one costs more than a subject
    order = sorted(members, key=lambda m: m.anatomy)
    if workers <= 1:
        for member in order:
            yield member, make_subject(out, request, member, scanners, found[member.anatomy])
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=begin_worker) as pool:
        jobs = {
            pool.submit(make_subject, out, request, m, scanners, found[m.anatomy]): m for m in order
        }
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        finally:  # after an error, what still waits is not begun
            pool.shutdown(cancel_futures=True)


def missing_scans(
    out: str, request: CohortRequest, member: Member, scanners: list[Scanner], store: Store
) -> list[tuple[Scanner, str]]:
    """Scanner and sequence of a subject's scans that are not there, or not complete."""
    return [
        (scanner, sequence)
        for scanner in scanners
        if scanner.site in member.sites
        for sequence in request.sequences
        if not store.exists(sidecar_uri(scan_uri(out, member, scanner.site, sequence)))
    ]


def make_subject(
    out: str, request: CohortRequest, member: Member, scanners: list[Scanner], anatomy: str
) -> int:
    """Write what is missing of one subject's scans and truth; the number of scans written."""
    store = Store()
    missing = missing_scans(out, request, member, scanners, store)
    last_truth = truth_uri(out, member, "desc-tissue_dseg.json")
    if not missing and store.exists(last_truth):
        return 0
    subject = draw_subject(request, member, anatomy)
    if not store.exists(last_truth):
        _write_truth(out, request, member, subject, store)
    for scanner, sequence in missing:
        key = [request.seed, 41, member.number, scanners.index(scanner)]
        rng = np.random.default_rng([*key, request.sequences.index(sequence)])
        data, affine = render_scan(
            subject, scanner, sequence, request.mm, rng, head=request.head, shift=request.shift
        )
        uri = scan_uri(out, member, scanner.site, sequence)
        write_scan(uri, data, affine, sidecar(scanner, sequence, request.head), store)
    return len(missing)


def draw_subject(request: CohortRequest, member: Member, anatomy: str) -> Subject:
    """The person behind a member of a cohort."""
    base = load_anatomy(anatomy, mm=1.0 if request.mm < 3 else 2.0, head=request.head)
    rng = np.random.default_rng([request.seed, 31, member.number])
    return random_subject(base, rng, name=member.label, age=member.age, sex=member.sex)


def _write_truth(
    out: str, request: CohortRequest, member: Member, subject: Subject, store: Store
) -> None:
    labels, affine = render_truth(subject, request.mm)
    store.write_bytes(
        truth_uri(out, member, "desc-brain_mask.nii.gz"),
        encode_nifti(labels > 0, affine, dtype=np.uint8),
    )
    store.write_bytes(
        truth_uri(out, member, "desc-brain_mask.json"),
        json_bytes({"Type": "Brain", "RawSources": [f"bids:raw:sub-{member.label}"]}),
    )
    store.write_bytes(
        truth_uri(out, member, "desc-tissue_dseg.nii.gz"),
        encode_nifti(labels, affine, dtype=np.uint8),
    )
    about = {"Description": "Tissue that fills most of each voxel; names in dseg.tsv",
             "RawSources": [f"bids:raw:sub-{member.label}"]}  # fmt: skip
    store.write_bytes(truth_uri(out, member, "desc-tissue_dseg.json"), json_bytes(about))
