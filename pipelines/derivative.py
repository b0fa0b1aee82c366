"""Names and sidecars of the harmonized scans: one BIDS derivative data set per model version."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.lake import Lake
from pipelines.schemas import RESULTS
from sgcd_core.io.store import Store, join

#: Label of the model grid in file names (BIDS entity `space`).
SPACE = "MNI152rigid"
#: Columns of a result that its sidecar repeats, each under its name in CamelCase.
IN_SIDECAR = (
    "scan_id", "model", "model_version", "target", "status", "code", "gradient_correlation",
    "volume_drift", "outlier_score", "lesion_ml", "uncertainty_mean", "config_digest",
    "code_version",
)  # fmt: skip


@dataclass(frozen=True)
class Names:
    """Addresses of what is written for one scan.

    Attributes:
        root: Root of the derivative data set.
        stem: `sub-01/ses-1/anat/sub-01_ses-1_*T1w`: folder, entities and BIDS suffix.
    """

    root: str
    stem: str

    def _named(self, entities: str, ending: str) -> str:
        head, _, suffix = self.stem.rpartition("_")
        return join(self.root, f"{head}_{entities}_{suffix}{ending}")

    @property
    def native(self) -> str:
        """Harmonized volume on the scan's own grid."""
        return self._named("desc-harmonized", ".nii.gz")

    @property
    def sidecar(self) -> str:
        """JSON beside it."""
        return self._named("desc-harmonized", ".json")

    @property
    def model_grid(self) -> str:
        """Harmonized volume on the model grid."""
        return self._named(f"space-{SPACE}_desc-harmonized", ".nii.gz")

    @property
    def uncertainty(self) -> str:
        """Standard deviation over the seeds, on the scan's own grid."""
        return self._named("desc-harmonizedstd", ".nii.gz")

    @property
    def uncertainty_model_grid(self) -> str:
        """The same on the model grid."""
        return self._named(f"space-{SPACE}_desc-harmonizedstd", ".nii.gz")


_ENTITY = re.compile(r"_(?P<key>task|acq|ce|rec|dir|run|echo|part|chunk)-(?P<value>[A-Za-z0-9]+)")


def stems(scans: pa.Table) -> pa.Table:
    """Output name of every scan: its own BIDS entities, made unique where two would collide.

    Args:
        scans: All rows of `scans` of the lake, so that a name depends on no request.

    Returns:
        `scan_id` and `stem`: folder, entities and suffix. Two scans of one name (two data sets
        with a subject 01) are told apart by `acq-` and the beginning of the scan_id.
    """
    columns = ["scan_id", "indexed_at", "uri", "subject", "session", "sequence"]
    in_order = scans.select(columns).sort_by(
        [("indexed_at", "ascending"), ("scan_id", "ascending")]
    )
    ids, names = [], []
    taken: set[str] = set()
    for batch in in_order.to_batches(max_chunksize=10_000):
        for scan in batch.to_pylist():
            entities = _ENTITY.findall(str(scan["uri"]).rpartition("/")[2])
            stem = _stem(scan, entities)
            if stem in taken:
                short = scan["scan_id"][:8]
                rest = [(k, v) for k, v in entities if k != "acq"]
                acq = "".join(v for k, v in entities if k == "acq")
                stem = _stem(scan, [("acq", acq + short), *rest])
            taken.add(stem)
            ids.append(scan["scan_id"])
            names.append(stem)
    return pa.table({"scan_id": pa.array(ids, pa.string()), "stem": pa.array(names, pa.string())})


def _stem(scan: Mapping[str, Any], entities: Sequence[tuple[str, str]]) -> str:
    # A manifest may name no subject; the scan then stands for itself.
    folder = [f"sub-{scan['subject'] or scan['scan_id'][:12]}"]
    if scan["session"]:
        folder.append(f"ses-{scan['session']}")
    name = "_".join([*folder, *(f"{k}-{v}" for k, v in entities), scan["sequence"] or "MRI"])
    return "/".join([*folder, "anat", name])


def json_beside(image: str) -> str:
    """Address of the sidecar of an image."""
    return image.removesuffix(".nii.gz") + ".json"


def sidecar_bytes(row: Mapping[str, Any], *, source: str, lesion: str | None = None) -> bytes:
    """The JSON sidecar of one result: BIDS's own keys, then the columns of `IN_SIDECAR`.

    Args:
        row: Row of `results`.
        source: Address of the scan.
        lesion: Address of the lesion mask that was honoured.
    """
    values: dict[str, Any] = {
        "Description": "Scan in the look of the target site, on its own grid.",
        "Sources": [source] if lesion is None else [source, lesion],
        "SkullStripped": True,
    }
    if lesion is not None:
        values["LesionMask"] = lesion
    for name in IN_SIDECAR:
        if row.get(name) is not None:
            values[camel(name)] = row[name]
    return (json.dumps(values, indent=2) + "\n").encode()


def uncertainty_sidecar_bytes(
    row: Mapping[str, Any], *, sources: Sequence[str], samples: int, seed: int, derived: str
) -> bytes:
    """The JSON sidecar of an uncertainty map.

    Args:
        row: Row of `results`.
        sources: Addresses it was made from.
        samples: Draws.
        seed: Of the run; draw n depends on scan, seed and n alone.
        derived: How the map came onto its grid, a sentence.
    """
    values = {
        "Description": "Voxelwise standard deviation of the harmonized scan over seeds of the "
        f"sampler. {derived}",
        "Units": "1",
        "UnitsDescription": "part of the harmonized scan's intensity range, 0 to 1",
        "Samples": samples,
        "Seed": seed,
        "Sources": list(sources),
        "SkullStripped": True,
        **{
            camel(name): row[name]
            for name in ("scan_id", "model", "model_version", "target", "uncertainty_mean",
                         "lesion_ml", "config_digest", "code_version")
            if row.get(name) is not None
        },
    }  # fmt: skip
    return (json.dumps(values, indent=2) + "\n").encode()


def camel(name: str) -> str:
    """`gradient_correlation` → `GradientCorrelation`."""
    RESULTS.column(name)  # a name that is no column is a mistake of this program
    return "".join(part.capitalize() for part in name.split("_"))


def write_description(lake: Lake, key: str, code_version: str, sources: Sequence[str]) -> None:
    """`dataset_description.json`, README and column descriptions of a derivative data set."""
    store, root = Store(), lake.derivatives(key)
    described = {
        camel(name): {
            "Description": RESULTS.column(name).description,
            "Units": RESULTS.column(name).unit,
        }
        for name in IN_SIDECAR
    }
    description = {
        "Name": f"Harmonized scans: {key}",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [
            {
                "Name": "sgcd-lake",
                "Version": code_version,
                "Description": f"Semantic-guided conditional diffusion, model {key}",
            }
        ],
        "SourceDatasets": [{"URL": uri} for uri in sources],
        "SidecarColumns": described,
    }
    readme = (
        f"Harmonized by SGCD Lake, model {key}. Research use only.\n\n"
        "*_desc-harmonized_*.nii.gz lies on the grid of the scan it was made from;\n"
        f"*_space-{SPACE}_desc-harmonized_*.nii.gz on the model grid, intensities in [0, 1];\n"
        "*_desc-harmonizedstd_*.nii.gz, where there is one, is the standard deviation over seeds.\n"
    )
    body = (json.dumps(description, indent=2) + "\n").encode()
    store.write_bytes(join(root, "dataset_description.json"), body)
    store.write_bytes(join(root, "README"), readme.encode())
