"""A cluster as an operator starts one: `ray start`, a token for every request."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import free_ports

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class RayCluster:
    """A head started with `ray start`, and what a client needs to reach it."""

    dashboard: str
    metrics: str
    environment: dict[str, str]

    def sgcd(self, *words: str, **more: str) -> subprocess.Popen[str]:
        """`sgcd WORDS…` as a user of the cluster runs it."""
        return subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.cli", *words], env=self.environment | more,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def get(self, path: str, token: bool = True) -> int:
        """Status of a request to the dashboard."""
        request = urllib.request.Request(self.dashboard + path)
        if token:
            request.add_header("Authorization", f"Bearer {self.environment['RAY_AUTH_TOKEN']}")
        try:
            return int(urllib.request.urlopen(request, timeout=5).status)
        except urllib.error.HTTPError as error:
            return error.code


def start_head() -> Iterator[RayCluster]:
    """A cluster of one node with two CPUs, token authentication on, on ports of its own."""
    folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets have long names
    names = (
        "port", "dashboard-port", "ray-client-server-port", "metrics-export-port",
        "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port",
        "node-manager-port", "object-manager-port",
    )  # fmt: skip
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
    token = "0123456789abcdef" * 2
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))
    } | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_TMPDIR": folder,
        # A busy machine may take long to load the agents without which Ray ends a node.
        "RAY_agent_register_timeout_ms": "300000", "RAY_health_check_failure_threshold": "30",
        "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }  # fmt: skip
    with open(os.path.join(folder, "log.txt"), "wb") as log:
        head = subprocess.Popen(
            [
                sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
                "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=2",
                "--object-store-memory=200000000", f"--temp-dir={folder}",
                *(f"--{name}={port}" for name, port in ports.items()),
            ],
            env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True,
        )  # fmt: skip
    client = {k: v for k, v in environment.items() if k != "RAY_TMPDIR"}
    cluster = RayCluster(
        dashboard, f"http://127.0.0.1:{ports['metrics-export-port']}/metrics",
        client | {"RAY_API_SERVER_ADDRESS": dashboard},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError):
                if cluster.get("/api/jobs/") == 200:
                    break
            if head.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"Ray did not start:\n{Path(folder, 'log.txt').read_text()[-3000:]}")
            time.sleep(0.3)
        yield cluster
    finally:
        died = head.poll() is not None
        text = Path(folder, "log.txt").read_text(errors="replace")[-3000:]
        # Only what this fixture started; `ray stop` would end every Ray of the machine.
        mine = []
        with contextlib.suppress(psutil.NoSuchProcess):
            mine = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(20)
        head.kill()
        for process in mine:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)
        if died:  # else a test would only say that nothing answers
            pytest.fail(f"Ray's head ended during the tests:\n{text}")
