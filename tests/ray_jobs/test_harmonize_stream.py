"""Windows of a stream: what a broken execution leaves over goes through another one, once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from pipelines.harmonize import Job
from pipelines.lake import Lake
from ray_jobs import harmonize_stream as module
from ray_jobs import windows
from ray_jobs.harmonize_stream import Pool, _beside, harmonize_stream
from ray_jobs.windows import FRUITLESS
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
        monkeypatch.setattr(windows, "WINDOW", 6)
        monkeypatch.setattr(windows, "WINDOW_PER_WORKER", 1)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def execution(self, ray: Any, job: Job, pool: Pool, scans: list[Any]) -> Iterator[Any]:
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


@pytest.mark.parametrize("fault", [AttributeError("core_worker"), TypeError()])
def test_a_fault_of_a_program_is_no_lost_node(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(monkeypatch, (2, fault))
    with pytest.raises(type(fault)):
        cluster.run()
    assert len(cluster.asked) == 1


def test_a_second_row_for_a_scan_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    monkeypatch.setattr(
        module, "_execution", lambda _ray, _job, _pool, scans: iter([scans[0], scans[0]])
    )
    with pytest.raises(KeyError):
        cluster.run()


class Nodes:
    """Stands for Ray: a cluster of these nodes."""

    def __init__(self, *nodes: dict[str, float]) -> None:
        self._nodes = nodes

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self._nodes]

    def cluster_resources(self) -> dict[str, float]:
        names = {name for node in self._nodes for name in node}
        return {name: sum(node.get(name, 0.0) for node in self._nodes) for name in names}


def test_parts_of_gpus_make_room_for_more_actors() -> None:
    gpus = Nodes({"CPU": 16.0, "GPU": 2.0})
    assert Pool(None, 1.0, {}).size(gpus) == 2
    assert Pool(None, 0.25, {}).size(gpus) == 8
    assert Pool(3, 0.25, {}).size(gpus) == 3
    assert Pool(None, 0, {}).size(gpus) == 15


def test_a_cluster_that_grows_is_asked_for_all_it_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Nodes({"CPU": 0.0})
    assert Pool(None, 1.0, {}).size(head) == 1, "nobody said that it grows"
    most = '[{"nodes": 16, "CPU": 8, "GPU": 1}, {"nodes": 2, "CPU": 32}]'
    monkeypatch.setenv("SGCD_CLUSTER_MAX", most)
    assert Pool(None, 1.0, {}).size(head) == 16
    assert Pool(None, 0.5, {}).size(head) == 32
    assert Pool(None, 0, {}).size(head) == 2 * 32 - 1, "no GPU is started for its CPUs"
    assert Pool(3, 1.0, {}).size(head) == 3, "the user's own number counts"
    assert windows.room(head, "CPU") == 64


def test_an_actor_knows_how_many_share_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    head, node = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}
    assert _beside(Nodes({"CPU": 2.0}), 1, 0) == 1
    assert _beside(Nodes(node, node), 16, 0) == 8
    assert _beside(Nodes(node, node), 3, 0) == 2
    assert _beside(Nodes(head, *[node] * 16), 32, 1.0) == 2, "the head has no GPU"
    assert _beside(Nodes(head, *[node] * 16), 64, 0.5) == 4
    assert _beside(Nodes({"CPU": 0.0}), 1, 1.0) == 1, "no node is there yet"
    monkeypatch.setenv("SGCD_CLUSTER_MAX", '[{"nodes": 16, "CPU": 8, "GPU": 2}]')
    assert _beside(Nodes({"CPU": 0.0}), 32, 1.0) == 2
    monkeypatch.setenv("SGCD_CLUSTER_MAX", '[{"nodes": 8, "CPU": 8}, {"nodes": 16, "GPU": 1}]')
    assert _beside(Nodes({"CPU": 0.0}), 8, 0) == 8, "all may be put on the first node that comes"
