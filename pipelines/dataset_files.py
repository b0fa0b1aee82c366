"""The files of a derivative data set that describe it as a whole: what BIDS asks for at its root.

All are written by the driver alone, from the catalog, and only where they changed, so that a run
on new scans brings them up to date and a run that has nothing to do leaves them alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from pipelines.bids_links import Links, as_uri, link_names
from pipelines.derivative import IN_SIDECAR, SPACE, camel
from pipelines.lesions import dataset_root
from pipelines.participants import participants_tables
from pipelines.schemas import RESULTS
from sgcd_core.errors import InputError, SgcdError
from sgcd_core.io.store import Store, join

Row = Mapping[str, Any]

BIDS_VERSION = "1.10.0"
DESCRIPTION = "dataset_description.json"
#: Where the files for people lie; no part of what BIDS defines.
LOGS = "logs"
_DESCRIPTIONS = {
    "harmonized": "scan in the look of the model's target site; brain only",
    "harmonizedstd": "voxelwise standard deviation of desc-harmonized over seeds of the sampler",
}


def sources_of(scans: Iterable[Row]) -> list[str]:
    """Roots of the BIDS data sets that scans lie in."""
    return sorted({root for scan in scans if (root := dataset_root(scan))})


def write_description(
    root: str,
    key: str,
    code_version: str,
    scans: Sequence[Row],
    used: Sequence[Row] | None = None,
    store: Store | None = None,
) -> Links:
    """Write what says which data set this is; return what names its sources.

    Args:
        root: Address of the derivative data set.
        key: Model and version, as in its folder's name.
        code_version: Of this program.
        scans: Rows of `scans`, all of the lake: names of sources depend on no request.
        used: Those of them that are harmonized, before or now; None for all.
        store: Where it lies.
    """
    store = store or Store()
    roots = sources_of(scans)
    links = Links(root, link_names(roots, _names_given(store, root)))
    description: dict[str, Any] = {
        "Name": f"Harmonized scans: {key}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [_generator(key, code_version)],
        "SourceDatasets": [
            _source(store, source) for source in sources_of(scans if used is None else used)
        ],
        "DatasetLinks": links.dataset_links(),
        "SidecarColumns": {
            camel(name): {
                "Description": RESULTS.column(name).description,
                "Units": RESULTS.column(name).unit,
            }
            for name in IN_SIDECAR
        },
    }
    for name in ("SourceDatasets", "DatasetLinks"):
        if not description[name]:  # scans of no BIDS data set: a manifest
            del description[name]
    readme = (
        f"Harmonized by SGCD Lake, model {key}. Research use only.\n\n"
        "*_desc-harmonized_*.nii.gz lies on the grid of the scan it was made from;\n"
        f"*_space-{SPACE}_desc-harmonized_*.nii.gz on the model grid, intensities in [0, 1];\n"
        "*_desc-harmonizedstd_*.nii.gz, where there is one, is the standard deviation over seeds.\n"
        "Sources in the sidecars are BIDS URIs: dataset_description.json says where each data set\n"
        f"lies. {LOGS}/CITATION.md describes what was done, for a methods section.\n"
    )
    table = "desc_id\tdescription\n" + "".join(
        f"desc-{name}\t{text}\n" for name, text in _DESCRIPTIONS.items()
    )
    write_changed(store, join(root, DESCRIPTION), _json(description))
    write_changed(store, join(root, "README"), readme.encode())
    write_changed(store, join(root, "descriptions.tsv"), table.encode())
    write_changed(store, join(root, ".bidsignore"), f"{LOGS}/\n/report\ngroup_*.tsv\n".encode())
    return links


def write_participants(
    root: str, scans: Iterable[Row], store: Store | None = None, gone: Collection[str] = ()
) -> None:
    """Write participants.tsv and .json: who has an output, with what the sources say of them.

    Rows of others stay, since runs with a lake of their own may write to one data set.

    Args:
        root: Address of the derivative data set.
        scans: Rows of `scans` with an output of this model version.
        store: Where it lies.
        gone: Participants (`sub-01`) whose rows do not stay, unless `scans` hold them.
    """
    store = store or Store()
    table, columns = participants_tables(scans, store, root, gone)
    if table.count(b"\n") < 2:  # nobody
        return
    write_changed(store, join(root, "participants.tsv"), table)
    write_changed(store, join(root, "participants.json"), _json(columns))


def write_changed(store: Store, uri: str, body: bytes) -> None:
    """Write an object unless it holds just that."""
    try:
        if store.read_bytes(uri, max_bytes=len(body)) == body:
            return
    except InputError:  # there is none, or a longer one
        pass
    store.write_bytes(uri, body)


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _names_given(store: Store, root: str) -> dict[str, str]:
    """Root → name of the sources that the data set names already."""
    try:
        links = json.loads(store.read_bytes(join(root, DESCRIPTION), max_bytes=10**7))[
            "DatasetLinks"
        ]
        return {_address(uri): name for name, uri in links.items()}
    except (InputError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # not written yet, or by an earlier version


def _address(uri: str) -> str:
    return unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri


def _source(store: Store, root: str) -> dict[str, str]:
    """Where a source lies, and its DOI where its own description gives one."""
    found = {"URL": as_uri(root)}
    try:
        doi = json.loads(store.read_bytes(join(root, DESCRIPTION), max_bytes=10**7)).get(
            "DatasetDOI"
        )
    except (SgcdError, ValueError, AttributeError):  # it may be out of reach by now
        return found
    return found | {"DOI": doi} if isinstance(doi, str) and doi else found


def _generator(key: str, code_version: str) -> dict[str, Any]:
    """This program, where its code is, and the container it runs in as far as that is known."""
    from importlib.metadata import PackageNotFoundError, metadata

    made: dict[str, Any] = {"Name": "sgcd-lake", "Version": code_version}
    try:
        urls = metadata("sgcd-lake").get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    for entry in urls:
        label, _, url = entry.partition(",")
        if label.strip().lower() in ("repository", "source", "homepage"):
            made["CodeURL"] = url.strip()
            break
    made["Description"] = f"Semantic-guided conditional diffusion, model {key}"
    container = {
        word: value for word in ("Type", "Tag", "URI")
        if (value := os.environ.get(f"SGCD_CONTAINER_{word.upper()}"))
    }  # fmt: skip
    image = os.environ.get("APPTAINER_NAME") or os.environ.get("SINGULARITY_NAME")
    if not container and image:
        container = {"Type": "apptainer", "Tag": image}
    return made | ({"Container": container} if container else {})
