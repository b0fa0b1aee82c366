"""When a training is tried again and when given up, and what each rank is given. No Ray runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipelines.lake import Lake
from pipelines.lease import Hold
from ray_jobs import loop, watch
from ray_jobs.checkpoint import Checkpoints
from ray_jobs.watch import Board
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import (
    BusyError,
    ConfigError,
    InputError,
    ModelError,
    SgcdError,
    StorageError,
)

TOTAL = 6
SCHEDULE = [{"step": n // 4, "scans": {"scan": (f"scan{n}", 0, n, "A")}} for n in range(4 * TOTAL)]


class Watch:
    """Stands for the real one: no actor, no losses."""

    noted: SgcdError | None = None

    def __init__(self, label: str, total: int, start: int) -> None:
        self.board, self.history = None, [{"step": float(start)}]

    def error(self) -> SgcdError | None:
        return self.noted

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Fit:
    """`loop.fit` whose runs of Ray Train end as told."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.checkpoints = Checkpoints(str(folder))
        self.hold = Hold("model-global", str(folder / "leases"), 1)
        self.runs: list[tuple[int, Exception | None]] = []
        self.left: list[tuple[int, Exception | None]] = []
        patch.setattr(loop, "Watch", Watch)
        patch.setattr(loop, "_run", self._run)

    def _run(self, *_: Any) -> Exception | None:
        """Save a checkpoint at the next step told, end with the error told."""
        step, error = self.left.pop(0)
        self.runs.append((step, error))
        if step > self.checkpoints.step():
            self.checkpoints.save(step, {"done": step})
        return error

    def go(self, *ends: tuple[int, Exception | None], workers: int = 2) -> list[dict[str, float]]:
        self.left = list(ends)
        return loop.fit(
            ray, lambda setup: None, SCHEDULE, Lake("lake"), SgcdConfig(), self.checkpoints,
            looks={}, label="train", total=TOTAL, workers=workers, gpus=False,
            hold=self.hold, extra={},
        )  # fmt: skip


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    return Fit(tmp_path, monkeypatch)


def test_lost_workers_are_replaced_as_long_as_training_gets_further(fit: Fit) -> None:
    lost = RuntimeError("the worker died")
    fit.go((2, lost), (4, lost), (4, None))
    assert [step for step, _ in fit.runs] == [2, 4, 4]


def test_a_training_that_gets_no_further_is_given_up(fit: Fit) -> None:
    lost = RuntimeError("the worker died")
    with pytest.raises(RuntimeError, match="the worker died"):
        fit.go((2, lost), (2, lost), (4, None))
    assert len(fit.runs) == 2


def test_an_error_that_no_try_can_mend_ends_it_with_its_cause(fit: Fit) -> None:
    error = RuntimeError("wrapped by Ray")
    error.__cause__ = ModelError("the loss is nan.", code="TRAIN-DIVERGED")
    with pytest.raises(ModelError, match="TRAIN-DIVERGED"):
        fit.go((2, error), (4, None))


def test_the_cause_is_known_though_ray_lost_it(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "noted", InputError("is damaged.", code="SCAN-CORRUPT"))
    with pytest.raises(InputError, match="SCAN-CORRUPT"):
        fit.go((2, RuntimeError("wrapped by Ray")), (4, None))


def test_a_store_that_was_away_is_tried_again(fit: Fit) -> None:
    fit.go((2, StorageError("does not answer.")), (2, None))
    assert len(fit.runs) == 2


def test_a_training_whose_lease_is_lost_is_not_started(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "00000002.json").write_text("{}")
    with pytest.raises(BusyError, match="LAKE-BUSY"):
        fit.go((6, None))
    assert fit.runs == []


def test_a_batch_that_workers_cannot_share_alike_is_refused(fit: Fit) -> None:
    with pytest.raises(ConfigError, match="3 workers"):
        fit.go(workers=3)


def test_ranks_share_every_step_and_begin_at_the_newest_checkpoint(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "training_stream", lambda ray, rows, *more: rows)
    monkeypatch.setattr(loop, "data_settings", lambda ray: None)

    def share(rank: int, workers: int) -> list[Any]:
        return loop.share_of(
            ray, SCHEDULE, rank, workers, 4, "lake", SgcdConfig(), {}, fit.checkpoints
        )

    assert share(0, 1) == SCHEDULE
    fit.checkpoints.save(3, {})
    one, two = share(0, 2), share(1, 2)
    assert [row["step"] for row in one] == [3, 3, 4, 4, 5, 5]
    seen = {row["scans"]["scan"][0] for row in one + two}
    assert seen == {row["scans"]["scan"][0] for row in SCHEDULE if row["step"] >= 3}


def test_a_worker_is_not_started_again_after_an_error_it_cannot_mend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes: list[SgcdError | None] = []
    board = SimpleNamespace(
        begin=SimpleNamespace(remote=lambda: notes[-1] if notes else None),
        fail=SimpleNamespace(remote=notes.append),
    )
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    starts: list[str] = []

    def diverges(setup: dict[str, Any]) -> None:
        starts.append("once")
        raise ModelError("the loss is nan.", code="TRAIN-DIVERGED")

    for _ in range(2):
        with pytest.raises(ModelError, match="TRAIN-DIVERGED"):
            loop._guarded(diverges, {"board": board})
    assert starts == ["once"]
    notes[:] = [StorageError("does not answer.")]
    loop._guarded(lambda setup: starts.append("again"), {"board": board})
    assert starts == ["once", "again"]


class Waits:
    """A `Watch` of workers that are there at the first questions, for each an answer."""

    def __init__(self, *there: bool) -> None:
        self.there, self.asked = list(there), threading.Event()

    def stop(self) -> bool:
        self.asked.set()
        return self.attended()

    def attended(self) -> bool:
        return self.there.pop(0) if len(self.there) > 1 else self.there[0]


@pytest.mark.parametrize("there", [(False,), (True,), (True, True, False)], ids=str)
def test_a_stop_waits_for_workers_that_are_there_and_for_no_node(
    there: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a training waits for a node that may never come, the first or a new, ends it."""
    monkeypatch.setattr(loop, "PULSE", 0.05)
    workers, ends = Waits(*there), threading.Event()

    def fit() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        if there[-1]:  # its workers keep their state and end
            workers.asked.wait(30)
        else:  # no worker: nothing ends it
            ends.wait(30)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        loop._fit_beside(SimpleNamespace(fit=fit), workers)
    assert workers.asked.is_set() and time.monotonic() - started < 20
    ends.set()


def test_the_board_knows_whether_a_worker_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    board, now = Board(), 100.0
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now))
    assert not board.stop() and not board.attended()
    assert board.begin() is None and board.attended() and board.stop() and board.put([])
    now += watch.SILENCE - 1
    board.pulse()
    now += watch.SILENCE - 1
    assert board.attended()
    now += 2
    assert not board.attended()


def test_a_worker_tells_that_it_is_there_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PULSE", 0.01)
    told = threading.Event()
    board = SimpleNamespace(pulse=SimpleNamespace(remote=told.set))
    with pytest.raises(RuntimeError), watch.seen_on(board):
        assert told.wait(30)
        raise RuntimeError("the body's own")
    thread = next((t for t in threading.enumerate() if t.name == "pulse"), None)
    if thread is not None:
        thread.join(30)
        assert not thread.is_alive()
