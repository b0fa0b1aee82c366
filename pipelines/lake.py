"""Where everything lies in a lake: a folder or an s3:// prefix."""

from __future__ import annotations

from dataclasses import dataclass

from sgcd_core.errors import StorageError
from sgcd_core.io.store import Store, join, trimmed

TABLES = ("scans", "results", "metrics", "site_metrics", "runs", "attempts")


@dataclass(frozen=True)
class Lake:
    """Addresses inside one lake. Holds no data and no connection.

    Attributes:
        uri: Folder or s3:// prefix, without a trailing slash.
        outputs: Root of the one derivative data set that is written, where it lies elsewhere.
    """

    uri: str
    outputs: str | None = None

    @classmethod
    def open(cls, uri: str, *, create: bool = False) -> Lake:
        """The lake at `uri`.

        Raises:
            StorageError: LAKE-MISSING when there is no lake there and `create` is false;
                STORE-ADDRESS.
        """
        lake = cls(trimmed(uri))
        store = Store()
        if not store.exists(lake.marker):
            if not create:
                raise StorageError(
                    "there is no lake here.", code="LAKE-MISSING", where=lake.uri,
                    hint="Make one with `sgcd index SOURCE --lake LAKE`.",
                )  # fmt: skip
            store.write_bytes(lake.marker, b'{"sgcd_lake": 1}\n')
        return lake

    @property
    def marker(self) -> str:
        """The small file that says: this is a lake."""
        return join(self.uri, "sgcd-lake.json")

    def table(self, name: str) -> str:
        """Address of a Delta table."""
        if name not in TABLES:
            raise KeyError(f"no such table: {name}; there are {', '.join(TABLES)}")
        return join(self.uri, "catalog", name)

    def prepared(self, recipe: str, scan_id: str = "") -> str:
        """Folder of a scan's model-grid volumes under one preparation recipe."""
        return join(self.uri, "prepared", recipe, scan_id)

    @property
    def prepared_with(self) -> str:
        """The settings of the last `sgcd prepare`, which later commands start from."""
        return join(self.uri, "prepared", "settings.json")

    def derivatives(self, model: str) -> str:
        """Root of a BIDS derivative data set."""
        return self.outputs or join(self.uri, "derivatives", model)

    def model(self, name: str, version: int | str = "") -> str:
        """Folder of a modelpack."""
        return join(self.uri, "models", name, str(version) if version != "" else "")

    def report(self, name: str = "") -> str:
        """Folder of reports, or one report."""
        return join(self.uri, "reports", name)

    def scratch(self, name: str) -> str:
        """Folder for checkpoints and caches of one run; safe to delete."""
        return join(self.uri, "scratch", name)
