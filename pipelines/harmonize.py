"""One scan from its address to its row: read, prepare, harmonize, guard, write, report.

Commit order: volumes, then the sidecar, then (by the driver) the catalog row. A row never names
an object that is not there.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipelines.bids_links import Links
from pipelines.derivative import (
    Names,
    json_beside,
    model_grid_sidecar_bytes,
    remove_files,
    sidecar_bytes,
    uncertainty_sidecar_bytes,
)
from pipelines.lake import Lake
from pipelines.ledger import MAX_ATTEMPTS, Attempt, attempt, model_key, worker_name
from pipelines.plan import TRANSIENT_CODES
from pipelines.turns import Turns
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import InputError, SgcdError
from sgcd_core.io.store import Store, sha256_hex

if TYPE_CHECKING:
    from sgcd_core.harmonizer import Harmonized

log = logging.getLogger(__name__)

Row = dict[str, Any]

#: Seconds a scan may take, preparation included; far above what any preset needs.
SCAN_DEADLINE = 3600.0
#: Columns of a result that are its scan's.
OF_SCAN = ("scan_id", "dataset", "subject", "session", "site", "sequence")
#: Failures that say nothing of scan or mask: an output of before is as good as it was.
_OF_THE_DAY = {*TRANSIENT_CODES, "SCAN-MISSING", "SCAN-FAILED", "SCAN-DEADLINE"}


class Model(Protocol):
    """What is asked of a `Harmonizer`."""

    def harmonize(self, image: Any, mask: Any, **options: Any) -> Harmonized:
        """See `Harmonizer.harmonize`."""
        ...

    def outlier_score(self, image: Any, mask: Any, sequence: str) -> float:
        """See `Harmonizer.outlier_score`."""
        ...


@dataclass(frozen=True)
class Job:
    """What is the same for every scan of one harmonization.

    Attributes:
        lake: Where scans, models and outputs lie.
        model: Name in the lake.
        version: Its version.
        target: Site whose look is the goal; None for the global model.
        config: The model's settings with the user's laid over.
        code_version: Of this program.
        batch_id: Of this run.
        samples: Seeds per scan; above 1 an uncertainty map is written.
        learned: Sequences the model was trained for, of those in the settings; None: all.
        lesions: Where lesion masks lie, see `lesions.candidates`.
        deadline: Seconds a scan may take.
        links: What names the data sets that the scans lie in.
    """

    lake: Lake
    model: str
    version: int
    target: str | None
    config: SgcdConfig
    code_version: str
    batch_id: str
    samples: int = 1
    learned: tuple[str, ...] | None = None
    lesions: str | None = None
    deadline: float = SCAN_DEADLINE
    links: Links = field(default_factory=Links)

    @property
    def key(self) -> str:
        """Name and version as one word."""
        return model_key(self.model, self.version)

    def made_by(self, scan: Mapping[str, Any], stem: str) -> str:
        """Digest of all that a scan's outputs and row depend on beside its voxels."""
        look = scan.get("site_look")
        parts = (
            self.lake.derivatives(self.key), self.target, self.config.digest(), self.code_version,
            self.samples, self.learned, self.lesions, stem, [scan[name] for name in OF_SCAN],
            None if look is None else sha256_hex(np.asarray(look, np.float32).tobytes()),
            scan.get("site_subjects"),
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def harmonize_scan(
    scan: Mapping[str, Any], job: Job, harmonizer: Model, stem: str, turns: Turns | None = None,
    tries: list[Row] | None = None,
) -> Row:  # fmt: skip
    """The `results` row of one scan. Never raises: a scan that fails is a row that says why.

    Args:
        scan: Row of `scans`; `site_look`, where there is one, is the look of its site,
            measured on `site_subjects` people.
        job: What is the same for all.
        harmonizer: The loaded model.
        stem: Path of the output below the derivative's root, without suffix: see `derivative`.
        turns: Shared by all scans that are in flight in this process.
        tries: Is given what the table `attempts` says of each try of the scan, earlier ones too.
    """
    turns, tries = turns or Turns(), [] if tries is None else tries
    row = _row_of(scan, job, harmonizer, stem, turns, tries)
    code = row["code"] or ""
    told = code.startswith(("SCAN-", "LESION-")) and code not in _OF_THE_DAY
    if row["status"] == "failed" and told:
        _remove_output(Names(job.lake.derivatives(job.key), stem), scan["scan_id"])
    return row


def _remove_output(names: Names, scan_id: str) -> None:
    """Leave no output of before beside a row that says why there is none.

    Here, where the scan's try is counted still: who is killed in between plans it again.
    """
    try:
        if remove_files(names.files, Store()):
            log.info("event=output_removed scan=%s uri=%s", scan_id, names.native)
    except SgcdError as error:
        log.warning("event=output_not_removed scan=%s code=%s", scan_id, error.code)


def _row_of(
    scan: Mapping[str, Any], job: Job, harmonizer: Model, stem: str, turns: Turns, tries: list[Row]
) -> Row:
    """As `harmonize_scan`; outputs of before are left where they are."""
    row = blank_row(scan, job)
    for last in (False, True):
        try:
            return _one_try(scan, job, harmonizer, stem, turns, tries)
        except SgcdError as error:
            row |= {"status": "failed", "code": error.code, "message": error.sentence}
            break
        except Exception as error:
            # One of the two places where any failure becomes a row: a scan must not stop the
            # others. What nobody foresaw may be a whim (memory that others held, a store that
            # hiccuped), so the scan is tried once more, alone in its worker.
            name = type(error).__name__
            log.warning("event=scan_failed scan=%s error=%s last=%s", scan["scan_id"], name, last)
            log.debug("event=scan_failed scan=%s", scan["scan_id"], exc_info=True)
            text = f"an unexpected {name}, twice; run again with --debug to see where."
            row |= {"status": "failed", "code": "SCAN-FAILED", "message": text}
    row["finished_at"] = datetime.now(UTC)
    return row


def _one_try(
    scan: Mapping[str, Any], job: Job, harmonizer: Model, stem: str, turns: Turns, tries: list[Row]
) -> Row:
    """The row of one counted try; raises where it cannot go on."""
    row = blank_row(scan, job)
    with attempt(job.lake, job.key, scan["scan_id"], job.batch_id, turns) as this:
        seen = {item["attempt"] for item in tries}
        tries += [item for item in this.earlier() if item["attempt"] not in seen]
        with _noted(tries, this) as mine:
            made_by = job.made_by(scan, stem)
            settled = _settled(this, job, row, made_by) if this.number > 1 else None
            if settled is not None:
                mine["ended"] = "adopted"
                return settled
            _harmonize(scan, job, harmonizer, Names(job.lake.derivatives(job.key), stem), row)
            row["finished_at"] = datetime.now(UTC)
            mine |= {"ended": row["status"], "error": row["code"]}
            if row["status"] in ("ok", "flagged"):
                this.keep(row, made_by)
    return row


@contextmanager
def _noted(tries: list[Row], this: Attempt) -> Iterator[Row]:
    """This try in `tries`, with how it ended; a scan that is not touched any more has none."""
    mine = this.begun()
    if this.number <= MAX_ATTEMPTS:
        tries.append(mine)
    try:
        yield mine
    except Exception as error:  # noted, then raised
        if isinstance(error, SgcdError):
            mine |= {"ended": "failed", "error": error.code}
        else:
            mine |= {"ended": "raised", "error": type(error).__name__}
        raise
    finally:
        mine["finished_at"] = datetime.now(UTC)


def blank_row(scan: Mapping[str, Any], job: Job) -> Row:
    """The columns of a result that are known before anything is done."""
    return {
        **{name: scan[name] for name in OF_SCAN},
        "model": job.model, "model_version": job.version, "target": job.target,
        "status": "failed", "code": None, "message": None, "worker": worker_name(),
        "config_digest": job.config.digest(), "code_version": job.code_version,
        "batch_id": job.batch_id, "finished_at": datetime.now(UTC),
    }  # fmt: skip


def _settled(this: Attempt, job: Job, row: Row, made_by: str) -> Row | None:
    """The row of a scan whose earlier tries leave nothing to try, else None."""
    kept = this.kept(made_by)
    if kept is not None:
        return kept | {"batch_id": job.batch_id}
    if this.was_late(job.deadline):
        raise InputError(
            f"it took longer than {job.deadline:g} s.", code="SCAN-DEADLINE",
            hint="Look at the scan, or allow more with --scan-deadline and --retry-failed.",
        )  # fmt: skip
    if this.number > MAX_ATTEMPTS:
        text = f"harmonizing it ended its worker {MAX_ATTEMPTS} times."
        return row | {"status": "quarantined", "code": "SCAN-QUARANTINED", "message": text}
    return None


def _harmonize(
    scan: Mapping[str, Any], job: Job, harmonizer: Model, names: Names, row: Row
) -> None:
    """Fill `row` with what happened; raises where it cannot go on."""
    from pipelines.lesions import lesion_of
    from pipelines.prepare import load_native_mask, load_prepared, prepare_one, read_indexed
    from pipelines.training_data import COMPLETE
    from sgcd_core.io.nifti import encode_nifti
    from sgcd_core.io.store import join
    from sgcd_core.volume.guard import flags, guard_scores
    from sgcd_core.volume.lesion import fill_smoothly, lesion_on_model_grid, require_surroundings
    from sgcd_core.volume.resample import voxel_ml
    from sgcd_core.volume.transport import carry_to_native, carry_uncertainty, recolour_lesion

    store, config, lake = Store(), job.config, job.lake
    scan_id, sequence = scan["scan_id"], scan["sequence"]
    if sequence not in config.sequences:
        raise InputError(
            f"sequence {sequence} is none of the model's ({', '.join(config.sequences)}).",
            code="SCAN-SEQUENCE",
        )  # fmt: skip
    if job.learned is not None and sequence not in job.learned:
        raise _not_learned(sequence, job)
    recipe = config.prepare.digest()
    if not store.exists(join(lake.prepared(recipe, scan_id), COMPLETE)):
        with _clock(row, "seconds_prepare"):
            done = prepare_one(dict(scan), lake, config.prepare)
        if done["status"] != "ok":
            row |= {"status": "failed", "code": done["code"], "message": done["message"]}
            return
    with _clock(row, "seconds_read"):
        native = read_indexed(scan, store, config.prepare.max_inflated_bytes)
        files = load_prepared(lake, recipe, scan_id)
        native_mask = load_native_mask(lake, recipe, scan_id)
        lesion_uri, marked, left_out = lesion_of(
            scan, job.lesions, native, store, config.prepare.max_inflated_bytes
        )
        lesion = None
        mask = np.asarray(files.mask, dtype=bool)
        if lesion_uri is not None:
            marked &= native_mask
            row["lesion_ml"] = float(marked.sum()) * voxel_ml(native.affine)
            lesion = lesion_on_model_grid(marked, files.geometry)
            require_surroundings(lesion, mask, where=lesion_uri)
    grid = np.array(files.geometry.model_affine)
    result = harmonizer.harmonize(
        files.image, mask, sequence=sequence, scan_id=scan_id, seed=config.seed,
        samples=job.samples, site_look=scan.get("site_look"),
        site_subjects=scan.get("site_subjects"),
        voxel_mm=files.geometry.longest_voxel_mm(),
    )  # fmt: skip
    row["seconds_model"] = result.seconds  # without waiting for another scan to leave the model
    row["outlier_score"] = float(harmonizer.outlier_score(files.image, mask, sequence))
    image, spread = result.image, result.uncertainty
    if lesion is not None:
        image = recolour_lesion(files.image, image, mask, lesion, config.transport)
    if spread is not None:
        if lesion is not None:  # what the seeds drew there is not in the output
            inside = mask & lesion
            spread = np.where(
                mask, fill_smoothly(spread, mask & ~inside, inside, 0.0), 0
            ).astype(np.float32)  # fmt: skip
        row["uncertainty_mean"] = float(spread[mask].mean())
    scores = guard_scores(files.image, image, mask, config.prepare.mm)
    row |= {name: float(value) for name, value in scores.items()}
    found = flags(scores | {"outlier_score": row["outlier_score"]}, config.guard)
    row["status"] = "flagged" if found else "ok"
    if found:
        row["code"] = found[0][0]
    said = "; ".join(message for _, message in found), left_out
    row["message"] = ". ".join(filter(None, said)) or None
    with _clock(row, "seconds_write"):
        out = carry_to_native(
            native, native_mask, files.geometry, image, mask, config.transport, lesion
        )
        data = encode_nifti(out, native)
        on_grid = encode_nifti(image, grid)
        store.write_bytes(names.model_grid, on_grid)
        if spread is not None:
            on_scan = carry_uncertainty(spread, mask, native_mask, files.geometry)
            store.write_bytes(names.uncertainty_model_grid, encode_nifti(spread, grid))
            store.write_bytes(names.uncertainty, encode_nifti(on_scan, native))
            row["uncertainty_uri"] = names.uncertainty
        else:  # none of other settings stays
            remove_files(names.uncertainty_files, store)
        store.write_bytes(names.native, data)
        row |= {
            "output_uri": names.native, "output_sha256": sha256_hex(data),
            "model_grid_uri": names.model_grid, "model_grid_sha256": sha256_hex(on_grid),
            "sidecar_uri": names.sidecar,
        }  # fmt: skip
    links, where = job.links, config.prepare.registration
    sampler = config.global_sampler if job.target is None else config.target_sampler
    if spread is not None:
        for uri, sources, registration in (
            (names.uncertainty_model_grid, [scan["uri"]], where),
            (names.uncertainty, [scan["uri"], names.uncertainty_model_grid], None),
        ):
            body = uncertainty_sidecar_bytes(
                row, links=links, sources=sources, seed=config.seed,
                samples=max(job.samples, sampler.seeds), registration=registration,
            )  # fmt: skip
            store.write_bytes(json_beside(uri), body)
    facts: dict[str, Any] = {"links": links, "source": scan["uri"], "lesion": lesion_uri}
    body = model_grid_sidecar_bytes(row, **facts, registration=where)
    store.write_bytes(json_beside(names.model_grid), body)
    store.write_bytes(names.sidecar, sidecar_bytes(row, **facts))


def _not_learned(sequence: str, job: Job) -> InputError:
    """Why a model cannot serve a sequence that its settings name."""
    if job.target is None:
        return InputError(
            f"the model saw no {sequence} scan in training.", code="SCAN-SEQUENCE",
            hint="Train again with prepared scans of this sequence.",
        )  # fmt: skip
    return InputError(
        f"site {job.target!r} had no {sequence} scan to learn its look from.",
        code="TARGET-SEQUENCE",
        hint="Tune to a site that has one, or harmonize with --model global.",
    )


@contextmanager
def _clock(row: Row, name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        row[name] = time.perf_counter() - started
