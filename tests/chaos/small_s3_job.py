"""A whole small job in one process: index, toy model, plan, prepare, harmonize, commit.

`run` is "the command": started again it goes on. As a program it dies at a named point:
python small_s3_job.py LAKE SOURCE POINT.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch

from pipelines.catalog import Catalog
from pipelines.derivative import stems
from pipelines.harmonize import Job, harmonize_scan
from pipelines.lake import Lake
from pipelines.manifest import index_sources
from pipelines.plan import TRANSIENT_CODES, plan
from ray_jobs.commit import Committer
from sgcd_core.config import load_config
from sgcd_core.errors import StorageError
from sgcd_core.global_stage import GlobalStage
from sgcd_core.harmonizer import Harmonizer
from sgcd_core.io.nifti import encode_nifti
from sgcd_core.io.store import Store, join, sha256_hex
from sgcd_core.modelpack import has_modelpack, load_modelpack, save_modelpack
from sgcd_core.style.look import LOOK_SIZE
from sgcd_core.style.outlier import OutlierModel, style_features
from sgcd_core.volume.condition import Goals
from sgcd_core.volume.template import template

SCANS = 4
MODEL, VERSION = "toy", 1
CONFIG = load_config(
    "tiny",
    settings=[
        "prepare.shape=[24, 24, 24]", "prepare.mm=8", "prepare.bias_correction=none",
        "prepare.registration=none", "network.channels=[8, 16]",
        "network.attention_levels=[false, true]", "network.head_channels=8", "network.patch=1",
        "network.norm_groups=4", "condition.match=none", "global_stage.precision=fp32",
        "global_sampler.t_start=400",
    ],
)  # fmt: skip
#: Where the process may die: before or after the write of this kind for the second scan.
POINTS = ("before volume", "before sidecar", "after sidecar", "after row")


def write_source(source: str) -> None:
    """A BIDS data set of `SCANS` brains of two sites, none like the other."""
    store = Store()
    image, mask, affine = template(4.0)
    table = ["participant_id\tsite"]
    for number in range(SCANS):
        noise = np.random.default_rng(number).normal(0, 0.02, image.shape)
        data = np.where(mask, np.clip(image + noise, 0.05, 1) ** (1 + 0.1 * number) * 900, 0)
        uri = join(source, f"sub-{number}/anat/sub-{number}_T1w.nii.gz")
        store.write_bytes(uri, encode_nifti(data, affine))
        table.append(f"sub-{number}\tsite{number % 2}")
    store.write_bytes(join(source, "participants.tsv"), "\n".join(table).encode())


def toy_model(uri: str) -> None:
    """An untrained network that draws something, the same each time."""
    torch.manual_seed(0)
    stage = GlobalStage(CONFIG, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in stage.network.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    image, mask, _ = template(8.0)
    outliers = OutlierModel.fit([style_features(image.astype(np.float32), mask)] * 2, [0, 0])
    save_modelpack(uri, stage.pack(outliers, Goals(torch.zeros(2, LOOK_SIZE)), {"name": MODEL}))


def run(lake_uri: str, source: str) -> list[dict[str, Any]]:
    """Do what is left to do; the rows of the scans that were worked on."""
    torch.set_num_threads(1)
    lake = Lake.open(lake_uri, create=True)
    catalog = Catalog(lake)
    known = catalog.rows("scans").to_pylist()
    found = index_sources([source], sequences=("T1w",), known=known, config=CONFIG.prepare)
    catalog.append("scans", found.rows)
    where = lake.model(MODEL, VERSION)
    if not has_modelpack(where):
        toy_model(where)
    harmonizer = Harmonizer(load_modelpack(where))
    job = Job(
        lake=lake, model=MODEL, version=VERSION, target=None, config=CONFIG, code_version="test",
        batch_id=sha256_hex(os.urandom(8))[:16],
    )  # fmt: skip
    named = {row["scan_id"]: row["stem"] for row in stems(catalog.rows("scans")).to_pylist()}
    rows = []
    with Committer(catalog, job) as commit:
        for scan in plan(catalog, MODEL, VERSION).todo.to_pylist():
            rows.append(harmonize_scan(scan, job, harmonizer, named[scan["scan_id"]]))
            commit.add(rows[-1])
            if len(rows) % 2 == 0:
                commit.flush()
    return rows


def results(lake_uri: str) -> list[dict[str, Any]]:
    """Every result that says something of its scan, of the whole history."""
    rows = Catalog(Lake(lake_uri)).history("results").to_pylist()
    return [row for row in rows if row["code"] not in TRANSIENT_CODES]


def outputs(lake_uri: str) -> dict[str, str]:
    """SHA-256 of every file that a user gets, by its path in the lake."""
    store, root = Store(), Lake(lake_uri).derivatives(f"{MODEL}-v{VERSION}")
    return {
        item.uri.removeprefix(root): sha256_hex(store.read_bytes(item.uri))
        for item in store.list(root)
    }


def check_rows_name_what_is_there(lake_uri: str) -> None:
    """No row names an object that is missing or another one."""
    store = Store()
    for row in results(lake_uri):
        store.read_bytes(row["output_uri"], sha256=row["output_sha256"])
        store.read_bytes(row["model_grid_uri"], sha256=row["model_grid_sha256"])
        assert row["scan_id"] in store.read_bytes(row["sidecar_uri"]).decode()


def die_at(point: str) -> None:
    """End this process, as `kill -9` would, at `point` of its second scan."""
    when, what = point.split()
    endings = {"volume": "_desc-harmonized_T1w.nii.gz", "sidecar": "_desc-harmonized_T1w.json"}
    count = 0
    write, append = Store.write_bytes, Catalog.append

    def dying_write(self: Store, uri: str, data: bytes, **options: bool) -> str:
        nonlocal count
        mine = uri.endswith(endings.get(what, "\0")) and "space-" not in uri
        count += mine
        if mine and count == 2 and when == "before":
            os._exit(9)
        etag = write(self, uri, data, **options)
        if mine and count == 2:
            os._exit(9)
        return etag

    def dying_append(self: Catalog, table: str, *args: Any, **options: Any) -> bool:
        done = append(self, table, *args, **options)
        if what == "row" and table == "results":
            os._exit(9)
        return done

    Store.write_bytes, Catalog.append = dying_write, dying_append  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    die_at(sys.argv[3])
    try:
        run(sys.argv[1], sys.argv[2])
    except StorageError as error:
        sys.exit(error.exit_code)
