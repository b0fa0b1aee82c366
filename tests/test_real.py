"""Real scans through the command line: three sites, a head, stripped brains, thick slices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.prepare import load_native_mask
from ray_jobs import cli
from ray_jobs.session import session
from sgcd_core.config import load_config

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.ray]

#: A coarse grid and neither N4 nor registration: what is tested is the way, not the model.
PREPARE = [
    "prepare.shape=[24,24,24]", "prepare.mm=8", "prepare.bias_correction=none",
    "prepare.registration=none",
]  # fmt: skip
TRAIN = [
    "network.channels=[8,16]", "network.attention_levels=[false,true]",
    "network.head_channels=8", "global_stage.steps=4", "target_stage.steps=2",
    "target_stage.encoder=statistics",
]  # fmt: skip
SCANS = [
    "sub-NSK01/anat/sub-NSK01_T1w.nii.gz", "sub-NSK06/anat/sub-NSK06_T1w.nii.gz",
    "sub-TCGADU7294/anat/sub-TCGADU7294_T2w.nii.gz",
    "sub-UCLA01/anat/sub-UCLA01_acq-inplane_T2w.nii.gz",
]  # fmt: skip


def words(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@dataclass
class Place:
    data: Path
    lake: Lake
    check_code: int

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.lake)

    def outputs(self) -> list[tuple[nib.Nifti1Image, nib.Nifti1Image, dict[str, object]]]:
        """(scan, harmonized scan, row of results) of every scan that was harmonized."""
        uris = {row["scan_id"]: row["uri"] for row in self.catalog.rows("scans").to_pylist()}
        done = [row for row in self.catalog.rows("results").to_pylist() if row["output_uri"]]
        return [(nib.load(uris[r["scan_id"]]), nib.load(r["output_uri"]), r) for r in done]


def mirrored(source: Path, target: Path) -> None:
    """The same scan with its first axis stored the other way round and the affine to match."""
    image = nib.load(source)
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = image.shape[0] - 1
    affine = image.affine @ flip
    other = nib.Nifti1Image(np.asarray(image.dataobj)[::-1], affine)
    other.set_qform(affine, 1)
    other.set_sform(affine, 1)
    target.parent.mkdir(parents=True)
    nib.save(other, target)


@pytest.fixture(scope="module")
def place(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Four real scans and a mirrored copy of the first, prepared, trained on and harmonized."""
    root = tmp_path_factory.mktemp("real")
    data, real = root / "data", data_dir / "real"
    for name in SCANS:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).symlink_to(real / name)
    mirrored(real / SCANS[0], data / "sub-MIRROR" / "anat" / "sub-MIRROR_T1w.nii.gz")
    people = (real / "participants.tsv").read_text()
    (data / "participants.tsv").write_text(f"{people}sub-MIRROR\tnovosibirsk\t39\tM\tdepr\tbrain\n")
    lake = str(root / "lake")
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    patch.delenv("RAY_ADDRESS", raising=False)
    code = cli.main(["check", *(str(data / name) for name in SCANS)])
    model = ["--model", "target-novosibirsk"]
    with session():
        assert cli.main(["index", str(data), "--lake", lake]) == 1  # thick slices
        assert cli.main(["prepare", "--lake", lake, *words(PREPARE)]) == 0
        # How the scans were prepared is not said again.
        assert cli.main(["train", "--lake", lake, *words(TRAIN)]) == 0
        assert cli.main(["suggest-target", "--lake", lake]) == 0
        tune = ["tune", "--lake", lake, "--target", "novosibirsk"]
        assert cli.main(tune) == 65  # it has no T2w
        assert cli.main([*tune, "--sequences", "T1w"]) == 0
        assert cli.main(["harmonize", "--lake", lake, *model]) == 1
        yield Place(data, Lake(lake), code)
    patch.undo()


def test_check_says_which_scans_are_unfit(place: Place) -> None:
    assert place.check_code == 1


def test_every_scan_is_one_row_whatever_happens(place: Place) -> None:
    rows = place.catalog.rows("results").to_pylist()
    code = {(row["subject"], row["sequence"]): row["code"] for row in rows if not row["output_uri"]}
    assert len(rows) == len({row["scan_id"] for row in rows}) == 5
    assert code == {
        ("UCLA01", "T2w"): "SCAN-COARSE",
        ("TCGADU7294", "T2w"): "TARGET-SEQUENCE",  # the target has no T2w
    }
    said = {row["code"]: row["message"] for row in rows if row["code"] in code.values()}
    assert "novosibirsk" in said["TARGET-SEQUENCE"] and "--model global" in said["TARGET-SEQUENCE"]


def test_outputs_lie_exactly_where_their_scan_lies(place: Place) -> None:
    names = ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "pixdim", "quatern_b")
    recipe = load_config(settings=PREPARE).prepare.digest()
    outputs = place.outputs()
    assert len(outputs) == 3
    for before, after, row in outputs:
        assert before.shape == after.shape
        assert before.affine.tobytes() == after.affine.tobytes()
        for name in names:
            old, new = before.header[name], after.header[name]
            assert (
                old[:4].tobytes() == new[:4].tobytes() if name == "pixdim" else (old == new).all()
            )
        data = np.asarray(after.dataobj)
        mask = load_native_mask(place.lake, recipe, str(row["scan_id"]))
        assert np.isfinite(data).all() and data[mask].any() and not data[~mask].any()


def test_left_stays_left(place: Place) -> None:
    """Closer to its scan than mirrored, and the same whichever way the axis is stored."""
    found = {row["subject"]: (before, after) for before, after, row in place.outputs()}
    for before, after in found.values():
        scan, out = np.asarray(before.dataobj), np.asarray(after.dataobj)
        inside = (out > 0) & (out[::-1] > 0)
        straight = np.corrcoef(scan[inside], out[inside])[0, 1]
        crossed = np.corrcoef(scan[inside], out[::-1][inside])[0, 1]
        assert straight > crossed + 0.1
    one = np.asarray(found["NSK01"][1].dataobj)
    two = np.asarray(found["MIRROR"][1].dataobj)[::-1]
    assert np.corrcoef(one[one > 0], two[one > 0])[0, 1] > 0.98
