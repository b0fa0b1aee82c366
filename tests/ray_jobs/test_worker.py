"""A worker's loop beside a stage of one number: order, checkpoints, stops. Ray is stood in for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import train
from ray.train import torch as train_torch

from pipelines.lease import Hold
from ray_jobs.checkpoint import Checkpoints
from ray_jobs.watch import SECONDS, WAIT
from ray_jobs.worker import Worker
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import BusyError, ModelError
from sgcd_core.modelpack import ModelPack, has_modelpack

TOTAL = 10
META = {"name": "m", "version": 1, "kind": "global", "init": "box", "data_digest": "d"}


class Board:
    """Takes what rank 0 puts; asks to stop from step `stop_at` on."""

    def __init__(self, stop_at: int = TOTAL) -> None:
        self.steps: list[dict[str, float]] = []
        self.stop_at = stop_at
        self.put = SimpleNamespace(remote=self._put)

    def _put(self, items: list[dict[str, float]]) -> bool:
        self.steps += items
        return self.steps[-1]["step"] >= self.stop_at


class Stage:
    """Its loss depends on all volumes so far, so that a step left out or done twice shows."""

    def __init__(self) -> None:
        self.value = torch.zeros(1, dtype=torch.float64)

    def step(self, columns: dict[str, Any]) -> dict[str, float]:
        self.value = self.value * 0.9 + float(columns["volume"].sum())
        return {"loss": float(self.value)}

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Run:
    """One start of a worker, from whatever the folder holds."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, **more: Any) -> None:
        self.board = more.pop("board", Board())
        self.notices = more.pop("notices", [])
        self.order = more.pop("order", range(TOTAL))
        self.checkpoints = Checkpoints(str(folder))
        context = SimpleNamespace(get_world_rank=lambda: 0, get_local_world_size=lambda: 1)
        patch.setattr(ray, "get", lambda answer: answer)
        patch.setattr(train, "get_context", lambda: context)
        patch.setattr(train_torch, "get_device", lambda: "cpu")
        patch.setattr(train, "report", lambda metrics: None)
        patch.setattr(train, "get_dataset_shard", lambda name: self)
        patch.setattr(train, "get_preemption_info", self._notice)
        setup = {
            "config": SgcdConfig().model_dump(mode="json"), "lake": str(folder), "batch": 2,
            "folder": str(folder), "total": TOTAL, "notices": True, "board": self.board,
            "hold": Hold("model-m", str(folder / "leases"), 1), "meta": META,
        }  # fmt: skip
        self.worker, self.stage, self.done = Worker(setup), Stage(), 0

    def _notice(self) -> Any:
        told = self.done in self.notices
        return SimpleNamespace(preempted_node_ids=[str(self.done)]) if told else None

    def iter_batches(self, **_: Any) -> Any:
        for step in self.order:
            if step >= self.checkpoints.step():
                yield {"step": np.full(2, step), "volume": np.full(2, step + 0.1)}

    def go(self, every: int, until: int = TOTAL) -> None:
        start = self.worker.resume(self.stage.load)
        for step, columns in self.worker.steps(start):
            if step == until:
                return  # as if it were killed here
            self.done = step
            losses = self.stage.step(columns)
            self.worker.after_step(step, losses, self.stage.state_dict, every)

    @property
    def losses(self) -> list[float]:
        return [item["loss"] for item in self.board.steps]


@pytest.fixture
def unbroken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    run = Run(tmp_path / "unbroken", monkeypatch)
    run.go(every=3)
    return run


def test_a_worker_that_was_killed_goes_on_as_if_it_had_not(
    unbroken: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Run(tmp_path / "run", monkeypatch)
    first.go(every=3, until=8)
    first.worker._writer.wait()
    assert first.checkpoints.step() == 6
    again = Run(tmp_path / "run", monkeypatch)
    again.go(every=3)
    assert again.losses == unbroken.losses and len(again.losses) == TOTAL


def test_a_stop_keeps_the_state_of_the_step_and_saves_no_model(
    unbroken: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Run(tmp_path / "run", monkeypatch, board=Board(stop_at=4))
    first.go(every=100)
    assert first.worker.stopping and first.checkpoints.step() == 6
    first.worker.finish(lambda meta: pytest.fail("half a model was made"))
    again = Run(tmp_path / "run", monkeypatch)
    again.go(every=100)
    assert again.losses == unbroken.losses and not again.worker.stopping


def test_a_wish_to_stop_at_the_last_step_is_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, board=Board(stop_at=TOTAL - 2))
    run.go(every=100)
    assert len(run.losses) == TOTAL and not run.worker.stopping


def test_a_notice_keeps_the_state_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, notices=[3])
    run.go(every=100)
    assert run.checkpoints.step() == 4 and len(run.losses) == TOTAL


def test_volumes_of_another_step_are_never_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, order=[0, 1, 3, 2, *range(4, TOTAL)])
    with pytest.raises(RuntimeError, match=r"step 2 was given volumes of \[3\]"):
        run.go(every=3)
    assert len(run.losses) == 2


def test_every_step_but_the_first_is_timed(unbroken: Run) -> None:
    first, *others = unbroken.board.steps
    assert WAIT not in first
    assert all(0 <= item[WAIT] <= item[SECONDS] for item in others)


def test_a_loss_that_is_not_finite_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch)
    run.stage.value += float("nan")
    with pytest.raises(ModelError, match="TRAIN-DIVERGED"):
        run.go(every=3)


def pack(meta: dict[str, Any]) -> ModelPack:
    return ModelPack(config=SgcdConfig(), network={}, state={}, meta=meta)


def take_over(folder: Path) -> None:
    """Another holds the lease from now on."""
    (folder / "leases").mkdir()
    (folder / "leases" / "00000002.json").write_text("{}")


def test_a_training_that_lost_its_lease_keeps_no_state_and_saves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch)
    run.go(every=100)
    take_over(tmp_path)
    with pytest.raises(BusyError, match="LAKE-BUSY"):
        run.worker.finish(pack)
    with pytest.raises(BusyError, match="LAKE-BUSY"):
        Run(tmp_path, monkeypatch).go(every=3)
    assert run.checkpoints.step() == 0 and not (tmp_path / "models").exists()


def test_a_worker_that_was_lost_after_it_saved_the_model_saves_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch)
    run.go(every=3)
    run.worker.finish(pack)
    again = Run(tmp_path, monkeypatch)
    again.go(every=3)
    again.worker.finish(lambda meta: pytest.fail("the model was made again"))
    assert has_modelpack(str(tmp_path / "models/m/1"))
