"""Names and sidecars of the harmonized scans: one BIDS derivative data set per model version."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.bids_links import Links
from pipelines.catalog import Catalog
from pipelines.plan import LABELS, labels_differ
from pipelines.schemas import RESULTS
from pipelines.verdict import person
from sgcd_core.io.bids import LABEL
from sgcd_core.io.store import Store, join, sha256_hex

#: Label of the model grid in file names (BIDS entity `space`).
SPACE = "MNI152rigid"
#: Entity of harmonized volumes.
HARMONIZED = "desc-harmonized"
#: What that space is laid on.
TEMPLATE = "http://www.bic.mni.mcgill.ca/ServicesAtlases/ICBM152NLin2009"
#: Columns of a result that its sidecar repeats, each under its name in CamelCase.
IN_SIDECAR = (
    "scan_id", "model", "model_version", "target", "status", "code", "gradient_correlation",
    "local_correlation", "volume_drift", "outlier_score", "lesion_ml", "uncertainty_mean",
    "config_digest", "code_version",
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

    def _named(self, entities: str, ending: str, space: str = "") -> str:
        head, _, suffix = self.stem.rpartition("_")
        head, chunk, number = head.partition("_chunk-")  # which BIDS puts behind the space
        return join(self.root, f"{head}{space}{chunk}{number}_{entities}_{suffix}{ending}")

    @property
    def native(self) -> str:
        """Harmonized volume on the scan's own grid."""
        return self._named(HARMONIZED, ".nii.gz")

    @property
    def sidecar(self) -> str:
        """JSON beside it."""
        return self._named(HARMONIZED, ".json")

    @property
    def model_grid(self) -> str:
        """Harmonized volume on the model grid."""
        return self._named(HARMONIZED, ".nii.gz", f"_space-{SPACE}")

    @property
    def uncertainty(self) -> str:
        """Standard deviation over the seeds, on the scan's own grid."""
        return self._named("desc-harmonizedstd", ".nii.gz")

    @property
    def uncertainty_model_grid(self) -> str:
        """The same on the model grid."""
        return self._named("desc-harmonizedstd", ".nii.gz", f"_space-{SPACE}")

    @property
    def files(self) -> tuple[str, ...]:
        """All that may have been written, each after its sidecar; last what the table names.

        So outputs that are removed in this order are found again until none is left.
        """
        return (
            *_with_sidecars(self.model_grid), *self.uncertainty_files,
            *_with_sidecars(self.native),
        )  # fmt: skip

    @property
    def uncertainty_files(self) -> tuple[str, ...]:
        """Of them the maps of the seeds, in such an order."""
        return (*_with_sidecars(self.uncertainty_model_grid), *_with_sidecars(self.uncertainty))

    @property
    def participant(self) -> str:
        """`sub-01`."""
        return self.stem.partition("/")[0]


#: Entities that an output keeps, in the order of BIDS.
_KEPT = ("task", "acq", "ce", "rec", "dir", "run", "echo", "part", "chunk")
_ENTITY = re.compile(rf"_(?P<key>[a-z]+)-(?P<value>{LABEL})")

_OUTPUT = re.compile(
    rf"(?P<stem>sub-[^/]+/(?:ses-[^/]+/)?anat/[^/]+_){HARMONIZED}_(?P<suffix>[^/]+)\.nii\.gz$"
)


def output_names(catalog: Catalog, scans: pa.Table, model: str, version: int) -> pa.Table:
    """Output name of every scan of the lake in one model version's derivative, see `stems`.

    Args:
        catalog: The lake's tables.
        scans: All rows of `scans`, so that a name depends on no request.
        model: Name in the registry.
        version: Version in the registry.
    """
    first = catalog.history("scans", columns=("scan_id", "indexed_at"))
    first = first.group_by("scan_id").aggregate([("indexed_at", "min")])
    at = first["indexed_at_min"].take(
        pc.index_in(scans["scan_id"], first["scan_id"].combine_chunks())
    )
    place = scans.column_names.index("indexed_at")
    owner: dict[str, str | None] = {}
    for row in _written(catalog, scans, model, version).to_pylist():
        if stem := _stem_of(row["output_uri"]):
            # the oldest first: a file holds what was written last
            owner[stem] = None if row["relabelled"] else row["scan_id"]
    given = {scan_id: stem for stem, scan_id in owner.items() if scan_id is not None}
    return stems(scans.set_column(place, "indexed_at", at), given)


def _written(catalog: Catalog, scans: pa.Table, model: str, version: int) -> pa.Table:
    """Every output that a model version ever wrote for these scans, the oldest first.

    `scan_id`, `output_uri`, and `relabelled`: a label that it is named or made by is no longer the
    scan's.
    """
    found = catalog.history(
        "results", where={"model": model, "model_version": version},
        columns=("scan_id", "output_uri", *LABELS),
    ).filter(pc.field("output_uri").is_valid())  # fmt: skip
    at = pc.index_in(found["scan_id"], scans["scan_id"].combine_chunks())
    found, at = found.filter(at.is_valid()), at.drop_null()
    return found.append_column("relabelled", labels_differ(scans.take(at), found))


def _stem_of(output_uri: str) -> str | None:
    """What an output is named by, see `Names`."""
    name = _OUTPUT.search(output_uri)
    return name and name["stem"] + name["suffix"]


#: The most that is kept of entities that an output does not keep, in `acq-`.
_LONGEST = 60
#: More addresses than this are looked for in one listing of the derivative.
_FEW = 100


def misnamed_outputs(
    catalog: Catalog, scans: pa.Table, root: str, model: str, version: int
) -> list[Names]:
    """Outputs that lie under labels their scans have no more, others having taken their place.

    Args:
        catalog: The lake's tables.
        scans: All rows of `scans` of the lake, with the columns `LABELS`.
        root: Root of the derivative data set; outputs of other places stay.
        model: Name in the registry.
        version: Version in the registry.
    """
    written = _written(catalog, scans, model, version)
    where = {"model": model, "model_version": version}
    current = catalog.rows("results", where=where, columns=("output_uri",))["output_uri"]
    old = written.filter(
        pc.field("relabelled") & ~pc.field("output_uri").isin(current.combine_chunks())
    )["output_uri"].unique().to_pylist()  # fmt: skip
    named = [(uri, Names(root, stem)) for uri in sorted(old) if (stem := _stem_of(uri))]
    found = [names for uri, names in named if names.native == uri]
    store = Store()
    if len(found) > _FEW:
        there = {item.uri for item in store.list(root + "/")}
        return [names for names in found if names.native in there]
    return [names for names in found if store.exists(names.native)]


def stems(scans: pa.Table, given: Mapping[str, str] | None = None) -> pa.Table:
    """Output name of every scan: its own BIDS entities, made unique where two would collide.

    Args:
        scans: All rows of `scans` of the lake, `indexed_at` being when each was first indexed.
        given: Names of outputs that are there, by scan_id: they stay, whoever comes later.

    Returns:
        `scan_id` and `stem`: folder, entities and suffix. Of several scans of one name the one
        that can be used, was indexed first and has the shortest file name has it (so that all
        people's are of the same kind); the others have `acq-` and the entities that an output
        does not keep, or the beginning of the scan_id, besides. Of several people of one label
        (two data sets with a subject 01) whoever was indexed first has it, the others a digest of
        their data set besides.
    """
    columns = ["scan_id", "indexed_at", "uri", "dataset", "subject", "session", "sequence"]
    in_order = scans.select(columns).append_column(
        "failed", pc.not_equal(scans["status"], "ok")
    ).append_column(
        "length", pc.utf8_length(pc.replace_substring_regex(scans["uri"], "^.*/", ""))
    ).sort_by([
        (name, "ascending") for name in ("failed", "indexed_at", "length", "scan_id")
    ])  # fmt: skip
    known = given or {}
    ids, names = [], []
    taken = set(known.values())
    people: dict[str, str] = {}  # label → whose it is
    labels: dict[tuple[str, str], str] = {}  # person and own label → label in outputs
    for batch in in_order.filter(
        pc.is_in(in_order["scan_id"], pa.array(known, pa.string()))
    ).to_batches(max_chunksize=10_000):  # whose outputs are there
        for scan in batch.to_pylist():
            label = known[scan["scan_id"]].partition("/")[0]
            people.setdefault(label, person(scan))
            labels.setdefault((person(scan), participant(scan)), label)
    for batch in in_order.to_batches(max_chunksize=10_000):
        for scan in batch.to_pylist():
            stem = known.get(scan["scan_id"])
            if stem is None:
                found = _ENTITY.findall(str(scan["uri"]).rpartition("/")[2])
                entities = {key: value for key, value in found if key in _KEPT}
                dropped = "".join(
                    key + value for key, value in found if key not in (*_KEPT, "sub", "ses")
                )
                who, own = person(scan), participant(scan)
                if (who, own) not in labels:
                    alone = people.setdefault(own, who) == who
                    more = "" if alone else sha256_hex(str(scan["dataset"]).encode())[:6]
                    labels[who, own] = own + more
                label = labels[who, own]
                acq, short = entities.get("acq", ""), scan["scan_id"][:8]
                stem = _stem(label, scan, entities)
                for more in (dropped[:_LONGEST], dropped[:_LONGEST] + short):
                    if stem not in taken:
                        break
                    stem = _stem(label, scan, entities | {"acq": acq + more})
                taken.add(stem)
            ids.append(scan["scan_id"])
            names.append(stem)
    return pa.table({"scan_id": pa.array(ids, pa.string()), "stem": pa.array(names, pa.string())})


def _stem(label: str, scan: Mapping[str, Any], entities: Mapping[str, str]) -> str:
    folder = [label]
    if scan["session"]:
        folder.append(f"ses-{bids_label(scan['session'])}")
    kept = [f"{key}-{entities[key]}" for key in _KEPT if entities.get(key)]
    name = "_".join([*folder, *kept, scan["sequence"] or "MRI"])
    return "/".join([*folder, "anat", name])


def participant_of(output_uri: str) -> str | None:
    """`sub-01`, from the address of an output; None where it is no address of `Names`."""
    stem = _stem_of(output_uri)
    return stem and stem.partition("/")[0]


def participant(scan: Mapping[str, Any]) -> str:
    """`sub-01`: who a scan is of, in a derivative.

    A manifest may name no subject; the scan then stands for itself.
    """
    return f"sub-{bids_label(scan['subject'] or scan['scan_id'][:12])}"


def bids_label(word: str) -> str:
    """`word` where it is a BIDS label, letters and digits; else those of it, and a digest of all.

    A manifest's subjects may be called `MR_001`; with the digest `MR_001` and `MR001` are two.
    """
    label = re.sub(r"[^A-Za-z0-9+]", "", word)
    return label if label == word else label + sha256_hex(word.encode())[:6]


def remove_files(files: Sequence[str], store: Store) -> bool:
    """Delete `Names.files` or some of them, if the last one, by which they are found, is there."""
    if not store.exists(files[-1]):
        return False
    for uri in files:
        store.delete(uri)
    return True


def _with_sidecars(image: str) -> tuple[str, str]:
    return json_beside(image), image


def json_beside(image: str) -> str:
    """Address of the sidecar of an image."""
    return image.removesuffix(".nii.gz") + ".json"


def sidecar_bytes(
    row: Mapping[str, Any], *, links: Links, source: str, lesion: str | None = None
) -> bytes:
    """The JSON sidecar of one result: BIDS's own keys, then the columns of `IN_SIDECAR`.

    Args:
        row: Row of `results`.
        links: What names the sources.
        source: Address of the scan.
        lesion: Address of the lesion mask that was honoured.
    """
    text = f"Scan in {_look(row)}, on its own grid."
    return _sidecar({"Description": text}, row, links, _sources(source, lesion), lesion)


def _look(row: Mapping[str, Any]) -> str:
    return "the look of the target site" if row.get("target") else "the common look of all sites"


def model_grid_sidecar_bytes(
    row: Mapping[str, Any],
    *,
    links: Links,
    source: str,
    registration: str,
    lesion: str | None = None,
) -> bytes:
    """The same for the volume on the model grid.

    Args:
        row: Row of `results`.
        links: What names the sources.
        source: Address of the scan.
        registration: `prepare.registration` of the settings.
        lesion: Address of the lesion mask that was honoured.
    """
    text = f"Scan in {_look(row)}, on the model grid, intensities in [0, 1]."
    values = {"Description": text, **_space(registration)}
    return _sidecar(values, row, links, _sources(source, lesion), lesion)


def uncertainty_sidecar_bytes(
    row: Mapping[str, Any],
    *,
    links: Links,
    sources: Sequence[str],
    samples: int,
    seed: int,
    registration: str | None = None,
) -> bytes:
    """The JSON sidecar of an uncertainty map.

    Args:
        row: Row of `results`.
        links: What names the sources.
        sources: Addresses it was made from.
        samples: Draws.
        seed: Of the run; draw n depends on scan, seed and n alone.
        registration: `prepare.registration` for the map on the model grid; None for the one on
            the scan's own grid.
    """
    how = "Interpolated linearly from the model grid." if registration is None else (
        "Computed on the model grid."
    )  # fmt: skip
    values = {
        "Description": "Voxelwise standard deviation of the harmonized scan over seeds of the "
        f"sampler. {how}",
        "Units": "1",
        "UnitsDescription": "part of the harmonized scan's intensity range, 0 to 1",
        "Samples": samples,
        "Seed": seed,
        **({} if registration is None else _space(registration)),
    }
    return _sidecar(values, row, links, sources, None, _IN_UNCERTAINTY)


_IN_UNCERTAINTY = (
    "scan_id", "model", "model_version", "target", "uncertainty_mean", "lesion_ml",
    "config_digest", "code_version",
)  # fmt: skip


def _sources(source: str, lesion: str | None) -> list[str]:
    return [source] if lesion is None else [source, lesion]


def _space(registration: str) -> dict[str, str]:
    """What `space-MNI152rigid` means; it is no space that BIDS lists."""
    how = (
        "the scan is aligned with it by a rotation and a shift; its size and shape are its own"
        if registration == "rigid"
        else "the scan's centre of mass is laid on its centre; it is not turned"
    )
    return {
        "SpatialReference": TEMPLATE,
        "SpaceDescription": "Millimetres of the ICBM152 2009a nonlinear symmetric template: "
        f"{how}.",
    }


def _sidecar(
    values: Mapping[str, Any],
    row: Mapping[str, Any],
    links: Links,
    sources: Sequence[str],
    lesion: str | None,
    columns: Sequence[str] = IN_SIDECAR,
) -> bytes:
    body: dict[str, Any] = {
        **values, "Sources": [links.uri(source) for source in sources], "SkullStripped": True,
    }  # fmt: skip
    if lesion is not None:
        body["LesionMask"] = links.uri(lesion)
    body |= {camel(name): row[name] for name in columns if _sayable(row.get(name))}
    return (json.dumps(body, indent=2, allow_nan=False) + "\n").encode()


def _sayable(value: Any) -> bool:
    """Whether JSON has a word for a value: no missing one, no NaN, no infinity."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def camel(name: str) -> str:
    """`gradient_correlation` → `GradientCorrelation`."""
    RESULTS.column(name)  # a name that is no column is a mistake of this program
    return "".join(part.capitalize() for part in name.split("_"))
