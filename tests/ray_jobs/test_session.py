"""A session under the command line: SIGTERM must end with 75, though Ray brings its own handler."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ray_jobs import cli
from ray_jobs.session import DATA_THREADS, session
from sgcd_core.errors import StorageError, UsageError

CLIENT = "ray://127.0.0.1:1"


@pytest.mark.parametrize("said", ["here", "in the environment"])
def test_a_ray_client_is_refused_with_what_works(
    said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray Data cannot run on one: trying again, which 69 asks for, would never help."""
    monkeypatch.setenv("RAY_ADDRESS", CLIENT if said != "here" else "auto")
    words = ["--ray-address", CLIENT] if said == "here" else []
    with pytest.raises(UsageError), session(*words[1:]):
        pass
    assert cli.main(["doctor", *words]) == 2
    told = capsys.readouterr()
    assert not told.out and f"[USAGE] {CLIENT}" in told.err
    assert "`sgcd submit --address http://HEAD:8265 …`" in told.err
    assert "`--ray-address auto`" in told.err


@pytest.mark.parametrize("address", ["10.0.0.1:6379", None])
def test_a_cluster_that_is_not_reached_may_want_a_token(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray raises a ConnectionError for a wrong token, as for a head that is down."""
    import ray

    def refuse(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(StorageError) as caught, session(address):
        pass
    assert caught.value.code == "CLUSTER"
    wanted = ["refuses this token", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN", "~/.ray/auth_token"]
    assert [text in str(caught.value) for text in wanted] == [address is not None] * 4


PROGRAM = """
import os, signal, sys, threading, time
import ray_jobs.status
from ray_jobs import cli
from ray_jobs.session import session

def wait(args):
    with session() as ray:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        ray.get(ray.remote(lambda: time.sleep(90)).remote())  # where a command waits for its work

ray_jobs.status.run = wait
sys.exit(cli.main(["status", "--lake", "none"]))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_sigterm_with_ray_running_is_75() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 75, done.stderr[-2000:]
    assert "run the same command again" in done.stderr


LOOP = """
import os, signal, sys, threading, time
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray_jobs.session import session
from ray_jobs.windows import dataset_of, rows_of

step, ended = StreamingExecutor._scheduling_loop_step, threading.Event()

def late(self, topology):
    if ended.is_set():
        time.sleep(4)  # a machine so busy that Ray Data does not wait for it
    return step(self, topology)

StreamingExecutor._scheduling_loop_step = late
try:
    with session() as ray:
        scans = dataset_of(ray, [{"scan_id": str(number)} for number in range(40)])
        for row in rows_of(scans.map(lambda row: (time.sleep(0.1), row)[1], num_cpus=1), 60):
            ended.set()
            if sys.argv[1] == "error":
                time.sleep(0.2)
                raise ValueError
            for seconds in (0, 1.2):  # the second comes while Ray Data waits for its loop
                threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            time.sleep(60)
except (ValueError, KeyboardInterrupt) as error:
    print("told:", type(error).__name__, flush=True)
time.sleep(6)
import ray
print("Ray runs:", ray.is_initialized(), [t.name for t in threading.enumerate()])
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("how", "told"), [("error", "ValueError"), ("C-c", "KeyboardInterrupt")])
def test_a_loop_over_a_dataset_may_be_left_in_the_middle(how: str, told: str) -> None:
    """Left alone, the late threads end the process or start another Ray."""
    done = subprocess.run(
        [sys.executable, "-c", LOOP, how], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"told: {told}" in done.stdout and "thread_left" not in done.stderr
    assert "Ray runs: False" in done.stdout
    assert not any(name in done.stdout for name in DATA_THREADS)
