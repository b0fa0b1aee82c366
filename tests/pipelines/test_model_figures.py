"""Figures of an evaluation beside the model card; the model's own files stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_lake import fake_lake

from pipelines.evaluate import evaluate
from pipelines.model_figures import write_figures
from pipelines.training_data import described
from ray_jobs.models import models
from sgcd_core.config import load_config
from sgcd_core.modelpack import ModelPack, load_modelpack, save_modelpack


@pytest.mark.parametrize("traveling", [2, 0])
def test_figures_are_written_beside_the_card(tmp_path: Path, traveling: int) -> None:
    lake, config = fake_lake(
        str(tmp_path / "lake"), lambda scan, truth: truth * 0.999, traveling=traveling
    )
    uri = lake.model("target-T", 1)
    pack = ModelPack(
        load_config(), {"a": torch.ones(2)}, {"b": torch.ones(1)}, meta={"name": "target-T"}
    )
    digests = save_modelpack(uri, pack)
    before = {file.name: file.read_bytes() for file in Path(uri).iterdir()}
    found = evaluate(lake, "target-T", 1, config, training_sites=["T", "A"])
    where = Path(write_figures(lake, found, "0.1.0"))
    text = where.read_text()
    assert where.name == "FIGURES.md" and where.parent == Path(uri)
    assert all((where.parent / name).read_bytes() == data for name, data in before.items())
    assert load_modelpack(uri).meta["name"] == "target-T" and digests
    assert models(lake) == {"target-T": [1]}
    for sentence in found.verdict:
        assert sentence in text
    assert f"{found.pairs} scans of test subjects" in text
    if traveling:
        line = next(line for line in found.summary.lines if line.metric == "psnr")
        assert f"{line.by_method['sgcd'].mean:.2f} [" in text
        assert "| A | T1w | yes | PSNR (dB) | 2 |" in text
    assert "Distance of a site's mean histogram" in text
    Path(write_figures(lake, found, "0.1.0"))
    assert where.read_text() == text


def test_scans_are_described_by_numbers_alone() -> None:
    row = {"dataset": "d", "subject": "01", "site": "A", "sequence": "T1w", "age": 34.7}
    rows = [
        {**row, "scan_id": "1"},
        {**row, "scan_id": "2", "sequence": "T2w", "age": None},
        {**row, "scan_id": "3", "subject": None, "site": "B", "age": 61.2},
        {**row, "scan_id": "4", "subject": None, "site": "B", "age": None},
    ]
    assert described(rows) == {
        "subjects": 3, "ages": [34, 61], "site_scans": {"A": {"T1w": 1, "T2w": 1}, "B": {"T1w": 2}},
    }  # fmt: skip
    assert described([{**row, "scan_id": "1", "age": None}])["ages"] is None
