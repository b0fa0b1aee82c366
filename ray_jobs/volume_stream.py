"""Prepared volumes through Ray Data to training.

Rows of metadata travel between processes; a volume is read by the worker that needs it.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_jobs.cpus import cpu_count
from sgcd_core.config import PrepareConfig, SgcdConfig

if TYPE_CHECKING:
    from sgcd_core.batch import Batch
    from sgcd_core.style.look import SiteLook
    from sgcd_core.volume.condition import Goals

Row = dict[str, Any]
#: By site and sequence index.
Looks = dict[tuple[str, int], "SiteLook"]
#: Scans that a task measures: as many as take the time that a new process takes to start.
SCANS_OF_A_TASK = 8


def packed(row: Row) -> dict[str, bytes]:
    """A row as one binary column, so that missing values and times keep their types on the way.

    Only this program's own processes read it, and it never comes from a store.
    """
    return {"row": pickle.dumps(row)}


def unpacked(item: dict[str, Any]) -> Row:
    """The row again."""
    row: Row = pickle.loads(item["row"])
    return row


def training_stream(
    ray: Any, schedule: list[Row], lake_uri: str, config: SgcdConfig, looks: Looks
) -> Any:
    """A Ray data set of loaded volumes in the order of `schedule`.

    Args:
        ray: The connected module.
        schedule: Rows with `step`, and in `scans` for each role (scan_id, sequence index, seed,
            site).
        lake_uri: Where the prepared volumes lie.
        config: Gives the recipe.
        looks: Of the sites the scans are from.

    Returns:
        Data set whose rows have `step` and, for each role, `ROLE_image` float32 (X, Y, Z),
        `ROLE_mask` uint8 (X, Y, Z), `ROLE_sequence`, `ROLE_seed`, `ROLE_look`, the look of the
        scan's site without this scan, `ROLE_source`, the look it is taken to have,
        `ROLE_subjects`, how many people the site's look was measured on, and `ROLE_voxel`, the
        longest side of the stored scan's voxels, mm.
    """
    blocks = max(1, min(len(schedule), 4 * cpu_count(), len(schedule) // 8))
    items = ray.data.from_items([packed(row) for row in schedule], override_num_blocks=blocks)
    stream = items.map(
        load_packed,
        fn_kwargs={
            "lake_uri": lake_uri,
            "config": config.prepare,
            "looks": looks,
            "names": config.sequences,
        },
        num_cpus=0.25,  # reading is mostly waiting, and training needs the rest
    )
    stream.context.execution_options.preserve_order = True
    stream.context.custom_execution_callback_classes = [_Breathe]
    return stream


class _Breathe:
    """Ray Data's execution callback: a pause in each round of its scheduling loop.

    When enough is read ahead the loop spins in a thread of the training process and holds its
    interpreter lock: a training step took 4.3 s instead of 1.8 s on two cores.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called once in each round."""
        time.sleep(0.05)

    def before_execution_starts(self, executor: Any) -> None:
        """Nothing to do."""

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing to do."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing to do."""


def load_packed(
    item: dict[str, Any], lake_uri: str, config: PrepareConfig, looks: Looks,
    names: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Read the prepared volumes that one row of a schedule names; see `training_stream`."""
    from pipelines.lake import Lake
    from pipelines.prepare import load_prepared
    from sgcd_core.style.look import blend, leave_out, measure_look

    row = unpacked(item)
    lake = Lake(lake_uri.rstrip("/"))
    out: dict[str, Any] = {"step": row["step"]}
    for role, (scan_id, sequence, seed, site) in row["scans"].items():
        files = load_prepared(lake, config.digest(), scan_id)
        voxel = files.geometry.longest_voxel_mm()
        own = measure_look(
            files.image, files.mask, config.mm, names[sequence], voxel_mm=voxel
        ).vector()
        theirs = looks[site, sequence]
        out[f"{role}_image"] = np.asarray(files.image, dtype=np.float32)
        out[f"{role}_mask"] = np.asarray(files.mask, dtype=np.uint8)
        out[f"{role}_sequence"] = sequence
        out[f"{role}_seed"] = seed
        out[f"{role}_look"] = leave_out(theirs.mean, theirs.scans, own)
        # from its own to its site's: the smaller a group, the further off its look is
        out[f"{role}_source"] = blend(theirs.mean, own, np.random.default_rng(seed).uniform())
        out[f"{role}_subjects"] = theirs.subjects
        out[f"{role}_voxel"] = voxel
    return out


@dataclass(frozen=True)
class Survey:
    """What is measured on every training scan before training.

    Attributes:
        features: Style features, for the outlier model.
        sequences: Index of the sequence of each.
        looks: Of each site and sequence.
    """

    features: list[Any]
    sequences: list[int]
    looks: Looks


def common_goals(looks: Looks, count: int) -> Goals:
    """The mean over sites of each of `count` sequences' looks."""
    import torch

    from sgcd_core.style.look import LOOK_SIZE
    from sgcd_core.volume.condition import Goals

    means, subjects = torch.zeros(count, LOOK_SIZE), torch.zeros(count)
    for index in range(count):
        mine = [look for (_, sequence), look in looks.items() if sequence == index]
        if mine:
            means[index] = torch.from_numpy(np.mean([look.mean for look in mine], axis=0))
            subjects[index] = sum(look.subjects for look in mine)
    return Goals(means, subjects)


def site_goals(looks: Looks, site: str, common: Goals) -> Goals:
    """The looks of a site; those of `common` for sequences that it has no scan of."""
    import torch

    from sgcd_core.volume.condition import Goals

    means, subjects = common.looks.clone(), torch.full((len(common.looks),), math.inf)
    for index in range(len(means)):
        if (site, index) in looks:
            means[index] = torch.from_numpy(looks[site, index].mean)
            subjects[index] = looks[site, index].subjects
    return Goals(means, subjects)


def survey(ray: Any, rows: list[Row], lake_uri: str, config: SgcdConfig) -> Survey:
    """Measure every scan of `rows`, in the same order whatever the workers."""
    index = {name: i for i, name in enumerate(config.sequences)}
    blocks = -(-len(rows) // SCANS_OF_A_TASK)
    found = ray.data.from_items([packed(row) for row in rows], override_num_blocks=blocks).map(
        survey_packed, fn_kwargs={"lake_uri": lake_uri, "config": config.prepare}, num_cpus=0.5
    )
    found.context.execution_options.preserve_order = True
    items = [unpacked(item) for item in found.take_all()]
    sequences = [index[row["sequence"]] for row in rows]
    looks = by_site(rows, sequences, [item["look"] for item in items])
    return Survey([item["features"] for item in items], sequences, looks)


def by_site(rows: Sequence[Row], sequences: Sequence[int], vectors: Sequence[Any]) -> Looks:
    """Looks of the sites from those of their scans, rows of `scans`."""
    from pipelines.verdict import person
    from sgcd_core.style.look import SiteLook

    groups: dict[tuple[str, int], list[tuple[str, Any]]] = {}
    for row, sequence, vector in zip(rows, sequences, vectors, strict=True):
        groups.setdefault((row["site"], sequence), []).append((person(row), vector))
    looks = {}
    for key, group in sorted(groups.items()):
        people, theirs = zip(*group, strict=True)
        looks[key] = SiteLook(len(group), np.mean(theirs, axis=0), len(set(people)))
    return looks


def survey_packed(item: dict[str, Any], lake_uri: str, config: PrepareConfig) -> dict[str, bytes]:
    """Style features and look of one prepared scan."""
    from pipelines.lake import Lake
    from pipelines.prepare import load_prepared
    from sgcd_core.style.look import measure_look
    from sgcd_core.style.outlier import style_features

    row = unpacked(item)
    files = load_prepared(Lake(lake_uri.rstrip("/")), config.digest(), row["scan_id"])
    image, mask = np.asarray(files.image, np.float32), np.asarray(files.mask, bool)
    look = measure_look(
        image, mask, config.mm, row["sequence"], voxel_mm=files.geometry.longest_voxel_mm()
    ).vector()
    return packed({"features": style_features(image, mask), "look": look})


def to_batch(columns: dict[str, Any], role: str) -> Batch:
    """The stage's batch of one role, from numpy columns."""
    import torch

    def tensor(name: str) -> Any:
        return torch.from_numpy(np.array(columns[f"{role}_{name}"]))

    return {
        "image": tensor("image")[:, None],
        "mask": tensor("mask")[:, None].bool(),
        "sequence": tensor("sequence").long(),
        "seed": tensor("seed").long(),
        "look": tensor("look").float(),
        "source": tensor("source").float(),
        "subjects": tensor("subjects").float(),
        "voxel": tensor("voxel").float(),
    }
