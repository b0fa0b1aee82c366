"""Results and the tries they took into the catalog: by the driver alone, in batches, once."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

from pipelines.catalog import Catalog
from pipelines.harmonize import Job, Row
from pipelines.ledger import end_attempts

#: Rows per commit and the longest a finished row waits for one. What a dead driver did not commit
#: is not lost: the store holds the row beside its try.
COMMIT_ROWS, COMMIT_SECONDS = 512, 20.0
#: Threads that clear the tries of committed scans: on S3 each costs two requests.
CLEARERS = 16


class Committer:
    """Appends finished rows in batches; what is finished is kept even when the run is stopped."""

    def __init__(self, catalog: Catalog, job: Job) -> None:
        self._catalog, self._job = catalog, job
        self._rows: list[Row] = []
        self._tries: list[Row] = []
        self._last = time.monotonic()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def add(self, row: Row) -> None:
        """Keep `row`, and the `tries` it took, for the next commit."""
        whose = {name: row[name] for name in ("scan_id", "model", "model_version")}
        self._tries += [whose | item for item in row.pop("tries", ())]
        self._rows.append(row)
        waited = time.monotonic() - self._last
        if len(self._rows) >= COMMIT_ROWS or waited >= COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Commit what waits, then forget the tries of scans that are settled."""
        rows, self._rows, self._last = self._rows, [], time.monotonic()
        tries, self._tries = self._tries, []
        if not rows:
            return
        text = "\n".join(sorted(f"{row['scan_id']} {row['finished_at']}" for row in rows))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        txn = f"{self._job.key}-{self._job.batch_id}-{digest}"
        # First the tries: whoever dies in between leaves scans to do, whose tries are told again.
        self._catalog.append("attempts", tries, txn=txn)
        self._catalog.append("results", rows, txn=txn)
        settled = [row["scan_id"] for row in rows if row["status"] != "quarantined"]
        with ThreadPoolExecutor(CLEARERS) as pool:
            for _ in pool.map(self._forget, settled):
                pass  # raises what a thread raised

    def _forget(self, scan_id: str) -> None:
        end_attempts(self._job.lake, self._job.key, scan_id)
