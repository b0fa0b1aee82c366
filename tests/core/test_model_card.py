"""The model card says what is in the model, what it is for, and what it is not for."""

from __future__ import annotations

import re
from typing import Any

import torch

from sgcd_core.config import load_config
from sgcd_core.model_card import FIGURES, model_card, rows_table
from sgcd_core.modelpack import ModelPack

META: dict[str, Any] = {
    "name": "global", "kind": "global", "version": 3, "training_sites": ["A", "B|C"],
    "sequences": ["T1w"], "scans": 12, "subjects": 11, "ages": [20, 61],
    "site_scans": {"A": {"T1w": 7}, "B|C": {"T1w": 4, "T2w": 1}}, "data_digest": "d1gest",
    "init": "box", "box": {"steps": 900, "volumes": 1800}, "steps": 321,
    "losses": {"noise": 0.0123456, "record": 0.5}, "code_version": "0.1.0+abc", "colour": "green",
}  # fmt: skip


def card(*settings: str, preset: str = "tiny", **more: Any) -> str:
    pack = ModelPack(
        config=load_config(preset, settings=settings), network={"a": torch.ones(7, 3)}, state={},
        meta=META | more,
    )  # fmt: skip
    assert pack.weights_digest() in model_card(pack)
    assert pack.config.digest() in model_card(pack)
    return model_card(pack)


def test_every_section_is_there_and_data_are_described() -> None:
    text = card()
    heads = re.findall(r"^## (.*)$", text, re.M)
    assert heads == [
        "Intended use", "What it must not be used for", "Data", "Recipe", "Figures", "Limits",
        "Licence and citation", "Other metadata",
    ]  # fmt: skip
    assert text.startswith("# Model card: global, version 3\n")
    for found in ("A, B\\|C", "| 12 |", "| 11 |", "20, 61", "d1gest", "0.1.0+abc", "| 321 |"):
        assert found in text
    assert "| B\\|C | 4 | 1 |" in text and "| A | 7 | - |" in text
    assert "21 weights" in text
    assert "900 steps on 1800 digital scans" in text
    assert "0.01235" in text and "| colour | green |" in text


def test_what_was_fitted_in_the_box_is_named() -> None:
    both = card(box={"steps": 600, "volumes": 1200, "filter_volumes": 1500})
    assert "600 steps on 1200 digital scans, its look filter fitted to 1500 digital scans" in both
    assert "its U-Net at rest, its look filter fitted to 1600 digital scans" in card(
        box={"steps": 0, "volumes": 0, "filter_volumes": 1600}
    )
    assert "the network in the box; no person" in card(box=None)


def test_misuse_is_named() -> None:
    text = card()
    for word in (
        "Clinical diagnosis", "Quantitative measurement", "Children", "lesions", "confounded",
        "Not a medical device",
    ):  # fmt: skip
        assert word in text


def test_the_recipe_is_read_off_the_settings() -> None:
    text = card(
        "global_stage.learning_rate=0.00123", "prepare.mm=3", "guard.max_volume_drift=0.17",
        "global_sampler.t_start=777", "network.prediction=v",
    )  # fmt: skip
    for found in (
        "learning_rate 0.00123", "mm 3,", "more than 17%", "t_start 777", "prediction v",
        "(3 mm)",
    ):  # fmt: skip
        assert found in text, found
    assert "decay 0.2" in card(preset="paper") and "decay 0.95" in card()


def test_a_target_model_says_what_it_was_tuned_from() -> None:
    stage1 = {"init": "scratch", "steps": 50, "scans": 40, "losses": {"noise": 0.25}}
    text = card(
        name="target-A", kind="target", target="A", parent="global@2", stage1=stage1,
        encoder="statistics", losses={"style": 0.75},
    )  # fmt: skip
    assert "look of site A" in text and "global@2" in text and "statistics" in text
    assert "fresh weights" in text and "digital scans" not in text
    assert "Losses at the end of Stage 1" in text
    assert "| noise | 0.25 |" in text and "| style | 0.75 |" in text
    assert "| target_stage |" in text and "| target_stage |" not in card()


def test_figures_are_a_table_where_there_are_some() -> None:
    assert FIGURES in card() and "Measured" not in card()
    rows = [{"site": "A", "psnr": 24.5}, {"site": "B", "psnr": 21.0, "n": 2}]
    assert "| site | psnr | n |\n| --- | --- | --- |\n| A | 24.5 | - |" in card(figures=rows)
    assert "| psnr of A | 24.5 |" in card(figures={"psnr of A": 24.5})


def test_a_model_without_metadata_has_a_card() -> None:
    pack = ModelPack(load_config(), {"a": torch.ones(2)}, {})
    text = model_card(pack)
    assert "unnamed" in text and " None " not in text
    assert rows_table([{"a": None, "b": True}]) == "| a | b |\n| --- | --- |\n| - | yes |"
