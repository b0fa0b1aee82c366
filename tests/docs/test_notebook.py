"""The notebooks in examples/ run from top to bottom on the small lake, and are kept bare."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from toy_lake import Place

FOLDER = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_no_output_is_kept(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs(path: Path, toy_lake: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGCD_LAKE", str(toy_lake.lake))
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=120, kernel_name="python3").execute(cwd=str(FOLDER))
    outputs = [out for cell in book.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 2  # the sites; one scan
    assert any("siteB" in out.get("data", {}).get("text/html", "") for out in outputs)
