"""Checkpoints: what is saved comes back, only the newest stays, half a write is never seen."""

from __future__ import annotations

from pathlib import Path

import torch

from ray_jobs.checkpoint import Checkpoints
from sgcd_core.io.store import Store


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_save_and_load(tmp_path: Path) -> None:
    kept = Checkpoints(str(tmp_path / "run"))
    assert kept.step() == 0 and kept.load() == (0, None)
    kept.save(5, {"network": {"w": torch.arange(3.0)}, "done": 5})
    kept.save(10, {"network": {"w": torch.ones(3)}, "done": 10})
    step, state = kept.load()
    assert step == kept.step() == 10
    assert state is not None and torch.equal(state["network"]["w"], torch.ones(3))
    assert files(tmp_path / "run") == ["latest.json", "step-00000010.pt"]
    kept.clear()
    assert kept.step() == 0


def test_a_state_without_its_pointer_does_not_count(tmp_path: Path) -> None:
    """A writer that dies between the two objects leaves the checkpoint before it in force."""
    kept = Checkpoints(str(tmp_path / "run"))
    kept.save(5, {"done": 5})
    Store().write_bytes(str(tmp_path / "run" / "step-00000010.pt"), b"half")
    step, state = kept.load()
    assert (step, state) == (5, {"done": 5})
