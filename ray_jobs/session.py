"""One Ray session: connect or start, check that the work fits, close what was opened here."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.lake import Lake
from pipelines.lake_check import require_lake
from ray_jobs.cpus import cpu_count
from ray_jobs.preflight import Need, require_nodes, require_room
from sgcd_core.errors import StorageError, UsageError

log = logging.getLogger(__name__)

#: Volumes stay inside the worker that reads them, so the shared store may be small.
OBJECT_STORE_BYTES = 320_000_000
#: A job that makes no progress for so long is stopped with an error instead of hanging.
NO_PROGRESS_SECONDS = 900
#: What a client of a cluster that asks for a token needs.
TOKEN = "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token"
#: Starts of a local Ray that are tried on a busy machine.
START_TRIES = 3
#: The longest that closing waits for threads of Ray Data, and how their names begin.
END_SECONDS = 60.0
DATA_THREADS = ("StreamingExecutor-", "ray-data-metadata-prefetch", "iter_threaded")


def threads_per_worker(workers: int) -> int:
    """Torch threads of each of `workers` processes on this machine.

    Ray sets OMP_NUM_THREADS to a worker's num_cpus; that would leave most of a small machine idle.
    """
    return max(1, cpu_count() // max(1, workers))


def cluster_address(given: str | None) -> str | None:
    """The cluster to drive from here: `given` or RAY_ADDRESS; none is this machine.

    Raises:
        UsageError: It is that of a Ray Client. Ray Data wants a driver that is on the cluster.
    """
    address = given or os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise UsageError(
            "the commands cannot be driven through Ray Client.", where=address,
            hint="Use `sgcd submit --address http://HEAD:8265 …`, or run on the head with "
            "`--ray-address auto`.",
        )  # fmt: skip
    return address


def _environment(address: str | None) -> None:
    """Settings that Ray reads at import and at start; a user's own values win."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Workers are to use this very environment, not one that `uv run` would build again.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if not address:
        # Nobody takes this machine away; a process less that watches for it.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Torch's threads wait for each other by spinning. Where they share cores with Ray's own
    # processes that made a training step four times slower (28 s against 7 s, two busy cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Many small arenas cost every worker tens of megabytes.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")


@contextmanager
def session(
    address: str | None = None,
    need: Need | None = None,
    lake: Lake | None = None,
    *,
    ask_nodes: bool = True,
) -> Iterator[Any]:
    """A connected `ray` module, with room for `need` and access to `lake`.

    An open session is used as it is. Otherwise connects to `address` or RAY_ADDRESS, or starts
    Ray on this machine; what was opened here is closed at the end.

    Raises:
        UsageError: The address is that of a Ray Client.
        StorageError: CLUSTER when the cluster does not answer, is too small or has a node with
            another program; STORE-… when the lake cannot be worked on from here or from a node.
    """
    began = time.monotonic()
    address = cluster_address(address)
    if lake is not None:
        for finding in require_lake(lake.uri):
            if finding.answer == "warn":
                log.warning("%s: %s", finding.check, finding.found)
    _environment(address)
    import ray

    mine = not ray.is_initialized()
    if mine:
        _connect(ray, address)
    try:
        require_room(ray, need or Need())
        if ask_nodes and mine and address:
            require_nodes(ray, None if lake is None else lake.uri, began)
        data_settings(ray)
        yield ray
    finally:
        if mine:
            try:
                _end_executions()
            finally:
                ray.shutdown()


def _end_executions() -> None:
    """Stop what Ray Data still carries out here, and wait for its threads.

    A loop over a dataset that an error ends leaves them to themselves after two seconds. One that
    asks Ray for something while it shuts down ends this process, status 1 and not a word; a moment
    later it starts another Ray.
    """
    deadline = time.monotonic() + END_SECONDS
    for thread in threading.enumerate():
        if not thread.name.startswith(DATA_THREADS) or thread is threading.current_thread():
            continue
        _stop(thread)
        # Not `join`: one that a signal broke off takes the thread for ended.
        while thread in threading.enumerate():
            if time.monotonic() > deadline:
                log.warning("event=thread_left name=%s", thread.name)
                break
            time.sleep(0.02)


def _stop(thread: threading.Thread) -> None:
    """Tell an execution, which is its own thread, or the owner of one of its threads to end."""
    owner = getattr(getattr(thread, "_target", None), "__self__", None)
    try:
        if shutdown := getattr(thread, "shutdown", None):
            shutdown(force=True)
        elif stop := getattr(owner, "stop", None):
            stop()
    except Exception as error:  # of nodes that are gone; what ended the loop counts
        log.info("event=execution_not_stopped error=%s", type(error).__name__)


def _connect(ray: Any, address: str | None) -> None:
    quiet = not log.isEnabledFor(logging.DEBUG)
    common: dict[str, Any] = {
        "logging_level": logging.ERROR if quiet else logging.INFO,
        "log_to_driver": not quiet,
        "namespace": "sgcd",
    }
    if address:
        common["address"] = address
    else:
        common |= {
            # A Ray of its own, whatever else runs on this machine.
            "address": "local",
            # One worker and the tasks that feed it need two places, whatever the machine.
            "num_cpus": max(2, cpu_count()),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    for left in range(START_TRIES - 1, -1, -1):
        on_stop = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**common)
            _restore(on_stop)
            return
        except Exception as error:
            # Ray raises a bare Exception when a busy machine takes longer than its 30 s to start.
            log.info("event=ray_not_started error=%s tries_left=%d", type(error).__name__, left)
            ray.shutdown()
            if left and not address:
                continue
            raise _not_connected(address, type(error).__name__) from error


def _not_connected(address: str | None, error: str) -> StorageError:
    """Ray says the same of a cluster that is down and of one that refuses a token."""
    if not address:
        return StorageError(
            f"Ray does not start ({error}).", code="CLUSTER", where="this machine",
            hint="If this machine is busy, try again.",
        )  # fmt: skip
    return StorageError(
        f"the Ray cluster does not answer, or refuses this token ({error}).", code="CLUSTER",
        where=address,
        hint="Check --ray-address or RAY_ADDRESS, or leave both out to use this machine. "
        f"Where the cluster asks for a token, set {TOKEN}.",
    )  # fmt: skip


def _restore(handler: Any) -> None:
    """Take SIGTERM back: Ray's own handler ends the process at once, rows uncommitted."""
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def data_settings(ray: Any) -> None:
    """Ray Data: quiet, and an error instead of a hang."""
    context = ray.data.DataContext.get_current()  # configures Ray Data's own loggers, too
    if not log.isEnabledFor(logging.DEBUG):
        for name in ("ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    if hasattr(context, "print_on_execution_start"):
        context.print_on_execution_start = False
