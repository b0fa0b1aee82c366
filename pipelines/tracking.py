"""Runs, metrics, figures and models in MLflow, for people to compare; the lake never depends on it.

Default: SQLite and an artifact folder inside a local lake, or under the user's data folder for a
lake on S3. `MLFLOW_TRACKING_URI` wins. Whatever goes wrong in MLflow is a warning and ends the
tracking of that run: no scan and no model is ever lost to it.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.lake import Lake
from sgcd_core.config import Settings
from sgcd_core.io.store import is_s3, local_path

log = logging.getLogger(__name__)

EXPERIMENT = "sgcd"


def tracking_uri(lake: Lake) -> str:
    """Where runs of this lake are tracked."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_home(lake) / 'mlflow.db'}"


def _home(lake: Lake) -> Path:
    """Folder of the database and the artifacts when no server is named."""
    if is_s3(lake.uri):
        base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
        return Path(base) / "sgcd"
    return Path(local_path(lake.uri)).absolute()


class Tracker:
    """One run in MLflow. Build with `Tracker.start`; every method is safe to call at any time.

    Attributes:
        run_id: MLflow's id of the run; None when it is not tracked.
    """

    def __init__(self) -> None:
        self.run_id: str | None = None
        self._client: Any = None

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
        tracker = cls()
        tracker._guard("start", lambda: tracker._open(lake, command, config, tags or {}))
        status = "FAILED"
        try:
            yield tracker
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker._guard(
                "end", lambda: tracker._client.set_terminated(tracker.run_id, status=status)
            )

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Numbers of one step. In names, characters that MLflow refuses become `_`."""

        def send() -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            values = [
                Metric(re.sub(r"[^/\w.\- :]", "_", name), float(v), now, step)
                for name, v in metrics.items()
            ]
            for first in range(0, len(values), 500):
                self._client.log_batch(self.run_id, metrics=values[first : first + 500])

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

    def register(self, name: str, version: int, alias: str = "candidate") -> None:
        """List a version of the lake's model in MLflow's registry and point `alias` at it.

        MLflow numbers versions itself; the lake's number is the tag `lake_version`. Doing it
        again for the same version only moves the alias.
        """
        self._guard("register", lambda: self._register(name, version, alias))

    def _register(self, name: str, version: int, alias: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = self._client.search_model_versions(f"name = '{name}'")
        found = [v for v in known if v.tags.get("lake_version") == str(version)]
        if found:
            number = found[0].version
        else:
            source = f"{self._client.get_run(self.run_id).info.artifact_uri}/modelpack"
            number = self._client.create_model_version(
                name, source=source, run_id=self.run_id, tags={"lake_version": str(version)}
            ).version
        self._client.set_registered_model_alias(name, alias, number)

    def _open(
        self, lake: Lake, command: str, config: Settings | None, tags: Mapping[str, str]
    ) -> None:
        uri = tracking_uri(lake)
        # A scan's name must not leave the machine, and a dead server must not hold up the work.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        location = None
        if uri.startswith("sqlite:///"):
            home = Path(uri.removeprefix("sqlite:///")).parent
            home.mkdir(parents=True, exist_ok=True)
            location = (home / "mlflow-artifacts").as_uri()
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(EXPERIMENT)
        if known is None:
            experiment = client.create_experiment(EXPERIMENT, artifact_location=location)
        else:
            experiment = known.experiment_id
        run = client.create_run(
            experiment, run_name=command, tags={"command": command, "lake": lake.uri, **tags}
        )
        self._client, self.run_id = client, run.info.run_id
        if config is not None:
            from mlflow.entities import Param

            params = {"config_digest": config.digest(), **flatten(config.model_dump(mode="json"))}
            client.log_batch(self.run_id, params=[Param(k, str(v)) for k, v in params.items()])
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
        """The one place where trouble in MLflow becomes a warning."""
        if what != "start" and self._client is None:
            return
        started = time.monotonic()
        try:
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError
        except ImportError as error:
            log.warning("tracking=off what=%s error=%s", what, type(error).__name__)
            return
        try:
            action()
        except (MlflowException, SQLAlchemyError, OSError) as error:
            # After one failure the run is left alone: each further call could wait for a timeout.
            self._client = None
            log.warning(
                "tracking=off what=%s error=%s seconds=%.1f: MLflow does not answer as expected; "
                "the work goes on without it",
                what, type(error).__name__, time.monotonic() - started,
            )  # fmt: skip


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
