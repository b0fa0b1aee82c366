"""Who is in a cohort, where each is scanned, and from which anatomy: all fixed by the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipelines.cohort.anatomy import list_anatomies, names_of
from pipelines.cohort.scanner import Scanner, random_sites
from pipelines.cohort.subject import AGES
from sgcd_core.errors import ConfigError, UsageError

SEQUENCES = ("T1w", "T2w")


class CohortRequest(BaseModel):
    """The arguments of `make_cohort`: what two runs in one folder must agree on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    subjects: int = Field(20, ge=0)
    sites: int = Field(5, ge=1)
    traveling: int = Field(2, ge=0)
    unseen_sites: int = Field(1, ge=0)
    anatomies: tuple[str, ...] = ("template",)
    train_anatomies: tuple[str, ...] = ("template",)
    test_anatomies: tuple[str, ...] = ("template",)
    mm: float = Field(2.0, ge=0.5, le=8)
    seed: int = Field(0, ge=0)
    sequences: tuple[str, ...] = SEQUENCES
    head: bool = False
    shift: float = Field(0.0, ge=0)


class Member(BaseModel):
    """One person of a cohort before anything is rendered."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    label: str
    number: int
    age: float
    sex: str
    split: str
    sites: tuple[str, ...]
    anatomy: str


def choose_anatomies(
    folder: str | None,
    train: Sequence[str] | None,
    test: Sequence[str] | None,
    out: str | None = None,
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Addresses by name (`names_of`), and the names for training and for traveling subjects.

    With four or more anatomies and no choice, the last three tenths are kept for testing, so no
    traveling subject shares an anatomy with training. What lies below `out` is no anatomy.

    Raises:
        ConfigError: A name that is not there.
        InputError: No anatomy in the folder.
    """
    found = names_of(list_anatomies(folder, out), folder)
    names = sorted(found)
    held = max(1, round(0.3 * len(names))) if len(names) >= 4 else 0
    if test is not None and train is None:
        left = [n for n in names if n not in test]
        train = left or names
    if train is not None and test is None:
        left = [n for n in names if n not in train]
        test = left or names
    train = list(train) if train is not None else names[: len(names) - held]
    test = list(test) if test is not None else (names[-held:] if held else names)
    for name in (*train, *test):
        if name not in found:
            raise ConfigError(f"there is no anatomy {name!r}; found {', '.join(names)}.",
                              where=folder)  # fmt: skip
    if not train or not test:
        raise ConfigError("train_anatomies and test_anatomies must each name at least one.")
    return found, tuple(train), tuple(test)


def check_sequences(sequences: Sequence[str]) -> tuple[str, ...]:
    """The sequences, checked.

    Raises:
        UsageError: Empty, or one that scanners here do not take.
    """
    wrong = [s for s in sequences if s not in SEQUENCES]
    if wrong or not sequences:
        raise UsageError(f"sequences can be {', '.join(SEQUENCES)}; got {', '.join(wrong)}.")
    return tuple(sequences)


def plan_members(request: CohortRequest) -> tuple[list[Member], list[Scanner]]:
    """People and scanners. Training subjects visit one site each, in turn, so sites balance."""
    scanners = random_sites(request.seed, request.sites, request.unseen_sites)
    names = [s.site for s in scanners]
    members: list[Member] = []
    for number in range(request.subjects + request.traveling):
        rng = np.random.default_rng([request.seed, 21, number])
        travels = number >= request.subjects
        rank = number - request.subjects if travels else number
        pool = request.test_anatomies if travels else request.train_anatomies
        # anatomies turn once per round of the sites, so that no site owns an anatomy
        turn = rank if travels else rank + rank // request.sites
        label = f"travel{rank + 1:02d}" if travels else f"{rank + 1:03d}"
        members.append(
            Member(
                label=label, number=number, age=round(float(rng.uniform(*AGES)), 1),
                sex="F" if rng.uniform() < 0.5 else "M", split="test" if travels else "train",
                sites=tuple(names) if travels else (names[rank % request.sites],),
                anatomy=pool[turn % len(pool)],
            )
        )  # fmt: skip
    return members, scanners
