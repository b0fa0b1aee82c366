"""Both stages on Ray Train: broken off in every way and gone on with, by one worker and by two.

What is compared is what a user sees in MLflow: the loss of every step of the whole training.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_lake import CURVES, add_scan, brain
from processes import started

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from ray_jobs import cli, session, train_global, tune_target, watch
from ray_jobs.checkpoint import Checkpoints
from sgcd_core.config import load_config

pytestmark = [pytest.mark.slow, pytest.mark.ray]

STEPS = 30
SETTINGS = [
    "prepare.shape=[24,24,24]", "prepare.mm=8", "prepare.bias_correction=none",
    "prepare.registration=none", "network.channels=[8,16]", "network.attention_levels=[false,true]",
    "network.head_channels=8", "condition.match=histogram",
    f"global_stage.steps={STEPS}",
    "global_stage.precision=fp32", "target_stage.precision=fp32", "target_stage.steps=4",
    "global_stage.learning_rate=1e-4",  # differences of rounding grow with it, step by step
    "target_stage.batch_size=2", "target_stage.style_every=2", "target_stage.encoder=statistics",
]  # fmt: skip
SET = [word for setting in SETTINGS for word in ("--set", setting)]
SHARED = ("loss", "noise", "gradient", "record")


class Place:
    """A lake with prepared scans of two sites, and the commands on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lake = folder, Lake(str(folder))

    def train(self, *words: str, every: int = 2) -> int:
        return cli.main(self.words(*words, every=every))

    def words(self, *words: str, every: int = 2) -> list[str]:
        saving = ["--set", f"global_stage.checkpoint_every={every}"]
        return ["train", "--lake", str(self.folder), *SET, *saving, *words]

    def tune(self, *words: str) -> int:
        return cli.main(["tune", "--lake", str(self.folder), "--target", "T", *words])

    @property
    def checkpoints(self) -> Checkpoints:
        (folder,) = (self.folder / "scratch").glob("train-*")
        return Checkpoints(str(folder))

    def curve(self, command: str = "train") -> dict[str, list[float]]:
        """Every metric of the run that finished, in order of the steps."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
        (run,) = (
            r for r in runs
            if r.data.tags["command"] == command and r.info.status == "FINISHED"
        )  # fmt: skip
        found = {}
        for name in run.data.metrics:
            points = client.get_metric_history(run.info.run_id, name)
            found[name] = [m.value for m in sorted(points, key=lambda m: m.step)]
        return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "lake"
    lake, config = Lake.open(str(folder), create=True), load_config(settings=SETTINGS)
    rows = []
    for number in range(6):
        site = "TA"[number % 2]
        for sequence in ("T1w", "T2w"):
            image, mask = brain(number, sequence, (24, 24, 24))
            look = (CURVES[site](image) * mask).astype("float32")
            row = add_scan(
                lake, config, look, mask,
                subject=f"s{number}", site=site, sequence=sequence, split="train",
            )  # fmt: skip
            rows.append(row)
    Catalog(lake).append("scans", rows)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One Ray for all, with room for two workers on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(session, "cpu_count", lambda: 4)
        with session.session() as ray:
            patch.undo()  # the workers are to count for themselves
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            yield ray


@pytest.fixture
def place(prepared: Path, tmp_path: Path, cluster: Any) -> Place:
    shutil.copytree(prepared, tmp_path / "lake")
    return Place(tmp_path / "lake")


@pytest.fixture(scope="module")
def unbroken(prepared: Path, tmp_path_factory: pytest.TempPathFactory, cluster: Any) -> Place:
    """One worker, from the first step to the last, and Stage 2 after it."""
    folder = tmp_path_factory.mktemp("unbroken") / "lake"
    shutil.copytree(prepared, folder)
    place = Place(folder)
    assert place.train() == 0
    assert place.tune() == 0
    return place


def at_step(patch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> list[int]:
    """Call `action` once, when the driver hears of `step` or a later one; all steps it hears of."""
    heard: list[int] = []
    show = watch.Watch._show

    def hear(self: watch.Watch, item: watch.Losses) -> None:
        show(self, item)
        heard.append(int(item["step"]))
        if item["step"] >= step and not acted:
            acted.append(True)
            action()

    acted: list[bool] = []
    patch.setattr(watch.Watch, "_show", hear)
    return heard


def slow_worker(
    notice_after: int | None = None, seconds: float = 0.1, stage: str = "train_global:train_worker"
) -> Callable[[dict[str, Any]], None]:
    """`train_worker` or `tune_worker` with steps slow enough to be broken off.

    Args:
        notice_after: Steps after which Ray says that a node will be taken away.
        seconds: Added to each step.
        stage: Module and name of the worker.
    """

    def work(setup: dict[str, Any]) -> None:  # inside, so that it travels to the workers whole
        import importlib
        import time

        from ray import train

        from ray_jobs.worker import Worker

        module, _, name = stage.partition(":")
        worker = getattr(importlib.import_module(f"ray_jobs.{module}"), name)

        after = Worker.after_step

        def slowly(self: Worker, *args: Any) -> None:
            time.sleep(seconds)
            after(self, *args)

        Worker.after_step = slowly  # type: ignore[method-assign]
        if notice_after is not None:
            info = train.PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [1]})
            answers = iter([None] * notice_after)
            train.get_preemption_info = lambda: next(answers, info)
        worker(setup)

    return work


def train_workers() -> list[psutil.Process]:
    """Processes of Ray Train's workers that this program started."""
    return started("RayTrainWorker")


def kill_workers() -> list[int]:
    """Kill all of them; their process ids."""
    workers = train_workers()
    for process in workers:
        process.kill()
    return [process.pid for process in workers]


def test_every_step_is_logged_with_its_time_and_its_wait(unbroken: Place) -> None:
    curve = unbroken.curve()
    assert set(SHARED) < set(curve)
    assert len(curve["loss"]) == STEPS
    # the first step waits for the pipeline to fill and is not timed
    assert len(curve[watch.SECONDS]) == len(curve[watch.WAIT]) == STEPS - 1
    for took, waited in zip(curve[watch.SECONDS], curve[watch.WAIT], strict=True):
        assert 0 <= waited <= took


def test_one_of_two_workers_is_killed_and_both_go_on(
    place: Place, unbroken: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is left waits for the other in an all-reduce; it must not wait for ever."""
    killed: list[int] = []

    def kill() -> None:
        first, second = train_workers()
        killed.extend((first.pid, second.pid))
        first.kill()

    heard = at_step(monkeypatch, 4, kill)
    monkeypatch.setattr(train_global, "train_worker", slow_worker())
    assert place.train("--workers", "2") == 0
    assert len(killed) == 2 and len(heard) > STEPS
    for name in SHARED:
        assert place.curve()[name] == pytest.approx(unbroken.curve()[name], abs=1e-4)


def test_two_workers_that_are_killed_tune_as_one(
    place: Place, unbroken: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(unbroken.folder / "models" / "global", place.folder / "models" / "global")
    killed: list[int] = []
    heard = at_step(monkeypatch, 2, lambda: killed.extend(kill_workers()))
    slowly = slow_worker(seconds=1.0, stage="tune_target:tune_worker")
    monkeypatch.setattr(tune_target, "tune_worker", slowly)
    words = ("global_stage.checkpoint_every=1", "target_stage.accumulate=2")
    set_ = [word for setting in words for word in ("--set", setting)]
    assert place.tune("--workers", "2", *set_) == 0
    assert len(killed) == 2 and sorted(set(heard)) == list(range(4))
    ours, theirs = place.curve("tune"), unbroken.curve("tune")
    assert len(ours["style"]) == 2 and len(ours["denoising"]) == 4
    for name in ("loss", "denoising", "style", "reconstruction", "anatomy"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5)


def test_a_notice_and_sigterm_keep_the_state_and_one_worker_goes_on_for_two(
    place: Place, unbroken: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def look_and_stop() -> None:
        found.append(place.checkpoints.step())
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
        patch.setattr(train_global, "train_worker", slow_worker(notice_after=2, seconds=0.5))
        at_step(patch, 5, look_and_stop)
        assert place.train("--workers", "2", every=1000) == 75
    stopped = place.checkpoints.step()
    assert found == [3] and 5 < stopped < STEPS
    heard = at_step(monkeypatch, STEPS, lambda: None)
    assert place.train(every=1000) == 0
    assert heard == list(range(STEPS))  # none was done again
    for name in SHARED:
        assert place.curve()[name] == pytest.approx(unbroken.curve()[name], abs=1e-4)


def test_a_killed_driver_and_a_damaged_checkpoint_change_nothing(
    place: Place, unbroken: Place, caplog: pytest.LogCaptureFixture
) -> None:
    code = f"import sys; from ray_jobs import cli; sys.exit(cli.main({place.words()!r}))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    told = place.folder.parent / "driver.txt"  # a pipe that nobody reads would fill
    with told.open("wb") as stream:
        driver = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=stream, stderr=stream
        )
    deadline = time.monotonic() + 240
    while not any((place.folder / "scratch").glob("train-*/*-*.pt")) or (
        len(place.checkpoints.kept()) < 2
    ):
        assert driver.poll() is None and time.monotonic() < deadline, told.read_text()[-2000:]
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    wait_for_silence(place)
    newest, before = place.checkpoints.kept()
    assert before.step < newest.step < STEPS
    path = Path(place.checkpoints.folder) / newest.name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert place.train() == 0
    assert f"the checkpoint of step {newest.step} is damaged" in caplog.text
    for name in SHARED:
        assert place.curve()[name] == unbroken.curve()[name]
    # A job that was killed between its model and its last step leaves checkpoints: taken away.
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    assert place.train() == 0
    assert not path.exists() and os.listdir(place.folder / "models/global") == ["1"]


def wait_for_silence(place: Place) -> None:
    """Until no worker of a killed driver writes any more."""
    before = place.checkpoints.kept()
    for _ in range(60):
        time.sleep(1.5)
        now = place.checkpoints.kept()
        if now == before:
            return
        before = now
    pytest.fail("the workers of a killed driver live on")


def test_a_training_that_lost_its_lease_writes_no_model(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place.folder / "scratch" / "leases" / "model-global"
    at_step(monkeypatch, 1, lambda: (folder / "00000009.json").write_text("{}"))
    assert place.train() == 75
    assert "LAKE-BUSY" in capsys.readouterr().err
    assert not (place.folder / "models" / "global").exists()


def test_a_training_that_diverges_is_not_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = at_step(monkeypatch, STEPS, lambda: None)
    assert place.train("--set", "global_stage.learning_rate=1e36") == 65
    assert "TRAIN-DIVERGED" in capsys.readouterr().err
    assert len(heard) == len(set(heard)) < STEPS
