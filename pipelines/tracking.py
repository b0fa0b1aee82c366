"""Runs, metrics, figures and models in MLflow, for people to compare; the lake never depends on it.

Default: SQLite and an artifact folder inside a local lake, or under the user's data folder for a
lake on S3. `MLFLOW_TRACKING_URI` wins. Whatever goes wrong in MLflow is a warning and ends the
tracking of that run, which is still marked as ended when MLflow answers: no scan and no model is
ever lost to it.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipelines import registry
from pipelines.lake import Lake
from sgcd_core.config import Settings
from sgcd_core.io.store import is_s3, local_path, sha256_hex

log = logging.getLogger(__name__)

EXPERIMENT = "sgcd"
_ARTIFACTS = "mlflow-artifacts"
#: A longer name of a metric is refused.
_LONGEST_METRIC = 250
#: More in a batch are refused.
_METRICS_IN_REQUEST = 1000


def tracking_uri(lake: Lake) -> str:
    """Where runs of this lake are tracked."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_home(lake) / 'mlflow.db'}"


def database_file(uri: str) -> Path | None:
    """File of the SQLite database at `uri`; None for anything else."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).absolute()


def _home(lake: Lake) -> Path:
    """Folder of the database and the artifacts when no server is named.

    MLflow cannot keep a database in a folder with `?` in its name.
    """
    if is_s3(lake.uri) or "?" in str(Path(local_path(lake.uri)).absolute()):
        base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
        return Path(base) / "sgcd"
    return Path(local_path(lake.uri)).absolute()


class Tracker:
    """One run in MLflow. Build with `Tracker.start`; every method is safe to call at any time.

    Attributes:
        run_id: MLflow's id of the run; None when it is not tracked.
    """

    def __init__(self, lake: Lake) -> None:
        self.run_id: str | None = None
        self._client: Any = None
        self._answers: Any = None
        self._lake = lake

    @classmethod
    @contextmanager
    def start(
        cls,
        lake: Lake,
        command: str,
        config: Settings | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Iterator[Tracker]:
        """A tracked run for the time of the block; it ends FAILED when the block raises.

        Args:
            lake: Whose run it is.
            command: Name of the command, also the run's name.
            config: Resolved settings: parameters of the run, and whole as `config.json`.
            tags: Data versions, code version, model and the like.
        """
        tracker = cls(lake)
        tracker._guard("start", lambda: tracker._open(lake, command, config, tags or {}))
        status = "FAILED"
        try:
            yield tracker
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker._client = tracker._answers
            tracker._guard(
                "end", lambda: tracker._client.set_terminated(tracker.run_id, status=status)
            )

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Numbers of one step, under names that MLflow takes (`metric_name`)."""
        self.log_history([(step, metrics)])

    def log_history(self, history: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Numbers of many steps, many in a request.

        Args:
            history: Each step with its numbers by name.
        """

        def send() -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            values = [
                Metric(metric_name(name), float(value), now, step)
                for step, metrics in history
                for name, value in metrics.items()
            ]
            for first in range(0, len(values), _METRICS_IN_REQUEST):
                part = values[first : first + _METRICS_IN_REQUEST]
                self._client.log_batch(self.run_id, metrics=part)

        self._guard("metrics", send)

    def log_figure(self, name: str, png: bytes) -> None:
        """A picture, shown under `figures/`."""
        self._log_files("figures", {name if name.endswith(".png") else f"{name}.png": png})

    def log_pack(self, pack: str | Path | Mapping[str, bytes], name: str = "modelpack") -> None:
        """A model as plain files: a local folder, or file name → bytes."""
        if isinstance(pack, Mapping):
            self._log_files(name, pack)
        else:
            self._guard("model", lambda: self._client.log_artifacts(self.run_id, str(pack), name))

    def register(self, name: str, version: int, alias: str | None = None) -> None:
        """List a version of the lake's model in MLflow's registry and point `alias` at it.

        Doing it again for the same version only moves the alias.
        """

        def send() -> None:
            registry.add_version(self._client, self._lake, name, version, str(self.run_id))
            if alias is not None:
                registry.point_alias(self._client, self._lake, name, alias, version)

        self._guard("register", send)

    def compare_alias(self, name: str, alias: str, version: int) -> None:
        """Warn when MLflow has another version behind an alias than the lake, which counts."""

        def ask() -> None:
            there = registry.alias_version(self._client, self._lake, name, alias)
            if there not in (None, version):
                log.warning(
                    "alias=%s model=%s: the lake says version %d, which counts; MLflow says %d. "
                    "Move it with `sgcd promote`.", alias, name, version, there,
                )  # fmt: skip

        self._guard("alias", ask)

    def _open(
        self, lake: Lake, command: str, config: Settings | None, tags: Mapping[str, str]
    ) -> None:
        uri = tracking_uri(lake)
        location = None
        file = database_file(uri)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            location = file.parent / _ARTIFACTS
        client = registry.connect(uri)
        experiment = _experiment(client, location)
        run = client.create_run(
            experiment, run_name=command, tags={"command": command, "lake": lake.uri, **tags}
        )
        self._client = self._answers = client
        self.run_id = run.info.run_id
        if config is not None:
            from mlflow.entities import Param

            params = {"config_digest": config.digest(), **flatten(config.model_dump(mode="json"))}
            values = [Param(name, str(value)) for name, value in params.items()]
            for first in range(0, len(values), 100):  # more in a batch are refused
                client.log_batch(self.run_id, params=values[first : first + 100])
            client.log_text(self.run_id, config.model_dump_json(indent=1), "config.json")

    def _log_files(self, folder: str, files: Mapping[str, bytes]) -> None:
        def send() -> None:
            with tempfile.TemporaryDirectory(prefix="sgcd-") as scratch:
                for name, data in files.items():
                    path = Path(scratch) / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                self._client.log_artifacts(self.run_id, scratch, folder)

        self._guard(folder, send)

    def _guard(self, what: str, action: Callable[[], Any]) -> None:
        """Trouble in MLflow becomes a warning; after the first the run is left alone."""
        if what != "start" and self._client is None:
            return
        error = registry.trouble(what, action)
        if error is None:
            return
        self._client = None  # each further call could wait for a timeout
        if registry.lost(error):
            self._answers = None


def _experiment(client: Any, location: Path | None) -> str:
    """Id of the one experiment of this program; made where there is none.

    A lake that was copied or moved brings the experiment of its old folder: it gets one of its
    own, named with a digest, and leaves that folder alone.
    """
    from mlflow.exceptions import MlflowException

    name, known = EXPERIMENT, client.get_experiment_by_name(EXPERIMENT)
    if known is not None and location is not None and _elsewhere(known, location):
        name = f"{EXPERIMENT}-{sha256_hex(str(location).encode())[:8]}"
        known = client.get_experiment_by_name(name)
    if known is None:
        address = None if location is None else location.as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=address))
        except MlflowException:  # another run was first
            known = client.get_experiment_by_name(name)
            if known is None:
                raise
    return str(known.experiment_id)


def _elsewhere(experiment: Any, location: Path) -> bool:
    """Whether an experiment keeps its files beside a database in another folder."""
    address = str(experiment.artifact_location)
    if not address.startswith("file:"):  # a place that somebody chose
        return False
    there = Path(local_path(address))
    return there.name == _ARTIFACTS and there.resolve() != location.resolve()


def metric_name(name: str) -> str:
    """`name` as MLflow takes it; unlike names stay unlike.

    A part between slashes that MLflow refuses has `_` for what is refused in it, and a digest.
    """
    plain = "/".join(map(_metric_part, name.split("/")))
    if len(plain) <= _LONGEST_METRIC:
        return plain
    return f"{plain[:100]}-{sha256_hex(plain.encode())[:8]}-{plain[-100:]}"


def _metric_part(part: str) -> str:
    plain = re.sub(r"[^\w.\- :]|^\.\.+|^\.?$", "_", part)
    return part if plain == part else f"{plain}-{sha256_hex(part.encode())[:8]}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
