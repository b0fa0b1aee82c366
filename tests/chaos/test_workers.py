"""Workers, nodes and drivers that die: no scan is lost, doubled or changed, and little is redone.

Every case ends the same way: each scan has exactly one row, the outputs are bit-identical to those
of the calm run, and no more scans were computed twice than were in flight when something died.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos_rig import build_lake, harmonize, noted, outputs, set_faults
from processes import started

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from ray_jobs.harmonize_stream import IN_FLIGHT
from ray_jobs.session import session
from sgcd_core.io.store import Store

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

SCANS, ACTORS = 50, 2
WORKERS = ("--workers", str(ACTORS))
#: What may be computed again each time something dies.
IN_HAND = ACTORS * IN_FLIGHT + 1


class Case:
    """A fresh copy of the lake, and what the calm run made of it."""

    def __init__(self, folder: Path, template: Path, calm: dict[str, str]) -> None:
        self.lake, self.calm = folder / "lake", calm
        shutil.copytree(template, self.lake)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The one row of each scan; fails where there are several or none."""
        catalog = Catalog(Lake(str(self.lake)))
        results = catalog.history("results").to_pylist()
        scans = catalog.rows("scans")["scan_id"].to_pylist()
        assert sorted(row["scan_id"] for row in results) == sorted(scans)
        return {row["scan_id"]: row for row in results}

    def scan_ids(self) -> list[str]:
        found: list[str] = Catalog(Lake(str(self.lake))).rows("scans")["scan_id"].to_pylist()
        return found

    def check(self, without: tuple[str, ...] = (), deaths: int = 0) -> None:
        """One row for each scan, outputs as in the calm run but for those of `without`.

        Each of `deaths` may leave a file half written for what was in flight, and no more.
        """
        rows = self.rows()
        good = {key: row for key, row in rows.items() if key not in without}
        assert {row["status"] for row in good.values()} <= {"ok", "flagged"}
        lost = {f"sub-{rows[key]['subject']}" for key in without}
        wanted = {path: d for path, d in self.calm.items() if not lost & set(path.split("/"))}
        assert outputs(self.lake) == wanted
        now = datetime.now(UTC) + timedelta(minutes=1)
        left = Store().remove_leftovers(str(self.lake / "derivatives"), now, dry_run=True)
        assert left <= deaths * IN_HAND
        # A worker that outlives its node a little may leave the row of a try that is settled.
        for file in (self.lake / "scratch" / "attempts").rglob("1.json"):
            assert "row" in json.loads(file.read_text()) or file.parent.name in without

    def redone(self) -> int:
        """Computations beyond one for each scan."""
        return sum(count - 1 for count in noted(self.lake, "computed").values())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lake before any run."""
    return Path(build_lake(str(tmp_path_factory.mktemp("chaos")), SCANS).uri)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No cluster of others, and one tracking database for all cases: making one takes seconds."""
    patch = pytest.MonkeyPatch()
    patch.delenv("RAY_ADDRESS", raising=False)
    here = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    patch.setenv("PYTHONPATH", os.pathsep.join(here))  # workers import the actor of chaos_rig
    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def cluster(quiet: None) -> Iterator[contextlib.ExitStack]:
    """One Ray for all cases of this process; it ends before those that bring their own."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(session())
        yield stack


@pytest.fixture(scope="module")
def calm(
    template: Path, cluster: contextlib.ExitStack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Digests of what a run without faults writes."""
    lake = tmp_path_factory.mktemp("calm") / "lake"
    shutil.copytree(template, lake)
    assert harmonize(lake, *WORKERS) == 0
    assert set(noted(lake, "computed").values()) == {1}
    # The model is loaded once in each worker, which reads and writes other scans meanwhile.
    assert noted(lake, "loaded").keys() == noted(lake, "workers").keys()
    assert set(noted(lake, "loaded").values()) == {1} and len(noted(lake, "loaded")) == ACTORS
    assert max(map(int, noted(lake, "held"))) == IN_FLIGHT
    yield outputs(lake)


@pytest.fixture
def no_cluster(calm: dict[str, str], cluster: contextlib.ExitStack) -> None:
    """Once the calm run is over."""
    cluster.close()


@pytest.fixture
def case(tmp_path: Path, template: Path, calm: dict[str, str]) -> Case:
    return Case(tmp_path, template, calm)


def test_the_calm_run_has_an_output_for_every_scan(calm: dict[str, str]) -> None:
    assert sum(path.endswith("desc-harmonized_T1w.nii.gz") for path in calm) == 2 * SCANS
    assert len(set(calm.values())) > 2 * SCANS, "the outputs of two scans are not the same"


def test_a_scan_that_kills_its_worker_is_set_aside_alone(
    case: Case, figure: Callable[[str], None]
) -> None:
    killer = case.scan_ids()[SCANS // 2]
    set_faults(case.lake, kill=[killer])
    assert harmonize(case.lake, *WORKERS) == 1
    case.check(without=(killer,), deaths=3)
    row = case.rows()[killer]
    assert (row["status"], row["code"]) == ("quarantined", "SCAN-QUARANTINED")
    tries = Catalog(Lake(str(case.lake))).rows("attempts").to_pylist()
    assert [t["ended"] for t in tries if t["scan_id"] == killer] == ["lost"] * 3
    # "adopted": done beside the killer, which ended the worker before it could hand over the row.
    done = {t["scan_id"] for t in tries if t["ended"] in ("ok", "flagged", "adopted")}
    assert done == set(case.scan_ids()) - {killer}
    assert case.redone() <= IN_HAND
    figure(f"1 of {SCANS} scans kills its worker: quarantined, {case.redone()} others redone")


def test_a_scan_that_hangs_is_failed_at_its_deadline(
    case: Case, figure: Callable[[str], None]
) -> None:
    hangs = case.scan_ids()[SCANS // 3]
    set_faults(case.lake, hang=[hangs])
    started = time.monotonic()
    assert harmonize(case.lake, *WORKERS, "--scan-deadline", "15") == 1
    seconds = time.monotonic() - started
    case.check(without=(hangs,), deaths=1)
    assert case.rows()[hangs]["code"] == "SCAN-DEADLINE"
    assert case.redone() <= IN_HAND
    set_faults(case.lake)
    assert harmonize(case.lake, *WORKERS, "--retry-failed") == 0
    assert outputs(case.lake) == case.calm
    figure(
        f"a scan hangs, deadline 15 s: failed after one try, {case.redone()} others redone, "
        f"{seconds:.0f} s in all"
    )


def test_random_exceptions_cost_a_second_try_each(
    case: Case, figure: Callable[[str], None]
) -> None:
    set_faults(case.lake, **{"raise": 0.05})
    assert harmonize(case.lake, *WORKERS) == 0
    raised = noted(case.lake, "raised").total()
    assert raised > 0
    case.check()
    assert case.redone() == 0
    figure(f"exceptions at 5 %: {raised} raised, {SCANS} of {SCANS} scans done, 0 redone")


def test_a_worker_killed_every_five_seconds(case: Case, figure: Callable[[str], None]) -> None:
    set_faults(case.lake, slow=1.0)
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not over.wait(5):
            # One that has done what it took over from its predecessor; else this test would kill
            # one scan again and again, and that one would rightly be set aside.
            done = noted(case.lake, "workers")
            at_work = [w for w in map_workers() if done[str(w.pid)] > IN_FLIGHT]
            if at_work:
                killed.append(at_work[0].pid)
                at_work[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        assert harmonize(case.lake, *WORKERS) == 0
    finally:
        over.set()
        thread.join()
    assert len(killed) >= 3
    case.check(deaths=len(killed))
    assert case.redone() <= len(killed) * IN_HAND
    figure(f"a worker killed every 5 s: {len(killed)} killed, {case.redone()} scans redone")


def test_a_node_of_three_is_killed(
    no_cluster: None, case: Case, figure: Callable[[str], None]
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    set_faults(case.lake, slow=0.3)
    small = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    gone: list[Counter[str]] = []
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
        cluster.wait_for_nodes()

        def kill() -> None:
            if wait_for(functools.partial(computed, case.lake, SCANS / 4), 90):
                cluster.remove_node(nodes[0], allow_graceful=False)
                gone.append(noted(case.lake, "computed"))

        thread = threading.Thread(target=kill)
        ray.init(address=cluster.address, namespace="sgcd", logging_level="ERROR",
                 log_to_driver=False)  # fmt: skip
        thread.start()
        assert harmonize(case.lake, "--workers", "3") == 0
        thread.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert gone and len(gone[0]) < SCANS, "the node died before the end"
    case.check(deaths=1)
    assert case.redone() <= 3 * IN_FLIGHT + 1
    figure(f"a node of three killed after {len(gone[0])} scans: {case.redone()} redone")


def test_a_driver_killed_at_10_50_and_90_percent(
    no_cluster: None, case: Case, figure: Callable[[str], None]
) -> None:
    rig = str(Path(__file__).with_name("chaos_rig.py"))
    command = [sys.executable, rig, str(case.lake), *WORKERS]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    }
    set_faults(case.lake, slow=0.2)
    redone = []
    for part in (0.1, 0.5, 0.9):
        before = case.redone()
        driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        goal = part * SCANS
        assert wait_for(functools.partial(computed, case.lake, goal), 120)
        assert driver.poll() is None
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
        # Ray's own agents are late to notice; all others end with the driver
        assert wait_for(functools.partial(ended, family), 30), names_of(family)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert Catalog(Lake(str(case.lake))).history("results").num_rows < SCANS
        redone.append(case.redone() - before)
    before = case.redone()
    assert subprocess.run(command, env=environment, check=False, timeout=240).returncode == 0
    redone = [*redone[1:], case.redone() - before]
    case.check(deaths=3)
    assert max(redone) <= IN_HAND
    figure(f"driver killed at 10, 50 and 90 %: {', '.join(map(str, redone))} scans redone")


def map_workers() -> list[psutil.Process]:
    """The actors of this process's Ray, the oldest first."""
    return started("ray::MapWorker")


def ended(family: list[psutil.Process]) -> bool:
    """Whether all have ended but Ray's agents."""
    return all("Agent" in name for name in names_of(family))


def names_of(family: list[psutil.Process]) -> list[str]:
    """Names of those that are still there."""
    names = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                names.append(process.name())
    return names


def computed(lake: Path, goal: float) -> bool:
    """Whether so many scans have been computed."""
    return len(noted(lake, "computed")) >= goal


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.05)
    return False
