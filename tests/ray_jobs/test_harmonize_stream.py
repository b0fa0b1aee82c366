"""Windows of a stream: what a broken execution leaves over goes through another one, once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from pipelines.harmonize import Job
from pipelines.lake import Lake
from ray_jobs import harmonize_stream as module
from ray_jobs.harmonize_stream import FRUITLESS, Pool, harmonize_stream
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import ModelError, StorageError

JOB = Job(Lake("/nowhere"), "m", 1, None, SgcdConfig(), "t", "b")
WORK = pa.table({"scan_id": [f"{n:02d}" for n in range(10)]})


class Cluster:
    """Stands for Ray: one worker's place, and executions that end as told."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *ends: tuple[int, Exception | None]
    ) -> None:
        self.ends = list(ends)
        self.asked: list[list[str]] = []
        monkeypatch.setattr(module, "_execution", self.execution)
        monkeypatch.setattr(module, "WINDOW", 6)
        monkeypatch.setattr(module, "WINDOW_PER_ACTOR", 1)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def execution(self, ray: Any, scans: list[Any], job: Job, pool: Pool) -> Iterator[Any]:
        self.asked.append([scan["scan_id"] for scan in scans])
        count, error = self.ends.pop(0) if self.ends else (len(scans), None)
        yield from scans[:count]
        if error is not None:
            raise error

    def run(self) -> list[str]:
        stream = harmonize_stream(self, WORK, JOB, Pool(None, 0, {}))
        return [row["scan_id"] for _, row in stream]


def test_every_scan_comes_once_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    assert cluster.run() == WORK["scan_id"].to_pylist()
    assert [len(scans) for scans in cluster.asked] == [6, 4]


def test_what_a_broken_execution_left_goes_through_another(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, (2, RuntimeError("node lost")), (0, OSError()), (1, OSError()))
    assert cluster.run() == WORK["scan_id"].to_pylist()
    assert [len(scans) for scans in cluster.asked] == [6, 4, 4, 3, 4]


def test_an_execution_that_ends_early_without_a_word_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(monkeypatch, (5, None))
    assert cluster.run() == WORK["scan_id"].to_pylist()


def test_executions_that_bring_nothing_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, *[(0, RuntimeError("no place"))] * FRUITLESS)
    with pytest.raises(StorageError) as caught:
        cluster.run()
    assert caught.value.code == "CLUSTER"
    assert len(cluster.asked) == FRUITLESS


def test_a_model_that_cannot_be_loaded_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, (0, ModelError("damaged", code="MODEL-DIGEST")))
    with pytest.raises(ModelError):
        cluster.run()
    assert len(cluster.asked) == 1


def test_a_second_row_for_a_scan_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    monkeypatch.setattr(module, "_execution", lambda _ray, scans, *_: iter([scans[0], scans[0]]))
    with pytest.raises(KeyError):
        cluster.run()


def test_parts_of_gpus_make_room_for_more_actors() -> None:
    class Gpus:
        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 16.0, "GPU": 2.0}

    assert Pool(None, 1.0, {}).size(Gpus()) == 2
    assert Pool(None, 0.25, {}).size(Gpus()) == 8
    assert Pool(3, 0.25, {}).size(Gpus()) == 3
    assert Pool(None, 0, {}).size(Gpus()) == 15
