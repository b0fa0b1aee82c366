"""A session under the command line: SIGTERM must end with 75, though Ray brings its own handler."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=80
    )
    assert done.returncode == 75, done.stderr[-2000:]
    assert "run the same command again" in done.stderr
