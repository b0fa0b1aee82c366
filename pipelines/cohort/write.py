"""The files of a cohort: BIDS names, tables and sidecars, and the truth as a derivative."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.cohort.plan import CohortRequest, Member
from pipelines.cohort.scanner import Scanner
from pipelines.cohort.tissues import TRUTH
from sgcd_core.errors import ConfigError, InputError
from sgcd_core.io.nifti import encode_nifti
from sgcd_core.io.store import Store, join

BIDS_VERSION = "1.10.0"
_README = """# Digital traveling subjects

Made by `sgcd cohort`; nobody was scanned. Each person is an anatomy under a smooth random warp,
aged, with a micro-structure of its own; each site is a scanner: field strength, timing, coil,
noise, resolution and intensity transfer, applied through signal equations.

Training subjects were scanned at one site each. Traveling subjects (split `test`) were scanned
at every site, also at those no training subject visited. The truth is in `derivatives/truth`:
tissue classes and brain mask of each subject, and the physics of each site in `sites.json`.
All scans of a subject share one world position unless the cohort was made with repositioning.
"""


def json_bytes(value: Any) -> bytes:
    """Indented JSON, a newline at the end; the same bytes for the same value."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def tsv_bytes(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    """A BIDS table; None becomes n/a."""
    lines = ["\t".join(columns)]
    lines += ["\t".join("n/a" if v is None else str(v) for v in row) for row in rows]
    return ("\n".join(lines) + "\n").encode()


def scan_uri(out: str, member: Member, site: str, sequence: str) -> str:
    """Address of one scan's volume."""
    subject, session = f"sub-{member.label}", f"ses-{site}"
    return join(out, subject, session, "anat", f"{subject}_{session}_{sequence}.nii.gz")


def sidecar_uri(uri: str) -> str:
    """Address of a volume's JSON. Written after the volume: where it is, the scan is complete."""
    return uri.removesuffix(".nii.gz") + ".json"


def truth_uri(out: str, member: Member, name: str) -> str:
    """Address of a truth file of a subject, `name` without the subject."""
    subject = f"sub-{member.label}"
    return join(out, "derivatives", "truth", subject, "anat", f"{subject}_{name}")


def claim(
    out: str,
    request: CohortRequest,
    store: Store,
    check_maps: Callable[[], dict[str, str]],
    *,
    dry_run: bool = False,
) -> None:
    """Record what this folder holds, or check that it holds just that.

    Args:
        out: Folder or prefix.
        request: Settings of the cohort.
        store: Where `out` is.
        check_maps: Gives the SHA-256 of the label maps by name, or raises; called once it is known
            that no other cohort lies here, and before anything is written. Cohorts of earlier
            versions have no digests: their maps are taken to be the same.
        dry_run: Check only.

    Raises:
        ConfigError: The folder holds another cohort, or anything else.
    """
    uri = join(out, "derivatives", "truth", "cohort.json")
    now = request.model_dump(mode="json")
    try:
        before = json.loads(store.read_bytes(uri, max_bytes=1_000_000))
    except InputError:
        if store.has_any(out):
            raise ConfigError(
                "holds files and is not a digital cohort.", where=out,
                hint="Choose a new folder.",
            ) from None  # fmt: skip
        maps = check_maps()
        if not dry_run:
            store.write_bytes(uri, json_bytes({**now, "maps": maps} if maps else now))
        return
    known = before.pop("maps", None)
    keys = sorted(k for k in before | now if before.get(k) != now.get(k))
    if keys:
        raise ConfigError(
            f"holds a cohort made with other settings ({', '.join(keys)}).", where=out,
            hint="Choose another folder, or repeat the settings it was made with.",
        )  # fmt: skip
    maps = check_maps()
    names = sorted(name for name in maps if maps[name] != known.get(name)) if known else []
    if names:
        raise ConfigError(
            f"holds a cohort made from other label maps of the same names ({', '.join(names)}).",
            where=out, hint="Choose another folder, or give the label maps it was made from.",
        )  # fmt: skip


def write_tables(
    out: str, members: Sequence[Member], scanners: Sequence[Scanner], store: Store
) -> None:
    """Descriptions, participants, sessions and the physics of the sites; small, always written."""
    made_by = [{"Name": "sgcd cohort", "Description": "digital traveling subjects"}]

    def put(name: str, data: bytes) -> None:
        store.write_bytes(join(out, name), data)

    description = {"Name": "Digital traveling subjects", "BIDSVersion": BIDS_VERSION,
                   "DatasetType": "raw", "License": "CC0", "GeneratedBy": made_by}  # fmt: skip
    put("dataset_description.json", json_bytes(description))
    put("README.md", _README.encode())
    put("participants.tsv", tsv_bytes(
        ("participant_id", "age", "sex", "split", "site"),
        [(f"sub-{m.label}", m.age, m.sex, m.split, m.sites[0] if m.split == "train" else None)
         for m in members],
    ))  # fmt: skip
    put("participants.json", json_bytes({
        "age": {"Description": "age that the anatomy shows", "Units": "year"},
        "sex": {"Description": "sex, shown by head size", "Levels": {"F": "female", "M": "male"}},
        "split": {"Description": "use in experiments",
                  "Levels": {"train": "scanned at one site", "test": "scanned at every site"}},
        "site": {"Description": "site of a training subject; n/a for traveling subjects"},
    }))  # fmt: skip
    column = {"site": {"Description": "site where the session took place"}}
    for member in members:
        subject = f"sub-{member.label}"
        rows = [(f"ses-{site}", site) for site in member.sites]
        put(f"{subject}/{subject}_sessions.tsv", tsv_bytes(("session_id", "site"), rows))
        put(f"{subject}/{subject}_sessions.json", json_bytes(column))
    truth = {"Name": "Truth of digital traveling subjects", "BIDSVersion": BIDS_VERSION,
             "DatasetType": "derivative", "License": "CC0", "GeneratedBy": made_by,
             "SourceDatasets": [{"URL": "../.."}]}  # fmt: skip
    put("derivatives/truth/dataset_description.json", json_bytes(truth))
    put("derivatives/truth/sites.json", json_bytes([s.model_dump(mode="json") for s in scanners]))
    put("derivatives/truth/dseg.tsv", tsv_bytes(
        ("index", "name"), [(number, name) for number, (name, _) in TRUTH.items()]))  # fmt: skip
    origin = [(f"sub-{m.label}", m.anatomy) for m in members]
    put("derivatives/truth/participants.tsv", tsv_bytes(("participant_id", "anatomy"), origin))


def write_scan(
    uri: str, data: NDArray[np.float32], affine: NDArray[np.float64],
    sidecar: Mapping[str, Any], store: Store,
) -> None:  # fmt: skip
    """One scan as int16, then its sidecar, whose presence says the scan is complete."""
    stored = np.clip(np.rint(data), 0, 32767)
    store.write_bytes(uri, encode_nifti(stored, affine, dtype=np.int16))
    store.write_bytes(sidecar_uri(uri), json_bytes(sidecar))


def sidecar(scanner: Scanner, sequence: str, head: bool) -> dict[str, Any]:
    """BIDS metadata of a scan: times in seconds, angles in degrees, field in tesla."""
    protocol = scanner.acquisitions[sequence].protocol
    names = {
        "mprage": ("GR\\IR", "MP", "MPRAGE"),
        "spoiled_gradient_echo": ("GR", "SP", "spoiled gradient echo"),
        "spin_echo": ("SE", "NONE", "spin echo"),
    }
    scanning, variant, name = names[protocol.kind]
    out: dict[str, Any] = {
        "Modality": "MR",
        "Manufacturer": "digital",
        "ManufacturersModelName": scanner.model,
        "InstitutionName": scanner.site,
        "MagneticFieldStrength": scanner.field_strength,
        "ScanningSequence": scanning,
        "SequenceVariant": variant,
        "PulseSequenceType": name,
        "MRAcquisitionType": "3D",
        "EchoTime": round(protocol.te / 1000, 6),
        "FlipAngle": protocol.flip,
        "SkullStripped": not head,
    }
    if protocol.kind == "mprage":
        out["RepetitionTimePreparation"] = round(protocol.tr / 1000, 6)
        out["RepetitionTimeExcitation"] = round(protocol.echo_spacing / 1000, 6)
        out["InversionTime"] = round((protocol.ti or 0.0) / 1000, 6)
    out["RepetitionTime"] = round(protocol.tr / 1000, 6)
    return out
