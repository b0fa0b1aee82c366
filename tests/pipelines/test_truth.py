"""The target's scan of a subject, laid on another scan of the same subject."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fake_lake import fake_lake

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.pair import load_pair
from pipelines.prepare import load_prepared, save_prepared
from pipelines.truth import load_truth_on_scan
from sgcd_core.config import PrepareConfig
from sgcd_core.errors import InputError
from sgcd_core.io.nifti import read_nifti
from sgcd_core.io.store import Store
from sgcd_core.volume.prepare import prepare_scan
from sgcd_core.volume.template import template


@pytest.mark.parametrize("axes", ["LPS", "PIR"])
def test_the_truth_is_the_same_however_its_file_is_stored(
    axes: str, tmp_path: Path, tmp_lake: Lake
) -> None:
    image, mask, affine = template(3.0)
    shaded = image * np.exp(np.linspace(-0.3, 0.3, image.shape[0]))[:, None, None]
    data = np.where(mask, 50 + 700 * shaded, 0).astype(np.float32)
    plain = nib.Nifti1Image(data, affine)
    turned = plain.as_reoriented(
        nib.orientations.ornt_transform(
            nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(axes))
        )
    )
    config = PrepareConfig(shape=(64, 80, 64), mm=3)
    found, own = {}, None
    for name, stored in (("plain", plain), ("turned", turned)):
        path = tmp_path / f"{name}.nii.gz"
        stored.set_sform(stored.affine, 1)
        nib.save(stored, path)
        scan = read_nifti(str(path))
        folder = tmp_lake.prepared(config.digest(), scan.sha256)
        save_prepared(folder, scan, prepare_scan(scan, config, sequence="T1w"), Store())
        row = {"scan_id": scan.sha256, "sequence": "T1w", "uri": str(path)}
        own = own or load_prepared(tmp_lake, config.digest(), scan.sha256)
        found[name], inside = load_truth_on_scan(tmp_lake, config, row, own)
    assert np.abs(found["plain"] - found["turned"])[inside].max() < 2e-3
    nib.save(plain.slicer[1:], path)
    with pytest.raises(InputError, match="SCAN-CHANGED"):
        load_truth_on_scan(tmp_lake, config, row, own)


def test_a_scan_that_is_not_what_was_indexed_is_not_shown(tmp_path: Path) -> None:
    lake, config = fake_lake(str(tmp_path), lambda scan, truth: truth, sites=(), traveling=0)
    scan, other = Catalog(lake).rows("scans").to_pylist()[:2]
    assert load_pair(lake, config.prepare, scan, None).before.any()
    shutil.copy(other["uri"], scan["uri"])
    with pytest.raises(InputError, match="SCAN-CHANGED"):
        load_pair(lake, config.prepare, scan, None)
