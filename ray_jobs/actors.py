"""The actor that harmonizes: it loads the model once and keeps it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipelines.harmonize import Job
from ray_jobs.session import threads_per_worker
from ray_jobs.volume_stream import packed, unpacked


class HarmonizeActor:
    """Scan in, results row out.

    Args:
        job: What is the same for every scan.
        workers: Actors that share a machine at most, for the number of threads.
        gpus: Run the network on this actor's GPU.
    """

    def __init__(self, job: Job, workers: int, gpus: bool) -> None:
        import torch

        from sgcd_core.harmonizer import Harmonizer
        from sgcd_core.io.store import Store
        from sgcd_core.modelpack import load_modelpack

        torch.set_num_threads(threads_per_worker(workers))
        pack = load_modelpack(job.lake.model(job.model, job.version), Store())
        self._job = job
        # The user's settings of the sampler, laid over the model's own.
        pack = replace(pack, config=job.config)
        self._harmonizer = Harmonizer(pack, device="cuda" if gpus else "cpu")

    def __call__(self, item: dict[str, Any]) -> dict[str, bytes]:
        """Harmonize the one scan of `item`."""
        from pipelines.harmonize import harmonize_scan

        scan = unpacked(item)
        return packed(harmonize_scan(scan, self._job, self._harmonizer, scan["stem"]))
