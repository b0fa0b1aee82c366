"""The looks of the sites that are harmonized: measured once in a lake, then kept.

What a site does to its scans is told by several of them better than by one, so a scan is taken to
look as its site does. The look of a site is written down the first time it is needed. Scans that
arrive later meet the same one: two scans of a site are never corrected differently because of when
they came. It is measured again when a scan that it was measured on turns out to be of another site.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.lake import Lake
from ray_jobs.prepare import PrepareJob, prepare_stream
from ray_jobs.volume_stream import Row, survey
from sgcd_core.config import SgcdConfig
from sgcd_core.io.store import Store, file_name, join
from sgcd_core.words import counted

if TYPE_CHECKING:
    from sgcd_core.style.look import SiteLook

#: Scans measured of each site and sequence; the mean of more would hardly move.
MOST_SCANS = 32
#: People behind a look below which it is said how few they are.
FEW_PEOPLE = 3
#: Raised when a look is measured in another way: those kept are measured again.
_FORMAT = 4

log = logging.getLogger(__name__)


def look_uri(lake: Lake, recipe: str, site: str, sequence: str) -> str:
    """Where the look of a site and sequence is kept."""
    name = f"{file_name(site)}_{sequence}.json"
    return join(lake.prepared(recipe), f"looks-{_FORMAT}", name)


def site_looks(
    ray: Any, scans: pa.Table, work: pa.Table, job: PrepareJob, config: SgcdConfig,
    workers: int | None, *, again: bool = False,
) -> dict[tuple[str, str], SiteLook]:  # fmt: skip
    """Looks by site and sequence of the scans in `work`; those not kept yet are measured.

    Args:
        ray: The connected module.
        scans: Rows of `scans`, all of the lake. Those of the test split are taken only where a
            site has no other.
        work: Rows of `scans` that are to be harmonized. A scan whose site is not known has no
            look but its own.
        job: Lake, where the looks are kept beside the prepared scans, and how scans are prepared.
        config: Gives the recipe.
        workers: For scans that are not prepared yet; None: as many as there is room for.
        again: Measure those that are kept as well.
    """
    store, lake, recipe = Store(), job.lake, job.config.digest()
    groups = work.select(["site", "sequence"]).group_by(["site", "sequence"]).aggregate([])
    wanted = sorted(
        (row["site"], row["sequence"]) for row in groups.to_pylist()
        if row["site"] is not None and row["sequence"] in config.sequences
    )  # fmt: skip
    found: dict[tuple[str, str], SiteLook] = {}
    left: set[tuple[str, str]] = set()
    for site, sequence in wanted:
        uri = look_uri(lake, recipe, site, sequence)
        if again or not store.exists(uri):
            continue
        look, measured_on = _read(store, uri, scans)
        if _elsewhere(scans, measured_on, site, sequence):
            log.info("event=look_measured_again site=%s sequence=%s", site, sequence)
            left.add((site, sequence))
        else:
            found[site, sequence] = look
    missing = [key for key in wanted if key not in found]
    if not missing:
        return found
    sample = [row for key in missing for row in _sample(scans, key)]
    measured = _measure(ray, sample, job, config, workers)
    index = {name: i for i, name in enumerate(config.sequences)}
    for site, sequence in missing:
        if (site, index[sequence]) not in measured:
            continue  # none of its scans could be prepared: each says so in its row
        look = measured[site, index[sequence]]
        uri = look_uri(lake, recipe, site, sequence)
        key = (site, sequence)
        mine = [row["scan_id"] for row in sample if (row["site"], row["sequence"]) == key]
        body = {"format": _FORMAT, "site": site, "sequence": sequence, "scans": look.scans,
                "subjects": look.subjects, "scan_ids": mine,
                "look": [float(value) for value in look.mean]}  # fmt: skip
        anew = again or key in left
        with contextlib.suppress(FileExistsError):  # another run was first: its look counts
            store.write_bytes(uri, json.dumps(body).encode(), if_absent=not anew)
        found[key], _ = _read(store, uri, scans)
    return found


def few_notes(looks: Mapping[tuple[str, str], SiteLook]) -> list[str]:
    """A line for each look that few people are behind."""
    return [
        f"note: the look of {site} in {sequence} is that of "
        f"{counted(look.subjects, 'person', 'people')}; what is taken for the scanner's may be "
        "theirs. Scans of more people help."
        for (site, sequence), look in sorted(looks.items())
        if look.subjects < FEW_PEOPLE
    ]


def _read(store: Store, uri: str, scans: pa.Table) -> tuple[SiteLook, list[str]]:
    """A look, and the scans it was measured on (the first versions name none).

    Looks that say of how many scans they are and not of how many people are of those who had
    these scans.
    """
    from pipelines.verdict import person
    from sgcd_core.style.look import SiteLook

    body = json.loads(store.read_bytes(uri, max_bytes=1_000_000))
    mean, number = np.asarray(body["look"], np.float32), int(body["scans"])
    scan_ids: list[str] = body.get("scan_ids", [])
    people = body.get("subjects")
    if people is None:
        theirs = scans.filter(pc.field("scan_id").isin(pa.array(scan_ids, pa.string())))
        people = min(len({person(row) for row in theirs.to_pylist()}), number) or number
    return SiteLook(number, mean, people), scan_ids


def _elsewhere(scans: pa.Table, scan_ids: list[str], site: str, sequence: str) -> bool:
    """Whether one of these scans is of another site or sequence now."""
    field = pc.field
    mine = scans.filter(field("scan_id").isin(pa.array(scan_ids, pa.string())))
    other = (field("site") != site) | field("site").is_null() | (field("sequence") != sequence)
    return bool(mine.filter(other).num_rows)


def _sample(scans: pa.Table, key: tuple[str, str]) -> list[Row]:
    """Up to `MOST_SCANS` usable scans of a site and sequence, the same whatever the order."""
    field = pc.field
    mine = scans.filter(
        (field("status") == "ok") & (field("site") == key[0]) & (field("sequence") == key[1])
    )
    free = mine.filter((field("split") != "test") | field("split").is_null())
    chosen = free if free.num_rows else mine
    found: list[Row] = chosen.sort_by("scan_id").slice(0, MOST_SCANS).to_pylist()
    return found


def _measure(
    ray: Any, sample: list[Row], job: PrepareJob, config: SgcdConfig, workers: int | None
) -> Any:
    """Number of scans and mean look by site and sequence index, of those that can be prepared."""
    from pipelines.training_data import prepared_ids

    lake, recipe = job.lake, config.prepare.digest()
    ready = prepared_ids(lake, recipe)
    todo = [row for row in sample if row["scan_id"] not in ready]
    if todo:
        for _ in prepare_stream(ray, todo, job, workers):
            pass
        ready = prepared_ids(lake, recipe)
    usable = [row for row in sample if row["scan_id"] in ready]
    return survey(ray, usable, lake.uri, config).looks if usable else {}
