"""CPUs of a container are those of its quota, not those of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ray_jobs import cpus
from ray_jobs.session import threads_per_worker

MACHINE = 16
V1 = "7:cpuset:/\n4:cpu,cpuacct:{path}\n1:name=systemd:/x\n0::/\n"
V2 = "0::{path}\n"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of sixteen CPUs, without control groups as yet."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MACHINE)), raising=False)
    monkeypatch.setattr(cpus, "GROUPS", tmp_path)
    monkeypatch.setattr(cpus, "MINE", tmp_path / "mine")
    return tmp_path


def quota(folder: Path, text: str) -> None:
    """Of version 2, `cpu.max`; below a folder `cpu`, the two files of version 1."""
    folder.mkdir(parents=True, exist_ok=True)
    if "cpu" not in folder.parts:
        (folder / "cpu.max").write_text(f"{text}\n")
        return
    for name, value in zip(("quota", "period"), text.split(), strict=True):
        (folder / f"cpu.cfs_{name}_us").write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("told", "where", "text", "count"),
    [
        (V2, "", "max 100000", MACHINE),
        (V2, "", "800000 100000", 8),
        (V2, "", "50000 100000", 1),
        (V2, "", "250000 100000", 3),
        (V2, "", "6400000 100000", MACHINE),
        (V1, "cpu", "-1 100000", MACHINE),
        (V1, "cpu", "100000 50000", 2),
    ],
)
def test_a_quota_counts_as_cpus(groups: Path, told: str, where: str, text: str, count: int) -> None:
    (groups / "mine").write_text(told.format(path="/"))
    quota(groups / where, text)
    assert cpus.cpu_count() == count
    assert threads_per_worker(1) == count


@pytest.mark.parametrize(("told", "top"), [(V2, ""), (V1, "cpu")])
def test_the_least_of_the_groups_around_counts(groups: Path, told: str, top: str) -> None:
    (groups / "mine").write_text(told.format(path="/pods/mine"))
    quota(groups / top / "pods" / "mine", "600000 100000")
    quota(groups / top / "pods" / "other", "100000 100000")
    assert cpus.cpu_count() == 6
    quota(groups / top / "pods", "400000 100000")
    assert cpus.cpu_count() == 4


@pytest.mark.parametrize(("told", "top"), [(V2, ""), (V1, "cpu")])
def test_a_path_of_the_world_outside_the_container(groups: Path, told: str, top: str) -> None:
    (groups / "mine").write_text(told.format(path="/kubepods/pod1/abc"))
    quota(groups / top, "200000 100000")
    assert cpus.cpu_count() == 2


def test_no_linux_has_no_quota(groups: Path) -> None:
    assert cpus.cpu_count() == MACHINE
