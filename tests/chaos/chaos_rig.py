"""What the chaos tests share: a small lake, an actor with faults, a driver that can be killed.

The faults live here alone. `ChaosActor` is the real actor around a model that notes every scan it
computes and then does what `chaos.json` in the lake says: kill the process, hang, raise, be slow.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.prepare import save_prepared
from pipelines.turns import Turns
from ray_jobs import cli
from ray_jobs import commit as commit_module
from ray_jobs import harmonize as harmonize_module
from ray_jobs.actors import HarmonizeActor
from ray_jobs.harmonize_stream import Pool
from sgcd_core.config import load_config
from sgcd_core.diffusion.sampler import noise_for
from sgcd_core.harmonizer import Harmonized
from sgcd_core.io.nifti import encode_nifti, read_nifti
from sgcd_core.io.store import Store, sha256_hex
from sgcd_core.modelpack import ModelPack, save_modelpack
from sgcd_core.volume.geometry import Geometry, rows
from sgcd_core.volume.prepare import Prepared
from sgcd_core.volume.transport import native_on_model_grid

NATIVE, MODEL = (24, 28, 24), (16, 16, 16)
CONFIG = load_config(
    "tiny", settings=["prepare.shape=[16, 16, 16]", "prepare.mm=8", "condition.match=none"]
)
#: Rows per commit of a run that is to be killed between commits.
COMMIT_ROWS = 7


def build_lake(root: str, scans: int) -> Lake:
    """A lake with prepared scans of one site and a model; what is in them is drawn from seeds.

    It is made in `root`, a folder or an S3 prefix, and the scans beside it.
    """
    lake, store = Lake.open(f"{root}/lake", create=True), Store()
    affine, model = np.diag([6.0, 6.0, 6.0, 1.0]), np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = -6.0 * (np.array(NATIVE) - 1) / 2
    model[:3, 3] = -8.0 * (np.array(MODEL) - 1) / 2
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in NATIVE], indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    mask = radius < 0.8
    geometry = Geometry(
        NATIVE, rows(affine), ((0, 1), (1, 1), (2, 1)), rows(model), MODEL, rows(np.eye(4)),
        0.0, 700.0, 1200.0,
    )  # fmt: skip
    table = []
    for number in range(scans):
        rng = np.random.default_rng(number)
        tissue = np.select([radius < 0.35, radius < 0.6], [0.85, 0.5], 0.25)
        tissue = tissue + 0.05 * rng.standard_normal(NATIVE)
        volume = np.where(mask, np.clip(tissue, 0.01, 1) * 700, 0).astype(np.float32)
        data = encode_nifti(volume, affine)
        uri = f"{root}/bids/sub-{number:03d}/anat/sub-{number:03d}_T1w.nii.gz"
        store.write_bytes(uri, data)
        scan, scan_id = read_nifti(uri), sha256_hex(data)[:32]
        image, model_mask = native_on_model_grid(scan, mask, geometry)
        prepared = Prepared(image.clip(0, 1), model_mask, mask, geometry)
        save_prepared(lake.prepared(CONFIG.prepare.digest(), scan_id), scan, prepared, store)
        table.append({
            "scan_id": scan_id, "dataset": "bids", "subject": f"{number:03d}", "session": None,
            "site": "A", "sequence": "T1w", "split": "train", "uri": uri, "status": "ok",
        })  # fmt: skip
    Catalog(lake).append("scans", table)
    pack = ModelPack(CONFIG, {"none": torch.zeros(1)}, {}, meta={"kind": "global"})
    save_modelpack(lake.model("global", 1), pack)
    return lake


class ToyModel:
    """A model whose output depends on the scan and its seeded noise, and that loads in no time."""

    def __init__(self, turns: Turns, seconds: float) -> None:
        self._turns, self._seconds = turns, seconds

    def harmonize(self, image: Any, mask: Any, *, scan_id: str, seed: int, **_: Any) -> Harmonized:
        with self._turns.model():
            time.sleep(self._seconds)
            noise = noise_for(scan_id, seed, 0, image.shape).numpy()
            out = np.where(mask, np.clip(0.9 * image + 0.02 * noise, 0, 1), 0)
            return Harmonized(out.astype(np.float32), None, 0.0)

    def outlier_score(self, *_: Any) -> float:
        return 1.0


class ChaosModel:
    """A model that notes what it computes, with the faults that chaos.json names."""

    def __init__(self, model: Any, lake: Path, faults: dict[str, Any]) -> None:
        self._model, self._lake, self._faults = model, lake, faults
        self._calls: Counter[str] = Counter()

    def harmonize(self, image: Any, mask: Any, **options: Any) -> Any:
        scan_id, faults = options["scan_id"], self._faults
        if scan_id in faults.get("kill", ()):
            os.kill(os.getpid(), signal.SIGKILL)
        if scan_id in faults.get("hang", ()):
            time.sleep(10_000)
        self._calls[scan_id] += 1
        chance = random.Random(f"{scan_id} {self._calls[scan_id]}").random()
        if chance < faults.get("raise", 0.0):
            note(self._lake, "raised", scan_id)
            raise RuntimeError("chaos")
        result = self._model.harmonize(image, mask, **options)
        note(self._lake, "computed", scan_id)
        note(self._lake, "workers", str(os.getpid()))
        return result

    def outlier_score(self, *args: Any) -> float:
        score: float = self._model.outlier_score(*args)
        return score


class ChaosActor(HarmonizeActor):
    """The real actor around a model with faults; it notes its loads and how many scans it holds."""

    def __call__(self, item: dict[str, Any]) -> dict[str, bytes]:
        with self._turn:
            self._held += 1
            note(self._notes, "held", str(self._held))
        try:
            return super().__call__(item)
        finally:
            with self._turn:
                self._held -= 1

    def load_model(self, gpus: float) -> Any:
        self._turn, self._held = threading.Lock(), 0
        # An S3 lake is no folder for notes.
        lake = self._notes = Path(os.environ.get("SGCD_CHAOS", self._job.lake.uri))
        note(lake, "loaded", str(os.getpid()))
        faults = read_faults(lake)
        return ChaosModel(ToyModel(self._turns, faults.get("slow", 0.0)), lake, faults)


def note(lake: Path, what: str, word: str) -> None:
    """One short line, appended in one step, so that it outlives its process."""
    with open(lake / f"{what}.log", "ab", buffering=0) as file:
        file.write(f"{word}\n".encode())


def noted(lake: Path, what: str) -> Counter[str]:
    """How often each word was noted."""
    file = lake / f"{what}.log"
    return Counter(file.read_text().split()) if file.exists() else Counter()


def set_faults(lake: Path, **faults: Any) -> None:
    (lake / "chaos.json").write_text(json.dumps(faults))


def read_faults(lake: Path) -> dict[str, Any]:
    file = lake / "chaos.json"
    faults: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return faults


def outputs(lake: Path) -> dict[str, str]:
    """Path below the lake → digest, of every subject's volumes and sidecars.

    What a writer killed in the middle of a write left (`Store.remove_leftovers`) is none.
    """
    store = Store()
    files = [i.uri for d in (lake / "derivatives").glob("*/sub-*") for i in store.list(str(d))]
    return {str(Path(f).relative_to(lake)): sha256_hex(store.read_bytes(f)) for f in files}


def harmonize(lake: Path | str, *words: str) -> int:
    """`sgcd harmonize` with the actor of this module."""
    usual = harmonize_module.Pool
    harmonize_module.Pool = functools.partial(Pool, actor=ChaosActor)  # type: ignore[misc,assignment]
    try:
        return cli.main(["harmonize", "--lake", str(lake), "--model", "global", *words])
    finally:
        harmonize_module.Pool = usual  # type: ignore[misc]


def main(words: Sequence[str]) -> int:
    """A driver in a process of its own: LAKE and words of `sgcd harmonize`."""
    commit_module.COMMIT_ROWS = COMMIT_ROWS
    return harmonize(Path(words[0]), *words[1:])


if __name__ == "__main__":
    import chaos_rig  # under its own name, so that workers can import the actor

    sys.exit(chaos_rig.main(sys.argv[1:]))
