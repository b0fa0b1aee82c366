"""The most uniform site comes first."""

from __future__ import annotations

from argparse import Namespace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_lake import add_scan, brain, make_config

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.target_site import best_target, mean_pairwise, suggest_target
from ray_jobs import commands
from sgcd_core.errors import InputError


def test_sites_are_sorted_by_the_distance_between_their_own_scans(tmp_path):
    lake, config, rows = Lake(str(tmp_path)), make_config(), []
    spread = {"uniform": 0.0, "mixed": 0.5, "single": 0.0}
    for order, (site, strength) in enumerate(spread.items()):
        for number in range(1 if site == "single" else 3):
            image, mask = brain(10 * order + number, "T1w")
            image = np.where(mask, image ** (1 + strength * number), 0).astype(np.float32)
            who = {"subject": f"{site}{number}", "site": site, "sequence": "T1w"}
            rows.append(add_scan(lake, config, image, mask, **who, split="train"))
    odd, mask = brain(7, "T1w")
    who = {"subject": "t", "site": "uniform", "sequence": "T1w"}
    rows.append(add_scan(lake, config, odd**5, mask, **who, split="test"))
    Catalog(lake).append("scans", rows)
    found = suggest_target(Catalog(lake), lake, config.prepare.digest())
    assert [r["site"] for r in found] == ["uniform", "mixed", "single"]
    assert [r["n"] for r in found] == [3, 3, 1]
    assert found[0]["distance"] < 0.05 < found[1]["distance"]
    assert found[2]["distance"] is None


def test_the_mean_over_pairs_is_that_of_all_pairs_one_by_one():
    quantiles = np.sort(np.random.default_rng(0).random((6, 40)), axis=1)
    pairs = [np.abs(a - b).mean() for a, b in combinations(quantiles, 2)]
    assert mean_pairwise(quantiles) == pytest.approx(np.mean(pairs))
    assert mean_pairwise(quantiles[:1]) is None


def test_nothing_prepared_is_an_error(tmp_path):
    with pytest.raises(InputError) as caught:
        suggest_target(Catalog(Lake(str(tmp_path))), Lake(str(tmp_path)), "x")
    assert caught.value.code == "LAKE-EMPTY"


def row(site: str, sequence: str, distance: float | None, subjects: int = 2) -> dict[str, Any]:
    return {"site": site, "sequence": sequence, "distance": distance, "subjects": subjects}


def test_the_target_has_two_people_in_as_many_sequences_as_any_and_the_lowest_mean():
    both = [row("A", "T1w", 0.02), row("A", "T2w", 0.03), row("B", "T1w", 0.01)]
    assert best_target([*both, row("B", "T2w", 0.05)]) == ("A", ["T1w", "T2w"])
    assert best_target([*both, row("B", "T2w", 0.03)]) == ("B", ["T1w", "T2w"])
    assert best_target([*both, row("B", "T2w", None, 1)]) == ("A", ["T1w", "T2w"])
    assert best_target([*both, row("B", "T2w", 0.01, 1)]) == ("A", ["T1w", "T2w"])
    assert best_target([row("A", "T2w", 0.01, 1), row("B", "T1w", 0.2)]) == ("B", ["T1w"])
    assert best_target([row("A", "T1w", None, 1), row("B", "T2w", 0.1, 1)]) is None


def test_the_command_that_is_suggested_can_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, config = Lake.open(str(tmp_path), create=True), make_config()
    monkeypatch.setattr(commands, "from_args", lambda *_: config)
    args = Namespace(lake=str(tmp_path))

    def add(number: int, site: str, sequence: str) -> None:
        image, mask = brain(number, sequence)
        who = {"subject": f"{site}{number}", "site": site, "sequence": sequence}
        rows = [add_scan(lake, config, image, mask, **who, split="train")]
        Catalog(lake).append("scans", rows)

    add(0, "A", "T1w")
    add(1, "B", "T2w")
    with pytest.raises(InputError) as caught:
        commands.suggest(args)
    assert caught.value.code == "LAKE-EMPTY"
    add(2, "A", "T1w")
    found = commands.suggest(args)
    assert found.data["target"] == "A" and "in T1w, A has" in found.summary
    assert found.next.endswith("--target A --sequences T1w")
    add(3, "A", "T2w")
    assert commands.suggest(args).next.endswith("--target A")
