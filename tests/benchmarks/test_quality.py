"""The table of the quality benchmark: every method and group, values where they belong."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from pipelines.verdict import summarize

FILE = Path(__file__).parents[2] / "benchmarks" / "quality.py"


def quality() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_a_row_for_every_method_and_group_with_intervals() -> None:
    rows = [
        {"subject": f"s{n}", "site": "B" if seen else "C", "sequence": "T1w", "seen": seen,
         "method": method, "metric": metric, "value": base + 0.1 * n}
        for seen in (True, False)
        for n in range(4)
        for method, base in (("raw", 20.0), ("stage1", 24.0), ("sgcd", 25.0))
        for metric in ("psnr", "ssim")
    ]  # fmt: skip
    lines = quality().table(summarize(rows).groups).splitlines()
    assert len(lines) == 2 + 2 * 3
    assert [line.split("|")[2].strip() for line in lines[2:5]] == [
        "raw", "SGCD, Stage 1 alone", "**SGCD**",
    ]  # fmt: skip
    assert "T1w, unseen" in lines[-1] and "25.15 (" in lines[-1]


@pytest.mark.parametrize("gpus", [True, False])
def test_every_command_that_runs_a_network_is_told_of_gpus(
    gpus: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise RuntimeError("all commands are run")

    module, commands = quality(), []
    monkeypatch.setattr(module, "run", lambda *words: commands.append(words) or 1)
    monkeypatch.setattr(module.Lake, "open", stop)
    with pytest.raises(RuntimeError, match="all commands"):
        module.main([str(tmp_path), *(["--gpus"] if gpus else [])])
    networks = [words for words in commands if words[0] in ("train", "tune", "harmonize")]
    assert [words[0] for words in networks] == [
        "train", "tune", "harmonize", "harmonize", "train", "tune", "harmonize",
    ]  # fmt: skip
    assert {"--gpus" in words for words in networks} == {gpus}
    assert not any("--gpus" in words for words in commands if words not in networks)
