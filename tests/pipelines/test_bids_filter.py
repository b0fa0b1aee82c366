"""Filter files of fMRIPrep's users choose the scans they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.bids_filter import passes, read_filters
from sgcd_core.errors import ConfigError

SCAN = "s3://b/sub-01/ses-1/anat/sub-01_ses-1_acq-mprage_run-01_T1w.nii.gz"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, True),
        ({"session": "1"}, True),
        ({"session": "ses-1"}, True),
        ({"session": ["2", "1"]}, True),
        ({"session": "2"}, False),
        ({"run": 1}, True),
        ({"run": 2}, False),
        ({"run": "²"}, False),
        ({"acquisition": None}, False),
        ({"reconstruction": None}, True),
        ({"reconstruction": "*"}, False),
        ({"acquisition": "*"}, True),
        ({"datatype": "anat", "suffix": "T1w", "acquisition": "mprage"}, True),
        ({"suffix": "T2w"}, False),
        ({"datatype": "func"}, False),
    ],
)
def test_a_scan_passes_when_it_has_what_is_asked(wanted: dict[str, Any], expected: bool) -> None:
    assert passes(SCAN, {"T1w": wanted}) is expected
    assert passes(SCAN.replace("T1w", "T2w"), {"T1w": wanted})  # no filter for this kind


def test_kinds_of_other_programs_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "filter.json"
    file.write_text(json.dumps({"t1w": {"session": "1"}, "bold": {"task": "rest", "space": 1}}))
    assert read_filters(str(file)) == {"T1w": {"session": "1"}}


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"t1w": 3}', '{"t1w": {"sesion": "1"}}', '{"t1w": {"datatype": [["anat"]]}}',
        '{"t1w": {"suffix": {"T1w": 1}}}',
    ],
)  # fmt: skip
def test_a_filter_that_says_nothing_sensible_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "filter.json"
    file.write_text(text)
    with pytest.raises(ConfigError):
        read_filters(str(file))
