"""The catalog's tables as data: every column with its Arrow type, unit and description.

Reference pages, sidecars and checks are generated from here; nothing is typed twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

STRING = pa.string()
INT = pa.int64()
FLOAT = pa.float64()
BOOL = pa.bool_()
TIME = pa.timestamp("us", tz="UTC")

#: Values of `results.status`. `ok` and `flagged` have an output.
STATUSES = ("ok", "flagged", "failed", "quarantined")

#: Values of `attempts.ended` beside those of `results.status`, with their meaning.
ENDINGS = {
    "raised": "an error that nobody foresaw, so the scan was tried again",
    "lost": "its worker ended, or was stopped, while it held the scan",
    "late": "it took longer than the deadline",
    "uncommitted": "it made the outputs, but its run ended before the row was committed",
    "adopted": "it found the outputs of an `uncommitted` try and took them over",
}


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Column name.
        type: Arrow type.
        description: What the value says.
        unit: Unit of the value; empty when it has none.
        required: The value may not be missing.
        now: A missing value becomes the time of the append.
    """

    name: str
    type: pa.DataType
    description: str
    unit: str = ""
    required: bool = False
    now: bool = False


@dataclass(frozen=True)
class Table:
    """One append-only table.

    Attributes:
        name: Folder under `catalog/` and name in SQL.
        description: What one row is.
        key: Columns that identify a thing; of equal keys the latest row counts.
        counts_by: Column without which the latest row of a key takes back those before; "" where
            nothing is taken back.
        partition_by: Columns whose values are folders, so that a filter reads one folder.
        columns: In order.
    """

    name: str
    description: str
    key: tuple[str, ...]
    partition_by: tuple[str, ...]
    columns: tuple[Column, ...]
    counts_by: str = ""

    @property
    def arrow(self) -> pa.Schema:
        """The Arrow schema; unit and description are field metadata."""
        return pa.schema(
            [
                pa.field(c.name, c.type, metadata={"unit": c.unit, "description": c.description})
                for c in self.columns
            ]
        )

    def column(self, name: str) -> Column:
        """The column of this name."""
        return next(c for c in self.columns if c.name == name)


_SCAN_ID = Column("scan_id", STRING, "first 32 hex digits of the file's SHA-256", required=True)
_DATASET = Column("dataset", STRING, "name of the data set the scan was indexed from")
_SUBJECT = Column("subject", STRING, "BIDS subject label, without sub-")
_SITE = Column("site", STRING, "where the scan was taken")
_SEQUENCE = Column("sequence", STRING, "BIDS suffix: T1w, T2w, …")
_MODEL = Column("model", STRING, "name in the model registry", required=True)
_VERSION = Column("model_version", INT, "version in the model registry", required=True)
_TARGET = Column("target", STRING, "site whose look is the goal; missing: global model")
_METHOD = Column(
    "method", STRING, "raw, nyul, sgcd or another baseline; chance, shuffled", required=True
)
_METRIC = Column(
    "metric",
    STRING,
    "ssim, psnr, …; dice.SEGMENTER, ap.SEGMENTER; site_f1.FEATURES, …",
    required=True,
)
_SEEN = Column("seen", BOOL, "the site is among the model's training sites")
_RECORDED = Column("recorded_at", TIME, "when the row was appended; the latest counts", now=True)

SCANS = Table(
    "scans",
    "One file that was listed, usable or not.",
    key=("scan_id",),
    partition_by=(),
    columns=(
        _SCAN_ID,
        _DATASET,
        _SUBJECT,
        Column("session", STRING, "BIDS session label, without ses-"),
        _SITE,
        _SEQUENCE,
        Column("age", FLOAT, "age at the scan", unit="years"),
        Column("sex", STRING, "F, M or O (other); missing for any other word"),
        Column("split", STRING, "train, test or missing; training never reads test"),
        Column("uri", STRING, "address of the file", required=True),
        Column("etag", STRING, "the store's version tag of the file"),
        Column("bytes", INT, "size of the file as stored", unit="bytes"),
        Column("shape", pa.list_(INT), "voxels along each stored axis", unit="voxels"),
        Column("voxel_mm", pa.list_(FLOAT), "voxel sides", unit="mm"),
        Column("field_strength", FLOAT, "from the sidecar", unit="T"),
        Column("manufacturer", STRING, "from the sidecar"),
        Column("model_name", STRING, "the scanner's model, from the sidecar"),
        Column("sidecar_uri", STRING, "address of the JSON sidecar, if there is one"),
        Column("listed_in", STRING, "root of the data set, or the manifest, that lists the scan"),
        Column("status", STRING, "ok or failed", required=True),
        Column("code", STRING, "why the scan cannot be used"),
        Column("message", STRING, "the same as a sentence"),
        Column("indexed_at", TIME, "when the file was read", now=True),
        _RECORDED,
    ),
)

RESULTS = Table(
    "results",
    "One scan through one version of one model.",
    key=("scan_id", "model", "model_version"),
    partition_by=("target", "site", "sequence"),
    columns=(
        _SCAN_ID,
        _DATASET,
        _SUBJECT,
        Column("session", STRING, "BIDS session label, without ses-"),
        _SITE,
        _SEQUENCE,
        _MODEL,
        _VERSION,
        _TARGET,
        Column("status", STRING, "ok, flagged, failed or quarantined", required=True),
        Column("code", STRING, "why the scan is flagged, failed or quarantined"),
        Column("message", STRING, "the same as a sentence"),
        Column("output_uri", STRING, "harmonized volume on the scan's own grid"),
        Column("output_sha256", STRING, "digest of that file"),
        Column("model_grid_uri", STRING, "harmonized volume on the model grid, [0, 1]"),
        Column("model_grid_sha256", STRING, "digest of that file"),
        Column("sidecar_uri", STRING, "JSON beside the output"),
        Column("gradient_correlation", FLOAT, "edges before and after, masked", unit="1"),
        Column("local_correlation", FLOAT, "the same where it is lowest, in 24 mm", unit="1"),
        Column("volume_drift", FLOAT, "largest relative change of a tissue volume", unit="1"),
        Column(
            "outlier_score",
            FLOAT,
            "distance from the nearest other training scan; 1 is usual",
            unit="1",
        ),
        Column("lesion_ml", FLOAT, "lesion mask inside the brain; missing: no mask", unit="ml"),
        Column("uncertainty_mean", FLOAT, "mean over the brain of the uncertainty map", unit="1"),
        Column("uncertainty_uri", STRING, "that map, on the scan's own grid"),
        Column("seconds_read", FLOAT, "reading the scan", unit="s"),
        Column("seconds_prepare", FLOAT, "bringing it onto the model grid", unit="s"),
        Column("seconds_model", FLOAT, "the network", unit="s"),
        Column("seconds_write", FLOAT, "carrying to the native grid and writing", unit="s"),
        Column("worker", STRING, "host and process that did the work"),
        Column("config_digest", STRING, "digest of the resolved settings"),
        Column("code_version", STRING, "version of this program"),
        Column("batch_id", STRING, "commit the row came with"),
        Column("finished_at", TIME, "when the scan was done", now=True),
        _RECORDED,
    ),
)

METRICS = Table(
    "metrics",
    "One number of one scan by one method.",
    key=(
        "scan_id", "model", "model_version", "method", "metric", "region", "reference",
    ),
    partition_by=("target", "site", "sequence"),
    columns=(
        _SCAN_ID, _DATASET, _SUBJECT, _SITE, _SEQUENCE, _MODEL, _VERSION, _TARGET, _METHOD, _METRIC,
        Column("value", FLOAT, "the number; in `metrics_all` missing where it was taken back"),
        Column("unit", STRING, "unit of the number: 1, dB, intensity range"),
        Column("region", STRING, "voxels it is taken over: brain, grey matter, white matter"),
        Column(
            "reference", STRING,
            "scan_id of the same subject's scan at the target site; truth: a digital subject's own",
        ),
        _SEEN,
        Column("created_at", TIME, "when it was first computed to this number", now=True),
        _RECORDED,
    ),
    counts_by="value",
)  # fmt: skip

SITE_METRICS = Table(
    "site_metrics",
    "One number of one site (missing: of all) and sequence, before and after harmonization.",
    key=("site", "sequence", "model", "model_version", "method", "metric"),
    partition_by=(),
    columns=(
        _SITE, _SEQUENCE, _MODEL, _VERSION, _TARGET, _METHOD, _METRIC,
        Column("before", FLOAT, "mean over subjects of the raw scans"),
        Column("after", FLOAT, "mean over subjects of the method's outputs"),
        Column(
            "low", FLOAT,
            "lower end of the 95 % bootstrap interval of `after`; where a task is repeated on "
            "random partitions, the mean less a standard deviation",
        ),
        Column("high", FLOAT, "upper end, likewise"),
        Column(
            "n", INT,
            "subjects behind the means; in `site_metrics_all` missing where they were taken back",
            unit="subjects",
        ),
        _SEEN,
        Column("created_at", TIME, "when it was first computed to these numbers", now=True),
        _RECORDED,
    ),
    counts_by="n",
)  # fmt: skip

RUNS = Table(
    "runs",
    "One run of one command.",
    key=("run_id",),
    partition_by=(),
    columns=(
        Column("run_id", STRING, "identity of the run", required=True),
        Column("command", STRING, "the command's name"),
        Column("config_digest", STRING, "digest of the resolved settings"),
        Column("code_version", STRING, "version of this program"),
        Column("started_at", TIME, "start"),
        Column("finished_at", TIME, "end; missing while it runs"),
        Column("status", STRING, "running, ok, partial, failed or stopped"),
        Column("summary", STRING, "what the run did, as JSON"),
        _RECORDED,
    ),
)

ATTEMPTS = Table(
    "attempts",
    "One try of one scan through one version of one model; written with the scan's result.",
    key=("scan_id", "model", "model_version", "batch_id", "attempt"),
    partition_by=(),
    columns=(
        _SCAN_ID, _MODEL, _VERSION,
        Column("batch_id", STRING, "run of `harmonize` that tried, as in `results`", required=True),
        Column("attempt", INT, "1 for the first try since the last result", required=True),
        Column("worker", STRING, "host and process that tried"),
        Column("started_at", TIME, "start of the try"),
        Column("finished_at", TIME, "its end; missing where nobody saw it"),
        Column(
            "ended", STRING,
            "ok, flagged or failed as in `results`, or "
            + "; ".join(f"{name}: {meaning}" for name, meaning in ENDINGS.items()),
        ),
        Column("error", STRING, "code, or class of an error that nobody foresaw"),
        _RECORDED,
    ),
)  # fmt: skip

#: Columns of `results` that hold addresses in a derivative of the lake.
OUTPUT_ADDRESSES = ("output_uri", "model_grid_uri", "sidecar_uri", "uncertainty_uri")

#: Every table of the catalog by name.
SCHEMAS: dict[str, Table] = {
    t.name: t for t in (SCANS, RESULTS, METRICS, SITE_METRICS, RUNS, ATTEMPTS)
}
