"""What an actor does when the device has too little memory: give back, try again, then the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines.turns import Turns
from ray_jobs import actors
from ray_jobs.actors import SharedModel


class Fake:
    """A model on a device with so many failures before it has memory."""

    def __init__(self, device: str, failures: int) -> None:
        self.device, self.left = device, failures
        self.calls = 0

    def harmonize(self, image: Any, mask: Any, **options: Any) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("too little memory")
        return f"{image} on {self.device}"


def shared(monkeypatch: pytest.MonkeyPatch, failures: int) -> tuple[SharedModel, dict[str, Fake]]:
    made: dict[str, Fake] = {}

    def load(self: SharedModel, device: str) -> Fake:
        made[device] = Fake(device, failures if device == "cuda" else 0)
        return made[device]

    monkeypatch.setattr(SharedModel, "_load", load)
    monkeypatch.setattr(actors, "MEMORY_WAITS", (0.0, 0.0))
    return SharedModel(None, "cuda", Turns()), made  # type: ignore[arg-type]


def test_a_shortage_that_passes_stays_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = shared(monkeypatch, failures=1)
    assert model.harmonize("scan", None) == "scan on cuda"
    assert list(made) == ["cuda"]


def test_a_shortage_that_stays_moves_one_scan_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = shared(monkeypatch, failures=2)
    assert model.harmonize("big", None) == "big on cpu"
    assert model.harmonize("small", None) == "small on cuda", "the next one tries the GPU again"
    assert (made["cuda"].calls, made["cpu"].calls) == (3, 1)


def test_other_faults_are_not_taken_for_a_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = shared(monkeypatch, failures=0)
    monkeypatch.setattr(made["cuda"], "harmonize", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.harmonize("scan", None)
    assert list(made) == ["cuda"]
