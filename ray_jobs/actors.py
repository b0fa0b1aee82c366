"""The actor that harmonizes: it loads the model once, keeps it, and holds several scans at a time.

While the model works on one scan another is read and a third written, each in a thread of its own;
volumes never leave the actor.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines.harmonize import Job, Model
from pipelines.ledger import note_late
from pipelines.turns import Turns
from ray_jobs.session import threads_per_worker
from ray_jobs.volume_stream import packed, unpacked
from ray_jobs.windows import end_late

if TYPE_CHECKING:
    from sgcd_core.harmonizer import Harmonized, Harmonizer
    from sgcd_core.modelpack import ModelPack
    from sgcd_core.style.look import SiteLook

log = logging.getLogger(__name__)

#: What the work on a scan imports: loaded at the start, so that no scan's clock pays for it.
WARM = ("pipelines.lesions", "pipelines.prepare", "sgcd_core.volume.guard",
        "sgcd_core.volume.transport")  # fmt: skip
#: Seconds to wait before each further try when the device has too little memory: whoever shares it
#: may be through with its own scan by then.
MEMORY_WAITS = (0.0, 2.0, 8.0)


class HarmonizeActor:
    """Scan in, results row out; called from several threads.

    Args:
        job: What is the same for every scan.
        looks: The looks of the sites by site and sequence.
        workers: Actors that share a machine at most, for the number of threads.
        gpus: Part of a GPU this actor has; 0: none.
    """

    def __init__(
        self, job: Job, looks: Mapping[tuple[str, str], SiteLook], workers: int, gpus: float
    ) -> None:
        import torch

        for name in WARM:
            importlib.import_module(name)
        torch.set_num_threads(threads_per_worker(workers))
        self._job, self._looks = job, looks
        self._turns = Turns(job.deadline, self._end_late)
        self._model = self.load_model(gpus)

    def load_model(self, gpus: float) -> Model:
        """The model of the job, on this actor's part of a GPU or on the CPU."""
        import torch

        from sgcd_core.io.store import Store
        from sgcd_core.modelpack import load_modelpack

        if 0 < gpus < 1:  # a share that is outgrown must fail here, not in the neighbour
            torch.cuda.set_per_process_memory_fraction(gpus)
        job = self._job
        pack = load_modelpack(job.lake.model(job.model, job.version), Store())
        # The user's settings of the sampler, laid over the model's own.
        pack = replace(pack, config=job.config)
        return SharedModel(pack, "cuda" if gpus else "cpu", self._turns)

    def __call__(self, item: dict[str, Any]) -> dict[str, bytes]:
        """The row of the one scan of `item`, with its `tries`."""
        from pipelines.harmonize import harmonize_scan

        scan = unpacked(item)
        if look := self._looks.get((scan["site"], scan["sequence"])):
            scan |= {"site_look": look.mean, "site_subjects": look.subjects}
        tries: list[dict[str, Any]] = []
        row = harmonize_scan(scan, self._job, self._model, scan["stem"], self._turns, tries)
        return packed(row | {"tries": tries})

    def _end_late(self, scan_ids: list[str]) -> None:
        """End this process for scans that hang."""
        job = self._job
        note = partial(note_late, job.lake, job.key, seconds=job.deadline)
        end_late(note, job.deadline, scan_ids)


class SharedModel:
    """A `Harmonizer` for the threads of one process: one scan at a time on the device.

    A pass holds one volume, so that the voxels of a scan depend on no other. When the device has
    too little memory for it, what is cached is given back and the pass tried again, and at last
    made on the CPU.

    Args:
        pack: The model.
        device: Where it runs.
        turns: Gives the model to one thread at a time.
    """

    def __init__(self, pack: ModelPack, device: str, turns: Turns) -> None:
        self._pack, self._device, self._turns = pack, device, turns
        self._on_device = self._load(device)
        self._on_cpu: Harmonizer | None = None

    def harmonize(self, image: Any, mask: Any, **options: Any) -> Harmonized:
        """`Harmonizer.harmonize`."""
        import torch

        with self._turns.model():
            for wait in MEMORY_WAITS:
                try:
                    return self._on_device.harmonize(image, mask, **options)
                except torch.OutOfMemoryError:
                    pass  # out here its traceback no longer holds the tensors
                log.warning("event=out_of_memory device=%s wait=%g", self._device, wait)
                torch.cuda.empty_cache()
                time.sleep(wait)
            log.warning("event=out_of_memory device=%s action=cpu", self._device)
            if self._on_cpu is None:
                self._on_cpu = self._load("cpu")
            return self._on_cpu.harmonize(image, mask, **options)

    def outlier_score(self, image: Any, mask: Any, sequence: str) -> float:
        """`Harmonizer.outlier_score`; needs no device."""
        return self._on_device.outlier_score(image, mask, sequence)

    def _load(self, device: str) -> Harmonizer:
        from sgcd_core.harmonizer import Harmonizer

        return Harmonizer(self._pack, device=device)
