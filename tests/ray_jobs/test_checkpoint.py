"""Checkpoints: what is saved comes back; half a write or a damaged one is never taken for whole."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from ray_jobs.checkpoint import Checkpoints, Writer
from ray_jobs.watch import SECONDS, WAIT, data_wait, last_means, packed_history, unpacked_history
from sgcd_core.errors import StorageError
from sgcd_core.io.store import Store


def state(value: float) -> dict[str, object]:
    return {"network": {"w": torch.full((3,), value)}, "done": int(value)}


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(str(tmp_path / "run"))
    for step in (5, 10, 15):
        checkpoints.save(step, state(step))
    return checkpoints


def damage(kept: Checkpoints, number: int) -> None:
    path = Path(kept.folder) / kept.kept()[number].name
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_save_and_load(kept: Checkpoints) -> None:
    step, found = kept.load()
    assert step == kept.step() == kept.repair() == 15
    assert found is not None and torch.equal(found["network"]["w"], torch.full((3,), 15.0))
    assert [item.step for item in kept.kept()] == [15, 10]
    assert len(list(Path(kept.folder).iterdir())) == 3  # two states and the pointer
    kept.clear()
    assert kept.step() == kept.repair() == 0 and kept.load() == (0, None)


def test_a_state_without_its_pointer_does_not_count(kept: Checkpoints) -> None:
    """A writer that dies between the two objects leaves the checkpoint before it in force."""
    Store().write_bytes(f"{kept.folder}/step-00000020-0.pt", b"half")
    assert kept.load()[0] == 15


def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(
    kept: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    damage(kept, 0)
    with pytest.raises(StorageError, match="CHECKPOINT-DIGEST"):
        kept.load()
    assert kept.repair() == 10
    assert "the checkpoint of step 15 is damaged; going on from step 10" in caplog.text
    assert kept.load()[0] == 10
    kept.save(15, state(15))  # done again, under the name that the damaged one had
    assert kept.repair() == kept.load()[0] == 15


@pytest.mark.parametrize("how", ["damaged", "gone", "pointer"])
def test_without_any_sound_checkpoint_training_begins_anew(kept: Checkpoints, how: str) -> None:
    for number, item in enumerate(kept.kept()):
        if how == "damaged":
            damage(kept, number)
        elif how == "gone":
            (Path(kept.folder) / item.name).unlink()
    if how == "pointer":
        (Path(kept.folder) / "latest.json").write_text('{"step": 3}')
    assert kept.repair() == 0 and kept.load() == (0, None)


def test_the_pointer_stays_when_the_store_gives_back_other_bytes(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Store.read_bytes
    with monkeypatch.context() as patch:
        patch.setattr(
            Store, "read_bytes",
            lambda self, uri, **more: read(self, uri, **more)[: None if "json" in uri else -1],
        )  # fmt: skip
        with pytest.raises(StorageError, match="STORE-WRITE"):
            kept.save(20, state(20))
    assert kept.repair() == 15


def test_the_writer_writes_the_state_as_it_was(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, save = threading.Event(), Checkpoints.save

    def late(self: Checkpoints, step: int, saved: dict[str, object]) -> None:
        assert gate.wait(20)
        save(self, step, saved)

    monkeypatch.setattr(Checkpoints, "save", late)
    writer, now = Writer(kept), state(20)
    writer.save(20, now)
    assert kept.step() == 15  # it did not wait
    now["network"]["w"].fill_(-1)  # type: ignore[index]
    gate.set()
    writer.wait()
    step, found = kept.load()
    assert step == 20 and found is not None
    assert torch.equal(found["network"]["w"], torch.full((3,), 20.0))


def test_an_error_of_the_writer_comes_up_and_harms_nothing(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_bytes", refuse)
        writer = Writer(kept)
        writer.save(20, state(20))
        with pytest.raises(StorageError, match="STORE-WRITE"):
            writer.save(25, state(25))
    assert kept.repair() == 15
    writer.save(30, state(30))  # and the next is written again
    writer.wait()
    assert kept.repair() == 30


def refuse(*_: object, **__: object) -> str:
    raise StorageError("the disk is full.", code="STORE-WRITE")


def test_the_history_survives_in_a_checkpoint_to_the_last_bit(kept: Checkpoints) -> None:
    history = [{"step": 0, "loss": 1 / 3}, {"step": 1, "loss": 0.1, "style": 0.7, WAIT: 0.25}]
    kept.save(20, {"losses": packed_history(history)})
    found = kept.load()[1]
    assert found is not None and unpacked_history(found["losses"]) == history


def test_the_wait_for_data_is_a_part_of_the_time_and_no_loss() -> None:
    history = [
        {"step": 0, "loss": 4.0},  # the first step after a start is not timed
        {"step": 1, "loss": 2.0, SECONDS: 1.0, WAIT: 0.5},
        {"step": 2, "loss": 1.0, SECONDS: 3.0, WAIT: 0.0},
    ]
    assert data_wait(history) == 0.125 and data_wait(history[:1]) is None
    assert last_means(history, 2) == {"loss": 1.5}
