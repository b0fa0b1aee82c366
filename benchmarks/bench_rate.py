"""Storage → harmonize → storage through Ray Data, beside the bare model on arrays in memory.

Real-size scans (182×218×182 voxels of 1 mm, prepared) go through what `sgcd harmonize` runs: read,
model, guard, transport to the native grid, compression, writing, rows, commits. The peer is
`Harmonizer.harmonize` on the same prepared arrays, in this process, with the same number of
threads, half of it before and half after, so that what else the machine does hits both.

    python benchmarks/bench_rate.py [--scans 40] [--preset small] [--threads 1] [--lake URI]

With one thread the model stands for a device of its own, and the other cores do what a GPU
machine's CPU does. Nothing is asserted about time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipelines.catalog import Catalog
from pipelines.derivative import stems
from pipelines.harmonize import Job
from pipelines.lake import Lake
from pipelines.prepare import load_prepared, save_prepared
from ray_jobs.actors import HarmonizeActor
from ray_jobs.commit import Committer
from ray_jobs.harmonize import WORK
from ray_jobs.harmonize_stream import Pool, harmonize_stream
from ray_jobs.session import session
from sgcd_core.config import SgcdConfig, load_config
from sgcd_core.global_stage import GlobalStage
from sgcd_core.harmonizer import Harmonizer
from sgcd_core.io.nifti import decode_nifti, encode_nifti
from sgcd_core.io.store import Store, join, sha256_hex
from sgcd_core.modelpack import save_modelpack
from sgcd_core.style.look import LOOK_SIZE, measure_look
from sgcd_core.style.outlier import OutlierModel, style_features
from sgcd_core.volume.condition import Goals
from sgcd_core.volume.geometry import Geometry, rows
from sgcd_core.volume.prepare import Prepared
from sgcd_core.volume.transport import native_on_model_grid

NATIVE = (182, 218, 182)


def actor_with(threads: int) -> type[HarmonizeActor]:
    """The actor with a given number of threads for the model."""

    class FixedThreads(HarmonizeActor):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            torch.set_num_threads(threads)

    return FixedThreads


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=int, default=40)
    parser.add_argument("--preset", default="small", choices=("tiny", "small"))
    parser.add_argument("--threads", type=int, default=1, help="of the model, both sides")
    parser.add_argument("--lake", help="an empty folder or s3:// prefix (default: temporary)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lake = Lake.open(args.lake or folder, create=True)
        config = load_config(args.preset)
        table = build(lake, config, args.scans)
        measure(lake, config, table, args.threads)


def build(lake: Lake, config: SgcdConfig, count: int) -> list[dict[str, Any]]:
    """Scans, prepared volumes and a tuned model, fresh weights: time does not depend on them."""
    voxel, mm = np.diag([1.0, 1.0, 1.0, 1.0]), config.prepare.mm
    voxel[:3, 3] = -(np.array(NATIVE) - 1) / 2
    model = np.diag([mm, mm, mm, 1.0])
    model[:3, 3] = -mm * (np.array(config.prepare.shape) - 1) / 2
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in NATIVE], indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    mask = radius < 0.8
    tissue = np.select([radius < 0.35, radius < 0.6], [0.85, 0.5], 0.25)
    geometry = Geometry(
        NATIVE, rows(voxel), ((0, 1), (1, 1), (2, 1)), rows(model), config.prepare.shape,
        rows(np.eye(4)), 0.0, 700.0, 1200.0,
    )  # fmt: skip
    store, table = Store(), []
    for number in range(count):
        noise = np.random.default_rng(number).standard_normal(NATIVE, dtype=np.float32)
        volume = np.where(mask, np.clip(tissue + 0.05 * noise, 0.01, 1) * 700, 0)
        data = encode_nifti(volume.astype(np.float32), voxel)
        scan = decode_nifti(data, where="memory", max_inflated=10**9)
        scan_id, uri = sha256_hex(data)[:32], join(lake.uri, f"raw/sub-{number:03d}_T1w.nii.gz")
        store.write_bytes(uri, data)
        image, model_mask = native_on_model_grid(scan, mask, geometry)
        image = image.clip(0, 1).astype(np.float32)
        folder = lake.prepared(config.prepare.digest(), scan_id)
        save_prepared(folder, scan, Prepared(image, model_mask, mask, geometry), store)
        table.append({
            "scan_id": scan_id, "dataset": "bench", "subject": f"{number:03d}", "session": None,
            "site": "A", "sequence": "T1w", "split": "train", "uri": uri, "status": "ok",
        })  # fmt: skip
    Catalog(lake).append("scans", table)
    look = torch.from_numpy(measure_look(image, model_mask, mm, "T1w").vector())
    outliers = OutlierModel.fit([style_features(image, model_mask)], [0])
    looks = look.expand(len(config.sequences), LOOK_SIZE).clone()
    pack = GlobalStage(config, 1).pack(outliers, Goals(looks), {"kind": "target", "target": "A"})
    save_modelpack(lake.model("m", 1), replace(pack, global_network=pack.network))
    return table


def measure(lake: Lake, config: SgcdConfig, table: list[dict[str, Any]], threads: int) -> None:
    """Print both rates and their ratio."""
    from sgcd_core.modelpack import load_modelpack

    torch.set_num_threads(threads)
    bare = Harmonizer(load_modelpack(lake.model("m", 1)))
    recipe = config.prepare.digest()
    arrays = [load_prepared(lake, recipe, row["scan_id"]) for row in table]

    def run(some: slice) -> list[float]:
        out = []
        for row, files in zip(table[some], arrays[some], strict=True):
            started = time.perf_counter()
            bare.harmonize(files.image, files.mask, "T1w", row["scan_id"])
            out.append(time.perf_counter() - started)
        return out

    run(slice(0, 1))  # warm-up
    half = len(table) // 2
    alone = run(slice(0, half))
    catalog = Catalog(lake)
    scans = catalog.rows("scans")
    named = dict(
        zip(*[stems(scans)[name].to_pylist() for name in ("scan_id", "stem")], strict=True)
    )
    work = scans.select(WORK)
    work = work.append_column("stem", [[named[key] for key in work["scan_id"].to_pylist()]])
    job = Job(lake, "m", 1, "A", config, "bench", "bench")
    pool = Pool(1, 0, {}, actor_with(threads))
    moments, found = [], []
    with session() as ray, Committer(catalog, job) as commit:
        started = time.perf_counter()
        for _, row in harmonize_stream(ray, work, job, pool):
            moments.append(time.perf_counter())
            commit.add(row)
            found.append(row)
    alone += run(slice(half, len(table)))
    assert all(row["output_uri"] for row in found), [row["message"] for row in found]
    assert len(found) == len(table)
    steady = (moments[-1] - moments[0]) / (len(moments) - 1)
    model = statistics.mean(alone)
    where = f"preset {config.preset}, {len(table)} scans, model on {threads} thread(s)"
    print(f"{where}, torch {torch.__version__}")
    print(f"  bare model on arrays in memory   {model:7.2f} s a scan")
    print(f"  storage → harmonize → storage    {steady:7.2f} s a scan, ratio {model / steady:.2f}")
    print(f"  first scan out after             {moments[0] - started:7.2f} s")
    parts = {name: statistics.mean(row[f"seconds_{name}"] for row in found)
             for name in ("read", "model", "write")}  # fmt: skip
    told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
    print(f"  of a scan in the stream          {told}")


if __name__ == "__main__":
    main()
